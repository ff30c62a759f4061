"""Many recipes on one model: what is common is done once, what is measured is measured alike, and one table tells all."""

from secateur.comparison.budget import Budget
from secateur.comparison.entries import Entry, entries
from secateur.comparison.run import Compared, compare
from secateur.comparison.table import render

__all__ = ["Budget", "Compared", "Entry", "compare", "entries", "render"]

"""Secateur takes a trained network and gives back a smaller, faster one that loads everywhere."""

from secateur.comparison import Compared, compare
from secateur.errors import RequestError, RunError, SecateurError
from secateur.evaluation import ResultCard, evaluate
from secateur.explain import Explanation, explain
from secateur.generation import Written, generate_lengths
from secateur.network.masks import read_masks
from secateur.network.zeros import to_semi_structured
from secateur.page import write_report
from secateur.recipe import Recipe
from secateur.registry import methods as list_methods
from secateur.run import Result, compress

__all__ = [
    "Compared",
    "Explanation",
    "Recipe",
    "RequestError",
    "Result",
    "ResultCard",
    "RunError",
    "SecateurError",
    "Written",
    "compare",
    "compress",
    "evaluate",
    "explain",
    "generate_lengths",
    "list_methods",
    "read_masks",
    "to_semi_structured",
    "write_report",
]

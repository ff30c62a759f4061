"""Largest weight norms: the simplest criterion that reads weights."""

from typing import Literal

import torch

from secateur.registry import Cut, Units, method


@method(
    "magnitude_units",
    kind="structure",
    paper="",
    claim="none: the baseline that reads weight norms alone",
    when="after training",
    speedup="universal",
)
def magnitude_units(units: Units, *, norm: Literal["first", "all"] = "first") -> Cut:
    """Keeps the units with the largest weight norms.

    Args:
        norm: first takes the unit's rows of the first matrix (gate, query); all takes the product of the norms of its rows
            in every matrix and of its output columns.
    """
    scores = [rows.norm(dim=1) for rows in units.makers]
    if norm == "first":
        return units.best(scores[0])
    scores.append(units.per_unit(units.output).movedim(1, 0).flatten(1).norm(dim=1))
    return units.best(torch.stack(scores).prod(dim=0))

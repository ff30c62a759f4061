"""Largest weight norms: the simplest criterion that reads weights."""

from typing import Literal

import torch

from secateur.network.anatomy import AXES
from secateur.registry import Cut, Units, method


@method(
    "magnitude_units",
    kind="structure",
    paper="",
    claim="none: the baseline that reads weight norms alone",
    when="after training",
    speedup="universal",
    criterion="magnitude",
    schedule="one-shot",
    axes=AXES,
)
def magnitude_units(units: Units, *, norm: Literal["first", "all"] = "first") -> Cut:
    """Keeps the units with the largest weight norms.

    Args:
        norm: first takes the unit's rows of the first matrix (gate, query), of an expert all its matrices as one; all takes
            the product of the norms of its rows in every matrix and of its output columns, of an expert its router row, of
            a pair of dimensions inside heads those of queries and of keys.
    """
    scores = [rows.norm(dim=1) for rows in units.makers]
    if norm == "first":
        return units.best(torch.stack(scores).norm(dim=0) if units.axis == "experts" else scores[0])
    scores.append(units.per_unit(units.output).movedim(1, 0).flatten(1).norm(dim=1))
    return units.best(torch.stack(scores).prod(dim=0))

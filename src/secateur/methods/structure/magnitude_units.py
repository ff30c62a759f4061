"""Largest weight norms: the simplest criterion that reads weights."""

from typing import Literal

import torch

from secateur.network.anatomy import AXES
from secateur.network.views import norm_products
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
    axes=(*AXES, "channels"),
)
def magnitude_units(units: Units, *, norm: Literal["first", "all"] = "first") -> Cut:
    """Keeps the units with the largest weight norms.

    Args:
        norm: first takes the unit's rows of the first matrix (gate, query, of a channel the embeddings), of an expert all
            its matrices as one; all takes the product of the norms of its rows in every matrix and of its output columns, of
            an expert its router row, of a pair of dimensions inside heads those of queries and of keys, of a channel all
            that lies behind the embeddings as one.
    """
    if norm == "all":
        return units.best(norm_products(units))
    scores = [rows.norm(dim=1) for rows in units.makers]
    return units.best(torch.stack(scores).norm(dim=0) if units.axis == "experts" else scores[0])

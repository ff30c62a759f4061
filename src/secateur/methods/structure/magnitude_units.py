"""Largest row norms: the simplest criterion that reads weights."""

from typing import Literal

import torch
from torch import Tensor

from secateur.network.widths import round_width
from secateur.registry import Cut, Ratio, Units, method


@method(
    "magnitude_units",
    kind="structure",
    paper="",
    claim="none: the baseline that reads weight norms alone",
    when="after training",
    speedup="universal",
)
def magnitude_units(
    units: Units, *, ratio: Ratio = 0.2, norm: Literal["first", "all"] = "first", multiple_of: int = 32
) -> Cut:
    """Keeps the feed-forward neurons with the largest weight norms.

    Args:
        ratio: fraction of the neurons removed, 0 ≤ ratio < 1.
        norm: first takes the row of the first matrix; all takes the product of the norms of the rows and the column.
        multiple_of: the kept width is rounded to a multiple of this where the ratio allows it.
    """
    score = units.first.norm(dim=1)
    if norm == "all":
        score = _norms(units)
    width = round_width(units.count, ratio, multiple_of)
    # a stable sort, so that equal norms are decided by index on every machine
    return Cut(score.argsort(descending=True, stable=True)[:width].sort().values)


def _norms(units: Units) -> Tensor:
    matrices = [matrix for matrix in (units.gate, units.up, units.down.T) if matrix is not None]
    return torch.stack([matrix.norm(dim=1) for matrix in matrices]).prod(dim=0)

"""A uniform grid of values that stored weights may take: scales and zero points, round to nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Grid:
    """The values scale · (code − zero) for codes 0 … levels, one grid for each row and each group of columns.

    0 is always among them, so that a removed weight needs no value of its own.

    Args:
        scale: (groups, r) distance of neighbouring values.
        zero: (groups, r) the code of 0, a whole number.
        levels: the highest code, 2^bits − 1.
        group: columns that share a grid.
    """

    scale: Tensor
    zero: Tensor
    levels: int
    group: int

    @classmethod
    def fit(cls, weight: Tensor, bits: int, group: int | None = None, symmetric: bool = False) -> "Grid":
        """From the smallest to the largest weight of each group, as in the published code of GPTQ (arXiv:2210.17323).

        Args:
            weight: (r, d) matrix.
            bits: 1 to 16.
            group: consecutive columns that share a scale, the last group may be shorter; None for whole rows.
            symmetric: the grid reaches equally far on both sides (but for the one code that 2^bits leaves over).

        Raises ValueError for other bits.
        """
        if not 1 <= bits <= 16:
            raise ValueError(f"a grid of {bits} bits was asked for; from 1 to 16 are possible")
        rows, columns = weight.shape
        group, levels = group or columns, 2**bits - 1
        # a padding of 0 changes no range, because every range holds 0
        groups = pad(weight, (0, -columns % group)).view(rows, -1, group)
        low, high = groups.amin(2).clamp_max(0).T, groups.amax(2).clamp_min(0).T
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        span = high - low
        scale = torch.where(span == 0, 1, span / levels).contiguous()
        middle = torch.full_like(scale, (levels + 1) // 2)
        return cls(scale, middle if symmetric else (-low / scale).round(), levels, group)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """(r,) the values of the grids of `column` that are nearest to `values`, (r,)."""
        scale, zero = self.scale[column // self.group], self.zero[column // self.group]
        return ((values / scale).round_().add_(zero).clamp_(0, self.levels).sub_(zero)).mul_(scale)

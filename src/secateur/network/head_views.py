"""What methods see of the dimensions inside heads: pairs of queries and keys, and values, as units like any others."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateur.network.anatomy import Group, HeadDims, Slice
from secateur.network.source import Source
from secateur.network.views import Units


class PairUnits(Units):
    """Pairs of dimensions of queries and keys in one block, each with its two dimensions of every head.

    The matrix that reads queries is made of keys: a score is keys · query. So `output` has a column for each dimension of a
    query, the numbers of the key that it meets: (n, heads · head_dim). Of calibration tokens it holds one row, the root of
    the mean square of keys, which has their columns' norms; without tokens the weights that make keys stand for them.

    Args:
        keys: (heads of keys, head_dim) mean squares of keys on calibration tokens; None where none were read.
    """

    def __init__(
        self,
        source: Source,
        block: int,
        dims: HeadDims,
        pairs: tuple[tuple[int, int], ...],
        keep: int | None = None,
        device: str = "cpu",
        keys: Tensor | None = None,
    ) -> None:
        super().__init__(source, block, dims.group, keep, device)
        self._dims, self._pairs, self._keys = dims, torch.tensor(pairs), keys
        self.name = f"{self.name}, pairs"

    @property
    def head_dim(self) -> int:
        return self._dims.head_dim

    @property
    def makers(self) -> list[Tensor]:
        """(count, n) for queries alone: what makes keys is the matrix that reads them."""
        rows = self._rows_of(self._dims.queries[0], self._dims.heads)  # (heads, head_dim, inputs)
        return [rows[:, self._pairs].movedim(1, 0).flatten(1)]

    @property
    def coupled(self) -> Iterator[Tensor]:
        raise NotImplementedError("pairs of dimensions are not made anew")

    @property
    def output(self) -> Tensor:
        """(n, heads · head_dim)"""
        dims = self._dims
        together = dims.heads // dims.kv_heads
        if self._keys is not None:
            return self._keys.sqrt().repeat_interleave(together, dim=0).flatten()[None]
        return self._rows_of(dims.keys[0], dims.kv_heads).repeat_interleave(together, dim=0).flatten(0, 1).T

    @property
    def output_bias(self) -> Tensor | None:
        return None

    def per_unit(self, columns: Tensor) -> Tensor:
        """(..., heads · head_dim) as (..., count, 2 · heads)."""
        heads = columns.unflatten(-1, (self._dims.heads, self._dims.head_dim))[..., self._pairs]
        return heads.movedim(-3, -2).flatten(-2)

    def columns(self, units: Tensor) -> Tensor:
        """The columns of these pairs, in all heads."""
        starts = torch.arange(self._dims.heads)[:, None, None] * self._dims.head_dim
        return (starts + self._pairs[units]).flatten().sort().values

    def _rows_of(self, part: Slice, heads: int) -> Tensor:
        """(heads, head_dim, inputs) of a matrix."""
        matrix = self._whole(part.parameter)
        matrix = matrix.T if part.dim == 1 else matrix
        return matrix[part.offset :][: heads * self._dims.head_dim].unflatten(0, (heads, -1))


class ValueUnits(Units):
    """Single dimensions of values in one block, those of each head of keys and values a run of their own.

    The output matrix has a column for each in every query head that shares it; columns stay in its order.
    """

    def __init__(
        self, source: Source, block: int, dims: HeadDims, keep: int | None = None, device: str = "cpu"
    ) -> None:
        heads = dims.kv_heads
        group = Group(
            "head_dims",
            heads * dims.head_dim,
            tuple(Slice(part.parameter, part.dim, part.offset) for part in dims.values),
            Slice(dims.output.parameter, dims.output.dim, 0, dims.heads // heads),
            dims.output_bias,
            heads,
        )
        super().__init__(source, block, group, keep, device)
        self._dims = dims
        self.name = f"{self.name}, values"

    @property
    def head_dim(self) -> int:
        return 1

    def per_unit(self, columns: Tensor) -> Tensor:
        """(..., heads · head_dim) as (..., count, width): a column for each query head that shares the value."""
        heads = columns.unflatten(-1, (self._dims.kv_heads, self.width, self._dims.head_dim))
        return heads.movedim(-1, -2).flatten(-3, -2)

    def columns(self, units: Tensor) -> Tensor:
        """(k,) units as the (k · width,) columns of the output matrix that are theirs."""
        return self.per_unit(torch.arange(self.count * self.width))[units].flatten()

    def by_head(self, kept: Tensor) -> Tensor:
        """(k,) units as (kv_heads, k / kv_heads) sorted dimensions of each head."""
        return kept.sort().values.view(self._dims.kv_heads, -1) % self._dims.head_dim


def common_pairs(scores: Mapping[int, Tensor], keep: int, turned: int) -> Tensor:
    """(keep,) sorted pairs that stay in all blocks: those with the largest share of the scores of a block, summed over them.

    OURS: what a block's scores measure differs in size between blocks, so each is divided by the mean size of its own.

    Args:
        scores: (pairs,) by block.
        turned: how many pairs, from the first, are turned by positions; of these one must stay.
    """
    total = sum(each.double().cpu() / each.double().abs().mean().clamp(min=1e-300).cpu() for each in scores.values())
    assert isinstance(total, Tensor), "there is a block with attention"
    order = total.argsort(descending=True, stable=True).tolist()
    if turned and not any(pair < turned for pair in order[:keep]):
        first = next(pair for pair in order if pair < turned)
        order = [first, *(pair for pair in order if pair != first)]
    return torch.tensor(sorted(order[:keep]))

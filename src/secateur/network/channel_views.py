"""What methods see of the channels of the residual stream: units of the whole network, as those of a block."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from secateur.network.channels import Channels
from secateur.network.source import Source
from secateur.network.views import Units


class ChannelUnits(Units):
    """The channels of the stream, which all blocks share. Every matrix has a row or a column of each; they are never laid
    side by side, so only their norms are seen: of the embeddings, which come first, as what makes a channel, and of all that
    lies behind as what reads it.

    Args:
        where: where the channels lie.
        keep: how many are to stay.
    """

    def __init__(self, source: Source, where: Channels, keep: int, device: str = "cpu") -> None:
        self.axis = "channels"  # type: ignore[assignment]  # which no block has
        self.block, self.count, self.width, self.sets = 0, where.count, 1, 1
        self.hidden, self.expert, self.scores, self.name = where.count, None, None, "channels"
        self._source, self._where, self._keep, self._device = source, where, keep, device

    @property
    def size(self) -> int:
        """How many parameters go with one channel, tied ones counted once."""
        return sum(
            self._source.skeleton.get_parameter(name).numel() // self.count * len(dims) for name, dims in self._parts
        )

    @property
    def makers(self) -> list[Tensor]:
        """(count, 1) norms of what the embeddings hold for each channel."""
        return [self._norms[0][:, None]]

    @property
    def coupled(self) -> Iterator[Tensor]:
        raise NotImplementedError("channels are not made anew")

    @property
    def output(self) -> Tensor:
        """(1, count) norms of what everything behind the embeddings holds for each channel."""
        return self._norms[1][None]

    @property
    def output_bias(self) -> Tensor | None:
        return None

    @property
    def _parts(self) -> list[tuple[str, tuple[int, ...]]]:
        again = {name for group in self._source.anatomy.tied for name in group[1:]}
        return [(name, dims) for name, dims in self._where.dims.items() if name not in again]

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        """(count,) of the embeddings and of the rest; one parameter in memory at a time."""
        sums = torch.zeros(2, self.count, dtype=torch.float64)
        for name, dims in self._parts:
            whole = self._whole(name)
            for dim in dims:
                squares = whole.movedim(dim, 0).reshape(self.count, -1).square().sum(1, dtype=torch.float64)
                sums[int(name not in self._source.anatomy.embeddings)] += squares.cpu()
        embedded, rest = sums.sqrt().float()
        return embedded, rest

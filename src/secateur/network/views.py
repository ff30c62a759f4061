"""What methods see of a network, and what they say should become of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from secateur.network.anatomy import FeedForward, Slice
from secateur.network.source import Source


@dataclass(frozen=True)
class Cut:
    """What becomes of one block's feed-forward neurons.

    Args:
        kept: (k,) sorted indices of the neurons that stay.
        down: (hidden, k) new output matrix of the kept neurons, or None to keep their columns as they are.
        down_bias: (hidden,) new output bias, or None to keep the old one.
    """

    kept: Tensor
    down: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of the whole network: a cut for each block that is cut, by block index."""

    cuts: dict[int, Cut] = field(default_factory=dict)


class Units:
    """The feed-forward neurons of one block. Matrices are read when asked for and not kept.

    Matrices come as float32, oriented as in torch.nn.Linear whatever the module stores: (out_features, in_features).
    """

    def __init__(self, source: Source, block: int, feed_forward: FeedForward, device: str = "cpu") -> None:
        self.block = block
        self.count = feed_forward.units
        self.hidden = feed_forward.hidden
        self.gated = feed_forward.gate is not None
        self._source = source
        self._device = device
        self._parts = feed_forward

    def __repr__(self) -> str:
        return f"Units(block={self.block}, count={self.count}, hidden={self.hidden}, gated={self.gated})"

    @property
    def first(self) -> Tensor:
        """(m, h) the matrix behind the nonlinearity: gate of a gated feed-forward, else its only input matrix."""
        return self._rows(self._parts.first)

    @property
    def gate(self) -> Tensor | None:
        """(m, h), None for a plain feed-forward."""
        return self._rows(self._parts.gate) if self._parts.gate else None

    @property
    def up(self) -> Tensor:
        """(m, h)"""
        return self._rows(self._parts.up)

    @property
    def down(self) -> Tensor:
        """(h, m)"""
        part = self._parts.down
        matrix = self._whole(part.parameter)
        return matrix if part.dim == 1 else matrix.T

    @property
    def gate_bias(self) -> Tensor | None:
        """(m,)"""
        return self._rows(self._parts.gate_bias) if self._parts.gate_bias else None

    @property
    def up_bias(self) -> Tensor | None:
        """(m,)"""
        return self._rows(self._parts.up_bias) if self._parts.up_bias else None

    @property
    def down_bias(self) -> Tensor | None:
        """(h,)"""
        return self._whole(self._parts.down_bias) if self._parts.down_bias else None

    def _whole(self, parameter: str) -> Tensor:
        return self._source.parameter(parameter).to(self._device).float()

    def _rows(self, part: Slice) -> Tensor:
        tensor = self._source.parameter(part.parameter).narrow(part.dim, part.offset, self.count)
        tensor = tensor.to(self._device).float()
        return tensor.T if tensor.dim() == 2 and part.dim == 1 else tensor


class Network(Sequence[Units]):
    """The feed-forward layers of a network in order, each read lazily; `blocks` narrows it to some of them."""

    def __init__(self, source: Source, device: str = "cpu", blocks: Sequence[int] | None = None) -> None:
        self._units = [
            Units(source, block.index, block.feed_forward, device)
            for block in source.anatomy.blocks
            if block.feed_forward and (blocks is None or block.index in blocks)
        ]
        self.hidden = source.anatomy.hidden

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        return self._units[index]

    def __iter__(self) -> Iterator[Units]:
        return iter(self._units)


@dataclass(frozen=True)
class Mask:
    """Which weights of a matrix stay; the others become zero.

    Args:
        kept: (r, d) bool.
    """

    kept: Tensor


@dataclass(frozen=True)
class Update:
    """New weights of a matrix.

    Args:
        matrix: (r, d) float32, exactly zero where not kept.
        kept: (r, d) bool.
    """

    matrix: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Allocation:
    """How much each matrix is to lose.

    Args:
        remove: number of weights (of tiles, where the pattern removes tiles) by matrix; they sum to what was asked for.
    """

    remove: Mapping[str, int] = field(default_factory=dict)


class Weight:
    """One matrix that multiplies tokens. It is read when asked for, as float32, oriented as in torch.nn.Linear.

    Args:
        name: of the parameter, with the expert's number in brackets where one parameter holds many experts.
        block: index of its block.
        expert: number of its expert, None outside experts.
        shape: (r, d) = (outputs, inputs).
        read: gives the matrix.
    """

    def __init__(
        self, name: str, block: int, expert: int | None, shape: tuple[int, int], read: Callable[[], Tensor]
    ) -> None:
        self.name, self.block, self.expert = name, block, expert
        self.rows, self.columns = shape
        self._read = read

    def __repr__(self) -> str:
        return f"Weight({self.name}, {self.rows} x {self.columns})"

    @cached_property
    def matrix(self) -> Tensor:
        """(r, d) float32; not to be changed in place."""
        return self._read()


class Matrices(Sequence[Weight]):
    """The matrices that a step prunes, in order, each read anew whenever it is taken from here, so that none is kept.

    Args:
        makers: give the matrices.
        remove: how many weights go in all (tiles, where the pattern removes tiles).
        sizes: how many each matrix holds of what is counted.
    """

    def __init__(self, makers: Sequence[Callable[[], Weight]], remove: int, sizes: Sequence[int]) -> None:
        self._makers = makers
        self.remove = remove
        self.sizes = list(sizes)

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        return self._makers[index]()

    def __iter__(self) -> Iterator[Weight]:
        return (make() for make in self._makers)

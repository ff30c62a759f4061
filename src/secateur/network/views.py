"""What methods see of a network, and what they say should become of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from secateur.errors import RequestError
from secateur.network.anatomy import AXES, NEURON_AXES, Axis, CutAxis, FeedForward, Group, Slice
from secateur.network.bases import Bases
from secateur.network.channels import find_channels, nearest_channels, sayable_channels, turned_channels
from secateur.network.shapes import Shapes
from secateur.network.source import Source
from secateur.network.store import resized_config


@dataclass(frozen=True)
class Cut:
    """What becomes of the units of one kind in one block.

    Args:
        kept: (k,) sorted indices of the units that stay.
        output: (hidden, k · width) new output matrix of the kept units, or None to keep their columns as they are.
        output_bias: (hidden,) new output bias, or None to keep the old one.
        makers: what makes the kept units, new: for each of `Units.coupled` the same with k units in place of all; None to
            keep it as it is.
        values: of the axis head_dims, where `kept` are pairs of dimensions of queries and keys: (kv_heads, 2 k) sorted
            dimensions of values that stay in each head that has some.

    Of the neurons inside experts every tensor here has a first dimension more, with an entry for each expert; `of` and
    `stacked` go from one form to the other.
    """

    kept: Tensor
    output: Tensor | None = None
    output_bias: Tensor | None = None
    makers: tuple[Tensor, ...] | None = None
    values: Tensor | None = None

    @property
    def count(self) -> int:
        """How many units stay; of the neurons inside experts, in each of them."""
        return self.kept.shape[-1]

    def of(self, expert: int) -> "Cut":
        """What becomes of the neurons of one expert."""
        makers = None if self.makers is None else tuple(made[expert] for made in self.makers)
        return Cut(self.kept[expert], None if self.output is None else self.output[expert], None, makers)

    @classmethod
    def stacked(cls, experts: "Sequence[Cut]") -> "Cut":
        """What becomes of the neurons of all experts, of which each gives the same parts anew."""

        def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
            given = [tensor for tensor in tensors if tensor is not None]
            assert len(given) in (0, len(tensors)), "all of them, or none"
            return torch.stack(given) if given else None

        makers = [
            made
            for each in zip(*(cut.makers or () for cut in experts), strict=True)
            if (made := together(each)) is not None
        ]
        kept = torch.stack([cut.kept for cut in experts])
        return cls(kept, together([cut.output for cut in experts]), None, tuple(makers) or None)


@dataclass(frozen=True)
class Plan:
    """What becomes of the units of a network: a cut by block index and kind of unit, for what is cut.

    channels: (k,) sorted indices of the channels of the residual stream that stay, in all blocks and outside; None for all.
    basis: (h, d) instead of these, orthonormal directions of the residual stream, to which the network is rotated.
    bases: instead of one, those that were kept for each place of it.
    """

    cuts: dict[tuple[int, Axis], Cut] = field(default_factory=dict)
    channels: Tensor | None = None
    basis: Tensor | None = None
    bases: Bases | None = None


class Units:
    """The units of one kind in one block: neurons of the feed-forward layer or of one expert, or heads of attention (those
    that share keys and values are one unit). Tensors are read when asked for and not kept; float32, matrices oriented as in
    torch.nn.Linear whatever the module stores: (out_features, in_features).

    Args:
        group: where the units lie.
        keep: how many are to stay; None where the method decides.
        expert: whose neurons they are; then `group` says where they lie in this expert's entries.

    count: how many there are. width: columns of the output matrix, and inputs of it, that each of them has. sets: they lie
    in so many equal runs, of which each keeps as many. scores: (count,) those by which a method has chosen the best, None
    before.
    """

    def __init__(
        self,
        source: Source,
        block: int,
        group: Group,
        keep: int | None = None,
        device: str = "cpu",
        expert: int | None = None,
    ) -> None:
        self.block, self.axis, self.count, self.width = block, group.axis, group.count, group.output.width
        self.expert = expert
        self.sets = group.sets
        self.hidden = source.anatomy.hidden
        self._keep = keep
        self._source, self._device, self._group = source, device, group
        self.scores: Tensor | None = None
        self.name = f"block {block}, {group.axis}" + ("" if expert is None else f" {expert}")

    def __repr__(self) -> str:
        return f"Units(block={self.block}, axis={self.axis}, count={self.count}, width={self.width})"

    @property
    def address(self) -> tuple[int | str, ...]:
        """Of a random stream that no other units share."""
        return (self.axis, self.block) if self.expert is None else (self.axis, self.block, self.expert)

    @property
    def head_dim(self) -> int:
        """Columns of one head; of a neuron 1."""
        attention = self._source.anatomy.blocks[self.block].attention
        return attention.head_dim if self.axis not in NEURON_AXES and attention else 1

    @property
    def keep(self) -> int:
        assert self._keep is not None, "who asks has been told how many"
        return self._keep

    @property
    def size(self) -> int:
        """How many parameters go with one unit, in all tensors that are coupled to it."""
        shapes = ((self._shape(part.parameter), part) for part in self._group.slices)
        return sum(prod(shape) // shape[part.dim] * part.width for shape, part in shapes)

    @property
    def makers(self) -> list[Tensor]:
        """(count, n) for each matrix that makes the units: the rows of each unit, flattened; biases are left out."""
        vectors = 1 if self.axis != "experts" else 2  # dimensions that a bias has
        return [self._rows(part) for part in self._group.inputs if len(self._shape(part.parameter)) > vectors]

    @property
    def coupled(self) -> Iterator[Tensor]:
        """Everything that makes the units, one tensor at a time in the order of `Cut.makers`: (count, rows, inputs) of a
        matrix, (count, rows) of a bias or another vector with numbers for each unit.
        """
        for part in self._group.inputs:
            vector = len(self._shape(part.parameter)) == 1
            yield self._rows(part).view(self.count, part.width, *(() if vector else (-1,)))

    @property
    def output(self) -> Tensor:
        """(hidden, count · width)"""
        part = self._group.output
        matrix = self._whole(part.parameter)
        return matrix if part.dim == 1 else matrix.T

    @property
    def output_bias(self) -> Tensor | None:
        """(hidden,)"""
        return self._whole(self._group.output_bias) if self._group.output_bias else None

    def per_unit(self, columns: Tensor) -> Tensor:
        """(..., count · width) of something that stands for each column of the output matrix, as (..., count, width)."""
        return columns.unflatten(-1, (self.count, self.width))

    def columns(self, units: Tensor) -> Tensor:
        """(k,) units as the (k · width,) columns of the output matrix that are theirs."""
        return Slice("", 1, 0, self.width).indices(units)

    @property
    def residual_inputs(self) -> tuple[int, ...]:
        """Which inputs of attention take over residuals of other heads, by place in the group: all, but queries alone where
        heads share keys and values. Raises RequestError where queries cannot be told from the rest.
        """
        attention, inputs = self._source.anatomy.blocks[self.block].attention, self._group.inputs
        assert attention is not None, "asked of heads"
        if attention.kv_heads == attention.heads:
            return tuple(range(len(inputs)))
        weights = [place for place, part in enumerate(inputs) if len(self._shape(part.parameter)) == 2]
        if len(weights) != 3:
            raise RequestError(
                f"{self.name}: queries, keys and values lie interleaved in one matrix, so residuals of queries alone "
                "cannot be taken over; leave that out."
            )
        return tuple(range(weights[1]))  # queries come first, their bias behind them

    def _shape(self, parameter: str) -> tuple[int, ...]:
        shape = tuple(self._source.skeleton.get_parameter(parameter).shape)
        return shape if self.expert is None else shape[1:]

    def best(self, scores: Tensor) -> Cut:
        """Keeps the units with the highest of (count,) scores, among equals the first; as many of each set."""
        self.scores = scores
        size = self.count // self.sets
        best = scores.view(self.sets, size).argsort(descending=True, stable=True)[:, : self.keep // self.sets]
        return Cut((best + size * torch.arange(self.sets, device=best.device)[:, None]).flatten().sort().values)

    def _whole(self, parameter: str) -> Tensor:
        return self._stored(parameter).to(self._device).float()

    def _stored(self, parameter: str) -> Tensor:
        if self.expert is None:
            return self._source.parameter(parameter)
        return self._source.entry(parameter, self.expert)

    def _rows(self, part: Slice) -> Tensor:
        size = self.count * part.width
        tensor = self._stored(part.parameter).narrow(part.dim, part.offset, size)
        tensor = tensor.to(self._device).float()
        return (tensor.T if part.dim == 1 else tensor).reshape(self.count, -1)


class Neurons(Units):
    """Units that are feed-forward neurons, with what each matrix is."""

    def __init__(
        self, source: Source, block: int, layer: FeedForward, keep: int | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(source, block, layer.group, keep, device)
        self._layer = layer

    @property
    def first(self) -> Tensor:
        """(m, h) the matrix behind the nonlinearity: gate of a gated feed-forward, else its only input matrix."""
        return self._rows(self._layer.first)

    @property
    def gate(self) -> Tensor | None:
        """(m, h), None for a plain feed-forward."""
        return self._rows(self._layer.gate) if self._layer.gate else None

    @property
    def up(self) -> Tensor:
        """(m, h)"""
        return self._rows(self._layer.up)


def units_of(
    source: Source, block: int, axis: Axis, keep: int | None = None, device: str = "cpu", expert: int | None = None
) -> Units:
    """The units of that kind in a block that has some; of neurons inside experts those of one."""
    found = source.anatomy.blocks[block]
    if axis == "neurons" and found.feed_forward:
        return Neurons(source, block, found.feed_forward, keep, device)
    group = found.group(axis)
    assert group is not None, "asked for where it is"
    assert bool(group.stacked) == (expert is not None), "experts are asked about one by one"
    return Units(source, block, group if expert is None else group.one, keep, device, expert)


def norm_products(units: Units) -> Tensor:
    """(count,) product of the norms of a unit's rows in every matrix that makes it, and of its output columns."""
    norms = [rows.norm(dim=1) for rows in units.makers]
    norms.append(units.per_unit(units.output).movedim(1, 0).flatten(1).norm(dim=1))
    return torch.stack(norms).prod(dim=0)


UnitsT = TypeVar("UnitsT", bound=Units)


class Network(Sequence[UnitsT]):
    """The units of a network in the order in which tokens meet them, each read lazily: Network[Neurons] has its feed-forward
    layers, Network[Units] those of the kinds in `axes`. `blocks` narrows it to some of them.
    """

    def __init__(
        self,
        source: Source,
        device: str = "cpu",
        blocks: Sequence[int] | None = None,
        axes: Sequence[Axis] = ("neurons",),
    ) -> None:
        self._units = [
            cast(UnitsT, units_of(source, block.index, axis, None, device))
            for block in source.anatomy.blocks
            for axis in AXES
            if axis in axes and block.group(axis) and (blocks is None or block.index in blocks)
        ]
        self.hidden = source.anatomy.hidden
        self.parameters = source.anatomy.parameters
        self._source = source

    def of(self, axis: Axis) -> list[UnitsT]:
        """The units of one kind."""
        return [units for units in self._units if units.axis == axis]

    def counter(self, channels: bool = False) -> Shapes:
        """Counts the parameters of the network with other widths. Raises RequestError where `channels` cannot be cut."""
        return Shapes(self._source, find_channels(self._source) if channels else None)

    def channels(
        self, ratio: float, multiple_of: int, keep: Mapping[CutAxis, int] | None = None, turned: bool = False
    ) -> int:
        """How many channels stay where a fraction of them goes: see `nearest_channels`.

        Args:
            keep: how many units of other kinds every block is left with.
            turned: whether the stream is to be turned from place to place.

        Raises RequestError where channels cannot be cut.
        """
        channels = turned_channels(self._source) if turned else find_channels(self._source)
        return nearest_channels(self._source, channels, self._resized(keep or {}), ratio, multiple_of)

    def can_be(self, keep: Mapping[CutAxis, int]) -> bool:
        """Whether the configuration can say so many units of every block, channels among them."""
        try:
            raw = self._resized(keep)
        except RequestError:
            return False
        count = keep.get("channels")
        return count is None or sayable_channels(self._source, find_channels(self._source), raw, count)

    def _resized(self, keep: Mapping[CutAxis, int]) -> dict[str, Any]:
        blocks = self._source.anatomy.blocks
        sizes = {axis: {b.index: keep[axis] for b in blocks if b.group(axis)} for axis in AXES if axis in keep}
        return resized_config(self._source, sizes)

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        return self._units[index]

    def __iter__(self) -> Iterator[UnitsT]:
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
    """How much each matrix, or each block's units of one kind, is to lose.

    Args:
        remove: number of weights (of tiles, where the pattern removes tiles) by matrix; they sum to what was asked for.
            Of units how many go, by the name of the units.
        short: the sentence that says why less goes than was asked for, where the method was told to; of weights alone.
    """

    remove: Mapping[str, int] = field(default_factory=dict)
    short: str = ""


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

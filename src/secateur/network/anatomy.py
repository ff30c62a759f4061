"""The anatomy of a language model: blocks, attention, feed-forward, experts, norms, embeddings, tied weights.

How it is found is in `examine`; here is what was found. No weight is read, so a skeleton on meta and a loaded model have
the same anatomy.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.network.head_probe import Layout, pairs_of


@dataclass(frozen=True)
class Slice:
    """Where units lie in one parameter: along `dim`, `width` numbers for each, the first at index `offset` (fused tensors
    hold several parts).
    """

    parameter: str
    dim: int
    offset: int = 0
    width: int = 1

    def indices(self, units: Tensor) -> Tensor:
        """Where these units lie: (k,) gives (k · width,)."""
        return (self.offset + units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


Axis = Literal["heads", "queries", "head_dims", "neurons", "expert_neurons", "experts"]
AXES: tuple[Axis, ...] = ("heads", "queries", "head_dims", "neurons", "expert_neurons", "experts")
COLUMN_AXES: tuple[Axis, ...] = ("heads", "queries", "neurons")
"""Units that are inputs of a matrix; experts are whole layers, known by what the router says of them."""
NEURON_AXES: tuple[Axis, ...] = ("neurons", "expert_neurons")
"""Units that are one input of a matrix each. Who asks for neurons gets those inside experts too (`units.asked_axes`)."""
CutAxis = Literal["heads", "queries", "head_dims", "neurons", "expert_neurons", "experts", "channels"]
"""What may be cut: units of a block, or channels of the residual stream, which all blocks share."""


@dataclass(frozen=True)
class Group:
    """The units of one kind in one block, with everything that must be cut together.

    Of head_dims the slices only say how many numbers go with a unit: `HeadDims` says where they lie.

    axis: "neurons" of the feed-forward layer; "heads" of attention, where those that share keys and values are one unit;
    "queries": single query heads, where several share keys and values; "head_dims": two dimensions of every head;
    "expert_neurons": a neuron of every expert of a mixture; "experts" of a mixture. inputs: what makes the
    units, weights and biases. output: the matrix that reads them, along its inputs; its bias, output_bias, is not per unit
    and stays whole. Of experts, inputs hold all their weights and output is the router's matrix, along its outputs. sets:
    the units lie in so many equal runs, of which each must keep as many. buffers: learned vectors with a number for each
    unit that are no parameters. stacked: every tensor has so many entries along its first dimension, one for each expert,
    of which each keeps as many units, but its own; 0 where there are no such entries.
    """

    axis: Axis
    count: int
    inputs: tuple[Slice, ...]
    output: Slice
    output_bias: str | None
    sets: int = 1
    buffers: tuple[str, ...] = ()
    stacked: int = 0

    @property
    def slices(self) -> tuple[Slice, ...]:
        return (*self.inputs, self.output)

    @property
    def one(self) -> "Group":
        """The units of a single expert, as they lie in its entry of the stacked tensors."""
        inputs = tuple(replace(part, dim=part.dim - 1) for part in self.inputs)
        return replace(self, inputs=inputs, output=replace(self.output, dim=self.output.dim - 1), stacked=0)


@dataclass(frozen=True)
class FeedForward:
    """A confirmed feed-forward layer of `units` neurons between a residual stream of `hidden` channels.

    gate: the matrix behind the nonlinearity of a gated layer, None for a plain one. up: the other, or only, input
    matrix. down: the output matrix. down_bias is not per unit and stays whole. activation: path of the module f with
    layer = down(f(gate) * up), or down(f(up)); "" where no module makes that exactly true. norm_module: path of the
    norm whose output is the layer's input, None if undetermined; norm, norm_bias: names of its scale and bias, None
    where it has none. others: further vectors with one number for each unit.
    """

    module: str
    units: int
    hidden: int
    gate: Slice | None
    up: Slice
    down: Slice
    gate_bias: Slice | None
    up_bias: Slice | None
    down_bias: str | None
    activation: str
    norm: str | None
    norm_bias: str | None
    norm_module: str | None
    others: tuple[Slice, ...] = ()

    @property
    def first(self) -> Slice:
        """The matrix behind the nonlinearity: gate of a gated layer, else its only input matrix."""
        return self.gate or self.up

    @property
    def group(self) -> Group:
        parts = (self.gate, self.up, self.gate_bias, self.up_bias, *self.others)
        inputs = tuple(part for part in parts if part is not None)
        return Group("neurons", self.units, inputs, self.down, self.down_bias)


@dataclass(frozen=True)
class HeadDims:
    """The dimensions of heads, in twos as positions turn them: query i · key i over the same dimensions makes a score.

    turned: the first so many of a head's dimensions are turned by its position, in the order that `layout` says. queries,
    keys, values: where each head lies (with its numbers side by side) in weight and bias. output: where the columns of each
    head lie. query_norm, key_norm: paths of the norms over the dimensions of a head that they go through, "" for none;
    scales: the parameters of these.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layout: Layout
    turned: int
    queries: tuple[Slice, ...]
    keys: tuple[Slice, ...]
    values: tuple[Slice, ...]
    output: Slice
    output_bias: str | None
    query_norm: str
    key_norm: str
    scales: tuple[str, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms over the dimensions of a head."""
        return tuple(path for path in (self.query_norm, self.key_norm) if path)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The dimensions of a head in twos: those that are turned together by frequency, then the others."""
        return pairs_of(self.head_dim, self.turned, self.layout)

    @property
    def group(self) -> Group:
        """Its units: two dimensions of every head, of queries, keys and values alike."""
        wide, narrow = 2 * self.heads, 2 * self.kv_heads
        inputs = [Slice(part.parameter, part.dim, part.offset, wide) for part in self.queries]
        inputs += [Slice(part.parameter, part.dim, part.offset, narrow) for part in (*self.keys, *self.values)]
        inputs += [Slice(name, 0, 0, 2) for name in self.scales]
        output = Slice(self.output.parameter, self.output.dim, 0, wide)
        return Group("head_dims", self.head_dim // 2, tuple(inputs), output, self.output_bias)


@dataclass(frozen=True)
class Attention:
    """Attention as parameter names. `fused`: one parameter holds several of q, k, v and is named under each. group: its
    heads as units, None where it is not known where they lie. queries: its query heads, None also where each has keys and
    values of its own. dims: the dimensions inside its heads, None where it is not known which are turned together.
    """

    module: str
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool
    q: tuple[str, ...]
    k: tuple[str, ...]
    v: tuple[str, ...]
    o: tuple[str, ...]
    group: Group | None = None
    queries: Group | None = None
    dims: HeadDims | None = None

    @property
    def kind(self) -> str:
        """Multi-head, multi-query or grouped-query attention."""
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"


@dataclass(frozen=True)
class Experts:
    """A mixture of `count` experts, each a feed-forward layer of `width` units; `router` is its scoring parameter.

    chosen: how many of them each token goes to, None where that could not be seen. group: the experts as units, None where
    they do not lie together in one tensor, or have no router. neurons: what each of them is made of as units, None where
    they do not lie together or it was not confirmed how.
    """

    module: str
    count: int
    width: int
    router: str | None
    chosen: int | None = None
    group: Group | None = None
    neurons: Group | None = None


@dataclass(frozen=True)
class Block:
    """One block of the network.

    parameters: names in the model of all its parameters; size: how many numbers they hold. feed_forward: beside a mixture of
    experts the one that all tokens go through, where there is one. kind: "transformer",
    "moe", "mamba" or "unknown". parallel: whether the feed-forward layer reads the block's input rather than the
    attention's output; None if undetermined. norms: names of the scales and biases of its norms. note: sentences on
    what was not recognised and why, "" if all was.
    """

    index: int
    path: str
    parameters: tuple[str, ...]
    size: int
    feed_forward: FeedForward | None
    attention: Attention | None
    experts: Experts | None
    kind: str
    parallel: bool | None
    norms: tuple[str, ...]
    note: str

    def group(self, axis: Axis) -> Group | None:
        """Its units of that kind, None where there are none or they were not recognised."""
        if axis == "queries":
            return self.attention.queries if self.attention else None
        if axis == "head_dims":
            return self.attention.dims.group if self.attention and self.attention.dims else None
        if axis == "expert_neurons":
            return self.experts.neurons if self.experts else None
        part = {"neurons": self.feed_forward, "heads": self.attention, "experts": self.experts}[axis]
        return part.group if part else None

    @property
    def groups(self) -> tuple[Group, ...]:
        """All its units whose numbers lie side by side, in the order in which tokens meet them."""
        return tuple(group for axis in AXES if axis != "head_dims" and (group := self.group(axis)))


@dataclass(frozen=True)
class Anatomy:
    """A whole network. All names are parameter names in the model.

    norms: of norms outside blocks. tied: groups of names that are one tensor. hidden: width of the residual stream.
    outside: parameters outside blocks. parameters: how many numbers the network holds, tied ones counted once.
    """

    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    head: str | None
    norms: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    hidden: int
    vocabulary: int
    outside: tuple[str, ...]
    parameters: int


def to_dict(anatomy: Anatomy) -> dict[str, Any]:
    """The anatomy as JSON can hold it; attention also says its `kind`."""
    found = asdict(anatomy)
    for block, entry in zip(anatomy.blocks, found["blocks"], strict=True):
        if block.attention:
            entry["attention"]["kind"] = block.attention.kind
    return found

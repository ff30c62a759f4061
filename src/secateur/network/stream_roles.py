"""What each parameter of a network does to its residual stream: which write to it, which read it, behind which norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from secateur.errors import RequestError
from secateur.network.anatomy import Anatomy, Block
from secateur.network.norms import Norm, norm_of


@dataclass(frozen=True)
class Roles:
    """What parameters do to the stream. A place is where norms read it, see `rotation.py`.

    Args:
        embeddings: (rows, h) that are added to it.
        readers: matrices that read it behind a norm; {parameter: (dimension of the stream, path of that norm, place)}.
        writers: matrices and biases that are added to it; {parameter: (dimension of the stream, next place)}.
        norms: over it, by path.
        biases: behind readers whose norm has a bias too, by the name of the reader; as it is named, or would be.
        own: those of `biases` that are in the model.
        places: how many there are.
        untied: the head where it shares the embedding, which afterwards it cannot.
    """

    embeddings: tuple[str, ...]
    readers: Mapping[str, tuple[int, str, int]]
    writers: Mapping[str, tuple[int, int]]
    norms: Mapping[str, Norm]
    biases: Mapping[str, str]
    own: frozenset[str]
    places: int
    untied: str | None

    @cached_property
    def scales(self) -> dict[str, Norm]:
        """The norms by their scales."""
        return {norm.scale: norm for norm in self.norms.values() if norm.scale}

    @cached_property
    def norm_biases(self) -> frozenset[str]:
        """The biases of norms, which readers take over."""
        return frozenset(norm.bias for norm in self.norms.values() if norm.bias)

    @cached_property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """The dimension of each parameter that has a number for each channel."""
        found: dict[str, tuple[int, ...]] = {name: (dim,) for name, (dim, *_) in self.readers.items()}
        found |= dict.fromkeys(self.embeddings, (1,))
        found |= {name: (dim,) for name, (dim, _) in self.writers.items()}
        return found | dict.fromkeys((*self.scales, *self.norm_biases), (0,))

    @property
    def subtracts(self) -> bool:
        """Whether norms subtract the mean."""
        return any(norm.centres for norm in self.norms.values())

    @property
    def centred(self) -> bool:
        """Whether norms subtract the mean, or have biases: in a turned network they are others."""
        return self.subtracts or bool(self.norm_biases)

    @cached_property
    def behind(self) -> dict[str, str]:
        """The readers by their biases."""
        return {bias: name for name, bias in self.biases.items()}


def find_roles(model: nn.Module, network: Anatomy, spec: str) -> Roles:
    """Raises RequestError where it is not known of everything that holds the stream what it does, or the stream could not be
    turned on its way through the network.
    """
    readers, writers, paths = dict[str, tuple[int, str, int]](), dict[str, tuple[int, int]](), list[str]()
    here = dict(model.named_parameters(remove_duplicate=False))

    def refuse(what: str) -> RequestError:
        return RequestError(f"{spec} cannot be rotated: {what}; choose a method that cuts channels as they are.")

    if len({block.parallel for block in network.blocks}) != 1:
        raise refuse("some of its blocks have attention and feed-forward layer side by side, and others do not")
    steps = 1 if network.blocks[0].parallel else 2
    for block in network.blocks:
        layer, attention = block.feed_forward, block.attention
        if layer is None or attention is None:
            raise refuse(f"{block.path} has no attention, or no feed-forward layer, that is understood")
        before = norms_before(block, [name for name in block.norms if here[name].shape == (network.hidden,)])
        if before is None:
            raise refuse(f"{block.path} has norms that are not simply in front of attention and feed-forward layer")
        paths += before
        place, last = steps * block.index, steps * (block.index + 1)
        for part in filter(None, (layer.gate, layer.up)):
            readers[part.parameter] = (1 - part.dim, before[1], last - 1)
        for name in (*attention.q, *attention.k, *attention.v):
            found = attention.group.inputs if attention.group else ()
            outputs = next((part.dim for part in found if part.parameter == name), 0)
            readers[name] = (1 - outputs, before[0], place)
        written = {layer.down.parameter: (1 - layer.down.dim, last)}
        for name in attention.o:
            inputs = attention.group.output.dim if attention.group else 1
            written[name] = (1 - inputs, place + 1)
        writers |= written
        biases = {_bias(name): (0, after) for name, (_, after) in written.items()}
        writers |= {name: entry for name, entry in biases.items() if name in here}
    outside = list(dict.fromkeys(name.rpartition(".")[0] for name in network.norms))
    if network.head is None or len(outside) != 1:
        raise refuse("it has not exactly one norm in front of its head")
    places = steps * len(network.blocks) + 1
    readers[network.head] = (1, outside[0], places - 1)
    norms = {path: norm_of(model, path, network.hidden) for path in dict.fromkeys([*paths, *outside])}
    if unknown := [path for path, norm in norms.items() if norm is None]:
        raise refuse(f"its norm {unknown[0]} is not one over the channels of the stream")
    known = {path: norm for path, norm in norms.items() if norm is not None}
    if odd := [path for path, norm in known.items() if norm.centres and norm.epsilon is None]:
        raise refuse(f"it is not known what its norm {odd[0]} adds to what it divides by")
    embeddings = tuple(name for name in network.embeddings if here[name].shape[-1] == network.hidden)
    taken = {name: _bias(name) for name, (_, path, _) in readers.items() if known[path].bias}
    tied = network.head if any(network.head in group for group in network.tied) else None
    own = frozenset(name for name in taken.values() if name in here)
    roles = Roles(embeddings, readers, writers, known, taken, own, places, tied)
    inside = {_bias(name) for name in readers} | {
        part.parameter for block in network.blocks for group in block.groups for part in group.slices
    }
    # inside attention nothing else meets the stream, though a head may be as wide
    modules = [block.attention.module for block in network.blocks if block.attention]
    within = tuple(f"{path}." for path in modules if path not in {block.path for block in network.blocks})
    for name, parameter in here.items():
        known_name = name in roles.dims or name in inside or name.startswith(within)
        if not known_name and network.hidden in parameter.shape:
            raise refuse(f"it is not known what {name} does to the residual stream")
    for name, (dim,) in roles.dims.items():
        if here[name].shape[dim] != network.hidden:
            raise refuse(f"{name} has not a number for each channel of the residual stream")
    return roles


def norms_before(block: Block, names: Sequence[str]) -> tuple[str, str] | None:
    """The paths of the norms that read the stream in front of the attention and of the feed-forward of a block, which may be
    one and the same where both are side by side; None where it is not so.

    names: of the scales and biases of norms over the stream.
    """
    layer, attention = block.feed_forward, block.attention
    if layer is None or attention is None or layer.norm_module is None or block.parallel is None:
        return None
    own = f"{attention.module}." if attention.module != block.path else "\0"
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names if not name.startswith(own)))
    others = [path for path in paths if path != layer.norm_module]
    if layer.norm_module not in paths or len(others) > 1 or not (others or block.parallel):
        return None
    return (others or paths)[0], layer.norm_module


def _bias(weight: str) -> str:
    """The name that the bias beside a matrix has, or would have."""
    return f"{weight.rpartition('.')[0]}.bias"

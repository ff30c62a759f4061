"""The residual stream in other orthonormal bases, of fewer directions: one for the whole network, or one for each place.

An RMSNorm without scale commutes with a rotation, so x → Qᵀx changes nothing once scales are moved into the matrices that
read the norm: readers W become W diag(γ) Q, writers Qᵀ W, embeddings E Q (SliceGPT, arXiv:2401.15024). What is left of the
norm is a constant, by which it divides by all h channels though it has only d.

A place is where a norm reads the stream: 2l in front of the attention of block l, 2l + 1 in front of its feed-forward, and
last in front of the head. Where bases differ, what is added to the stream is written in the basis of the next place, and the
stream itself is turned into it beside the part, by Qᵀ Q' (`bases.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError
from secateur.network.anatomy import Block
from secateur.network.bases import Bases
from secateur.network.channels import Channels, centres
from secateur.network.recognise import tied_groups
from secateur.network.source import Source
from secateur.network.store import build
from secateur.network.trace import clone

TIED = "tie_word_embeddings"  # the name that transformers itself gives it, whatever the architecture


@dataclass(frozen=True)
class Roles:
    """What each parameter does to the stream.

    Args:
        embeddings: (rows, h) that are added to it.
        readers: matrices that read it behind a norm; {parameter: (dimension of the stream, that norm's scale, place)}.
        writers: matrices and biases that are added to it; {parameter: (dimension of the stream, next place)}.
        scales: of norms; {parameter: what the norm adds to it before it multiplies: 0, or 1}.
        untied: the head where it shares the embedding, which afterwards it cannot.
    """

    embeddings: tuple[str, ...]
    readers: Mapping[str, tuple[int, str, int]]
    writers: Mapping[str, tuple[int, int]]
    scales: Mapping[str, float]
    untied: str | None


def find_roles(source: Source, channels: Channels) -> Roles:
    """Raises RequestError where the network cannot be rotated as a whole."""
    network, readers, writers = source.anatomy, dict[str, tuple[int, str, int]](), dict[str, tuple[int, int]]()

    def refuse(what: str) -> RequestError:
        return RequestError(f"{source.spec} cannot be rotated: {what}; choose a method that cuts channels as they are.")

    for path in channels.norms:
        module = source.skeleton.get_submodule(path)
        if centres(module, channels.count) or len(list(module.parameters())) != 1:
            raise refuse(
                f"its norm {path} subtracts the mean or has a bias, and only an RMSNorm commutes with a rotation"
            )
    for block in network.blocks:
        layer, attention = block.feed_forward, block.attention
        if layer is None or attention is None:
            raise refuse(f"{block.path} has no attention, or no feed-forward layer, that is understood")
        norms = [name for name in block.norms if name in channels.dims]
        before = [name for name in norms if name != layer.norm] or norms
        if layer.norm is None or len(norms) > 2 or len(before) != 1:
            raise refuse(f"{block.path} has norms that are not simply in front of attention and feed-forward layer")
        place = 2 * block.index
        for part in filter(None, (layer.gate, layer.up)):
            readers[part.parameter] = (1 - part.dim, layer.norm, place + 1)
        for name in (*attention.q, *attention.k, *attention.v):
            readers[name] = (channels.dims[name][0], before[0], place)
        writing = dict.fromkeys(attention.o, place + 1) | {layer.down.parameter: place + 2}
        writers |= {name: (channels.dims[name][0], after) for name, after in writing.items()}
        modules = {name.rpartition(".")[0]: after for name, after in writing.items()}
        writers |= {
            name: (0, modules[name.rpartition(".")[0]])
            for name in _vectors(source, block, channels)
            if name not in norms and name.rpartition(".")[0] in modules
        }
    if network.head is None or len(network.norms) != 1:
        raise refuse("it has not exactly one norm in front of its head")
    readers[network.head] = (channels.dims[network.head][0], network.norms[0], 2 * len(network.blocks))
    embeddings = tuple(name for name in network.embeddings if name in channels.dims)
    scales = {f"{path}.{name}": _added(source.skeleton.get_submodule(path)) for path in channels.norms
              for name, _ in source.skeleton.get_submodule(path).named_parameters()}  # fmt: skip
    known = {*embeddings, *readers, *writers, *scales}
    if missing := [name for name in channels.dims if name not in known]:
        raise refuse(f"it is not known what {missing[0]} does to the residual stream")
    if several := [name for name, dims in channels.dims.items() if len(dims) > 1]:
        raise refuse(f"{several[0]} both reads and writes the residual stream")
    if apart := [name for name in known if len(source.parts[name]) > 1 or source.parts[name][0].taken]:
        raise refuse(f"the checkpoint stores {apart[0]} in several tensors")
    tied = any(network.head in group for group in network.tied)
    return Roles(embeddings, readers, writers, scales, network.head if tied else None)


def rotated(
    roles: Roles, bases: Bases, names: Sequence[str], read: Callable[[str], Tensor], embeddings: float = 1.0
) -> dict[str, Tensor]:
    """The parameters of the network in the new bases, float32, of those named that change.

    Args:
        read: gives any parameter as it was.
        embeddings: what the narrower network multiplies them by, relative to the whole one.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        if name in roles.embeddings:
            found[name] = ((read(name).double() @ bases.at(0)) / embeddings).float()
        elif name in roles.readers:
            dim, scale, place = roles.readers[name]
            weights = (read(scale).double() + roles.scales[scale])[:, None] * bases.at(place)
            found[name] = _along(read(name), dim, weights)
        elif name in roles.writers:
            dim, place = roles.writers[name]
            found[name] = _along(read(name), dim, bases.at(place))
        elif name in roles.scales:
            found[name] = torch.full((bases.kept,), (bases.of / bases.kept) ** 0.5 - roles.scales[name])
    return found


def projected(roles: Roles, bases: Bases, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the source's architecture that add nothing to its stream but what lies in the basis of the next place:
    x → Q Qᵀ x.

    Shares nothing with `rotated` but who writes to the stream: scales and readers stay as they are.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name in roles.embeddings:
            found[name] = _within(tensor, -1, bases.at(0))
        elif name in roles.writers:
            dim, place = roles.writers[name]
            found[name] = _within(tensor, dim, bases.at(place))
    return found


def lifted(
    roles: Roles, bases: Bases, tensors: Mapping[str, Tensor], names: Sequence[str], embeddings: float = 1.0
) -> dict[str, Tensor]:
    """Rotated parameters, rounded as they are written, as parameters of the source's architecture, in which the stream lies
    in the bases: x → Q x. For norms whose input is `stretched`.

    tensors: parameters by name, those of `names` at least, rotated where a role says so.
    """
    found = {name: tensors[name] for name in names}
    factor = (bases.of / bases.kept) ** 0.5
    for name in names:
        tensor = tensors[name]
        if name in roles.embeddings:
            found[name] = ((tensor.double() @ bases.at(0).T) * embeddings).float()
        elif name in roles.readers:
            dim, _, place = roles.readers[name]
            found[name] = _along(tensor, dim, bases.at(place).T)
        elif name in roles.writers:
            dim, place = roles.writers[name]
            found[name] = _along(tensor, dim, bases.at(place).T)
        elif name in roles.scales:
            scale = (float(tensor[0]) + roles.scales[name]) / factor - roles.scales[name]
            found[name] = torch.full((bases.of,), scale)
    return found


@contextmanager
def stretched(model: nn.Module, channels: Channels, kept: int) -> Iterator[None]:
    """While it is open, norms are given √(h/d) times what they would be: with their epsilon they then compute what those of
    a stream of d directions do, times the constant that these have as their scale.
    """
    factor = (channels.count / kept) ** 0.5

    def stretch(_module: nn.Module, args: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
        return (args[0] * factor, *args[1:])

    handles = []
    try:
        for path in channels.norms:
            handles.append(model.get_submodule(path).register_forward_pre_hook(partial(stretch, factor=factor)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def untied_config(source: Source, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in which the head has a matrix of its own. Raises RequestError where that cannot be said."""
    changed = {**deepcopy(dict(raw)), TIED: False}
    model = build(source, changed)
    if model is None or tied_groups(model):
        raise RequestError(
            f"the configuration of {type(source.skeleton).__name__} cannot say that head and embedding differ, which they "
            f"do once {source.spec} is rotated; choose a method that cuts channels as they are."
        )
    return changed


def _vectors(source: Source, block: Block, channels: Channels) -> list[str]:
    named = block.parameters
    return [name for name in named if name in channels.dims and source.skeleton.get_parameter(name).dim() == 1]


def _added(module: nn.Module) -> float:
    """What a norm adds to its scale: its output for a scale of 0, relative to the difference that 1 makes."""
    outputs = []
    for value in (0.0, 1.0):
        twin = clone(module, lambda tensor, value=value: torch.full(tensor.shape, value), lambda buffer: buffer)  # type: ignore[misc]
        with torch.no_grad():
            outputs.append(float(twin(torch.ones(1, next(module.parameters()).numel())).mean()))
    return round(outputs[0] / (outputs[1] - outputs[0]), 3)


def _along(tensor: Tensor, dim: int, weights: Tensor) -> Tensor:
    """A tensor whose dimension of h numbers becomes the d combinations that (h, d) weights say."""
    return (tensor.double().movedim(dim, -1) @ weights).movedim(-1, dim).float().contiguous()


def _within(tensor: Tensor, dim: int, basis: Tensor) -> Tensor:
    """A tensor with nothing along a dimension but what lies in a basis, in its own dtype."""
    return ((tensor.double().movedim(dim, -1) @ basis) @ basis.T).movedim(-1, dim).to(tensor.dtype)

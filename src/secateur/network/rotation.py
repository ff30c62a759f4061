"""The residual stream in other orthonormal bases, of fewer directions: one for the whole network, or one for each place.

An RMSNorm without scale commutes with a rotation, so x → Qᵀx changes nothing once scales are moved into the matrices that
read the norm: readers W become W diag(γ) Q, writers Qᵀ W, embeddings E Q (SliceGPT, arXiv:2401.15024). What is left of the
norm is a constant, by which it divides by all h channels though it has only d. A LayerNorm becomes an RMSNorm: what it
subtracts, the mean, goes from everything that is added to the stream, W → M W with M = 1 - 11ᵀ/h, and its bias β into those
of its readers, b → b + W β; readers that have none get one.

A place is where norms read the stream: 2l in front of the attention of block l, 2l + 1 in front of its feed-forward, and
last in front of the head; where both stand side by side they share one, l. Where bases differ, what is added to the stream
is written in the basis of the next place, and the stream itself is turned into it beside the part, by Qᵀ Q' (`bases.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError
from secateur.network.bases import Bases
from secateur.network.channels import Channels
from secateur.network.norms import Norm, without_mean
from secateur.network.recognise import tied_groups
from secateur.network.source import Source
from secateur.network.store import build
from secateur.network.stream_roles import Roles, find_roles

TIED = "tie_word_embeddings"  # the name that transformers itself gives it, whatever the architecture


def roles_of(source: Source, each: bool) -> Roles:
    """What parameters do to the stream of a network that is to be turned.

    each: place by place, by a file of code; otherwise norms must stay what they are. Raises RequestError where it cannot be.
    """
    roles = find_roles(source.skeleton, source.anatomy, source.spec)
    if roles.centred and not each:
        path = next(path for path, norm in roles.norms.items() if norm.centres or norm.bias)
        raise RequestError(
            f"{source.spec} cannot be rotated as a whole: its norm {path} subtracts the mean or has a bias, and only an "
            "RMSNorm commutes with a rotation; choose rotation=each, which brings other norms along."
        )
    names = roles.dims if source.tensors else ()
    if held := [name for name in names if len(source.parts[name]) > 1 or source.parts[name][0].taken]:
        raise RequestError(
            f"{source.spec} cannot be rotated: the checkpoint stores {held[0]} in several tensors; choose a method that "
            "cuts channels as they are."
        )
    return roles


def rotated(
    roles: Roles, bases: Bases, names: Sequence[str], read: Callable[[str], Tensor], embeddings: float = 1.0
) -> dict[str, Tensor]:
    """The parameters of the network in the new bases, float32, of those named that change; biases that readers had not too.

    Args:
        read: gives any parameter as it was.
        embeddings: what the narrower network multiplies them by, relative to the whole one.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        if name in roles.embeddings:
            found[name] = ((read(name).double() @ _written(roles, bases, 0)) / embeddings).float()
        elif name in roles.readers:
            dim, path, place = roles.readers[name]
            found[name] = _along(read(name), dim, _scale(roles.norms[path], read, bases.of)[:, None] * bases.at(place))
        elif name in roles.writers:
            dim, place = roles.writers[name]
            found[name] = _along(read(name), dim, _written(roles, bases, place))
        elif name in roles.scales:
            # an RMSNorm takes the place of a norm that subtracted the mean
            added = 0.0 if roles.centred else roles.scales[name].added
            found[name] = torch.full((bases.kept,), (bases.of / bases.kept) ** 0.5 - added)
        elif name in roles.behind:
            reader = roles.behind[name]
            dim, path, _ = roles.readers[reader]
            bias = roles.norms[path].bias
            assert bias is not None, "that is why the reader's own changes"
            taken = _along(read(reader), dim, read(bias).double()[:, None]).flatten()
            found[name] = taken + read(name).float() if name in roles.own else taken
    return found


def projected(roles: Roles, bases: Bases, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the source's architecture that add nothing to its stream but what lies in the basis of the next place:
    x → Q Qᵀ x, behind the mean where norms subtract it.

    Shares nothing with `rotated` but who writes to the stream: norms and readers stay as they are.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name in roles.embeddings:
            found[name] = _within(roles, tensor, -1, bases.at(0))
        elif name in roles.writers:
            dim, place = roles.writers[name]
            found[name] = _within(roles, tensor, dim, bases.at(place))
    return found


def centred(roles: Roles, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that add nothing to the stream but what has no mean: its norms then need not subtract it."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name in roles.embeddings or name in roles.writers:
            dim = -1 if name in roles.embeddings else roles.writers[name][0]
            found[name] = tensor - tensor.mean(dim=dim, keepdim=True)
    return found


def lifted(
    roles: Roles, bases: Bases, tensors: Mapping[str, Tensor], names: Sequence[str], embeddings: float = 1.0
) -> dict[str, Tensor]:
    """Rotated parameters, rounded as they are written, as parameters of the source's architecture, in which the stream lies
    in the bases: x → Q x. For norms whose input is `stretched`, and which do not subtract the mean. Norms have no biases.

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
            added = roles.scales[name].added
            scale = (float(tensor[0]) + (0.0 if roles.centred else added)) / factor - added
            found[name] = torch.full((bases.of,), scale)
        elif name in roles.norm_biases:
            found[name] = torch.zeros(bases.of)
    return found


@contextmanager
def stretched(model: nn.Module, roles: Roles, bases: Bases) -> Iterator[None]:
    """While it is open, norms do not subtract the mean, and are given √(h/d) times what they would be: with their epsilon
    they then compute what those of a stream of d directions do, times the constant that these have as their scale.
    """
    factor = (bases.of / bases.kept) ** 0.5

    def stretch(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * factor, *args[1:])

    handles = [model.get_submodule(path).register_forward_pre_hook(stretch) for path in roles.norms]
    try:
        with without_mean(model, roles.norms):
            yield
    finally:
        for handle in handles:
            handle.remove()


def stream_entry(roles: Roles, channels: Channels, kept: int) -> dict[str, Any] | None:
    """What config.json must say of the stream beside what the architecture can; None where that is nothing."""
    return {"width": kept, "centred": roles.centred} if roles.centred or not channels.entries else None


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


def _scale(norm: Norm, read: Callable[[str], Tensor], width: int) -> Tensor:
    """(h,) float64, what a norm multiplies channels by."""
    return read(norm.scale).double() + norm.added if norm.scale else torch.ones(width, dtype=torch.float64)


def _written(roles: Roles, bases: Bases, place: int) -> Tensor:
    """(h, d) the directions of a place, for what is added to the stream: without its mean where norms subtract that."""
    basis = bases.at(place)
    return basis - basis.mean(dim=0) if roles.subtracts else basis


def _along(tensor: Tensor, dim: int, weights: Tensor) -> Tensor:
    """A tensor whose dimension of h numbers becomes the d combinations that (h, d) weights say."""
    return (tensor.double().movedim(dim, -1) @ weights).movedim(-1, dim).float().contiguous()


def _within(roles: Roles, tensor: Tensor, dim: int, basis: Tensor) -> Tensor:
    """A tensor with nothing along a dimension but what lies in a basis, in its own dtype."""
    x = tensor.double().movedim(dim, -1)
    x = x - x.mean(dim=-1, keepdim=True) if roles.subtracts else x
    return ((x @ basis) @ basis.T).movedim(-1, dim).to(tensor.dtype)

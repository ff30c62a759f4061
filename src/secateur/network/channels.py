"""Channels of the residual stream: where each of them lies in every tensor, and how the uncut network runs without some.

Found by building the architecture with a narrower stream: what shrinks has a number for each channel. Heads must keep their
size meanwhile, so an architecture whose configuration ties the two is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError
from secateur.network.anatomy import Anatomy
from secateur.network.examine import anatomy
from secateur.network.modelling_file import is_turned
from secateur.network.norms import centres
from secateur.network.parts import Part
from secateur.network.probe import norm_roles
from secateur.network.source import Source
from secateur.network.store import Entry, build, config_entries, raw_config, set_entry
from secateur.network.stream import observe
from secateur.network.stream_roles import find_roles
from secateur.network.widths import round_width


@dataclass(frozen=True)
class Channels:
    """The channels of a network.

    Args:
        count: how many there are.
        entries: of the configuration, that say so.
        held: entries with the size of a head, which must be said where it would follow from the number of channels.
        dims: the dimensions along which each parameter has a number for each channel, by its name in the model.
        norms: paths of the norms over channels.
    """

    count: int
    entries: tuple[Entry, ...]
    held: Mapping[str, int]
    dims: Mapping[str, tuple[int, ...]]
    norms: tuple[str, ...]

    def narrowed(self, raw: Mapping[str, Any], count: int) -> dict[str, Any]:
        """A configuration that says another number of channels."""
        changed = {**deepcopy(dict(raw)), **self.held}
        for entry in self.entries:
            set_entry(changed, entry, count)
        return changed


def find_channels(source: Source) -> Channels:
    """Where the channels lie. Raises RequestError where they cannot be told apart or the configuration cannot say fewer."""
    network, raw = source.anatomy, raw_config(source)
    hidden = network.hidden
    for block in network.blocks:
        if not block.groups and not block.experts:
            why = block.note or "it was not recognised"
            raise RequestError(
                f"channels are cut only where every block is understood, but {block.path} of {source.spec} is not: "
                f"{why.rstrip('.')}."
            )
    if is_turned(network):
        raise RequestError(
            f"the channels of {source.spec} are others behind each part of its blocks, so none of them can be cut for all; "
            "cut more of the model that it was made from."
        )
    before = _shapes(source.skeleton)
    heads = max((block.attention.heads for block in network.blocks if block.attention), default=1)
    for found in _candidates(source, raw):
        for fewer in (hidden - heads, hidden // 2):
            narrow = build(source, found.narrowed(raw, fewer))
            dims = _shrunk(before, _shapes(narrow), hidden, fewer) if narrow is not None else None
            if narrow is None or dims is None or not _fits(network, dims) or not _alike(network, narrow):
                continue
            norms = [name.rpartition(".")[0] for name in _all_norms(network) if name in dims]
            return Channels(hidden, found.entries, found.held, dims, tuple(dict.fromkeys(norms)))
    raise RequestError(
        f"the configuration of {type(source.skeleton).__name__} cannot say fewer channels with attention heads of the same "
        f"size, so {source.spec} with fewer could not be opened again; choose other axes."
    )


def turned_channels(source: Source) -> Channels:
    """Where the channels lie, for a stream that is turned from place to place: where the configuration cannot say fewer, the
    file of code that such a network brings does, and there are no `entries`. Raises RequestError where it cannot be turned.
    """
    if is_turned(source.anatomy):
        return find_channels(source)  # which says why not
    roles = find_roles(source.skeleton, source.anatomy, source.spec)
    try:
        return find_channels(source)
    except RequestError:
        return Channels(source.anatomy.hidden, (), {}, roles.dims, tuple(roles.norms))


def channels_config(source: Source, channels: Channels, raw: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """A configuration, which may have other widths than the source by now, that says `kept` channels.

    Raises RequestError, naming a number of channels that could be, when the architecture cannot be built so.
    """
    says = _sayer(source, channels, raw)
    if says(kept):
        return channels.narrowed(raw, kept)
    near = next(filter(says, _outward(kept, channels.count)), None)
    instead = f", but it could say {near}; choose a ratio or multiple_of that gives it" if near else ""
    raise RequestError(
        f"the configuration of {type(source.skeleton).__name__} cannot say {kept} of {channels.count} channels for "
        f"{source.spec}{instead}."
    )


def sayable_channels(source: Source, channels: Channels, raw: Mapping[str, Any], kept: int) -> bool:
    """Whether a configuration, which may have other widths than the source by now, can say so many channels."""
    return _sayer(source, channels, raw)(kept)


def nearest_channels(
    source: Source,
    channels: Channels,
    raw: Mapping[str, Any],
    ratio: float,
    multiple_of: int = 1,
    of: int | None = None,
) -> int:
    """How many channels stay at a ratio: of the two multiples around it the nearer that the configuration can say; where it
    can say neither, the number that it can say nearest to the one `round_width` gives. Among equally near ones the larger.

    It may lie on either side of what was asked for, as rounded widths do.

    Args:
        raw: the configuration so far, which may have other widths than the source.
        of: how many channels there are, by default all of the source.

    Raises RequestError where it can say no other number.
    """
    of = of or channels.count
    rounded = round_width(of, ratio, multiple_of)
    if rounded == of:
        return of
    tries = [rounded]
    if rounded % multiple_of == 0:
        exact, below = (1 - ratio) * of, int((1 - ratio) * of / multiple_of) * multiple_of
        tries = sorted((below + multiple_of, below), key=lambda width: abs(width - exact))
    says = _sayer(source, channels, raw)
    tries = [width for width in [*tries, *_outward(rounded, of)] if 0 < width < of]
    if (found := next(filter(says, tries), None)) is not None:
        return found
    channels_config(source, channels, raw, rounded)  # which says why not
    return rounded


def _outward(width: int, of: int) -> list[int]:
    """Numbers below `of`, the nearest to `width` first, of two as near the larger."""
    return sorted(range(1, of), key=lambda other: (abs(other - width), -other))


def _sayer(source: Source, channels: Channels, raw: Mapping[str, Any]) -> Callable[[int], bool]:
    """Tells whether a network of so many channels can be built, and differs from what `raw` gives in nothing else."""
    if not channels.entries:  # a file of code says it
        return lambda count: True
    whole = build(source, raw)
    assert whole is not None, "what is to be narrowed could be built"
    shapes = _shapes(whole)

    def says(count: int) -> bool:
        narrow = build(source, channels.narrowed(raw, count))
        return narrow is not None and _shapes(narrow) == {
            name: tuple(count if dim in channels.dims.get(name, ()) else size for dim, size in enumerate(shape))
            for name, shape in shapes.items()
        }

    return says


def stored_channels(source: Source, channels: Channels) -> dict[str, tuple[int, ...]]:
    """The dimensions along which each stored tensor has a number for each channel, by key.

    Raises RequestError where a tensor is stored so that channels do not lie side by side in it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, dims in channels.dims.items():
        for part in source.parts[name]:
            places = tuple(_place(part, dim, channels.count) for dim in dims)
            shape = source.tensors[part.key].shape
            if any(place is None or shape[place] != channels.count for place in places):
                raise RequestError(
                    f"{source.spec} stores {name} in another layout than the model has it ({part.key}), so no channel can "
                    "be removed."
                )
            found[part.key] = tuple(sorted({*found.get(part.key, ()), *(p for p in places if p is not None)}))
    return found


def embedding_factor(source: Source, channels: Channels, config: Mapping[str, Any]) -> float:
    """What the narrow network multiplies embeddings by, relative to what the source multiplies them by.

    Some architectures scale them by a number that depends on how many channels there are; found with embeddings of ones.
    """
    narrow = build(source, config)
    assert narrow is not None, "the configuration was found by building it"
    first = source.anatomy.blocks[0].path
    sizes = []
    for model in (source.skeleton, narrow):
        seen: list[float] = []

        def fetch(names, model=model):  # type: ignore[no-untyped-def]
            return {name: torch.ones(()).expand(model.get_parameter(name).shape) for name in names}

        def see(_: int, hidden: Tensor, seen: list[float] = seen) -> None:
            seen.append(float(hidden.float().mean()))

        observe(model, source.anatomy, fetch, torch.tensor([[1, 2]]), {first: 0}, see)
        sizes.append(seen[0])
    return sizes[1] / sizes[0] if sizes[0] else 1.0


def silence_channels(
    tensors: Mapping[str, Tensor], channels: Channels, kept: Tensor, embeddings: Mapping[str, float]
) -> dict[str, Tensor]:
    """Parameters of the uncut network with all that the removed channels are made of, and read by, zero.

    embeddings: numbers that single parameters are multiplied by, see `embedding_factor`.
    """
    gone = torch.ones(channels.count, dtype=torch.bool)
    gone[kept] = False
    places = gone.nonzero().flatten()
    silenced = {}
    for name, tensor in tensors.items():
        for dim in channels.dims.get(name, ()):
            tensor = tensor.index_fill(dim, places, 0)
        silenced[name] = tensor * embeddings[name] if name in embeddings else tensor
    return silenced


def cut_channels(model: nn.Module, channels: Channels, kept: Tensor) -> None:
    """Cuts a live model down to the channels `kept`, in place; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, dims in channels.dims.items():
        path, _, attribute = name.rpartition(".")
        module, old = model.get_submodule(path), model.get_parameter(name)
        if id(old) not in made:
            tensor = old.detach()
            for dim in dims:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
            made[id(old)] = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
            made[id(made[id(old)])] = made[id(old)]  # tied to one that was cut already
        module._parameters[attribute] = made[id(old)]
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(kept),)


@contextmanager
def norms_over(model: nn.Module, channels: Channels, kept: Tensor) -> Iterator[None]:
    """While it is open, the norms of an uncut network whose other channels are silent compute over the channels `kept`.

    A norm divides by the mean square of all channels, silent ones too. No weight makes up for that exactly, because of its
    epsilon and, in LayerNorm, the mean; so its input is stretched before it and its output shrunk behind it.
    """
    factor = (channels.count / len(kept)) ** 0.5

    def stretch(centred: bool, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        mean = x[..., kept].mean(dim=-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
        stretched = mean.expand_as(x).clone()
        stretched[..., kept] = mean + factor * (x[..., kept] - mean)
        return (stretched, *args[1:])

    def shrink(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = module.forward(torch.zeros_like(args[0].reshape(-1, channels.count)[:1]))  # what it makes of nothing
        return (output - bias) / factor + bias

    handles = []
    try:
        for path in channels.norms:
            module = model.get_submodule(path)
            handles += [
                module.register_forward_pre_hook(partial(stretch, centres(module, channels.count))),
                module.register_forward_hook(shrink),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _candidates(source: Source, raw: Mapping[str, Any]) -> Iterator[Channels]:
    """Entries that may say how many channels there are, alone and with those of the same name, the size of heads held."""
    hidden, attention = source.anatomy.hidden, [b.attention for b in source.anatomy.blocks if b.attention]
    size = attention[0].head_dim if attention else 0
    entries = list(config_entries(raw, source))
    # the usual name, which many architectures heed though their configuration does not list it
    sizes = [path[0] for path, value in entries if len(path) == 1 and type(value) is int and value == size]
    fixed = dict.fromkeys([None, *sizes, "head_dim"] if size else [None])
    for path, value in entries:
        if type(value) is not int or value != hidden:
            continue
        same = tuple(other for other, found in entries if other[-1] == path[-1] and found == hidden)
        for chosen in dict.fromkeys((same, (path,))):
            for held in fixed:
                if held is None or (held,) not in chosen:
                    yield Channels(hidden, chosen, {held: size} if held else {}, {}, ())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _shrunk(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], hidden: int, fewer: int
) -> dict[str, tuple[int, ...]] | None:
    """{parameter: dimensions that shrank from `hidden` to `fewer`}; None where anything else has changed."""
    dims: dict[str, tuple[int, ...]] = {}
    if before.keys() != after.keys():
        return None
    for name, shape in before.items():
        if len(shape) != len(after[name]):
            return None
        differ = [dim for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)) if old != new]
        if any((shape[dim], after[name][dim]) != (hidden, fewer) for dim in differ):
            return None
        dims |= {name: tuple(differ)} if differ else {}
    return dims


def _all_norms(network: Anatomy) -> list[str]:
    return [*network.norms, *(name for block in network.blocks for name in block.norms)]


def _fits(network: Anatomy, dims: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the dimensions are those of the stream: matrices around units have one, beside that of the units, and so have
    embedding, head and a norm of each block.
    """
    if network.head not in dims or not any(name in dims for name in network.embeddings):
        return False
    for block in network.blocks:
        if not any(name in dims for name in block.norms):
            return False
        for group in block.groups:
            units = {(part.parameter, part.dim) for part in group.slices}
            if any(dim in dims.get(name, ()) for name, dim in units) or group.output.parameter not in dims:
                return False
            if group.output_bias and group.output_bias not in dims:
                return False
    return True


def _alike(network: Anatomy, narrow: nn.Module) -> bool:
    """Whether the narrow network has the same parts as the whole one, by the probes that found those."""
    try:
        found = anatomy(narrow)
    except RequestError:
        return False

    def parts(each: Anatomy) -> list[Any]:
        return [
            (block.kind, [(group.axis, group.count, group.output.width) for group in block.groups], block.experts)
            for block in each.blocks
        ]

    return parts(found) == parts(network) and all(
        norm_roles(narrow.get_submodule(path), found.hidden) is not None
        for path in {name.rpartition(".")[0] for name in _all_norms(found)}
        if narrow.get_parameter(f"{path}.{next(iter(narrow.get_submodule(path)._parameters))}").shape == (found.hidden,)
    )


def _place(part: Part, dim: int, count: int) -> int | None:
    """Which dimension of the stored tensor a dimension of the parameter is, where all of it lies there in order."""
    if part.region:
        taken = part.region[dim]
        if not isinstance(taken, slice) or (taken.start or 0, taken.stop or count) != (0, count):
            return None
        dim -= sum(not isinstance(index, slice) for index in part.region[:dim])
    if part.swapped and dim in part.swapped:
        dim = part.swapped[1 - part.swapped.index(dim)]
    kept = [place for place, index in enumerate(part.taken) if isinstance(index, slice)]
    return kept[dim] if part.taken and dim < len(kept) else dim

"""Fewer blocks: how many a step removes, what the configuration says then, what their tensors are called, and live modules.

Which entries of a configuration speak of single blocks, and where a stored name holds a block's number, is found by
trying and comparing; no entry is known by name.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from secateur.errors import RequestError
from secateur.network import recognise
from secateur.network.anatomy import Anatomy
from secateur.network.recognise import join
from secateur.network.source import Source
from secateur.network.store import Entry, build, config_entries, raw_config, set_entry
from secateur.network.trace import clone, describe, first_tensor, real_call, trace

_MISSING = object()


def blocks_to_remove(method: str, parameters: Mapping[str, Any], count: int, without: Set[int] = frozenset()) -> int:
    """How many of `count` blocks a step removes: `remove`, or the fraction `ratio` rounded half up, so that one is left.

    without: those that have nothing more of what it removes; they do not count.

    Raises RequestError where that many cannot go, or `protect` names a block that is not there.
    """
    protected = set(parameters["protect"] or ())
    for index in sorted(protected):
        if not 0 <= index < count:
            raise RequestError(f"{method}: protect names block {index}, but there are blocks 0 to {count - 1}.")
    protected -= without
    count -= sum(index < count for index in without)
    remove = parameters["remove"]
    if remove is None:
        # a product that is meant to be whole or a half may fall a hair below it in binary
        remove = max(min(int(parameters["ratio"] * count + 0.5 + 1e-9), count - 1), 0)
    if remove >= max(count, 1):
        raise RequestError(f"{method}: remove={remove} leaves none of {count} blocks; ask for at most {count - 1}.")
    if remove > count - len(protected):
        raise RequestError(
            f"{method}: {remove} of {count} blocks are to go, but protect keeps {len(protected)}; remove at most "
            f"{count - len(protected)}, or protect fewer."
        )
    return int(remove)


@torch.no_grad()
def check_skippable(source: Source, method: str) -> None:
    """Raises RequestError naming the first block that cannot be left out as if it were not there.

    Tried on a copy whose every parameter is zero: a block that adds to the hidden states gives them out unchanged then,
    which is also how the reload check runs the whole network without it.
    """
    network, model = source.anatomy, source.skeleton
    modules = [model.get_submodule(block.path) for block in network.blocks]
    first: dict[Any, int] = {}
    for index, module in enumerate(modules):
        first.setdefault(recognise.signature(module, index), index)
    banks = [
        join(block.path, bank)
        for block, module in zip(network.blocks, modules, strict=True)
        for bank in recognise.expert_banks(module)
    ]
    for index, seen in trace(model, {index: network.blocks[index].path for index in first.values()}, banks).items():
        try:
            twin = clone(modules[index], _zeros, _buffer)
            args, kwargs = real_call(seen.calls[""], network.hidden, torch.Generator().manual_seed(0))
            given = first_tensor((args, kwargs), network.hidden)
            assert given is not None
            before = given.clone()  # a block may add in place
            after = first_tensor(twin(*args, **kwargs), network.hidden)
            passes = after is not None and torch.allclose(after, before, atol=1e-5)
            why = "its output is not its input and what it adds"
        except Exception as error:  # a foreign module may fail in any way; then nothing is known of it
            passes, why = False, f"it could not be run with weights of zero ({describe(error)})"
        if not passes:
            raise RequestError(
                f"{method} removes blocks, but {network.blocks[index].path} of {source.spec} cannot be left out: {why}."
            )


def _zeros(tensor: Tensor) -> Tensor:
    # one in memory for all experts; for a matrix one number, because kernels for experts refuse what has no strides
    shape = tensor.shape[1:] if tensor.ndim > 2 else ()
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.zeros(shape, dtype=dtype).expand(tensor.shape)


def _buffer(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().clone().cpu()


def shortened_config(source: Source, kept: Sequence[int]) -> dict[str, Any]:
    """The source's configuration for a network of the blocks `kept` (sorted indices) alone.

    Tried are: entries that equal the number of blocks, together with every list that holds one entry for each block or
    blocks' indices (known by its effect on the blocks that are built), and if need be one more number, which may say how
    many of the first blocks are of one kind. Taken is what builds the kept blocks as they are, and nothing else anew.

    Raises RequestError when nothing does.
    """
    raw, count = raw_config(source), len(source.anatomy.blocks)
    if len(kept) == count:
        return raw
    ours, entries = _as_built(source, raw), list(config_entries(raw, source))
    read = ((path, _shorter_lists(source, ours, raw, path, value, kept, count)) for path, value in entries)
    lists = [(path, shorter) for path, shorter in read if shorter]
    counts = [path for path, value in entries if type(value) is int and value == count]
    bounds = [(path, value) for path, value in entries if type(value) is int and 0 < value <= count]

    def tried(extra: tuple[Entry, int] | None) -> Iterator[dict[str, Any]]:
        for chosen in product(*(shorter for _, shorter in lists)):
            for path in counts:
                if extra is not None and extra[0] == path:
                    continue
                changed = deepcopy(raw)
                for (place, _), shorter in zip(lists, chosen, strict=True):
                    set_entry(changed, place, shorter)
                set_entry(changed, path, len(kept))
                if extra is not None:
                    set_entry(changed, extra[0], sum(index < extra[1] for index in kept))
                yield changed

    for extra in (None, *bounds):
        for changed in tried(extra):
            if _holds(source, ours, changed, kept):
                return changed
    raise RequestError(
        f"the configuration of {type(source.skeleton).__name__} cannot say that of the {count} blocks of {source.spec} "
        f"only {_spans(kept)} are left, so the result could not be opened again; keep other blocks, with `protect`."
    )


def _shorter_lists(
    source: Source, ours: nn.Module, raw: dict[str, Any], path: Entry, value: Any, kept: Sequence[int], count: int
) -> list[list[Any]]:
    """What a list in the configuration may become, [] where it says nothing of single blocks."""
    if not isinstance(value, list) or not value:
        return []
    readings, trials = [], []
    if len(value) == count:
        readings.append([value[index] for index in kept])
        trials.append(value[:-1])
    if all(type(entry) is int and 0 <= entry < count for entry in value):
        place = {index: number for number, index in enumerate(kept)}
        readings.append([place[index] for index in value if index in place])
        trials.append([])

    def matters(trial: list[Any]) -> bool:
        changed = deepcopy(raw)
        set_entry(changed, path, trial)
        return not _holds(source, ours, changed, range(count))

    return readings if any(matters(trial) for trial in trials) else []


def _as_built(source: Source, raw: Mapping[str, Any]) -> nn.Module:
    """The source's skeleton; for a live module, whose settings may have been changed, what its configuration builds."""
    built = build(source, raw) if source.live is not None else None
    return built if built is not None and _shapes(built) == _shapes(source.skeleton) else source.skeleton


def _holds(source: Source, ours: nn.Module, raw: Mapping[str, Any], kept: Sequence[int]) -> bool:
    """Whether a configuration builds the blocks `kept` as they are in `ours`, and the rest of it."""
    theirs, path = build(source, raw), _list_path(source.anatomy)
    if theirs is None or path not in dict(theirs.named_modules()):
        return False
    blocks, built = (list(each.get_submodule(path).children()) for each in (ours, theirs))
    if len(built) != len(kept) or _shapes(ours, path) != _shapes(theirs, path):
        return False
    return all(_alike(blocks[old], old, built[new], new) for new, old in enumerate(kept))


def _shapes(model: nn.Module, without: str = "") -> dict[str, tuple[int, ...]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(p.shape) for name, p in named if not name.startswith(f"{without}.")}


def _alike(one: nn.Module, index: int, other: nn.Module, number: int) -> bool:
    """Whether two blocks are built alike, but that one says it is `index` where the other says `number`."""
    shapes = [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in (one, other)]
    ones, others = dict(one.named_modules()), dict(other.named_modules())
    if shapes[0] != shapes[1] or list(ones) != list(others):
        return False

    def same(left: Any, right: Any) -> bool:
        if type(left) is not type(right):
            return False
        return bool(left == right) or (type(left) is int and (left, right) == (index, number))

    for path, module in ones.items():
        left, right = _settings(module), _settings(others[path])
        if type(module) is not type(others[path]):
            return False
        if not all(same(left.get(name, _MISSING), right.get(name, _MISSING)) for name in {**left, **right}):
            return False
    return True


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain public attributes: what is private are notes of the libraries, such as who initialised it."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or isinstance(value, bool | int | float | str))
    }


def _spans(indices: Sequence[int]) -> str:
    """Indices as a person writes them: 0–3, 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


class StoredNumbers:
    """Where the names of a source's stored tensors hold the number of their block.

    Raises RequestError where they do not, as when blocks share a tensor.
    """

    def __init__(self, source: Source) -> None:
        self._count = len(source.anatomy.blocks)
        named = [
            (str(block.index), key.split("."))
            for block in source.anatomy.blocks
            for name in block.parameters
            for key in source.stored_keys(name)
        ]
        for place in range(min(len(parts) for _, parts in named)):
            if all(parts[place] == number for number, parts in named) and len({(*p[:place],) for _, p in named}) == 1:
                self._prefix = named[0][1][:place]
                return
        raise RequestError(
            f"{source.spec} stores its blocks under names that do not tell them apart by their number (such as "
            f"{'.'.join(named[0][1])}), so none can be removed."
        )

    def renamed(self, key: str, kept: Sequence[int]) -> str | None:
        """The name of a stored tensor when only the blocks `kept` are left; None for a tensor of another block."""
        parts, place = key.split("."), len(self._prefix)
        if parts[:place] != self._prefix or len(parts) <= place or not parts[place].isdecimal():
            return key
        number = int(parts[place])
        if number < self._count and number not in kept:
            return None
        # behind the blocks some checkpoints store others, which transformers leaves alone
        moved = kept.index(number) if number < self._count else number - self._count + len(kept)
        return ".".join((*parts[:place], str(moved), *parts[place + 1 :]))


def drop_blocks(model: nn.Module, anatomy: Anatomy, kept: Sequence[int], config: Mapping[str, Any]) -> None:
    """Leaves only the blocks `kept` in a live model, in place, with their new numbers, and sets its configuration.

    config: as `shortened_config` gives it.
    """
    path = _list_path(anatomy)
    parent, _, name = path.rpartition(".")
    blocks = list(model.get_submodule(path).children())
    names = _index_names(blocks)
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[index] for index in kept))
    for number, index in enumerate(kept):
        for module in blocks[index].modules():
            for attribute in names & vars(module).keys():
                setattr(module, attribute, number)
    _set_config(model.config, config)  # type: ignore[arg-type]


def _index_names(blocks: Sequence[nn.Module]) -> set[str]:
    """Attributes that hold the index of their block, wherever they stand: the cache is addressed by it."""
    right: dict[str, set[int]] = {}
    wrong: set[str] = set()
    for index, block in enumerate(blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if type(value) is int and value == index:
                    right.setdefault(name, set()).add(index)
                else:
                    wrong.add(name)
    return {name for name, seen in right.items() if name not in wrong and len(seen) > 1}


def _set_config(config: PretrainedConfig, wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        inner = getattr(config, key, None)
        if isinstance(inner, PretrainedConfig) and isinstance(value, dict):
            _set_config(inner, value)
        elif inner != value and isinstance(value, int | list) and hasattr(config, key):
            setattr(config, key, value)


def _list_path(anatomy: Anatomy) -> str:
    return anatomy.blocks[0].path.rpartition(".")[0]

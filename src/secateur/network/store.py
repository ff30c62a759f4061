"""Writes a network as an ordinary model directory: shards, index, config, tokenizer files."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from secateur.errors import RequestError
from secateur.files import atomic, write_json
from secateur.network.anatomy import AXES, Axis, Block, Group
from secateur.network.heterogeneous import BlockShape, heterogeneous_config, skeleton_of
from secateur.network.modelling_file import FILE, frame, is_heterogeneous, model_files, plain_config
from secateur.network.source import Source, skeleton

logger = logging.getLogger(__name__)

Entry = tuple[str, ...]
"""Where something stands in a configuration: the keys from the outside in."""

# Weights in any form, what describes them, and what is written anew.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".py",
    ".ot", ".tflite", ".ckpt", ".npz", ".npy", ".pkl", ".zip", ".tar", ".gz",
)  # fmt: skip
_ADAPTER = "adapter_"  # made for the widths of the source; transformers would try to put it on the result
_COMPANION_BYTES = 64 * 10**6  # nothing but weights is larger, whatever it is called
_WRITTEN_ANEW = {"config.json", "README.md", "secateur.json"}


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def stored_dtype(source: Source, wanted: torch.dtype | None, stored: torch.dtype) -> torch.dtype:
    """The dtype a tensor is written in: what was asked for, else the source's own; bfloat16 for a GGUF source."""
    if not stored.is_floating_point:
        return stored
    if wanted is None and source.place.weights == "gguf":
        return torch.bfloat16
    return wanted or stored


Sizes = Mapping[Axis, Mapping[int, int]]
"""How many units of each kind stay, by block."""


def resized_config(source: Source, sizes: Sizes, plain: bool = False) -> dict[str, Any]:
    """The source's configuration with widths that say `sizes`; what they do not name stays.

    Which entries hold a width is not known by name: every entry with the right value is tried, and those are taken with
    which the architecture builds exactly the shapes that are wanted and changes no other. Where none do, because blocks
    differ, the configuration says them block by block and the model brings a file of code (`model_code`).

    plain: only a configuration that needs no code.

    Raises RequestError when the configuration cannot say the widths.
    """
    raw, blocks = raw_config(source), source.anatomy.blocks
    old = {axis: {block.index: group.count for block in blocks if (group := block.group(axis))} for axis in AXES}
    new = {axis: {**widths, **sizes.get(axis, {})} for axis, widths in old.items()}
    wanted = _wanted_shapes(source, new)
    # a live module may have been cut before to widths that its configuration does not say
    if new == old and (source.live is None or not any(new.values()) or _shapes(source, raw) == wanted):
        return raw
    common = plain_config(raw)
    unsaid: list[Axis] = []
    mixtures = [block for block in blocks if block.experts]
    # each has entries of its own: experts that all tokens go through are mostly not as wide as layers of blocks without
    together: list[tuple[tuple[Axis, ...], Sequence[Block]]] = [
        (("heads", "queries"), blocks),
        (("neurons",), [block for block in blocks if not block.experts]),
        (("neurons",), mixtures),
        (("expert_neurons",), mixtures),
        (("experts",), mixtures),
    ]
    dims = [_dims(some, axes) for axes, some in together]
    for place, (axes, some) in enumerate(together):
        # experts and neurons inside them lie across each other in the same tensors
        free = set().union(*dims[:place], *dims[place + 1 :]) - dims[place]
        names = {name for name, _ in dims[place]}
        if "heads" in axes:
            tries = _heads(common, source, new, _overridden(raw))
        else:
            here = {block.index for block in some}
            was, now = ({i: n for i, n in sizes[axes[0]].items() if i in here} for sizes in (old, new))
            tries = _widths(common, source, was, now, _overridden(raw)) if now else iter(())
        changed = next(
            (each for each in chain((common,), tries) if _agree(_shapes(source, each), wanted, names, free)), None
        )
        if changed is None:
            unsaid += axes
        else:
            common = changed
    if not unsaid and _shapes(source, common) == wanted:
        return common
    uniform = all(len(set(widths.values())) <= 1 for widths in new.values())
    if not plain and not (uniform and plain_config(raw) == raw):
        return heterogeneous_config(source, raw, {block.index: _block_shape(block, new) for block in blocks})
    axis: Axis = next((axis for axis in unsaid if new[axis] != old[axis]), "neurons")
    raise RequestError(_unsaid(source, axis, old[axis], new[axis]))


def _dims(blocks: Sequence[Block], axes: Sequence[Axis]) -> set[tuple[str, int]]:
    """In which dimensions of which parameters units of these kinds lie."""
    groups = [group for block in blocks for axis in axes if (group := block.group(axis))]
    return {(part.parameter, part.dim) for group in groups for part in group.slices}


def _agree(
    shapes: Mapping[str, tuple[int, ...]] | None,
    wanted: Mapping[str, tuple[int, ...]],
    names: Set[str],
    free: Set[tuple[str, int]],
) -> bool:
    """Whether the parameters `names` have the wanted shapes, but for the dimensions that are `free`."""
    return shapes is not None and all(
        name in shapes
        and len(shapes[name]) == len(wanted[name])
        and all(
            size == other or (name, dim) in free
            for dim, (size, other) in enumerate(zip(shapes[name], wanted[name], strict=True))
        )
        for name in names
    )


def _block_shape(block: Block, sizes: Sizes) -> BlockShape:
    """What a block is to have."""
    heads, kv_heads = single_heads(block, sizes)
    units, inside, experts = (sizes[axis].get(block.index) for axis in ("neurons", "expert_neurons", "experts"))
    return BlockShape(units=units, heads=heads, kv_heads=kv_heads, experts=experts, expert_units=inside)


def single_heads(block: Block, sizes: Sizes) -> tuple[int | None, int | None]:
    """How many heads, and how many of keys and values, a block is to have; None where they cannot be told apart."""
    attention, heads, kv_heads = block.attention, None, None
    if attention and attention.group:
        kept, of = sizes.get("heads", {}).get(block.index, attention.group.count), attention.group.count
        heads, kv_heads = (kept * count // of for count in (attention.heads, attention.kv_heads))
    if attention and attention.queries:
        kept = sizes.get("queries", {}).get(block.index, attention.queries.count)
        if kept < (heads or attention.heads):  # heads that went have taken theirs along
            heads, kv_heads = kept, kv_heads or attention.kv_heads
    return heads, kv_heads


def group_left(block: Block, axis: Axis, sizes: Sizes) -> Group | None:
    """Its units of a kind; dimensions as they lie across the heads that are left of it."""
    attention = block.attention
    if axis != "head_dims" or attention is None or attention.dims is None:
        return block.group(axis)
    heads, kv_heads = single_heads(block, sizes)
    dims = replace(attention.dims, heads=heads or attention.heads, kv_heads=kv_heads or attention.kv_heads)
    return dims.group


def each_alone(source: Source, sizes: Mapping[Axis, Mapping[int, int]]) -> dict[Axis, Mapping[int, int]]:
    """The same units, with those queries put back that went along with their heads: each kind may then be subtracted."""
    heads, queries = sizes.get("heads", {}), dict[int, int]()
    for index, kept in sizes.get("queries", {}).items():
        attention = source.anatomy.blocks[index].attention
        assert attention and attention.queries, "named where there are some"
        all_heads = attention.group.count if attention.group else attention.kv_heads
        # padding adds heads, and their queries come with them
        along = max(0, all_heads - heads.get(index, all_heads)) * (attention.queries.count // all_heads)
        queries[index] = min(kept + along, attention.queries.count)
    return {**sizes, "queries": queries} if queries else dict(sizes)


def _unsaid(source: Source, axis: Axis, old: Mapping[int, int], new: Mapping[int, int]) -> str:
    """Why these widths cannot be: a sentence."""
    architecture, values = type(source.skeleton).__name__, list(new.values())
    if len(set(values)) == 1:
        heads = "number of attention heads without changing their size"
        what = {
            "neurons": "feed-forward width", "heads": heads, "queries": heads, "experts": "number of experts alone",
            "expert_neurons": "width of experts alone",
        }[axis]  # fmt: skip
        if axis in ("heads", "queries") and (others := _sayable(source, axis, old)):
            return (
                f"the configuration of {architecture} cannot say {values[0]} of {min(old.values())} heads, only "
                f"{', '.join(map(str, others))}; choose for {source.spec} a ratio that leaves one of these."
            )
        return (
            f"the configuration of {architecture} has no entry that sets its {what}, so a cut model of {source.spec} could "
            "not be opened again."
        )
    return (
        f"the widths planned for {source.spec} differ between its layers ({min(values)} to {max(values)} {axis}), and the "
        f"configuration of {architecture} can only say one width for all."
    )


def _sayable(source: Source, axis: Axis, old: Mapping[int, int]) -> list[int]:
    """How many heads, by shared keys and values, its configuration could say: some ask that they divide the hidden size."""
    found = []
    sets = max(group.sets for block in source.anatomy.blocks if (group := block.group(axis)))
    for count in range(sets, min(old.values()), sets):
        new = dict.fromkeys(old, count)
        wanted = _wanted_shapes(source, {axis: new})
        if any(
            _shapes(source, changed) == wanted for changed in _heads(raw_config(source), source, {axis: new}, set())
        ):
            found.append(count)
    return found


def _widths(
    raw: Mapping[str, Any], source: Source, old: Mapping[int, int], new: Mapping[int, int], overridden: Set[str]
) -> Iterator[dict[str, Any]]:
    """Configurations that may say these feed-forward widths."""
    values = list(new.values())
    for path, value in _candidates(raw, source, {*old.values()}, overridden):
        changed = deepcopy(dict(raw))
        set_entry(changed, path, values[0] if len(set(values)) == 1 and not isinstance(value, list) else values)
        yield changed


def _heads(raw: Mapping[str, Any], source: Source, new: Sizes, overridden: Set[str]) -> Iterator[dict[str, Any]]:
    """Configurations that may say these numbers of heads: the entries for heads and for keys and values, with the size of a
    head held fast.
    """
    found = {
        (block.attention.heads, block.attention.kv_heads, block.attention.head_dim, *single_heads(block, new))
        for block in source.anatomy.blocks
        if block.attention and (block.attention.group or block.attention.queries)
    }
    if len(found) != 1:
        return
    [(old, old_kv, width, wanted, wanted_kv)] = found
    entries = {key: value for key, value in source.config.to_dict().items() if type(value) is int}
    heads = [key for key, value in entries.items() if value == old or key in overridden]
    kv = [key for key, value in entries.items() if value == old_kv or key in overridden]
    size = [key for key, value in entries.items() if value == width]
    # the usual name, which many architectures heed though their configuration does not list it
    for fixed in dict.fromkeys([None, *size, "head_dim"]):
        for head, shared in product(heads, [None, *kv]):
            if head not in (fixed, shared) and (fixed != shared or fixed is None):
                changed = {**deepcopy(dict(raw)), head: wanted, **({fixed: width} if fixed else {})}
                yield changed | ({shared: wanted_kv} if shared else {})


def raw_config(source: Source) -> dict[str, Any]:
    """config.json as the source has it, so that nothing it says is lost."""
    path = source.directory / "config.json" if source.directory else None
    raw: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else source.config.to_dict()
    raw.pop("quantization_config", None)
    if not raw.get("architectures"):
        raw["architectures"] = [type(source.skeleton).__name__]
    return raw


def model_code(source: Source, raw: Mapping[str, Any]) -> dict[str, str]:
    """The code that goes beside a config.json made from the source's, by file name; none for an ordinary model."""
    return model_files(raw, type(source.config))


def _overridden(raw: Mapping[str, Any]) -> set[str]:
    """Entries that blocks have of their own."""
    return (
        {name for own in raw.get("per_layer_config", {}).values() for name in own} if is_heterogeneous(raw) else set()
    )


def config_entries(raw: Mapping[str, Any], source: Source) -> Iterator[tuple[Entry, Any]]:
    """Everything the configuration says, defaults too, and what it says one level below."""
    complete = source.config.to_dict()
    yield from (((key,), value) for key, value in complete.items())
    for key, nested in complete.items():
        if isinstance(nested, dict) and isinstance(raw.get(key), dict):
            yield from (((key, inner), value) for inner, value in nested.items())


def _candidates(
    raw: Mapping[str, Any], source: Source, widths: Set[int], overridden: Set[str]
) -> Iterator[tuple[Entry, Any]]:
    """Entries that may hold the width: those equal to one of `widths` first, then those left to their default.

    overridden: entries that blocks have of their own, whose common value may be anything.
    """
    flat = list(config_entries(raw, source))
    for path, value in flat:
        alike = isinstance(value, list) and set(map(str, value)) <= set(map(str, widths)) and len(value) > 0
        if (type(value) is int and (value in widths or path[0] in overridden)) or alike:
            yield path, value
    for path, value in flat:
        if value is None:
            yield path, value


def set_entry(raw: dict[str, Any], path: Entry, value: Any) -> None:
    for key in path[:-1]:
        raw = raw[key]
    raw[path[-1]] = value


def build(source: Source, raw: Mapping[str, Any]) -> nn.Module | None:
    """The skeleton that a configuration describes, None where there is none."""
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what it thinks of a value that is only tried
    try:
        return skeleton(type(source.config).from_dict(dict(raw)), source.trust_remote_code)
    except Exception as error:  # whatever an architecture does with a value it was not made for: not this entry
        logger.debug("config entry refused: %s", error)
        return None
    finally:
        transformers_logging.set_verbosity(said)


def build_own(source: Source, raw: Mapping[str, Any]) -> nn.Module:
    """The skeleton that a configuration made here describes, one with a file of code too, which need not be written yet."""
    found = frame(raw, type(source.config)) if is_heterogeneous(raw) else None
    model = build(source, raw) if found is None else skeleton_of(found, raw)
    assert model is not None, "the configuration was found by building it"
    return model


def _shapes(source: Source, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    model = build(source, raw)
    if model is None:
        return None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _wanted_shapes(source: Source, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    # every name, because a live module shares tied parameters and an empty one may not
    named = source.skeleton.named_parameters(remove_duplicate=False)
    shapes = {name: list(parameter.shape) for name, parameter in named}
    for axis, kept in each_alone(source, sizes).items():
        for block in source.anatomy.blocks:
            if group := block.group(axis):
                for part in group.slices:
                    shapes[part.parameter][part.dim] -= (group.count - kept[block.index]) * part.width
    return {name: tuple(shape) for name, shape in shapes.items()}


def write_index(directory: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """The index of a sharded checkpoint; `shards` gives the bytes of each tensor by file. None for a single file."""
    if len(shards) > 1:
        total = sum(size for tensors in shards.values() for size in tensors.values())
        where = {name: file for file, tensors in sorted(shards.items()) for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(directory / "model.safetensors.index.json", index)


def write_config(directory: Path, raw: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    raw = dict(raw)
    if dtype is not None:
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", raw)


def companions(source: Source) -> list[Path]:
    """Tokenizer, generation config, licence and other small files; a model's own code only where it may run."""
    found = []
    for path in sorted(source.directory.iterdir()) if source.directory else ():
        # the file of a heterogeneous model is written anew, for as long as it needs one
        code = path.suffix == ".py" and source.trust_remote_code and path.name != FILE
        copied = (
            not path.name.endswith(_NOT_COPIED)
            and not path.name.startswith(_ADAPTER)
            and path.name not in _WRITTEN_ANEW
            and path.stat().st_size <= _COMPANION_BYTES
        )
        if path.is_file() and not path.name.startswith(".") and (copied or code):
            found.append(path)
    return found


def copy_companions(source: Source, directory: Path, without: Set[str] = frozenset()) -> None:
    """Copies what goes with the weights, but no file named in `without`; a live module has a generation config at most."""
    for path in companions(source):
        if path.name in without:
            continue
        with atomic(directory / path.name) as partial:
            shutil.copyfile(path, partial)
    generation = getattr(source.live, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


def check_output(output: Path, source: Source) -> None:
    """Raises RequestError when `output` is, lies inside, or holds the source."""
    if source.directory is None:
        return
    there, here = output.resolve(), source.place.directory.resolve()
    # beside a GGUF file there may be anything; inside a model directory everything is the model's
    inside = here in there.parents and source.place.file is None
    if there == here or inside or there == (source.place.file or here).resolve():
        raise RequestError(
            f"the output {output} is the source or lies inside it; a run never writes there: name another."
        )
    if there in here.parents:
        raise RequestError(f"the source {source.spec} lies inside the output {output}; name another output.")

"""Widens every block of a model to the widest, with zeros, so that an ordinary configuration says it and no code is needed.

A neuron whose weights are zero is silent, and so are heads of zeros: their values are zero whatever their scores are. The
logits stay what they are; the files and the work become those of a model with every block as wide as the widest.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from secateur.errors import RequestError
from secateur.export.common import Exported, check_place, size_of, whole_directory
from secateur.files import write_json, write_tensors, write_text
from secateur.network.anatomy import AXES, Anatomy, Axis
from secateur.network.examine import anatomy
from secateur.network.locate import Place
from secateur.network.modelling_file import is_heterogeneous, plain_config
from secateur.network.source import Source, open_model
from secateur.network.store import (
    build,
    copy_companions,
    model_code,
    raw_config,
    resized_config,
    shard_name,
    write_config,
    write_index,
)
from secateur.network.verify import stored, verify
from secateur.units import WORDS

_SHARD = 2 * 10**9
# above it the result is streamed for its check instead of loaded at once
_MEMORY = 16 * 10**9
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def to_padded(source: Source, output: Path, dtype: str | None = None) -> Exported:
    """Writes `source`, whose blocks differ, to the directory `output` with one width for all, and checks that plain
    transformers computes the same logits from it.

    dtype: None, because the numbers stay as they are.

    Raises RequestError where nothing is to be padded or the widths have no common configuration.
    """
    check_place(output, source)
    raw = raw_config(source)
    if dtype is not None:
        raise RequestError("--dtype does not go with --to padded, which changes no number; leave it out.")
    if not is_heterogeneous(raw):
        raise RequestError(
            f"the blocks of {source.spec} are alike, so it loads everywhere as it is; there is nothing to pad."
        )
    if any("shortcuts" in own for own in raw["per_layer_config"].values()):
        raise RequestError(
            f"{source.spec} has matrices that turn the residual stream beside parts of its blocks, and no padding takes "
            "their place; it loads with its own file of code (--trust-remote-code)."
        )
    with _without_gaps(source, raw) as whole:
        axes: list[Axis] = [axis for axis in AXES if axis != "head_dims"]  # alike in all blocks
        found = {axis: [(block.index, block.group(axis)) for block in whole.anatomy.blocks] for axis in axes}
        sizes = {axis: {index: group.count for index, group in groups if group} for axis, groups in found.items()}
        widest = {axis: max(widths.values()) for axis, widths in sizes.items() if widths}
        queries, heads = (sizes.pop(axis, {}) for axis in ("queries", "heads"))
        if len(set(queries.values())) > 1 and len(set(heads.values())) == 1:
            raise RequestError(
                f"blocks of {source.spec} differ in how many query heads share keys and values, and there is no padding for "
                "that; it loads with its own file of code (--trust-remote-code)."
            )
        sizes["heads"] = heads  # with all their queries
        widest.pop("queries", None)
        sizes = {axis: widths for axis, widths in sizes.items() if widths}
        wanted = {axis: dict.fromkeys(sizes[axis], width) for axis, width in widest.items()}
        config = resized_config(whole, wanted, plain=True) if wanted != sizes else _common(raw_config(whole))
        wide = _built(source, config)
        places = _places(source, anatomy(wide))
        with whole_directory(output) as folder:
            _write(folder, source, wide, places)
            write_config(folder, config, None)
            copy_companions(source, folder)
            result = open_model(folder)
            checked = verify(result, source, stored(source), _MEMORY)
            parameters = sum(parameter.numel() for parameter in result.skeleton.parameters())
            had = source.anatomy.parameters
            note = (
                f"it is no smaller and no faster than a model whose every block has {_said(widest)}: of {parameters:,} "
                f"parameters {parameters - had:,} are zeros that stand for what was removed"
            )
            write_text(folder / "README.md", _card(source, note))
    return Exported(
        "padded", str(output), type(wide).__name__, "as stored", size_of(output), source.bytes,
        [f"{checked.how}; largest relative difference of logits {checked.difference:.1g}"], [note + "."],
        {"difference": checked.difference},
    )  # fmt: skip


def _said(widest: Mapping[Any, int]) -> str:
    names = {**WORDS, "heads": "groups of attention heads"}
    return " and ".join(f"{width} {names[axis]}" for axis, width in widest.items())


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The plain configuration of blocks that are alike but say so one by one, because none is as the common entries say."""
    said = list((raw.get("per_layer_config") or {}).values())
    return {**plain_config(raw), **(said[0] if said else {})}


@contextmanager
def _without_gaps(source: Source, raw: Mapping[str, Any]) -> Iterator[Source]:
    """The same model with the parts that blocks have lost put back, as structure without weights."""
    said = raw["per_layer_config"]
    own = {index: {key: value for key, value in each.items() if key != "skip"} for index, each in said.items()}
    if own == said:
        yield source
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", {**raw, "per_layer_config": own})
        for file, text in model_code(source, raw).items():
            write_text(folder / file, text)
        # the code is ours: written here
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        yield Source(source.spec, folder, config, {}, Place(source.spec, folder), True)


def _built(source: Source, config: Mapping[str, Any]) -> nn.Module:
    model = build(source, config)
    assert model is not None, "its shapes were compared with what was wanted"
    return model


def _places(source: Source, wide: Anatomy) -> dict[str, list[tuple[int, Tensor, int]]]:
    """Where the numbers of each parameter go: (dimension, the index of each of them in the wider one, how wide that is).

    A fused parameter holds several stretches of units one after another. They are taken from the wider network: with a
    single head left its queries, keys and values look like one.
    """
    places: dict[str, list[tuple[int, Tensor, int]]] = {}
    for narrow, block in zip(source.anatomy.blocks, wide.blocks, strict=True):
        for axis in AXES:
            had, group = narrow.group(axis), block.group(axis)
            if axis == "queries":  # they go with the heads
                continue
            if not had or not group or had.count == group.count:
                continue
            dims = {(part.parameter, part.dim) for part in group.slices}
            for name, dim in sorted(dims):
                stretches = [part for part in group.slices if (part.parameter, part.dim) == (name, dim)]
                lost = torch.arange(had.count, group.count)
                gone = torch.cat([part.indices(lost) for part in stretches])
                size = source.skeleton.get_parameter(name).shape[dim] + len(gone)
                kept = torch.ones(size, dtype=torch.bool).index_fill(0, gone, False)
                places.setdefault(name, []).append((dim, kept.nonzero().flatten(), size))
    return places


def _widen(values: Tensor, shape: tuple[int, ...], places: list[tuple[int, Tensor, int]], name: str) -> Tensor:
    for dim, index, size in places:
        wide = values.new_zeros((*values.shape[:dim], size, *values.shape[dim + 1 :]))
        values = wide.index_copy(dim, index, values)
    assert tuple(values.shape) == shape, f"{name} is as wide as the configuration says"
    return values


def _write(folder: Path, source: Source, wide: nn.Module, places: Mapping[str, list[tuple[int, Tensor, int]]]) -> None:
    """Shards of whole tensors, one in memory at a time beside those of its shard."""
    have = {name for name, _ in source.skeleton.named_parameters(remove_duplicate=False)}
    again = {name for group in source.anatomy.tied for name in group[1:]}
    default = source.parameter(next(iter(have & set(dict(wide.named_parameters()))))).dtype
    shapes = {name: tuple(p.shape) for name, p in wide.named_parameters(remove_duplicate=False) if name not in again}
    groups: list[list[str]] = [[]]
    room = _SHARD
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * default.itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = _SHARD
        groups[-1].append(name)
        room -= size
    shards = {}
    for index, names in enumerate(groups):
        file = shard_name(index, len(groups))
        tensors = {}
        for name in names:
            if name in have:
                tensors[name] = _widen(source.parameter(name), shapes[name], places.get(name, []), name)
            else:
                tensors[name] = torch.zeros(shapes[name], dtype=default)
        write_tensors(folder / file, tensors, {"format": "pt"})
        shards[file] = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_index(folder, shards)


def _card(source: Source, note: str) -> str:
    licence = f"license: {source.place.licence}\n" if source.place.licence else ""
    base = source.place.base or source.place.directory.name
    return (
        f"---\n{licence}library_name: transformers\ntags:\n- secateur\n---\n\n# {base}, padded to one width\n\n"
        f"Made with Secateur from a model whose blocks differ in width. It opens with plain `transformers`, without code of "
        f"its own, and computes the same logits; {note}.\n"
    )

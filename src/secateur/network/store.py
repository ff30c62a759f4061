"""Writes a network as an ordinary model directory: shards, index, config, tokenizer files."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from secateur.errors import RequestError
from secateur.files import atomic, write_json
from secateur.network.heterogeneous import BlockShape, heterogeneous_config
from secateur.network.modelling_file import FILE, is_heterogeneous, model_files, plain_config
from secateur.network.source import Source, skeleton

logger = logging.getLogger(__name__)

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


def resized_config(source: Source, widths: Mapping[int, int], plain: bool = False) -> dict[str, Any]:
    """The source's configuration with feed-forward widths that say `widths` (units kept, by block index).

    Which entry holds the width is not known by name: every entry with the right value is tried, and the one is taken
    with which the architecture builds exactly the shapes that are wanted and changes no other. Where none does, because
    widths differ, the configuration says them block by block and the model brings a file of code (`model_code`).

    plain: only a configuration that needs no code.

    Raises RequestError when the configuration cannot say the widths.
    """
    raw = raw_config(source)
    blocks = source.anatomy.blocks
    old = {block.index: block.feed_forward.units for block in blocks if block.feed_forward}
    new = {**old, **widths}
    wanted = _wanted_shapes(source, new)
    # a live module may have been cut before to widths that its configuration does not say
    if new == old and (source.live is None or not new or _shapes(source, raw) == wanted):
        return raw
    uniform = len(set(new.values())) == 1
    values = list(new.values())
    common = plain_config(raw)
    for path, value in _candidates(common, source, {*old.values()}, _overridden(raw)):
        for setting in [values[0]] if uniform and not isinstance(value, list) else [values]:
            changed = deepcopy(common)
            _set(changed, path, setting)
            if _shapes(source, changed) == wanted:
                return changed
    if not plain and not (uniform and common == raw):
        return heterogeneous_config(source, raw, {index: BlockShape(units=width) for index, width in new.items()})
    if uniform:
        raise RequestError(
            f"the configuration of {type(source.skeleton).__name__} has no entry that sets its feed-forward width, so a "
            f"cut model of {source.spec} could not be opened again."
        )
    raise RequestError(
        f"the widths planned for {source.spec} differ between its layers ({min(values)} to {max(values)} neurons), and the "
        f"configuration of {type(source.skeleton).__name__} can only say one width for all."
    )


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


def _candidates(
    raw: Mapping[str, Any], source: Source, widths: Set[int], overridden: Set[str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Entries that may hold the width: those equal to one of `widths` first, then those left to their default.

    overridden: entries that blocks have of their own, whose common value may be anything.
    """
    complete = source.config.to_dict()
    flat: list[tuple[tuple[str, ...], Any]] = [((key,), value) for key, value in complete.items()]
    flat += [
        ((key, inner), value)
        for key, nested in complete.items()
        if isinstance(nested, dict) and isinstance(raw.get(key), dict)
        for inner, value in nested.items()
    ]
    for path, value in flat:
        alike = isinstance(value, list) and set(map(str, value)) <= set(map(str, widths)) and len(value) > 0
        if (type(value) is int and (value in widths or path[0] in overridden)) or alike:
            yield path, value
    for path, value in flat:
        if value is None:
            yield path, value


def _set(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        raw = raw[key]
    raw[path[-1]] = value


def _shapes(source: Source, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    try:
        config = type(source.config).from_dict(dict(raw))
        model = skeleton(config, source.trust_remote_code)
    except Exception as error:  # whatever an architecture does with a value it was not made for: not this entry
        logger.debug("config entry refused: %s", error)
        return None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _wanted_shapes(source: Source, widths: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    # every name, because a live module shares tied parameters and an empty one may not
    named = source.skeleton.named_parameters(remove_duplicate=False)
    shapes = {name: list(parameter.shape) for name, parameter in named}
    for block in source.anatomy.blocks:
        if block.feed_forward:
            for part in block.feed_forward.slices:
                shapes[part.parameter][part.dim] -= block.feed_forward.units - widths[block.index]
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


def copy_companions(source: Source, directory: Path) -> None:
    """Copies what goes with the weights; a live module has a generation config at most."""
    for path in companions(source):
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

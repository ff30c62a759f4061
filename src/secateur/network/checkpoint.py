"""What a checkpoint stores: its tensors by the headers of its files, and which parameters they make."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from secateur.errors import RequestError
from secateur.network.parts import Misfit, Part, Shape, Unsupported, Value, follow

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, known from its file's header alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a directory's safetensors files, from the headers; the index must agree with them."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            where: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{index.name} in {directory} is not a valid index: {line(error)}") from error
    else:
        where = {}
    files = sorted({directory / name for name in where.values()})
    if not files:
        # some makers put a second copy in their own layout beside it
        single = directory / "model.safetensors"
        files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        if not path.exists():
            raise RequestError(f"shard {path.name}, which the index names, is missing in {directory}; fetch it again.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    piece = file.get_slice(name)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise RequestError(f"tensor {name} in {path.name} has dtype {piece.get_dtype()}, unknown here.")
                    tensors[name] = TensorInfo(tuple(piece.get_shape()), dtype, path)
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"shard {path.name} in {directory} is damaged or cut short ({line(error)}); fetch it again."
            ) from error
    for name, shard in where.items():
        if name not in tensors or tensors[name].file != directory / shard:
            raise RequestError(
                f"the index of {directory} says that {shard} holds {name}, but it does not; shards and index are not of "
                "one model: fetch them again."
            )
    return {name: info for name, info in tensors.items() if not where or name in where}


def bind(model: nn.Module, tensors: Mapping[str, TensorInfo], spec: str) -> dict[str, tuple[Part, ...]]:
    """The stored tensors that make each parameter of `model`; tied ones share theirs.

    Raises RequestError naming what is missing, of another shape, or stored in a layout that is not understood.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found, merged = _sort(model, tensors, shapes)
    parts: dict[str, tuple[Part, ...]] = {}
    refused: dict[str, str] = {}
    for name, group in merged.items():
        made, sentence = group.made(name, shapes, spec)
        parts.update(made)
        refused.update(dict.fromkeys(group.names(name), sentence))
    parts.update({name: (Part(key),) for name, key in found.items()})
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in parts and other in parts:
            parts[name] = parts[other]
    for name, shape in shapes.items():
        if name not in parts:
            raise RequestError(
                refused.get(name)
                or f"{spec} holds no tensor for {name} of {type(model).__name__}: the checkpoint is incomplete or stores "
                "its weights in a layout that is not supported."
            )
        key = parts[name][0].key
        if parts[name] == (Part(key),) and tensors[key].shape != shape:
            raise RequestError(
                f"tensor {key} of {spec} has shape {list(tensors[key].shape)}, but its config asks for {list(shape)}."
            )
    return parts


def stored_buffers(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The stored name of each of `model`'s buffers that is stored in its shape."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in parameters}
    found, _ = _sort(model, tensors, shapes) if shapes else ({}, {})
    return {name: key for name, key in found.items() if tensors[key].shape == shapes[name]}


@dataclass
class _Group:
    """Stored tensors that transformers converts together: the conversion, and what each of its patterns collected."""

    converter: WeightConverter
    collected: dict[str, list[str]]
    tensors: Mapping[str, TensorInfo]

    def names(self, name: str) -> list[str]:
        """The parameters that come out; `name` is the first of them."""
        first, *others = self.converter.target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def made(self, name: str, shapes: Mapping[str, Shape], spec: str) -> tuple[dict[str, tuple[Part, ...]], str]:
        """The parts of every parameter that comes out, or why there are none."""
        targets = dict(zip(self.converter.target_patterns, self.names(name), strict=True))
        values = {
            pattern: [Value.stored(key, self.tensors[key].shape) for key in keys]
            for pattern, keys in self.collected.items()
        }
        try:
            made = follow(
                self.converter.operations, values, self.converter.source_patterns, list(targets),
                lambda target: shapes[targets[target]],
            )  # fmt: skip
        except Unsupported as operation:
            return {}, (
                f"{spec} stores {name} in a layout that is not supported: transformers makes it from "
                f"{self._keys[0]} by {operation}."
            )
        except (Misfit, KeyError):
            return {}, self._misfit(name, shapes[name], spec)
        if any(value.shape != shapes.get(targets[target]) for target, value in made.items()):
            return {}, self._misfit(name, shapes[name], spec)
        return {targets[target]: value.compact for target, value in made.items()}, ""

    @property
    def _keys(self) -> list[str]:
        return [key for keys in self.collected.values() for key in keys]

    def _misfit(self, name: str, shape: Shape, spec: str) -> str:
        """What is wrong with stored tensors that do not make a parameter of this shape."""
        for pattern in self.converter.source_patterns:
            if pattern not in self.collected:
                return f"{spec} holds no tensor {pattern} for {name}: the checkpoint is incomplete."
        merges = [each for each in self.converter.operations if isinstance(each, MergeModulelist)]
        for keys in self.collected.values() if merges else ():
            missing = _missing(keys, shape[merges[0].dim])
            if missing:
                return (
                    f"{spec} holds no tensor {missing[1]}, expert {missing[0]} of {name}: the checkpoint is incomplete."
                )
        for keys in self.collected.values():
            usual, _ = Counter(self.tensors[key].shape for key in keys).most_common(1)[0]
            for key in keys:
                if self.tensors[key].shape != usual:
                    return (
                        f"tensor {key} of {spec} has shape {list(self.tensors[key].shape)}, but the others of {name} "
                        f"have {list(usual)}."
                    )
        key = self._keys[0]
        others = f" and {len(self._keys) - 1} more" if len(self._keys) > 1 else ""
        return (
            f"tensor {key} of {spec} has shape {list(self.tensors[key].shape)}; it{others} cannot make {name}, for "
            f"which its config asks for {list(shape)}."
        )


def _missing(keys: Sequence[str], count: int) -> tuple[int, str] | None:
    """The first number below `count` that no key has, in the one place where keys differ, and the key it would make."""
    places = list(zip(*(key.split(".") for key in keys), strict=False))
    varying = [place for place, entries in enumerate(places) if len(set(entries)) > 1]
    if len(varying) != 1 or not all(entry.isdecimal() for entry in places[varying[0]]):
        return None
    numbers = {int(entry) for entry in places[varying[0]]}
    for number in range(count):
        if number not in numbers:
            steps = keys[0].split(".")
            steps[varying[0]] = str(number)
            return number, ".".join(steps)
    return None


def _sort(
    model: nn.Module, tensors: Mapping[str, TensorInfo], shapes: Mapping[str, Shape]
) -> tuple[dict[str, str], dict[str, _Group]]:
    """Which stored tensor is which of `shapes`: those that are one by one, and those that are converted together."""
    # transformers itself knows which names of older files mean which parameters, and which tensors it would merge
    transforms = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    alone: dict[str, str] = {}
    together: dict[str, _Group] = {}
    # experts are merged in the order of their numbers, not of their letters
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # already named as in the model
            name, pattern = key, None
        if name not in shapes:
            continue
        if pattern is None:
            alone[name] = key
        else:
            group = together.setdefault(name, _Group(by_pattern[pattern], {}, tensors))
            group.collected.setdefault(pattern, []).append(key)
    return alone, together


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def check_finite(name: str, tensor: torch.Tensor, spec: str) -> None:
    """Raises RequestError naming the tensor when it holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # the extremes carry any NaN or infinity, and are thirty times faster to find than a mask of finite values
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not torch.isfinite(low) or not torch.isfinite(high):
        raise RequestError(
            f"tensor {name} of {spec} holds non-finite values (NaN or infinity); the checkpoint is damaged or diverged in "
            "training: use another one."
        )


def line(error: BaseException) -> str:
    """The first line of what an error of another library says."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__

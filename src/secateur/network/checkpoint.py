"""What a checkpoint stores: its tensors by the headers of its files, and which parameter each of them is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from secateur.errors import RequestError

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


def bind(model: nn.Module, tensors: Mapping[str, TensorInfo], spec: str) -> dict[str, str]:
    """The stored name of each parameter of `model`; tied ones share one. Raises RequestError where one is missing."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    # transformers itself knows which names of older files mean which parameters, and which tensors it would merge
    transforms = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    keys: dict[str, str] = {}
    for key in tensors:
        name, merged = rename_source_key(key, renamings, converters, prefix, state)
        if name in shapes and merged is None:
            keys[name] = key
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in keys and other in keys:
            keys[name] = keys[other]
    for name, shape in shapes.items():
        if name not in keys:
            raise RequestError(
                f"{spec} holds no tensor for {name} of {type(model).__name__}: the checkpoint is incomplete or stores "
                "its weights in a layout that is not supported."
            )
        if tensors[keys[name]].shape != shape:
            raise RequestError(
                f"tensor {keys[name]} of {spec} has shape {list(tensors[keys[name]].shape)}, but its config asks for "
                f"{list(shape)}."
            )
    return keys


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

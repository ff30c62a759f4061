"""What zeros are good for: size under a general compressor, and kernels that skip them where a device has such."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import zstandard
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from secateur.errors import RequestError, RunError
from secateur.network.checkpoint import line
from secateur.network.recognise import expert_banks, join, matrices

LEVEL = 3
MOST = 8 * 10**9  # bytes; above this, compressing for information alone would take minutes


def size_under_zstd(files: Iterable[Path]) -> int | None:
    """Bytes of these files under zstd (level 3), one after the other; None when they are too large to try.

    Float weights hardly compress; zeros among them do. Nothing is written.
    """
    files = list(files)
    if sum(path.stat().st_size for path in files) > MOST:
        return None
    total = 0
    for path in files:
        compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                total += len(compressor.compress(piece))
        total += len(compressor.flush())
    return total


def is_semi_structured(matrix: Tensor) -> bool:
    """Whether no four neighbours in a row (r, d) of `matrix` hold more than two that are not zero."""
    return matrix.dim() == 2 and matrix.shape[1] % 4 == 0 and int((matrix.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2


@dataclass(frozen=True)
class SemiStructured:
    """What `to_semi_structured` did.

    converted: names of the weights that are torch's semi-structured tensors now.
    skipped: 2:4 weights that stayed dense, and why.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Puts torch's semi-structured tensors in the place of 2:4 weights, in place, so that kernels can skip the zeros.

    What it gives is for this process: such tensors are not saved. Speed is torch's and the device's affair; measure it.
    Converted weights lie beside the dense ones until all are made, so that the model is changed wholly or not at all.

    Raises RequestError saying why when nothing can be converted: no 2:4 weights, a device without such kernels, or a dtype,
    shape or layer that they do not take; RunError when torch fails on a weight that it should take. Not tried on a GPU yet.
    """
    found = dict(_semi_structured(model))
    if not found:
        raise RequestError("the model holds no 2:4 weights; prune it with pattern=2:4 first.")
    skipped = {name: why for name, layer in found.items() if (why := _hindrance(layer))}
    layers = {name: layer for name, layer in found.items() if name not in skipped}
    if not layers:
        reasons: dict[str, str] = {}
        for name, why in skipped.items():
            reasons.setdefault(why, name)
        told = "; ".join(f"{name}: {why}" for why, name in list(reasons.items())[:3])
        raise RequestError(f"none of the {len(found)} 2:4 weights can be converted ({told}).")
    made = {}
    for name, layer in layers.items():
        try:
            made[name] = to_sparse_semi_structured(layer.get_parameter("weight").detach().contiguous())
        except RuntimeError as error:
            raise RunError(f"torch could not convert {name} ({line(error)}); the model is as it was.") from error
    for name, layer in layers.items():
        layer.register_parameter("weight", nn.Parameter(made[name], requires_grad=False))
    return SemiStructured(tuple(made), skipped)


def _semi_structured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each 2:4 weight by its name, with the module that holds it; of stacked experts, either side may be the input."""
    for matrix in matrices(model):
        weight = model.get_parameter(matrix.weight).detach()
        if is_semi_structured(weight.T if matrix.output_dim == 1 else weight):
            yield matrix.weight, model.get_submodule(matrix.module)
    for path, bank in expert_banks(model).items():
        for name, stack in bank.named_parameters(recurse=False):
            flat = [each.detach().flatten(0, 1) for each in (stack, stack.mT)] if stack.ndim == 3 else []
            if any(is_semi_structured(each) for each in flat):
                yield join(path, name), bank


def _hindrance(layer: nn.Module) -> str | None:
    """Why torch's kernels cannot take a 2:4 weight; None where they can."""
    if not isinstance(layer, nn.Linear):
        kind = type(layer).__name__
        return f"a {kind} holds it, and the kernels stand behind linear layers alone"
    weight = layer.weight
    if why := _without_kernels(weight.device):
        return why
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels take float16 or bfloat16, not {weight.dtype}; cast the model first"
    # torch says its limits nowhere else, and they differ between the two libraries that it may use
    cutlass = SparseSemiStructuredTensor._FORCE_CUTLASS
    kernels = SparseSemiStructuredTensorCUTLASS if cutlass else SparseSemiStructuredTensorCUSPARSELT
    least = kernels._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = least.sparse_min_rows, least.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is no multiple of ({rows}, {columns}), which the kernels need"
    return None


def _without_kernels(device: torch.device) -> str | None:
    """Why a device has no kernels for 2:4 weights; None where it has."""
    if device.type != "cuda":
        return f"the device {device} has no kernels for 2:4 weights; move the model to a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no kernels for 2:4 weights; they came with compute capability 8.0"
    return None

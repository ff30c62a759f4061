"""What zeros are good for: size under a general compressor, and kernels that skip them where a device has such."""

from collections.abc import Iterable
from pathlib import Path

import torch
import zstandard
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from secateur.errors import RequestError

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


def to_semi_structured(model: nn.Module) -> int:
    """Puts torch's semi-structured tensors in the place of 2:4 weights, in place, so that kernels can skip the zeros.

    What it gives is for this process: such tensors are not saved. Speed is torch's and the device's affair; measure it.

    Returns: how many linear layers were converted.

    Raises RequestError saying why when nothing can be: no 2:4 weights, a device without such kernels, or a dtype that they
    do not take. Not tried on a GPU yet.
    """
    layers = [
        layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_semi_structured(layer.weight.detach())
    ]
    if not layers:
        raise RequestError("the model holds no 2:4 weights; prune it with pattern=2:4 first.")
    weight = layers[0].weight
    if weight.device.type != "cuda":
        raise RequestError(
            f"the device {weight.device} has no kernels for 2:4 weights; move the model to a CUDA device."
        )
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise RequestError("this GPU has no kernels for 2:4 weights; they came with compute capability 8.0.")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise RequestError(
            f"kernels for 2:4 weights take float16 or bfloat16, not {weight.dtype}; cast the model first."
        )
    for layer in layers:
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return len(layers)

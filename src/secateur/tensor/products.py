"""Products of float32 matrices on the CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 matrices with MKL, which uses half of the vector width on processors that are not Intel's. oneDNN,
which torch keeps for other dtypes and for compiled code, uses all of it: measured on an AMD EPYC with AVX-512, 195 against
90 GFLOP/s for one thread. It computes in float32 too, only in another order: sums are less blocked, and the largest error of
a product over 1536 inputs was 2e-4 where MKL's was 6e-5, both of entries of size 40. Which one is used depends on the kind
of tensor alone, never on a measurement, so that results can be repeated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# torch's own compiler calls it; there is no public name
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SMALL = 1 << 21  # multiply-adds; below, the call costs more than it saves


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs Wᵀ + bias, as torch.nn.functional.linear: inputs (..., d), weight (r, d), bias (r,)."""
    if _ONEDNN is not None and _fits(inputs, weight, bias):
        found: Tensor = _ONEDNN(inputs, weight, bias, "none", [], "")
        return found
    return functional.linear(inputs, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right, of (r, k) and (k, c)."""
    return linear(left, right.T) if _ONEDNN is not None and _fits(left, right, None) else left @ right


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (inputs, weight) if bias is None else (inputs, weight, bias)
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and weight.dim() == 2
        and inputs.dim() >= 2
        and inputs.numel() * weight.shape[0] >= SMALL
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


class FastProducts(TorchFunctionMode):
    """Inside, linear layers that compute in float32 on the CPU do so as `linear` does; nothing else changes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and type(args[0]) is Tensor:
            return linear(*args)
        if func is torch.addmm and not kwargs:  # the transposed layers of GPT-2
            bias, inputs, weight = args
            if _ONEDNN is not None and bias.dim() == 1 and _fits(inputs, weight.T, bias):
                return linear(inputs, weight.T, bias)
        return func(*args, **kwargs)

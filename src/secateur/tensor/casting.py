"""Tensors in another dtype without a second copy of them."""

import torch
from torch import Tensor

CHUNK = 1 << 20  # numbers turned at once


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in a dtype of at most its size, in the memory that it already has: its own numbers are lost.

    A tensor that is not contiguous is copied first, and one of a smaller dtype is turned as torch does.
    """
    if dtype == tensor.dtype:
        return tensor
    if dtype.itemsize > tensor.dtype.itemsize:
        return tensor.to(dtype)
    old = tensor.contiguous().view(-1)
    new = old.view(dtype)[: old.numel()]
    # forwards, because a number's new place is never behind its old one
    for start in range(0, len(old), CHUNK):
        new[start : start + CHUNK] = old[start : start + CHUNK].to(dtype)
    return new.view(tensor.shape)

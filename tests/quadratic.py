"""A layer's quadratic objective, small: weights, a Hessian of correlated inputs, masks, and the answer row by row."""

import torch
from torch import Tensor

from secateur.tensor.hessian import damp
from secateur.tensor.patterns import keep_per_row


def problem(rows: int = 6, columns: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    """Weights, the Hessian of correlated inputs, its inverse."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    common = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(8 * columns, columns // 4, generator=generator, dtype=torch.float64) @ common.T
    inputs += torch.randn(8 * columns, columns, generator=generator, dtype=torch.float64)
    hessian = damp(inputs.T @ inputs)
    return weight.to(dtype), hessian.matrix.to(dtype), hessian.inverse.to(dtype)


def random_mask(rows: int, columns: int, remove: list[int], seed: int = 0) -> Tensor:
    """(rows, columns) mask whose row i has lost remove[i] weights."""
    return keep_per_row(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)), remove)


def row_loss(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    """(r,) ½ Δ H Δᵀ."""
    return ((weight - found) @ hessian * (weight - found)).sum(1) / 2


def one_by_one(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """Masked least squares, one row and one solve after another."""
    result = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        stays = mask.nonzero()[:, 0]
        result[row, stays] = torch.linalg.solve(hessian[stays][:, stays], (weight[row] @ hessian)[stays])
    return result

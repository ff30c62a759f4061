"""Removing inputs of a linear map one group after another, each time refitting what stays (Optimal Brain Surgeon)."""

import torch
from torch import Tensor


def eliminate(
    gram: Tensor, weight: Tensor, keep: int, ridge: float = 0.1, group: int = 16, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """Backward elimination of the inputs of y = W a, with the least-squares refit of the kept columns.

    With P = (C + ridge · diag C)⁻¹ for the second moment C of a, removing input j costs ‖w_j‖² / P_jj and moves the
    others by −w_j P_j: / P_jj (Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
    1993, for whole columns). The `group` cheapest inputs go together, with their joint correction; then costs are new.

    Args:
        gram: (m, m) second moment of the inputs.
        weight: (n, m) matrix that reads them.
        keep: how many inputs stay.
        ridge: relative to each input's own energy, so that a few massive inputs do not decide how the rest is damped.
            Ten and a hundred times as much is tried where it leaves the matrix indefinite.
        group: inputs removed between two computations of the costs.
        constant: the last input is a constant 1 (its column a bias): it is refitted, never removed, and not counted.

    Returns: sorted indices (keep,) of the inputs that stay, and the new columns (n, keep), or (n, keep + 1) with the bias.

    Raises FloatingPointError when no ridge helps.
    """
    inputs = len(gram)
    # unit diagonal: an input a thousand times larger than the rest leaves the factorisation well conditioned
    energy = gram.diagonal().double()
    energy = energy.clamp_min(1e-12 * float(energy.mean()) + 1e-30)
    for damping in (ridge, 10 * ridge, 100 * ridge):
        scale = (energy * (1 + damping)).rsqrt()
        scaled = gram.double() * scale[:, None] * scale
        factor, failed = torch.linalg.cholesky_ex(scaled.fill_diagonal_(1))
        if not failed:
            break
    else:
        raise FloatingPointError(f"the second moment is not positive definite, even with a ridge of {100 * ridge:g}")
    inverse = torch.cholesky_inverse(factor).float()
    columns = weight.float() / scale.float()
    alive = torch.ones(inputs, dtype=torch.bool)
    free = alive.clone()
    free[-1] = not constant
    left = int(free.sum()) - keep
    while left > 0:
        cost = columns.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        cost[~(alive & free)] = torch.inf
        # a stable sort, so that equal costs are decided by index on every machine
        gone = cost.argsort(stable=True)[: min(group, left)]
        rows = inverse[:, gone].clone()
        correction = torch.linalg.solve(rows[gone], rows.T)
        columns = columns - columns[:, gone] @ correction
        inverse = inverse - rows @ correction
        # exact zeros: what is left of removed inputs by rounding must not come back
        columns[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
        inverse[gone, gone] = 1
        alive[gone] = False
        left -= len(gone)
    kept = alive.nonzero()[:, 0]
    return (kept[:-1] if constant else kept), (columns * scale.float())[:, kept]

"""Removing inputs of a linear map one after another, each time refitting what stays (Optimal Brain Surgeon)."""

import torch
from torch import Tensor


def eliminate(
    gram: Tensor,
    weight: Tensor,
    keep: int,
    ridge: float = 0.1,
    group: int = 16,
    constant: bool = False,
    width: int = 1,
) -> tuple[Tensor, Tensor]:
    """Backward elimination of the inputs of y = W a, with the least-squares refit of the kept columns.

    With P = (C + ridge · diag C)⁻¹ for the second moment C of a, removing input j costs ‖w_j‖² / P_jj and moves the
    others by −w_j P_j: / P_jj (Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
    1993, for whole columns). The `group` cheapest inputs go together, with their joint correction; then costs are new. Units
    of `width` neighbouring inputs U cost tr(W_U P_UU⁻¹ W_Uᵀ) and go one at a time.

    Args:
        gram: (m, m) second moment of the inputs.
        weight: (n, m) matrix that reads them.
        keep: how many units stay.
        ridge: relative to each input's own energy, so that a few massive inputs do not decide how the rest is damped.
            Ten and a hundred times as much is tried where it leaves the matrix indefinite.
        group: inputs removed between two computations of the costs.
        constant: the last input is a constant 1 (its column a bias): it is refitted, never removed, and not counted.
        width: inputs of a unit.

    Returns: sorted indices (keep,) of the units that stay, and the new columns (n, keep · width), with the bias behind them.

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
    units = (inputs - constant) // width
    alive = torch.ones(units, dtype=torch.bool)
    left = units - keep
    while left > 0:
        cost = _costs(columns, inverse, units, width)
        cost[~alive] = torch.inf
        # a stable sort, so that equal costs are decided by index on every machine
        gone = cost.argsort(stable=True)[: min(max(group // width, 1), left)]
        alive[gone] = False
        left -= len(gone)
        gone = (gone[:, None] * width + torch.arange(width)).flatten()
        rows = inverse[:, gone].clone()
        correction = torch.linalg.solve(rows[gone], rows.T)
        columns = columns - columns[:, gone] @ correction
        inverse = inverse - rows @ correction
        # exact zeros: what is left of removed inputs by rounding must not come back
        columns[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
        inverse[gone, gone] = 1
    kept = alive.nonzero()[:, 0]
    stays = torch.cat([alive.repeat_interleave(width), torch.ones(int(constant), dtype=torch.bool)])
    return kept, (columns * scale.float())[:, stays]


def _costs(columns: Tensor, inverse: Tensor, units: int, width: int) -> Tensor:
    """(units,) what removing each of them costs."""
    inputs = units * width
    if width == 1:
        return columns[:, :inputs].square().sum(0) / inverse.diagonal()[:inputs].clamp_min(1e-12)
    within = inverse[:inputs, :inputs].view(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    weights = columns[:, :inputs].T.reshape(units, width, -1)
    return (weights * torch.linalg.solve(within, weights)).sum((1, 2))


def eliminate_units(
    gram: Tensor,
    mean: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    keep: int,
    width: int = 1,
    ridge: float = 0.1,
    group: int = 16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`eliminate` for a layer y = W a + b: an output bias is one more input, always 1, where the mean of what goes is put.

    Args:
        gram, mean: (m, m) second moment of the inputs, (m,) their mean; one over tokens, not a sum. The mean is needed
            where there is a bias.
        weight, bias: (n, m), (n,) or None.

    Returns: sorted indices (keep,) of the units that stay, their new columns, the new bias.
    """
    if bias is None or mean is None:
        kept, columns = eliminate(gram, weight, keep, ridge, group, width=width)
        return kept, columns, None
    one = torch.ones(1, device=mean.device)
    moment = torch.cat([torch.cat([gram, mean[:, None]], dim=1), torch.cat([mean, one])[None]])
    both = torch.cat([weight, bias[:, None]], dim=1)
    kept, columns = eliminate(moment, both, keep, ridge, group, constant=True, width=width)
    return kept, columns[:, :-1], columns[:, -1]

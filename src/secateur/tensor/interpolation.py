"""Kept inputs of a linear map take over the removed ones, by least squares."""

import torch
from torch import Tensor


def interpolate(
    moment: Tensor, weight: Tensor, kept: Tensor, ridge: float = 0.1, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """New columns for the kept inputs of y = W x: W_K + W_R Qᵀ with Q = argmin ‖X_R − X_K Q‖² + Σ λ_i ‖Q_i‖².

    Args:
        moment: (m, m) second moment of the inputs over tokens.
        weight: (n, m) W.
        kept: (k,) sorted indices of the kept inputs.
        ridge: λ_i relative to the energy of input i; 0 gives the plain least squares.
        mean: (m,) of the inputs; given, Q is of the centred inputs, and the mean goes to the bias.

    Returns: (n, k) new columns, (n,) what is added to the bias: W_R (μ_R − Qᵀ μ_K), 0 without `mean`.

    Raises torch.linalg.LinAlgError where kept inputs depend on each other and there is no ridge.
    """
    stays = torch.zeros(len(moment), dtype=torch.bool, device=moment.device).index_fill(0, kept, True)
    gone = (~stays).nonzero()[:, 0]
    double = moment.double()
    if mean is not None:
        double = double - torch.outer(mean.double(), mean.double())
    # inputs that are always zero tell nothing; a diagonal of their own keeps the system solvable
    energy = double[kept, kept]
    floor = 1e-12 * float(energy.mean()) + 1e-30
    system = double[kept][:, kept] + torch.diag(ridge * energy + floor)
    # scaled to unit diagonal: a massive input leaves the factorisation well conditioned
    scale = system.diagonal().clamp_min(floor).rsqrt()
    factor = torch.linalg.cholesky(system * scale[:, None] * scale)
    q = scale[:, None] * torch.cholesky_solve(scale[:, None] * double[kept][:, gone], factor)
    removed = weight[:, gone].double()
    columns = weight[:, kept].double() + removed @ q.T
    shift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if mean is not None:
        shift = removed @ (mean[gone].double() - q.T @ mean[kept].double())
    return columns.to(weight.dtype), shift.to(weight.dtype)

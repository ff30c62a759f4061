"""Kept inputs of a linear map take over the removed ones, by least squares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.tensor.products import linear


class Interpolated(NamedTuple):
    """The best of several ridges.

    Args:
        columns, shift: as `interpolate` gives them.
        errors: of each ridge in order, Σ‖y − ŷ‖² / Σ‖y‖² on the inputs that it was judged by.
    """

    columns: Tensor
    shift: Tensor
    ridge: float
    errors: list[float]


def interpolate_best(
    moment: Tensor, weight: Tensor, kept: Tensor, ridges: Sequence[float], judge: Tensor, mean: Tensor | None = None
) -> Interpolated:
    """As `interpolate`, by the ridge whose output is nearest to the old one on other inputs; among equals the first.

    Args:
        ridges: what is tried.
        judge: (t, m) inputs that `moment` has not seen.
    """
    wanted = linear(judge, weight)
    whole = max(float(wanted.square().sum(dtype=torch.float64)), 1e-30)
    errors: list[float] = []
    for ridge in ridges:
        columns, shift = interpolate(moment, weight, kept, ridge, mean)
        lost = linear(judge[:, kept], columns) + shift - wanted
        errors.append(float(lost.square().sum(dtype=torch.float64)) / whole)
        if errors[-1] <= min(errors) and errors.index(errors[-1]) == len(errors) - 1:
            best = columns, shift, ridge
    return Interpolated(*best, errors)


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

"""Scores of inputs by leverage, and a scale for each kept input that makes up for the removed ones."""

import torch
from torch import Tensor


def leverage_scores(moment: Tensor, weight: Tensor, width: int = 1, ridge: float = 0.01) -> Tensor:
    """What removing each unit alone costs y = W x once all other inputs have adapted: tr(W_U (P_UU)⁻¹ W_Uᵀ), with
    P = (C + λ)⁻¹ and C the second moment; for one input ‖w_j‖² / P_jj.

    Args:
        moment: (m, m) C.
        weight: (n, m) W.
        width: neighbouring inputs of a unit.
        ridge: λ relative to each input's own energy.

    Returns: (m / width,)

    Raises torch.linalg.LinAlgError where the damped moment is not positive definite.
    """
    double = moment.double()
    energy = double.diagonal()
    # inputs that are always zero cost nothing; a diagonal of their own keeps the matrix invertible
    floor = 1e-12 * float(energy.mean()) + 1e-30
    scale = ((1 + ridge) * energy + floor).rsqrt()
    scaled = double * scale[:, None] * scale
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled.fill_diagonal_(1)))
    columns = weight.double() / scale
    units = len(moment) // width
    within = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    rows = columns.T.reshape(units, width, -1)
    return (rows * torch.linalg.solve(within, rows)).sum((1, 2)).to(weight.dtype)


def tune_scales(moment: Tensor, weight: Tensor, kept: Tensor, ridge: float = 0.1) -> Tensor:
    """(k,) scales c of the kept inputs with the least ‖X Wᵀ − X_K diag(c) W_Kᵀ‖² + Σ λ_i (c_i − 1)².

    In closed form: (W_KᵀW_K ∘ C_KK + Λ) c = diag(W_Kᵀ W C_:K) + Λ 1.

    Args:
        moment: (m, m) C, the second moment of the inputs.
        weight: (n, m) W.
        kept: (k,) sorted indices.
        ridge: λ_i relative to the diagonal of the system; more keeps the scales nearer to 1.
    """
    double, columns = moment.double(), weight[:, kept].double()
    system = (columns.T @ columns) * double[kept][:, kept]
    wanted = (columns * (weight.double() @ double[:, kept])).sum(0)
    diagonal = system.diagonal()
    pull = ridge * diagonal + 1e-12 * float(diagonal.mean()) + 1e-30
    return torch.linalg.solve(system + torch.diag(pull), wanted + pull).to(weight.dtype)

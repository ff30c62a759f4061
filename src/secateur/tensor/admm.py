"""Weights under a mask by alternating directions (ADMM): one factorisation serves all rows and all masks."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.tensor.hessian import Damped
from secateur.tensor.patterns import Budget, keep_n_of_m, keep_overall


class Solved(NamedTuple):
    """weight: (r, d) new matrix, 0 where not kept. kept: (r, d) bool."""

    weight: Tensor
    kept: Tensor


def grown_mask(scores: Tensor, budget: Budget, share: float, per: str = "layer") -> Tensor:
    """(r, d) mask that removes `share` of the budget, to the nearest whole number; all of it, exactly, for 1.

    Source: ADMM pruning (arXiv:2401.02938), whose rule for 2:4 is used for every N:M: the N best of M consecutive columns
    are safe, and of the others the lowest of the whole matrix go first.
    """
    count, pattern = round(share * budget.remove), budget.pattern
    if pattern.kept is None or pattern.of is None:
        return replace(budget, remove=count).mask(scores, per)
    safe = keep_n_of_m(scores, pattern.kept, pattern.of)
    return keep_overall(scores.masked_fill(safe, torch.inf), count)


def admm(
    weight: Tensor,
    hessian: Damped,
    target: Budget | Tensor,
    iterations: int = 20,
    ramp: int = 15,
    rho: float = 1.0,
    per: str = "layer",
) -> Solved:
    """Minimises ½ (W − Ŵ) H (W − Ŵ)ᵀ over the matrices that are 0 where a mask says so, and looks for the mask meanwhile.

    Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938. In iteration t,
    with P the projection on the mask: Z = P(W_t + Y), Y ← W_t + Y − Z, W_t ← argmin of the objective plus the penalty
    ½ ρ ‖(W_t − Z + Y) N^½‖². The result is P(W_t + Y). N is the diagonal of the undamped H, so one ρ suits every input, and
    the mask's scores, (W_t + Y)² N, are Wanda's squared at the start. The mask follows the cubic ramp of gradual pruning
    (arXiv:1710.01878): a share 1 − (1 − t / ramp)³ of the budget in iteration t = 1, 2, …, all of it from `ramp` on.

    Computed with one matrix of state, V = W_t + Y: Z − Y is V with the sign changed where it is not kept, and
    W_t = W + (Z − Y − W) ρ N (H + ρ N)⁻¹. The published code scales inputs to unit norm, which is the same, and has no
    ramp for the plain fraction by default.

    Args:
        weight: (r, d), not changed. Its dtype is the one that is computed in.
        hessian: of the d inputs. Weights of dead inputs are set to 0.
        target: what is to be removed, or a fixed (r, d) mask. With a mask the result tends to masked least squares.
        iterations: ≥ ramp where the mask is looked for.
        ramp: ≥ 1. With 1 the mask is Wanda's.
        rho: > 0, strength of the penalty. It changes how fast, not where to, a fixed mask converges.
        per: "layer" or "row", see Budget.mask.

    Raises ValueError when the ramp would not end, torch.linalg.LinAlgError when H + ρ N is not positive definite.
    """
    if isinstance(target, Budget) and not 1 <= ramp <= iterations:
        raise ValueError(f"the mask grows for {ramp} of {iterations} iterations; from 1 to all of them are possible")
    energy = hessian.energy.masked_fill(hessian.dead, 1)
    factor = torch.linalg.cholesky(hessian.matrix + torch.diag(rho * energy))
    pull = (rho * energy.unsqueeze(1) * torch.cholesky_inverse(factor)).to(weight.dtype)
    scores, dense = energy.to(weight.dtype), weight.masked_fill(hessian.dead, 0)
    kept = target if isinstance(target, Tensor) else torch.ones_like(dense, dtype=torch.bool)
    state = dense
    for iteration in range(1, iterations + 1):
        if isinstance(target, Budget) and iteration <= ramp:
            kept = grown_mask(state.square() * scores, target, 1 - (1 - iteration / ramp) ** 3, per)
        away = state.masked_fill(kept, 0)  # Y
        # Z − Y − W is exactly 0 where nothing is removed: then W comes back bit for bit
        pulled = (state - 2 * away).sub_(dense)
        state = away.addmm_(pulled, pull).add_(dense)
    return Solved(state.masked_fill(~kept, 0), kept)

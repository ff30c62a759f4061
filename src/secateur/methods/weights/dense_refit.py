"""What a mask leaves is fitted to what the dense network computed, from the inputs that the pruned network really gets.

Our own. Every other method here fits a layer to its own output on the inputs that come through the pruned layers before it,
and so keeps what those have spoilt. Here the target is the output in the dense network on the same tokens, X Wᵀ, and the
inputs are those of the pruned one, Y:

    min ‖X Wᵀ − Y Ŵᵀ‖²  over Ŵ with the zeros of the mask.

With G = YᵀY and C = XᵀY the best Ŵ without a mask is W̃ = W C G⁻¹, and what is to be minimised differs from
tr((Ŵ − W̃) G (Ŵ − W̃)ᵀ) by a constant: masked least squares about W̃. Damping pulls towards W: with γ added to the diagonals of
G and of C, no pruning before and no mask give W back.
"""

from typing import Annotated

import torch
from pydantic import Field

from secateur.registry import Budget, CrossGram, Gram, MaskFrom, Update, Weight, method
from secateur.tensor.masked_least_squares import solve_by_steps


@method(
    "dense_refit",
    kind="weights",
    paper="",
    claim="our own: layers that aim at the dense network's outputs undo part of what earlier layers have lost",
    when="after training",
    speedup="specific",
    criterion="another method's",
    schedule="one-shot",
)
def dense_refit(
    weight: Weight,
    gram: Gram,
    cross: CrossGram,
    budget: Budget,
    *,
    damping: Annotated[float, Field(gt=0)] = 0.01,
    tolerance: Annotated[float, Field(gt=0)] = 1e-3,
    mask: MaskFrom = "wanda",
) -> Update:
    """Refits what a mask leaves to the outputs of the dense network, from the inputs of the pruned one.

    Args:
        damping: fraction of the mean diagonal that is added; it pulls towards the weights as they were.
        tolerance: how far above the least a row's loss may be, as a fraction of it.
        mask: the method whose mask is used.
    """
    hessian = gram.damped(damping)
    added = hessian.matrix.diagonal() - gram.matrix.diagonal()
    target = (cross.matrix + torch.diag(added)).to(hessian.dtype)
    dense = weight.matrix.to(hessian.dtype).masked_fill(hessian.dead, 0)
    best = torch.cholesky_solve((dense @ target).T, hessian.factor).T.masked_fill(hessian.dead, 0)
    found = solve_by_steps(best, hessian.matrix, hessian.inverse, mask, None, tolerance).weight
    return Update(found.masked_fill(~mask | hessian.dead, 0).to(weight.matrix.dtype), mask)

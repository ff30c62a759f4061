"""Wanda: the weights go that move their row's output least, |weight| times the norm of its input.

Sun and others, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv:2306.11695. Score
S_ij = |W_ij| · ‖x_j‖, compared within each output row; weights do not change.

per="mass" is the variant of the published code: a row's budget is the number of its lowest scores whose sum is at most a
share α of the row's sum, α the same for all rows. There α is found by bisection to within 0.001 of the sparsity and kept
below 0.8; here the weights are ordered by the share at which they go, so α is met exactly, and so is the budget.
"""

from typing import Literal

from torch import Tensor

from secateur.registry import Budget, InputNorms, Mask, Weight, method


@method(
    "wanda",
    kind="weights",
    paper="arXiv:2306.11695",
    claim="LLaMA-2-7B at 50 %: WikiText perplexity 6.42 where magnitude has 14.89 and SparseGPT 6.51 (dense 5.12)",
    when="after training",
    speedup="specific",
    criterion="activation",
    schedule="one-shot",
)
def wanda(weight: Weight, norms: InputNorms, budget: Budget, *, per: Literal["row", "layer", "mass"] = "row") -> Mask:
    """Removes the weights of the smallest |weight| · norm of the input.

    Args:
        per: compare scores within each output row (published), within the whole matrix, or "mass": each row loses the same
            share of its summed scores, so rows with few large weights lose more. A plain fraction alone heeds it.
    """
    if per == "mass" and budget.pattern.block is None:
        return Mask(budget.mask(_mass(weight.matrix.abs().mul_(norms.norms)), "layer"))
    return Mask(budget.mask(lambda rows: weight.matrix[rows].abs().mul_(norms.norms), per))


def _mass(scores: Tensor) -> Tensor:
    """(r, d) share of its row's sum that is lost with a weight and all of the row that score lower."""
    # float64, because float32 sums of thousands of scores would make neighbours equal
    ordered, order = scores.double().sort(dim=1, stable=True)
    sums = ordered.cumsum(1)
    return sums.new_empty(sums.shape).scatter_(1, order, sums / sums[:, -1:].clamp_min(1e-300))

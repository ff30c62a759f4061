"""AlphaPruning: a block whose weight spectra have heavy tails loses less.

Lu and others, "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, arXiv:2410.10912. α of each matrix by Hill's estimate (secateur.tensor.heavy_tails), the
mean over a block's matrices, mapped linearly to [1 − ε, 1 + ε] and scaled to the budget.

What differs: what `limit` cuts off goes to the others (the published code has no clamp), blocks of equal
α are pruned uniformly (it divides by zero), and blocks may hold any number of matrices.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from secateur.errors import RequestError
from secateur.registry import Allocation, Context, Matrices, method
from secateur.tensor.budgets import scaled_counts
from secateur.tensor.heavy_tails import alpha_mid, alpha_peak, eigenvalues


@method(
    "alphapruning",
    kind="allocation",
    paper="arXiv:2410.10912",
    claim="LLaMA-7B can be pruned to 80 % with reasonable perplexity",
    when="after training",
    speedup="specific",
    criterion="spectrum",
    schedule="one-shot",
)
def alphapruning(
    network: Matrices,
    context: Context,
    *,
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    estimator: Literal["peak", "mid"] = "peak",
    limit: Annotated[float, Field(gt=0, le=1)] = 0.99,
) -> Allocation:
    """Gives each block a sparsity by the power-law exponent of its weights' spectra; needs no data.

    Args:
        epsilon: relative sparsities run from 1 - epsilon (heaviest tail) to 1 + epsilon. Published: 0.3 for magnitude,
            0.2 for Wanda and SparseGPT at 70 %.
        estimator: where the tail begins: "peak" searches near the peak of the spectrum, "mid" takes the upper half.
        limit: largest fraction that a single matrix loses; what it cuts off goes to the others.
    """
    estimate = {"peak": alpha_peak, "mid": alpha_mid}[estimator]
    block_of, alphas = dict[str, int](), dict[int, list[float]]()
    for weight in network:
        block_of[weight.name] = weight.block
        values = eigenvalues(weight.matrix)
        found = alphas.setdefault(weight.block, [])
        # a matrix of zeros, of rank one or orthogonal has no tail that says anything
        if len(values) >= 2 and math.isfinite(alpha := estimate(values)):
            found.append(alpha)
    means = {block: sum(found) / len(found) for block, found in alphas.items() if found}
    context.note("alpha", {str(block): round(mean, 4) for block, mean in means.items()})
    low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
    middle = (low + high) / 2

    def relative(block: int) -> float:
        share = (means.get(block, middle) - low) / (high - low) if high > low else 0.5
        return 1 - epsilon + 2 * epsilon * share

    try:
        counts = scaled_counts([relative(block) for block in block_of.values()], network.sizes, network.remove, limit)
    except ValueError as error:
        raise RequestError(f"alphapruning with limit={limit:g}: {error}; raise the limit or remove less.") from error
    return Allocation(dict(zip(block_of, counts, strict=True)))

"""MoE-Pruner: Wanda for experts, each token counted by the gate that its expert's output is multiplied by.

Xie and others, "MoE-Pruner: Pruning Mixture-of-Experts Large Language Model using the Hints from Its Router",
arXiv:2410.12013. S_ij = |W_ij| · ‖x_j · gate‖ = |W_ij| · √Σ_t (g_t x_tj)²; with all gates 1 it is Wanda.

For an expert's second matrix (down projection) the input is the expert's hidden activation, weighted by the same gate:
an inference from the paper's Eq. 9, which does not say so itself. The paper's distillation expert by expert is not part
of this step. The paper passes the dense network's outputs on to the next block; here they come through the pruned ones
unless the recipe says `calibration: {inputs: dense}`.
"""

from typing import Literal

from secateur.registry import Budget, GatedNorms, Mask, Weight, method


@method(
    "moe_pruner",
    kind="weights",
    paper="arXiv:2410.12013",
    claim="Mixtral-8x7B at 50 %: WikiText perplexity 4.68 where Wanda has 4.97 and the dense model 3.84",
    when="after training",
    speedup="specific",
    criterion="activation",
    schedule="one-shot",
)
def moe_pruner(weight: Weight, norms: GatedNorms, budget: Budget, *, per: Literal["row", "layer"] = "row") -> Mask:
    """Removes the lowest |weight| · input norm, where a token counts by the router's gate.

    Outside experts, and where every gate is 1, this is Wanda.

    Args:
        per: compare scores within each output row, or within the whole matrix.
    """
    scale = (norms.squares / norms.tokens).sqrt()
    return Mask(budget.mask(lambda rows: weight.matrix[rows].abs().mul_(scale), per))

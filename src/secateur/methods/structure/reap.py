"""REAP: experts go whose answers, weighted by the router, are small.

Lasby and others, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv:2510.13999. Saliency of
expert j: S_j = (1 / |X_j|) Σ over x in X_j of g_j(x) · |f_j(x)|, X_j the tokens that go to it, g_j its gate, f_j its output.
The lowest of each block go at once, with their router rows; the others are routed as before.

The formula was read in several descriptions of the paper, not in the paper itself. The gate here is what the network
multiplies by: normalised over a token's experts where it does so, as in the authors' code since March 2026. That code
compares with other scores, which are options under the names that it gives them; what they mean is read off these names:
frequency |X_j|, weighted_frequency_sum Σ g_j, ean_sum Σ |f_j| and ean_mean ("expert activation norm"). An expert that no
calibration token reached has no saliency; here it goes first.
"""

from typing import Literal

from torch import Tensor

from secateur.calibration.routing import ExpertSums
from secateur.errors import RequestError
from secateur.network.widths import round_width
from secateur.registry import Context, Cut, Network, Plan, Ratio, Routing, Units, method

Score = Literal["reap", "frequency", "weighted_frequency_sum", "ean_sum", "ean_mean"]


@method(
    "reap",
    kind="structure",
    paper="arXiv:2510.13999",
    claim="near-lossless code generation and tool calling with Qwen3-Coder-480B and Kimi-K2 without half of their experts",
    when="after training",
    speedup="universal",
    criterion=("activation", "frequency"),
    schedule="one-shot",
    comparison="layer",
    axes=("experts",),
)
def reap(
    network: Network[Units],
    routing: Routing,
    context: Context,
    *,
    ratio: Ratio = 0.25,
    ratios: list[Ratio] | None = None,
    score: Score = "reap",
) -> Plan:
    """Removes the experts of every mixture whose gated outputs are smallest on the tokens that go to them.

    Args:
        ratio: fraction of the experts removed in every mixture.
        ratios: one ratio for each block that holds a mixture, instead of `ratio`.
        score: reap is the mean over an expert's tokens of gate times norm of output; frequency counts its tokens,
            weighted_frequency_sum adds up their gates; ean_sum adds up the norms of outputs, ean_mean is their mean.
    """
    if ratios is not None and len(ratios) != len(network):
        raise RequestError(f"ratios holds {len(ratios)} numbers, but {len(network)} blocks hold experts.")
    plan, idle = Plan(), {}
    for place, units in enumerate(network):
        sums = routing.blocks[units.block]
        keep = round_width(units.count, ratio if ratios is None else ratios[place], 1)
        order = saliency(sums, score).argsort(descending=True, stable=True)
        plan.cuts[units.block, units.axis] = Cut(order[:keep].sort().values)
        if silent := int((sums.tokens == 0).sum()):
            idle[units.block] = silent
    if idle:
        context.warn(
            f"reap: {sum(idle.values())} experts of {len(idle)} blocks were reached by no calibration token and go first; "
            "more text says more of them."
        )
    return plan


def saliency(sums: ExpertSums, score: Score) -> Tensor:
    """(experts,) what each is worth, 0 for one that no token reached."""
    tokens = sums.tokens.clamp(min=1)
    return {
        "reap": sums.gated_norms / tokens,
        "frequency": sums.tokens,
        "weighted_frequency_sum": sums.gates,
        "ean_sum": sums.norms,
        "ean_mean": sums.norms / tokens,
    }[score]

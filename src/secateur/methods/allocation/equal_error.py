"""Equal errors: every block loses as many units as cost it the same share of the stream that it adds to. OUR method.

What a block adds wrongly matters beside the hidden states that it is added to: where they are long, the same error turns
them less. The error is that of plain removal in the order of the criterion's scores, measured in the dense network on
calibration tokens; a method that refits (LIAR) makes less of it, in every block. Errors of blocks do not add up in this, and
how much later blocks make of them is not looked at.

What was tuned: nothing. That widths of equal residual-relative error serve a small model better than equal widths was seen
on SmolLM2-135M.
"""

from typing import Annotated

from pydantic import Field

from secateur.methods.allocation.flap_search import one_threshold
from secateur.registry import Allocation, Context, ErrorCurves, UnitScores, method


@method(
    "equal_error",
    kind="allocation",
    paper="",
    claim="none: our own",
    when="after training",
    speedup="universal",
    criterion=("reconstruction", "another method's"),
    schedule="one-shot",
)
def equal_error(
    network: UnitScores,
    curves: ErrorCurves,
    context: Context,
    *,
    joint: bool = True,
    limit: Annotated[float, Field(gt=0, le=1)] = 0.99,
) -> Allocation:
    """Gives blocks the widths at which the errors of their outputs are the same share of the residual stream.

    Args:
        joint: heads and neurons share one error; otherwise each kind has its own, and its own part of the budget.
        limit: largest fraction of a block's units that goes.
    """
    prices = {each.name: curves.squares[each.name].cummax(0).values for each in network}
    found = one_threshold(network, prices, joint, limit, "equal_error")
    context.note(
        "error beside the stream",
        {
            name: round(float(prices[name][count - 1].sqrt()), 6) if count else 0.0
            for name, count in found.remove.items()
        },
    )
    return found

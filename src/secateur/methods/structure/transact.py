"""TransAct: units are kept by the size of their transitional activations, those between the two matrices of a module.

"TransAct: Transformer Pruning by Transitional Activations", ACL Findings 2024, arXiv:2407.05690. Read in its code: the score
of an inner dimension is √Σ a² over all tokens, a being the concatenated head outputs before the output projection or
act(gate) · up before down; a head's score is the mean over its dimensions plus (10 / head_dim) times their maximum. Kept
units are sorted.

OURS: heads that share keys and values are one unit, whose score is the mean of its heads' (the published code sets as many
key-value heads as heads and has no grouped queries). One shot: a unit's score is of its own activations alone, so shots
without training between them would take what one shot takes, but for what lies before it having shrunk by then. The paper's
K = 8 shots, each leaving cur − (cur − target) // remaining units, are as many steps of a recipe with multiple_of=1 and
ratio = 1 − next / cur, and the training between them is a step of its own.
"""

from typing import Annotated

from pydantic import Field

from secateur.network.anatomy import COLUMN_AXES, NEURON_AXES
from secateur.registry import Cut, InputNorms, Units, method

PEAK = 10.0


@method(
    "transact",
    kind="structure",
    paper="arXiv:2407.05690",
    claim="best at high compression of LLaMA-2-7B, with a smaller KV cache",
    when="after training",
    speedup="universal",
    axes=(*COLUMN_AXES, "expert_neurons"),
    criterion="activation",
    schedule="one-shot",
    refuses=lambda given: (
        "peak is for dimensions of a head, and a neuron has one; leave it out, or cut heads."
        if given["peak"] != PEAK and set(given["axis"]) <= set(NEURON_AXES)
        else None
    ),
)
def transact(units: Units, norms: InputNorms, *, peak: Annotated[float, Field(ge=0)] = PEAK) -> Cut:
    """Keeps the units with the largest activations, weights not looked at.

    Args:
        peak: how much the largest dimension of a head counts, beside their mean; divided by the size of a head.
    """
    sizes = units.per_unit(norms.squares.sqrt())
    if units.axis in NEURON_AXES:
        return units.best(sizes[:, 0])
    heads = sizes.unflatten(1, (-1, units.head_dim))
    return units.best((heads.mean(2) + peak / units.head_dim * heads.amax(2)).mean(1))

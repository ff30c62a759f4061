"""COMP-style: units go by what they cost once the others adapt, and a scale for each kept input is tuned.

COMP (arXiv:2501.15255, 2025) is known by its abstract alone: whole layers go first by their importance, then neurons of
dense layers by a "matrix condition-based" metric, and "mask tuning" recovers without fine-tuning. No text beyond that and no
code were found, so nothing here claims to be what it does. OURS: the metric (Optimal Brain Surgeon's leverage score), its
ridge, and mask tuning in closed form (secateur.tensor.mask_tuning). Its layers come first in a recipe:
`steps: [block_influence: {ratio: 0.1}, comp: {ratio: 0.1}]`.
"""

from typing import Annotated

from pydantic import Field

from secateur.network.anatomy import COLUMN_AXES
from secateur.registry import Cut, Gram, Units, method
from secateur.tensor.mask_tuning import leverage_scores, tune_scales


@method(
    "comp",
    kind="structure",
    paper="arXiv:2501.15255",
    claim="6.13 % better than LLM-Pruner on LLaMA-2-7B at 20 %, with 80 % less memory",
    when="after training",
    speedup="universal",
    axes=(*COLUMN_AXES, "expert_neurons"),
    criterion="reconstruction",
    schedule="one-shot",
)
def comp(
    units: Units,
    gram: Gram,
    *,
    ridge: Annotated[float, Field(gt=0)] = 0.01,
    tuning: Annotated[float, Field(ge=0)] | None = 0.1,
) -> Cut:
    """Keeps the units whose removal the others could make up for least, and scales what is kept.

    Args:
        ridge: damping of the score, relative to each input's own energy.
        tuning: how strongly scales are held at 1, relative to their own effect; null for no tuning.
    """
    moment, output = gram.matrix / gram.tokens, units.output
    kept = units.best(leverage_scores(moment, output, units.width, ridge)).kept
    if tuning is None or len(kept) == units.count:
        return Cut(kept)
    columns = units.columns(kept)
    return Cut(kept, output[:, columns] * tune_scales(moment, output, columns, tuning))

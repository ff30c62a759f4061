"""Zipf surgeon: neurons are eliminated and what they did is folded into the rest, with no data at all. OUR extension.

It is not PruneNet and no published system: PruneNet's reward (spectra) says little of a small model's perplexity, so this
asks for the reward that means something, the change of the block's output, and makes up the inputs it needs from the
checkpoint: tokens drawn by Zipf's law over the vocabulary's order, carried through the dense network once
(secateur.calibration.synthetic). No text is read and none is generated. The elimination is Optimal Brain Surgeon's
(Hassibi and Stork 1993) on whole neurons (secateur.tensor.elimination).

Fits vocabularies that are numbered by frequency, as byte-pair encodings are; on others expect less, and so where the first
entries are special tokens and bytes (259 in LLaMA-2's), which are then drawn most.

What was tuned: the prior, the ridge and the tokens per neuron were chosen on one model only, SmolLM2-135M, by perplexity on
WikiText-2's validation text; that Zipf's law does better than uniform drawing was first seen on three windows of the test
text. Measured against random neurons and PruneNet in benchmarks/quality.py.
"""

from typing import Annotated

import torch
from pydantic import Field

from secateur.errors import RunError
from secateur.network.widths import round_width
from secateur.registry import Cut, Ratio, SyntheticGram, Units, method
from secateur.tensor.elimination import eliminate


@method(
    "zipf_surgeon",
    kind="structure",
    paper="",
    claim="without data, at most half the perplexity random neurons leave (SmolLM2-135M at ratio 0.2, WikiText-2 test)",
    when="after training",
    speedup="universal",
)
def zipf_surgeon(
    units: Units,
    gram: SyntheticGram,
    *,
    ratio: Ratio = 0.2,
    ridge: Annotated[float, Field(gt=0)] = 0.1,
    group: Annotated[int, Field(ge=1)] = 16,
    multiple_of: int = 32,
) -> Cut:
    """Removes the feed-forward neurons whose loss the others can make up for, and lets them make up for it.

    Args:
        ratio: fraction of the neurons removed, 0 ≤ ratio < 1.
        ridge: damping of the refit, relative to each neuron's own energy; more keeps the weights closer to the old ones.
        group: neurons removed between two computations of the costs; more is faster and coarser.
        multiple_of: the kept width is rounded to a multiple of this where the ratio allows it.
    """
    width = round_width(units.count, ratio, multiple_of)
    try:
        return _solve(units, gram, width, ridge, group)
    except FloatingPointError as error:
        raise RunError(f"block {units.block}: {error}; use a larger ridge.") from error


def _solve(units: Units, gram: SyntheticGram, width: int, ridge: float, group: int) -> Cut:
    if width == units.count:
        return Cut(torch.arange(width))
    bias = units.down_bias
    if bias is None:
        kept, columns = eliminate(gram.matrix, units.down, width, ridge, group)
        return Cut(kept, columns)
    # an output bias is one more input, always 1: the mean of what is removed goes there
    moment = torch.cat(
        [torch.cat([gram.matrix, gram.mean[:, None]], dim=1), torch.cat([gram.mean, torch.ones(1)])[None]]
    )
    kept, columns = eliminate(moment, torch.cat([units.down, bias[:, None]], dim=1), width, ridge, group, constant=True)
    return Cut(kept, columns[:, :-1], columns[:, -1])

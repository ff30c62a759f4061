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

from pydantic import Field

from secateur.errors import RunError
from secateur.methods.structure.unit_surgeon import surgeon
from secateur.registry import Cut, SyntheticGram, Units, method


@method(
    "zipf_surgeon",
    kind="structure",
    paper="",
    claim="without data, at most half the perplexity random neurons leave (SmolLM2-135M at ratio 0.2, WikiText-2 test)",
    when="after training",
    speedup="universal",
    criterion="reconstruction",
    schedule="one-shot",
    axes=("neurons",),
    scores=False,
)
def zipf_surgeon(
    units: Units,
    gram: SyntheticGram,
    *,
    ridge: Annotated[float, Field(gt=0)] = 0.1,
    group: Annotated[int, Field(ge=1)] = 16,
) -> Cut:
    """Removes the feed-forward neurons whose loss the others can make up for, and lets them make up for it.

    Args:
        ridge: damping of the refit, relative to each neuron's own energy; more keeps the weights closer to the old ones.
        group: neurons removed between two computations of the costs; more is faster and coarser.
    """
    try:
        return surgeon(units, gram.matrix, gram.mean, ridge, group)
    except FloatingPointError as error:
        raise RunError(f"block {units.block}: {error}; use a larger ridge.") from error

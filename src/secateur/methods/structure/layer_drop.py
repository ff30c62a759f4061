"""Layer pruning by plain metrics, in one shot: the benchmark that found dropping the last layers hard to beat.

Lu and others, "Reassessing Layer Pruning in LLMs: New Insights and Methods", arXiv:2411.15558. Each metric scores every
block of the dense network once, and the lowest go together: iterating brought nothing there. Their claims are of models
that were tuned afterwards (final norm, head and last three layers), which is a step of its own.

What the paper leaves open is a parameter or said here: sums over weights take matrices, and vectors only on request; a
batch of the Taylor sums is one calibration sequence; perplexity is measured on the calibration tokens, where the
paper takes WikiText-2.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from secateur.registry import BlockGradients, Blocks, Context, Flow, Kept, LossWithout, method

_READ_BY = {
    "p": (1, ("magnitude",)),
    "vectors": (False, ("magnitude", "taylor")),
    "influence": ("token", ("influence",)),
}


def _unread(given: Mapping[str, Any]) -> str | None:
    for name, (default, metrics) in _READ_BY.items():
        if given[name] != default and given["metric"] not in metrics:
            return (
                f"metric={given['metric']} does not read {name}; leave it out, or take metric={' or '.join(metrics)}."
            )
    return None


@method(
    "layer_drop",
    kind="structure",
    paper="arXiv:2411.15558",
    claim="without the last quarter of its layers, and tuned, a model does as well as with elaborate metrics",
    when="after training",
    speedup="universal",
    criterion=("position", "random", "magnitude", "similarity", "saliency", "loss"),
    schedule="one-shot",
    only={
        "flow": {"metric": "influence"},
        "gradients": {"metric": "taylor"},
        "without": {"metric": "perplexity"},
    },
    refuses=_unread,
)
def layer_drop(
    blocks: Blocks,
    context: Context,
    flow: Flow | None,
    gradients: BlockGradients | None,
    without: LossWithout | None,
    *,
    metric: Literal["reverse", "random", "magnitude", "influence", "taylor", "perplexity"] = "reverse",
    p: Literal[1, 2] = 1,
    vectors: bool = False,
    influence: Literal["token", "flat"] = "token",
) -> Kept:
    """Removes whole blocks by one of the plain metrics of "Reassessing Layer Pruning", all at once.

    Args:
        metric: reverse removes the last blocks; random any; magnitude those with the smallest sum of absolute weights to
            the power p; influence those with the smallest 1 − cosine(x, y) of what they read and write; taylor those with
            the smallest sum over weights of abs(Σ over sequences of weight · gradient); perplexity those without which
            the loss is lowest.
        p: the power of magnitude.
        vectors: whether magnitude and taylor count biases and scales of norms too.
        influence: token is the mean of the tokens' cosines; flat, as in the published code, is one cosine of all tokens
            flattened and never scores the last block, which therefore stays.
    """
    count = len(blocks)
    if metric == "reverse":
        return blocks.without(reversed(range(count)))
    if metric == "random":
        return blocks.without(torch.randperm(count, generator=context.generator("blocks")).tolist())
    if metric == "magnitude":
        return blocks.without_lowest({block.index: _size(block, p, vectors) for block in blocks})
    if flow is not None:
        cosine = flow.cosine if influence == "token" else flow.flat[:-1]
        return blocks.without_lowest(dict(enumerate((1 - cosine).tolist())))
    if gradients is not None:
        sums = gradients.matrices + gradients.vectors if vectors else gradients.matrices
        return blocks.without_lowest(dict(enumerate(sums.tolist())))
    assert without is not None, "every other metric was seen above"
    context.note("loss of the dense network", without.dense)
    return blocks.without_lowest(dict(enumerate(without.losses.tolist())))


def _size(block, p: int, vectors: bool) -> float:  # type: ignore[no-untyped-def]
    """Σ|w|^p over a block, summed in float64: a block may hold 10⁹ weights."""
    tensors = [block.matrices()] + ([block.vectors()] if vectors else [])
    return sum(float(tensor.abs().pow(p).sum(dtype=torch.float64)) for part in tensors for tensor in part)

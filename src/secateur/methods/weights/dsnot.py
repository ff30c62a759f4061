"""DSnoT: repairs the mask of another method by swapping weights, without changing any.

Zhang and others, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, arXiv:2310.08915.
What a row's output loses on average, ε = Σ over removed j of W_ij μ_j, is brought below a threshold by exchanging
removed weights that would help for kept ones that matter little (secateur.tensor.swaps).

Written from a description of the method: the published code has no licence and was not read. It refines attention alone
by default; here `targets` says what is refined.

same_sign is on by default, although the published code is said to run without it: there the error of most rows swings
about zero until the cycles are used up. SmolLM2-135M, all matrices, Wanda's masks from the dense model's inputs (4096
tokens of WikiText-2's test text, perplexity on 3072 others, one run each): at 70 % Wanda 718, without the test 1410,
with it 613, with a relative threshold as well 601; at 60 % 136, 242, 144, 142. DSnoT is not always a gain.
"""

from typing import Annotated

from pydantic import Field

from secateur.registry import Budget, Context, InputNorms, Mask, MaskFrom, Moments, Weight, method
from secateur.tensor.patterns import Pattern
from secateur.tensor.swaps import refine


@method(
    "dsnot",
    kind="weights",
    paper="arXiv:2310.08915",
    claim="at 70 % LLaMA-7B has a perplexity 26.79 below Wanda's; at 50 % others found it no better than Wanda",
    when="after training",
    speedup="specific",
    criterion="reconstruction",
    schedule="one-shot",
    refuses=lambda given: (
        "it swaps single weights, which breaks tiles; use a plain fraction or N:M."
        if Pattern.parse(given["pattern"]).block is not None
        else None
    ),
)
def dsnot(
    weight: Weight,
    moments: Moments,
    norms: InputNorms,
    budget: Budget,
    context: Context,
    *,
    mask: MaskFrom = "wanda",
    cycles: Annotated[int, Field(ge=0)] = 50,
    threshold: Annotated[float, Field(ge=0)] = 0.1,
    length: Annotated[int, Field(ge=1)] = 2048,
    relative: bool = False,
    same_sign: bool = True,
) -> Mask:
    """Swaps removed and kept weights of each row until the mean of its output is nearly what it was.

    Inputs without mean, as after a LayerNorm without bias, leave the mask as it is.

    Args:
        mask: the method whose mask is refined; every row (and group of N:M) keeps its number of weights.
        cycles: most swaps of a row.
        threshold: a row has stopped once its error is at most this; in the published units, which depend on the scale
            of weights and inputs.
        length: the published error is summed over a sequence of so many tokens, ours is the mean of a token times this.
        relative: threshold is instead a fraction of the row's error at the start, which depends on no scale (ours).
        same_sign: refuse swaps after which the error has changed its sign, so that it falls at every swap; N:M always
            does. false is how the published code is said to run.
    """
    refined = refine(
        weight.matrix, mask, moments.mean * length, moments.variance, norms.norms,
        cycles=cycles, threshold=threshold, relative=relative, same_sign=same_sign, group=budget.pattern.of,
    )  # fmt: skip
    error = {"before": float(refined.before.abs().mean()), "after": float(refined.after.abs().mean())}
    context.note("dsnot", {"swaps": int(refined.swaps.sum()), "mean error": error})
    return Mask(refined.kept)

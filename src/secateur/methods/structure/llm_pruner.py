"""LLM-Pruner: units go whose weights matter least to the loss, by Taylor terms of every tensor that is coupled to them.

Ma and others, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv:2305.11627. A group is a
unit with all that must go with it: a neuron across gate, up and down; heads across q, k, v and o. Elements w of it have the
salience s = w g (first order), w² F (second), or w g − ½ w² F (mixed), with g the gradient of the next-token loss and F the
mean over sequences of its square. One backward pass for each sequence gives both. The paper takes 10 sequences of 64 tokens:
`calibration: {samples: 10, length: 64}`.

The published README names the mixed salience as its default, the code the first-order one, which is ours too. Its recipe of
20 % removes a quarter of layers 4 to 29 of 32 and spares the others: `ratios` says that here, with 0 for spared blocks.

What differs: a unit of attention is what shares keys and values, with all its queries, so no score is folded over key-value
groups (the code's folding mixes queries of different groups). g is the mean over sequences of each one's gradient, which for
sequences of one length is that of the batch. Biases are members of a group like matrices; the models of the paper have none.
"""

from typing import Literal

import torch

from secateur.registry import Cut, UnitGradients, Units, method


@method(
    "llm_pruner",
    kind="structure",
    paper="arXiv:2305.11627",
    claim="LLaMA-7B at 5.4 billion parameters, tuned on Alpaca, has a zero-shot average of 59.23, dense 63.25",
    when="after training",
    speedup="universal",
    criterion="saliency",
    schedule="one-shot",
)
def llm_pruner(
    units: Units,
    gradients: UnitGradients,
    *,
    element: Literal["first", "second", "mixed"] = "first",
    score: Literal["param", "vectorize"] = "param",
    group: Literal["sum", "mean", "max", "prod", "first"] = "sum",
) -> Cut:
    """Keeps the units whose removal changes the loss most, by Taylor terms of all tensors that are coupled to them.

    Args:
        element: the salience of one weight: first order w·g, second order w²·F, or mixed w·g − ½ w²·F.
        score: param sums the absolute saliences of a row or column; vectorize takes the absolute value of their sum, which
            is what removing the whole row changes. Rows and columns of one head or unit are added.
        group: how the scores of coupled tensors are combined; first takes the gate or the queries alone, and prod leaves out
            tensors that are zero throughout, such as biases that were never trained.
    """
    rows = [terms.sizes(element) if score == "param" else terms.sums(element).abs() for terms in gradients.tensors]
    scores = torch.stack([each.sum(1, dtype=torch.float64) for each in rows])  # (tensors, count)
    if group == "prod":
        scores = scores[(scores != 0).any(1)]
        # by logarithms, because products of five small numbers leave the range in which they differ
        return units.best(scores.log().sum(0))
    if group == "first":
        return units.best(scores[0])
    return units.best(scores.amax(0) if group == "max" else scores.mean(0) if group == "mean" else scores.sum(0))

"""Model folding: similar neurons and heads are merged, where other methods remove them. No data, no training.

"Forget the Data and Fine-Tuning! Just Fold the Network to Compress", ICLR 2025, arXiv:2502.10216; algorithm from a summary
of the paper and from its public code. The features of a unit are its rows in every matrix and vector that makes it and its
columns in the matrix that reads it; units are clustered by them (k-means, 10 starts). A cluster becomes one unit: its rows
the mean (UᵀU)⁻¹Uᵀ W, its columns the sum W U. Neurons cluster on [gate | up | downᵀ], heads on whole q, k, v, o, which
rotary positions allow. Equal units fold without loss.

What differs here: heads that share keys and values are one unit (the code refuses them); the residual stream is not folded
(nor is it in the paper's transformers). The paper's repair of variances (Fold-AR, Fold-R, Fold-DIR) lives in batch norms
of convolution networks, which are no language models and out of scope; transformers get none, and that is the default.
`repair` is OURS: Fold-AR's factor √(N / (1 + (N − 1) E)) on the merged rows themselves, so that they are as long as those
that they stand for; biases, like a batch norm's shift, are not scaled. cluster="ward" is what a later code of others takes
for all architectures.

Cost: the Gram matrix of the features, 3 h m² multiplications for m gated neurons, then passes of m k (see
secateur.tensor.clustering). Beside the block's matrices in float32 there are m (m + 2 k) numbers in memory, 1.2 GB for
m = 11008 and k = 8800.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.registry import Context, Cut, Units, method
from secateur.tensor.clustering import cluster_means, cluster_sums, k_means, norms_lost, representatives, scatter, ward
from secateur.tensor.products import linear

STARTS = 10


@method(
    "fold",
    kind="structure",
    paper="arXiv:2502.10216",
    claim="without data, LLaMA-7B at 20 % is near FLAP and Wanda-sp, which need some",
    when="after training",
    speedup="universal",
    criterion="similarity",
    schedule="one-shot",
    axes=("heads", "neurons", "expert_neurons"),
    scores=False,
    refuses=lambda given: (
        "cluster=ward merges two by two and never starts anew; leave starts out, or take cluster=kmeans."
        if given["cluster"] == "ward" and given["starts"] != STARTS
        else None
    ),
)
def fold(
    units: Units,
    context: Context,
    *,
    cluster: Literal["kmeans", "ward"] = "kmeans",
    starts: Annotated[int, Field(ge=1)] = STARTS,
    repair: bool = False,
) -> Cut:
    """Merges similar units: each cluster becomes one, with the mean of what makes them and the sum of what reads them.

    Args:
        cluster: how clusters are found: kmeans, as in the paper, or ward, merging two by two from below.
        starts: how often kmeans starts anew; the best is taken.
        repair: OURS: give the rows of merged units the length that averaging took from them; the paper does not for
            transformers.
    """
    if units.keep == units.count:
        return Cut(torch.arange(units.count))
    gram = _gram(units)
    if cluster == "ward":
        labels = ward(gram, units.keep)
    else:
        labels = k_means(gram, units.keep, context.generator("fold", *units.address), starts)
    # clusters in the order of the units that stand for them, whose places they take
    kept, order = representatives(gram, labels).sort()
    labels = order.argsort()[labels]
    context.note("scatter", scatter(gram, labels) / max(float(gram.diagonal().sum()), 1e-30))
    makers = tuple(_mean(rows, labels, units.keep, repair) for rows in units.coupled)
    columns = units.per_unit(units.output).movedim(1, 0)
    columns = cluster_sums(columns, labels.to(columns.device), units.keep)
    return Cut(kept, columns.movedim(0, 1).flatten(1), None, makers)


def _gram(units: Units) -> Tensor:
    """(n, n) inner products of the units' features, tensor by tensor: the features are never laid side by side."""
    rows = units.per_unit(units.output).movedim(1, 0).flatten(1)
    gram = linear(rows, rows)
    for part in units.coupled:
        rows = part.flatten(1)
        gram += linear(rows, rows)
    return gram.cpu()


def _mean(rows: Tensor, labels: Tensor, count: int, repair: bool) -> Tensor:
    labels = labels.to(rows.device)
    means = cluster_means(rows, labels, count)
    if not repair or rows.dim() == 2:
        return means
    return means * norms_lost(rows.flatten(1), labels, count).view(-1, 1, 1)

"""PQ Index as a budget: a matrix whose weights are far from flat loses more.

Diao and others, "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv:2302.05601, measure how
compressible weights are and let that say how much each round of training and pruning removes (SAP). Only the measure is
taken over: using SAP's bound to divide the budget of one pruning among the matrices of a language model is OUR
proposal, not the paper's, and untested there. Its γ scales all matrices alike and cancels.
"""

from typing import Annotated

from pydantic import Field

from secateur.errors import RequestError
from secateur.registry import Allocation, Context, Matrices, method
from secateur.tensor.budgets import scaled_counts
from secateur.tensor.pq_index import pq_index, removable, retained_bound

Positive = Annotated[float, Field(gt=0)]


@method(
    "pq_index",
    kind="allocation",
    paper="arXiv:2302.05601",
    claim="as a schedule of iterative pruning it beats lottery-ticket pruning; as a layer budget it is our proposal",
    when="after training",
    speedup="specific",
    criterion="magnitude",
    schedule="one-shot",
    refuses=lambda given: (
        f"it needs p < q, found p={given['p']:g} and q={given['q']:g}." if given["p"] >= given["q"] else None
    ),
)
def pq_index_allocation(
    network: Matrices,
    context: Context,
    *,
    p: Positive = 0.5,
    q: Positive = 1.0,
    eta: Annotated[float, Field(ge=0)] = 0.0,
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9,
    limit: Annotated[float, Field(gt=0, le=1)] = 0.99,
) -> Allocation:
    """Gives each matrix a sparsity in proportion to the share of its weights that the PQ Index says can go; needs no
    data.

    The receipt holds each matrix's index and bound: how many weights must stay.

    Args:
        p: smaller norm; the paper uses (p, q) = (0.5, 1) and (1, 2).
        q: larger norm.
        eta: how much of the q-norm may go with what is removed; larger lets more go.
        beta: largest share of a matrix that may count as removable.
        limit: largest fraction that a single matrix loses; what it cuts off goes to the others.
    """
    relative, told = dict[str, float](), dict[str, dict[str, float]]()
    for weight in network:
        size = weight.rows * weight.columns
        index = pq_index(weight.matrix, p, q)
        bound = retained_bound(index, size, p, q, eta)
        relative[weight.name] = int(removable(bound, size, beta=beta)) / size
        told[weight.name] = {"index": round(float(index), 6), "must stay": int(bound), "of": size}
    context.note("pq index", told)
    if not any(relative.values()):  # all weights of each matrix are equal: nothing tells them apart
        relative = dict.fromkeys(relative, 1.0)
    try:
        counts = scaled_counts(list(relative.values()), network.sizes, network.remove, limit)
    except ValueError as error:
        raise RequestError(f"pq_index with limit={limit:g}: {error}; raise the limit or remove less.") from error
    return Allocation(dict(zip(relative, counts, strict=True)))

"""One threshold for all: each matrix loses what it holds of the network's smallest weights.

Global magnitude pruning, as old as magnitude pruning itself. Nothing keeps a matrix of small weights from losing nearly
all of them; among matrices whose scales mean different things that is usual, and why uniform is the default.
"""

from secateur.registry import Allocation, Matrices, method
from secateur.tensor.budgets import lowest_counts
from secateur.tensor.patterns import Pattern


@method(
    "global_threshold",
    kind="allocation",
    paper="",
    claim="the common baseline: magnitude pruning without layers",
    when="after training",
    speedup="specific",
    criterion="magnitude",
    schedule="one-shot",
    refuses=lambda given: (
        "it counts single weights, not tiles; give a plain fraction, such as pattern=0.5."
        if "pattern" in given and Pattern.parse(given["pattern"]).block is not None
        else None
    ),
)
def global_threshold(network: Matrices) -> Allocation:
    """Divides the budget by how many of the smallest weights of all lie in each matrix; reads the matrices three times.

    With apply magnitude and per=layer this is global magnitude pruning to the weight. Only one matrix is held at a
    time.
    """
    sizes = {weight.name: weight.rows * weight.columns for weight in network}
    counts = lowest_counts(lambda: (weight.matrix for weight in network), network.remove)
    return Allocation(dict(zip(sizes, counts, strict=True)))

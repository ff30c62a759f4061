"""Magnitude pruning: the smallest weights go, no data is needed.

Han and others, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626,
without its retraining: the baseline of every paper on pruning. One threshold for the whole network is an allocation and not
part of this method.
"""

from typing import Literal

from secateur.registry import Budget, Mask, Weight, method


@method(
    "magnitude",
    kind="weights",
    paper="arXiv:1506.02626",
    claim="AlexNet keeps one of nine weights without loss of accuracy, trained again after pruning",
    when="after training",
    speedup="specific",
    criterion="magnitude",
    schedule="one-shot",
)
def magnitude(weight: Weight, budget: Budget, *, per: Literal["row", "layer"] = "layer") -> Mask:
    """Removes the weights of the smallest absolute value.

    Args:
        per: compare weights within the whole matrix, or within each output row; a plain fraction alone heeds it.
    """
    return Mask(budget.mask(lambda rows: weight.matrix[rows].abs(), per))

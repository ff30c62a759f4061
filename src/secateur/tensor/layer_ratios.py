"""Ratios of layers that move, step by step, towards the layers that change the hidden states least (arXiv:2502.03460)."""

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from secateur.tensor.budgets import scaled_counts

LIMIT = 0.99  # no layer loses more


def relative_importance(cosine: Tensor) -> Tensor:
    """(layers,) Ĩ in [−1, 1] with mean 0, from each layer's mean cosine of what it reads and what it gives.

    I = −cosine, less its mean, divided by the largest |I|; all 0 where all are alike.
    """
    importance = cosine.double().mean() - cosine.double()
    largest = importance.abs().max()
    return importance / largest if float(largest) > 0 else importance


def next_ratios(ratios: Tensor, importance: Tensor, share: float, strength: float) -> Tensor:
    """(layers,) s(t) = clip(s(t−1) + share − strength · Ĩ, 0, 0.99). Unclipped, their mean grows by `share` exactly."""
    return (ratios + share - strength * importance).clamp(0, LIMIT)


def largest_removals(sizes: Sequence[int]) -> list[int]:
    """How many units each layer can lose."""
    return [min(int(LIMIT * size + 1e-6), size - 1) for size in sizes]


def removals(ratios: Sequence[float], sizes: Sequence[int], gone: Sequence[int], total: int) -> list[int]:
    """How many units each layer has lost when `total` have gone: as near to its ratio of its size as that allows.

    What is gone does not come back, so a layer that has lost more than its ratio stays. Whole numbers by largest remainder;
    one unit at least stays in each layer.

    Args:
        ratios: (layers,) s.
        sizes: (layers,) units before the first step.
        gone: (layers,) units lost so far.
        total: units lost by all after this.

    Raises ValueError when fewer than that can go in all, or more are gone already.
    """
    more = total - sum(gone)
    room = [most - lost for most, lost in zip(largest_removals(sizes), gone, strict=True)]
    due = [
        max(Fraction(0), min(Fraction(ratio) * size - lost, Fraction(left)))
        for ratio, size, lost, left in zip(ratios, sizes, gone, room, strict=True)
    ]
    if sum(left for left, part in zip(room, due, strict=True) if part) < more:
        due = [Fraction(left) for left in room]  # clipping has left less than is to go: all that can give, gives
    relative = [part / left if left > 0 else Fraction(0) for part, left in zip(due, room, strict=True)]
    counts = scaled_counts(relative, [max(left, 0) for left in room], more)
    return [lost + count for lost, count in zip(gone, counts, strict=True)]

"""Random sub-models: which units are candidates to go, pairs of sub-models that lack them in turn, which go in the end."""

from collections.abc import Sequence

import torch
from torch import Tensor


def candidates(prior: Tensor, alive: Tensor, count: int) -> Tensor:
    """(min(count, alive),) the units of (n,) bool `alive` with the lowest (n,) prior, among equals the first."""
    units = alive.nonzero()[:, 0]
    return units[prior[units].argsort(stable=True)[:count]]


def draw_pair(prior: Tensor, top: float, lacking: int, generator: torch.Generator) -> Tensor:
    """Two sub-models that together have every candidate once.

    Args:
        prior: (c,) of the candidates; the probability to be lacking is proportional to top − prior.
        top: largest prior of all units beside which they stand.
        lacking: how many of them the first lacks; the second lacks the others.

    Returns: (2, c) bool, whether a candidate is present.
    """
    present = torch.ones(len(prior), dtype=torch.bool)
    if not lacking:  # which may be because there are no candidates
        return torch.stack([present, ~present])
    weights = (top - prior).double().clamp(min=0)
    # a candidate at the top, or all alike: drawn too, where nothing else is left
    weights = weights + max(1e-6 * float(weights.max()), 1e-30)
    present[torch.multinomial(weights / weights.sum(), lacking, generator=generator)] = False
    return torch.stack([present, ~present])


def lowest(theta: Tensor, prior: Tensor, count: int) -> Tensor:
    """(count,) indices of the lowest (c,) θ; equal ones are ordered by the prior."""
    order = prior.argsort(stable=True)
    return order[theta[order].argsort(stable=True)[:count]]


def lowest_within(
    theta: Tensor, prior: Tensor, sizes: Sequence[int], homes: Sequence[int], room: Sequence[int], budget: int
) -> list[int]:
    """Units from the lowest θ on, wherever they are, until they hold `budget` parameters.

    Args:
        theta, prior: (c,) of all candidates.
        sizes, homes: parameters of each, and the module that it is in.
        room: how many each module can lose at most.

    The sum of what goes is as near to the budget as the order allows: one that would pass it by more than half is skipped.
    """
    left, gone, removed = list(room), list[int](), 0
    for index in lowest(theta, prior, len(theta)).tolist():
        if left[homes[index]] > 0 and 2 * (removed + sizes[index] - budget) <= sizes[index]:
            left[homes[index]] -= 1
            removed += sizes[index]
            gone.append(index)
    return gone

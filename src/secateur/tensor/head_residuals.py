"""What attention heads that go leave to those that stay."""

import torch
from torch import Tensor


def residual_partners(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which heads stay, and whose residual each of them takes over: head i becomes head_i + (head_i − head_j).

    With heads in the order of their scores, best first and numbered from 1, head i of K takes over from j = 2K − i + 1, so
    that the worst that stays is paired with the best that goes, and so on (Minitron, arXiv:2407.14679). As many are paired
    as go, all at most.

    Args:
        scores: (L,) of all heads.
        keep: K.

    Returns: (K,) sorted indices kept, (K,) the index of each one's partner, its own where it has none.
    """
    order = scores.argsort(descending=True, stable=True)
    partners = torch.arange(len(scores))
    for place in range(keep):
        other = 2 * keep - place - 1
        if other < len(scores):
            partners[order[place]] = order[other]
    kept = order[:keep].sort().values
    return kept, partners[kept]

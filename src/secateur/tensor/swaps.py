"""Refining a mask by swapping removed and kept weights, row by row, without changing any weight.

Zhang and others, "Dynamic Sparse No Training", ICLR 2024, arXiv:2310.08915 (DSnoT). Written from a description of the
method, not from its code, which has no licence; what that left open is decided here and said so.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 24  # weights of rows that are refined together: sorting needs some 40 bytes for each


class Refined(NamedTuple):
    """A refined mask and what it did.

    kept: (r, d) bool. before, after: (r,) float64, the error ε of each row. swaps: (r,) int64.
    """

    kept: Tensor
    before: Tensor
    after: Tensor
    swaps: Tensor


def refine(
    weight: Tensor,
    kept: Tensor,
    mean: Tensor,
    variance: Tensor,
    norms: Tensor,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    relative: bool = False,
    same_sign: bool = False,
    group: int | None = None,
) -> Refined:
    """Swaps weights until what a row loses on average, ε = Σ over removed j of W_ij μ_j, is small.

    In one cycle a row with ε > 0 takes back the removed weight with the largest c/v, where c_ij = W_ij μ_j and v_j is
    the variance, and gives up the kept weight with c < 0 whose Wanda score |W_ij| · ‖x_j‖ is lowest; with ε < 0 the
    mirror image. Both bring ε towards zero: ε += c_given up − c_taken back. Both orders are those of the mask at the
    start: what was taken back is not given up again, and the other way round. Among equals the first goes.

    Decided here, the source being silent or unlike: only weights whose c has the sign that helps are candidates; a row
    in which they run out has stopped, and what has stopped is not touched (the published code is said to mark a kept
    weight of such a row). A swap that is refused passes over its taken-back candidate and costs a cycle. v = 0 counts
    as tiny.

    Args:
        weight: (r, d).
        kept: (r, d) bool mask to start from.
        mean, variance, norms: (d,) of the inputs; norms is the root of the mean square, on any scale.
        cycles: most cycles of a row.
        threshold: a row has stopped once |ε| ≤ threshold, in units of weight · mean; absolute as published, so that it
            depends on the scale of both.
        relative: the threshold is instead a fraction of the row's |ε| at the start [ours].
        same_sign: a swap after which ε has changed its sign is refused. Then |ε| falls at every swap. The published
            code does not ask for it except with groups.
        group: M of N:M. What is given up lies in the same group of M consecutive inputs as what is taken back, and
            same_sign holds. A weight that finds no partner in its group is passed over.

    The mask loses exactly as many weights of each row (and group) as before. With μ = 0 it stays bit for bit.
    """
    rows = max(1, CHUNK // weight.shape[1])
    inputs = (mean.float(), variance.float(), norms.float())
    strict = same_sign or group is not None
    done = [
        _refine_rows(some.float(), mask.clone(), *inputs, cycles, threshold, relative, strict, group)
        for some, mask in zip(weight.split(rows), kept.split(rows), strict=True)
    ]
    return Refined(*(torch.cat(pieces) for pieces in zip(*done, strict=True)))


def _refine_rows(
    weight: Tensor,
    kept: Tensor,
    mean: Tensor,
    variance: Tensor,
    norms: Tensor,
    cycles: int,
    threshold: float,
    relative: bool,
    same_sign: bool,
    group: int | None,
) -> Refined:
    """refine on rows that fit; `kept` is written to."""
    contribution = weight * mean
    wanda = weight.abs() * norms
    # sorted once by |c| / v: its positive and its negative members are then the two ends of the order by c / v
    gain = contribution.abs() / variance.clamp_min(1e-30)
    depth = min(cycles, weight.shape[1]) + 1
    takers = _queues(-gain, ~kept, contribution, depth)
    givers = _queues(wanda, kept, contribution, depth) if group is None else None
    error = contribution.double().masked_fill(kept, 0.0).sum(dim=1)
    before = error.clone()
    limit = threshold * before.abs() if relative else torch.full_like(before, threshold)
    every = torch.arange(len(weight), device=weight.device)
    # how far each queue has been used: [0] that of negative c, [1] that of positive c
    taken, given = torch.zeros(2, 2, len(weight), dtype=torch.int64, device=weight.device)
    swaps = torch.zeros_like(every)
    active = torch.ones_like(every, dtype=torch.bool)
    for _ in range(cycles):
        active &= error.abs() > limit
        if not active.any():
            break
        side = (error > 0).long()
        taker = takers[side, every, taken[side, every]]
        if givers is not None:
            giver = givers[1 - side, every, given[1 - side, every]]
            active &= giver >= 0
        else:
            assert group is not None
            # what was taken back has the sign of ε, which stays the same here: it is no candidate
            giver = _partner(taker, group, kept, contribution, wanda, side)
        active &= taker >= 0
        # exact in float64, whatever it is where there is no candidate
        change = _pick(contribution, giver) - _pick(contribution, taker)
        following = error + change
        accepted = active & (giver >= 0)
        if same_sign:
            accepted &= following * error >= 0
        row = every[accepted]
        kept[row, taker[row]] = True
        kept[row, giver[row]] = False
        error = torch.where(accepted, following, error)
        taken[side, every] += active
        given[1 - side, every] += accepted
        swaps += accepted
    return Refined(kept, before, error, swaps)


def _queues(key: Tensor, among: Tensor, contribution: Tensor, depth: int) -> Tensor:
    """(2, r, depth) columns of `among` by ascending key: those of negative, of positive contribution; -1 at the end."""
    order = key.masked_fill(~among, torch.inf).sort(dim=1, stable=True).indices
    signs = contribution.masked_fill(~among, 0.0).gather(1, order)
    wanted = torch.arange(1, depth + 1, device=key.device).expand(len(key), depth).contiguous()
    queues = []
    for members in (signs < 0, signs > 0):
        place = torch.searchsorted(members.cumsum(dim=1), wanted)  # of the first, second, … member
        found = order.gather(1, place.clamp_max(key.shape[1] - 1))
        queues.append(torch.where(place < key.shape[1], found, -1))
    return torch.stack(queues)


def _partner(taker: Tensor, group: int, kept: Tensor, contribution: Tensor, wanda: Tensor, side: Tensor) -> Tensor:
    """(r,) column of the lowest Wanda score in the taker's group among those kept of the other sign, or -1."""
    first = taker.clamp_min(0) // group * group
    columns = first.unsqueeze(1) + torch.arange(group, device=taker.device)
    signs = contribution.gather(1, columns).sign()
    suits = kept.gather(1, columns) & (signs == (1 - 2 * side).unsqueeze(1))
    scores = wanda.gather(1, columns).masked_fill(~suits, torch.inf)
    best = scores.sort(dim=1, stable=True).indices[:, 0]
    return torch.where(suits.any(dim=1), first + best, -1)


def _pick(matrix: Tensor, columns: Tensor) -> Tensor:
    """(r,) float64 entries of (r, d) at one column of each row."""
    return matrix.gather(1, columns.clamp_min(0).unsqueeze(1))[:, 0].double()

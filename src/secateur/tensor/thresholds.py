"""One threshold for all blocks: how many units go where each has a price, and widths that keep a sum."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cheapest_counts(prices: Sequence[Tensor], costs: Sequence[int], remove: int, limit: float = 1.0) -> list[int]:
    """How many of each entry's units go when the cheapest of all go until they cost as nearly as possible `remove`.

    Units of equal price go side by side: first those that are the smallest share of their entry, so entries that are alike
    lose alike.

    Args:
        prices: of each entry (n,), not falling: what the first unit, the second, ... asks to go.
        costs: what a unit of the entry counts.
        remove: how much is to go, counted so.
        limit: largest fraction of an entry that goes; one unit stays always.

    Raises ValueError where entries may not lose so much.
    """
    caps = [min(len(each) - 1, int(limit * len(each) + 1e-6)) for each in prices]
    most = sum(cap * cost for cap, cost in zip(caps, costs, strict=True))
    if remove > most:
        raise ValueError(f"{remove} are to go, but the units that may go count {most}")
    queue = sorted(
        (float(price), (rank + 1) / len(each), entry)
        for entry, (each, cap) in enumerate(zip(prices, caps, strict=True))
        for rank, price in enumerate(each[:cap].tolist())
    )
    counts, gone = [0] * len(prices), 0
    for _, _, entry in queue:
        # past the nearest: without this unit it was nearer
        if abs(gone + costs[entry] - remove) > abs(gone - remove) or gone >= remove:
            break
        counts[entry] += 1
        gone += costs[entry]
    return counts


def rounded_widths(
    wanted: Mapping[int, float], counts: Mapping[int, int], multiple: int | Mapping[int, int] = 1
) -> dict[int, int]:
    """Whole widths, multiples of `multiple` (one for all, or each block's own), whose sum is as near to that of `wanted` as
    multiples allow.

    Rounding is by largest remainder, among equals by index. What is to stay whole, and what is narrower than the multiple,
    need be no multiple.

    Args:
        wanted: widths by block, not whole.
        counts: how many units there are; at least one stays.
    """
    own = dict.fromkeys(wanted, multiple) if isinstance(multiple, int) else multiple
    steps = {block: own[block] if counts[block] >= own[block] else 1 for block in wanted}
    fixed = {block: counts[block] for block, width in wanted.items() if width >= counts[block]}
    free = {block: width for block, width in wanted.items() if block not in fixed}
    most = {block: counts[block] // steps[block] for block in free}
    found = {block: min(most[block], max(1, int(width / steps[block] + 1e-9))) for block, width in free.items()}

    def short(block: int) -> float:
        return free[block] / steps[block] - found[block]

    left = sum(free.values()) - sum(found[block] * steps[block] for block in free)
    while True:
        up = left > 0
        able = [block for block in free if (found[block] < most[block] if up else found[block] > 1)]
        block = max(able, key=lambda each: short(each) if up else -short(each), default=None)
        if block is None or abs(left) < steps[block] / 2 + 1e-9:
            break
        found[block] += 1 if up else -1
        left -= steps[block] if up else -steps[block]
    return {block: fixed.get(block) or found[block] * steps[block] for block in wanted}


def removal_squares(moment: Tensor, output: Tensor, order: Tensor, width: int = 1) -> Tensor:
    """(m,) mean over tokens of |Σ_removed W x|² when the first, the first two, ... units of `order` go.

    Args:
        moment: (m · width, m · width) mean of x xᵀ over tokens.
        output: (hidden, m · width) W.
        order: (m,) units in the order in which they go.
    """
    energy = moment * (output.T @ output)
    units = energy.unflatten(0, (-1, width)).unflatten(2, (-1, width)).sum(dim=(1, 3))[order][:, order]
    added = 2 * units.tril(-1).sum(1, dtype=torch.float64) + units.diagonal().double()
    return added.cumsum(0).clamp(min=0)

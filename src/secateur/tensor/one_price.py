"""One price for all: what each entry loses where every one of them pays the same for the last that it gives."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Curve = Sequence[tuple[Fraction, Fraction]]
"""(share, price) of one entry, both not falling, from (0, price) on; straight in between."""


def one_price_shares(curves: Sequence[Curve], sizes: Sequence[int], total: int) -> tuple[list[Fraction], Fraction]:
    """The share that each entry loses, and the price, at which Σ share · size is exactly `total`.

    Where several shares have the price that decides, all entries go the same part of the way through theirs. In rational
    numbers, so that no float sum decides.

    Args:
        curves: of each entry.
        sizes: how much each entry holds.
        total: how much goes in all.

    Raises ValueError where the curves do not reach so far.
    """
    most = sum(curve[-1][0] * size for curve, size in zip(curves, sizes, strict=True))
    if not 0 <= total <= most:
        raise ValueError(f"{total} are to go, but no more than {int(most)} may")

    def lost(shares: Sequence[Fraction]) -> Fraction:
        return sum((share * size for share, size in zip(shares, sizes, strict=True)), Fraction(0))

    prices = sorted({price for curve in curves for _, price in curve})
    low, high = 0, len(prices) - 1
    while low < high:  # the first price at which enough goes
        middle = (low + high) // 2
        if lost([share_at(curve, prices[middle]) for curve in curves]) >= total:
            high = middle
        else:
            low = middle + 1
    here, before = prices[low], prices[max(low - 1, 0)]
    least = [share_below(curve, here) for curve in curves]
    if lost(least) <= total:
        start, end, first, last = least, [share_at(curve, here) for curve in curves], here, here
    else:
        start, end, first, last = [share_at(curve, before) for curve in curves], least, before, here
    way = lost(end) - lost(start)
    part = (total - lost(start)) / way if way else Fraction(0)
    shares = [one + part * (other - one) for one, other in zip(start, end, strict=True)]
    return shares, first + part * (last - first)


def share_at(curve: Curve, price: Fraction) -> Fraction:
    """The largest share whose price is at most `price`; 0 where there is none."""
    found = Fraction(0)
    for (share, asked), (next_share, next_asked) in pairwise([*curve, (curve[-1][0], curve[-1][1])]):
        if asked > price:
            break
        found = share
        if next_asked > price:
            found += (price - asked) / (next_asked - asked) * (next_share - share)
    return found


def share_below(curve: Curve, price: Fraction) -> Fraction:
    """The smallest share from which on everything costs `price` or more: what goes for less."""
    for place, (share, asked) in enumerate(curve):
        if asked >= price:
            if not place:
                return Fraction(0)
            before, paid = curve[place - 1]
            return before + (price - paid) / (asked - paid) * (share - before)
    return curve[-1][0]

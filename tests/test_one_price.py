"""One price for all, by hand and by its definition."""

from fractions import Fraction

import pytest
import torch

from secateur.tensor.one_price import one_price_shares, share_at, share_below


def _curve(*points: tuple[float, float]) -> list[tuple[Fraction, Fraction]]:
    return [(Fraction(str(share)), Fraction(str(price))) for share, price in points]


def test_straight_curves_by_hand() -> None:
    # the second asks twice the price, so it loses half as much
    shares, price = one_price_shares([_curve((0, 0), (1, 1)), _curve((0, 0), (1, 2))], [100, 100], 60)
    assert shares == [Fraction(2, 5), Fraction(1, 5)] and price == Fraction(2, 5)
    # a larger matrix of the same curve loses the same share
    shares, _ = one_price_shares([_curve((0, 0), (1, 1)), _curve((0, 0), (1, 1))], [100, 300], 200)
    assert shares == [Fraction(1, 2), Fraction(1, 2)]


def test_what_costs_nothing_goes_first_and_side_by_side() -> None:
    free = [_curve((0, 0), (0.5, 0), (1, 1)), _curve((0, 0), (0.25, 0), (1, 1)), _curve((0, 0.5), (1, 1))]
    shares, price = one_price_shares(free, [100, 100, 100], 30)
    assert shares == [Fraction(1, 5), Fraction(1, 10), 0] and price == 0
    # a curve that begins at a price gives nothing for less
    assert one_price_shares(free, [100, 100, 100], 75) == ([Fraction(1, 2), Fraction(1, 4), 0], 0)


def test_a_step_is_shared() -> None:
    steps = [_curve((0, 0), (0.2, 0.5), (0.8, 0.5), (1, 1)), _curve((0, 0), (1, 1))]
    shares, price = one_price_shares(steps, [100, 100], 100)
    assert price == Fraction(1, 2) and shares == [Fraction(1, 2), Fraction(1, 2)]


def test_no_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="no more than 90"):
        one_price_shares([_curve((0, 0), (0.9, 1))], [100], 91)
    assert one_price_shares([_curve((0, 0), (0.9, 1))], [100], 90)[0] == [Fraction(9, 10)]


def test_random_curves_pay_one_price_and_sum_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        curves = []
        for _ in range(6):
            prices = torch.randint(0, 6, (5,), generator=generator).sort().values.tolist()
            shares = [0.0, 0.2, 0.4, 0.6, 0.9]
            curves.append([(Fraction(str(s)), Fraction(p, 5)) for s, p in zip(shares, prices, strict=True)])
        sizes = torch.randint(1, 50, (6,), generator=generator).tolist()
        total = int(0.9 * sum(sizes) * (trial / 50))
        shares, price = one_price_shares(curves, sizes, total)
        assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == total
        for share, curve in zip(shares, curves, strict=True):
            assert share_below(curve, price) <= share <= share_at(curve, price)

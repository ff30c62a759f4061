"""How long until something happens, by hand and against the plain definition."""

from fractions import Fraction

import pytest

from secateur.tensor.survival import restricted_mean, survival_curve, survival_quantile


def test_without_early_endings_it_is_the_plain_share() -> None:
    # tokens that agree: 0, 2, 2, 5, and two that never diverge within 6
    curve = survival_curve([0, 2, 2, 5, 6, 6], [True, True, True, True, False, False])
    assert curve == [Fraction(left, 6) for left in (6, 5, 5, 3, 3, 3, 2)]
    quantiles = [survival_quantile(curve, share) for share in (0.1, 0.25, 0.5, 0.6, 2 / 3, 0.75, 0.9)]
    assert quantiles == [0, 2, 2, 5, 5, None, None], "a third never diverged, so what more than that do is not known"
    assert restricted_mean(curve) == pytest.approx((0 + 2 + 2 + 5 + 6 + 6) / 6)


def test_what_ends_early_leaves_the_rest_to_say() -> None:
    # the classic table by hand: an event after 1, an ending after 2, events after 3 and 4
    curve = survival_curve([1, 2, 3, 4], [True, False, True, True])
    assert curve == [1, 1, Fraction(3, 4), Fraction(3, 4), Fraction(3, 8), 0]
    assert [survival_quantile(curve, share) for share in (0.25, 0.5, 1.0)] == [1, 3, 4]
    assert restricted_mean(curve) == pytest.approx(1 + 0.75 + 0.75 + 0.375)


def test_nothing_happens() -> None:
    curve = survival_curve([4, 4], [False, False])
    assert curve == [1] * 5 and survival_quantile(curve, 0.1) is None and restricted_mean(curve) == 4


def test_shares_are_taken_as_they_are_written() -> None:
    curve = survival_curve(list(range(10)), [True] * 10)
    # in floats 1 - 0.9 lies below a tenth, and the quantile would be one later
    assert survival_quantile(curve, 0.9) == 8 and survival_quantile(curve, 0.1) == 0

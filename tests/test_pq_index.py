"""PQ Index: closed forms and invariances."""

import math

import pytest
import torch

from secateur.tensor.pq_index import pq_index, removable, retained_bound

NORMS = [(0.5, 1.0), (1.0, 2.0), (0.25, 0.5), (1.0, 3.0)]


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_equal_weights_among_zeros_are_exactly_what_must_stay(p: float, q: float) -> None:
    for k, d in ((1, 7), (3, 1000), (64, 64), (999, 1000), (12_345, 100_000)):
        weight = torch.zeros(d)
        weight[torch.randperm(d, generator=torch.Generator().manual_seed(k))[:k]] = 0.37
        weight[::2] *= -1
        index = pq_index(weight, p, q)
        assert float(1 - index) == pytest.approx((k / d) ** (1 / p - 1 / q), rel=1e-9)
        bound = retained_bound(index, d, p, q)
        assert int(bound) == k
        assert int(removable(bound, d, beta=1.0)) == d - k


@pytest.mark.parametrize(("p", "q", "share"), [(0.5, 1.0, 0.847), (1.0, 2.0, 0.637)])
def test_a_gaussian_keeps_what_its_moments_say(p: float, q: float, share: float) -> None:
    def moment(order: float) -> float:
        return (2 ** (order / 2) * math.gamma((order + 1) / 2) / math.sqrt(math.pi)) ** (1 / order)

    exact = (moment(p) / moment(q)) ** (p * q / (q - p))
    assert exact == pytest.approx(share, abs=5e-4)
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    kept = int(retained_bound(pq_index(weight, p, q), weight.numel(), p, q)) / weight.numel()
    assert kept == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_neither_scale_nor_repetition_matters(p: float, q: float) -> None:
    weight = torch.randn(13, 17, generator=torch.Generator().manual_seed(1))
    index = float(pq_index(weight, p, q))
    assert 0 < index < 1
    for other in (weight * 1e-30, weight * 1e30, -weight, weight.repeat(3, 5), weight.T):
        assert float(pq_index(other, p, q)) == pytest.approx(index, rel=1e-6)


def test_the_formula_as_the_paper_writes_it() -> None:
    weight = torch.rand(5, 40, generator=torch.Generator().manual_seed(2)) + 0.1
    for p, q in NORMS:
        norms = [torch.linalg.vector_norm(weight.double(), order, dim=1) for order in (p, q)]
        expected = 1 - 40 ** (1 / q - 1 / p) * norms[0] / norms[1]
        torch.testing.assert_close(pq_index(weight, p, q, per_row=True), expected)


def test_removed_weights_are_not_counted_and_zeros_are() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    kept = torch.rand(6, 20, generator=torch.Generator().manual_seed(4)) < 0.5
    assert float(pq_index(weight, kept=kept)) == pytest.approx(float(pq_index(weight[kept])), rel=1e-12)
    assert float(pq_index(weight * kept)) > float(pq_index(weight, kept=kept)) + 0.1
    rows = pq_index(weight, kept=kept, per_row=True)
    alone = [float(pq_index(row[mask])) for row, mask in zip(weight, kept, strict=True)]
    assert rows.tolist() == pytest.approx(alone, rel=1e-12)


def test_flat_weights_and_nothing_at_all_have_index_zero() -> None:
    assert float(pq_index(torch.full((4, 5), -2.0))) == pytest.approx(0, abs=1e-12)
    assert float(pq_index(torch.zeros(9))) == 0
    assert float(pq_index(torch.ones(9), kept=torch.zeros(9, dtype=torch.bool))) == 0
    assert int(retained_bound(pq_index(torch.ones(9)), 9)) == 9


def test_eta_gamma_and_beta() -> None:
    index = pq_index(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    # (1 + η)^(−q/(q−p)) = 1/4 of the two
    assert int(retained_bound(index, 8, eta=1.0)) == 1
    bounds = torch.tensor([1, 50, 100])
    assert removable(bounds, 100).tolist() == [90, 50, 0]
    assert removable(bounds, 100, gamma=0.29).tolist() == [28, 14, 0]
    assert removable(torch.tensor(0), 100, beta=0.29).tolist() == 29


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0)])
def test_norms_must_differ_in_the_right_order(p: float, q: float) -> None:
    with pytest.raises(ValueError, match="0 < p < q"):
        pq_index(torch.ones(3), p, q)
    with pytest.raises(ValueError, match="0 < p < q"):
        retained_bound(torch.tensor(0.5), 3, p, q)

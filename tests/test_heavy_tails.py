"""Hill's estimate: Pareto samples, closed forms, invariances, and the definition spelled out."""

import math

import pytest
import torch

from secateur.tensor.heavy_tails import alpha_mid, alpha_peak, eigenvalues, hill


def _pareto(alpha: float, count: int, seed: int = 0) -> torch.Tensor:
    """Ascending samples with density ~ λ^−α above 1."""
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (1 - uniform).pow(-1 / (alpha - 1)).sort().values


@pytest.mark.parametrize("alpha", [1.5, 2.5, 4.0, 7.0])
def test_pareto_samples_give_their_exponent_back(alpha: float) -> None:
    count = 20_000
    values = _pareto(alpha, count)
    # the estimate of α − 1 has relative standard deviation 1/√n
    for estimate, used in ((hill(values, 0), count), (alpha_mid(values), count // 2)):
        assert abs(estimate - alpha) < 4 * (alpha - 1) / math.sqrt(used)


def test_alpha_peak_finds_where_the_power_law_begins() -> None:
    # half of the values lie below the tail, spread evenly: a fit that includes them is far off
    tail = 10 * _pareto(3.0, 1000, 1)
    body = torch.linspace(0.01, 10, 1000, dtype=torch.float64)
    values = torch.cat([body, tail]).sort().values
    assert alpha_peak(values) == pytest.approx(3.0, abs=0.25)
    assert hill(values, 0) < 1.5


def test_hill_by_hand() -> None:
    values = torch.tensor([1.0, math.e, math.e**3])
    assert hill(values, 0) == pytest.approx(1 + 3 / 4)
    assert hill(values, 1) == pytest.approx(1 + 2 / 2)
    assert alpha_mid(values) == pytest.approx(2.0)
    odd = torch.tensor([1.0, 1.1, 2.0, 5.0, 6.0, 20.0])
    assert alpha_mid(odd) == hill(odd, 3) != hill(odd, 2)
    assert hill(torch.full((5,), 0.3), 1) == math.inf
    assert alpha_peak(torch.full((5,), 0.3)) == math.inf


def test_alpha_peak_is_the_best_of_the_allowed_starts() -> None:
    weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(3)) * 0.05
    values = eigenvalues(weight)
    decades = values.log10()
    edges = torch.linspace(float(decades[0]), float(decades[-1]), 101, dtype=torch.float64)
    counts = [int(((decades >= low) & (decades < high)).sum()) for low, high in zip(edges, edges[1:], strict=False)]
    peak = 10 ** float(edges[counts.index(max(counts))])
    best, chosen = math.inf, math.nan
    for start in range(len(values) - 1):
        if values[start] > 1.5 * peak:
            break
        tail, exponent = values[start:], hill(values, start)
        law = 1 - (tail / tail[0]) ** (1 - exponent)
        distance = float((law - torch.arange(len(tail)) / len(tail)).abs().max())
        if distance < best:
            best, chosen = distance, exponent
    assert alpha_peak(values) == pytest.approx(chosen, rel=1e-9)


def test_neither_the_scale_nor_the_side_nor_a_rotation_matters() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(50, 80, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64)).Q
    values = eigenvalues(weight)
    for estimate in (alpha_mid, alpha_peak):
        expected = estimate(values)
        for other in (weight * 1e-4, weight * 1e4, weight.T, rotation @ weight):
            assert estimate(eigenvalues(other)) == pytest.approx(expected, rel=1e-6)


def test_heavier_tails_have_smaller_exponents() -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(100, 150, generator=generator, dtype=torch.float64)
    spiked = torch.linspace(0, 3, 100, dtype=torch.float64).exp().unsqueeze(1) * base
    assert alpha_mid(eigenvalues(spiked)) < alpha_mid(eigenvalues(base)) - 0.3


def test_numerically_zero_eigenvalues_are_left_out() -> None:
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 7), (7, 30)))
    values = eigenvalues(left @ right)
    assert len(values) == 7
    torch.testing.assert_close(values, torch.linalg.svdvals(left @ right)[:7].square().flip(0))
    assert len(eigenvalues(torch.zeros(4, 5))) == 0


def test_too_few_values_are_said() -> None:
    for values in (torch.zeros(0), torch.ones(1)):
        with pytest.raises(ValueError, match="at least two"):
            alpha_peak(values)
        with pytest.raises(ValueError, match="at least two"):
            alpha_mid(values)
    with pytest.raises(ValueError, match="at least two"):
        hill(torch.ones(3), 2)

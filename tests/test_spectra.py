"""Spectra of row selections against closed forms and LAPACK."""

import pytest
import torch
from scipy.stats import ks_2samp

from secateur.errors import RequestError
from secateur.network.widths import round_width
from secateur.tensor.spectra import (
    count_below,
    fast_dtype,
    gram,
    gram_of_kept,
    ks_distance,
    ks_distance_at,
    ks_nodes,
    single_suffices,
    singular_values,
)
from secateur.tensor.spectral_distance import SpectralDistance


def layer(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with heavy-tailed row norms and a decaying spectrum, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(rows, 1, generator=generator).mul(0.5).exp()
    scale = torch.logspace(0.8, -0.5, columns)
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return norms * torch.randn(rows, columns, generator=generator) * scale @ rotation


def selection(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("shape", [(150, 60), (60, 60), (40, 60)])
def test_singular_values_equal_svdvals(shape: tuple[int, int]) -> None:
    weight = layer(*shape)
    expected = torch.linalg.svdvals(weight.double()).flip(0)
    torch.testing.assert_close(singular_values(weight), expected, rtol=1e-9, atol=1e-9)


def test_blocked_gram_is_the_gram_matrix() -> None:
    weight = layer(90, 50).double()
    torch.testing.assert_close(gram(weight, block=16).tril(), (weight.T @ weight).tril())


@pytest.mark.parametrize("count", [50, 70, 85])
def test_down_dated_gram_is_that_of_the_kept_rows(count: int) -> None:
    weight = layer(90, 50).double()
    kept = selection(90, count, 1)
    expected = gram(weight[kept]).tril()
    torch.testing.assert_close(gram_of_kept(weight, kept, gram(weight)).tril(), expected, rtol=1e-9, atol=1e-9)


def test_interlacing_for_every_value_and_many_selections() -> None:
    weight = layer(120, 40)
    whole = singular_values(weight)
    for seed in range(60):
        count = 41 + seed
        part = singular_values(weight[selection(120, count, seed)])
        assert (part <= whole + 1e-9).all()
        assert (part >= whole.new_zeros(())).all()
        # Cauchy for removed rows: σᵢ(W[S]) ≥ σᵢ₊ᵣ(W), r = rows removed (ascending order: shifted down)
        removed = 120 - count
        if removed < 40:
            assert (part[removed:] >= whole[: 40 - removed] - 1e-9).all()


def test_ks_distance_is_scipys() -> None:
    generator = torch.Generator().manual_seed(3)
    for size, other in [(50, 50), (50, 31), (7, 200), (1, 1)]:
        a = torch.randn(size, generator=generator).double()
        b = torch.randn(other, generator=generator).double() * 1.3 + 0.2
        b[:1] = a[:1]  # a tie between the samples
        assert ks_distance(a, b) == pytest.approx(ks_2samp(a.numpy(), b.numpy()).statistic, abs=1e-12)
    assert ks_distance(a, a) == 0


@pytest.mark.parametrize("size", [30, 200])
def test_inertia_counts_eigenvalues(size: int) -> None:
    matrix = gram(layer(3 * size, size).double())
    values = torch.linalg.eigvalsh(matrix)
    for index in range(0, size - 1, 7):
        assert count_below(matrix, float(values[index] + values[index + 1]) / 2) == index + 1
    assert count_below(matrix, 0.0) == 0
    assert count_below(matrix, float(values[-1]) * 2) == size


def test_blocked_inertia_counts_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.tensor.spectra.WIDE", 50)
    matrix = gram(layer(900, 300).double())
    values = torch.linalg.eigvalsh(matrix)
    for index in range(3, 299, 13):
        assert count_below(matrix, float(values[index] + values[index + 1]) / 2, block=32) == index + 1


def test_blocked_inertia_survives_singular_pivots(monkeypatch: pytest.MonkeyPatch) -> None:
    """x is an eigenvalue of the first diagonal block, and of the first two: plain elimination divides by zero."""
    monkeypatch.setattr("secateur.tensor.spectra.WIDE", 50)
    matrix = gram(layer(600, 200))
    values = torch.linalg.eigvalsh(matrix.double())
    for size in (32, 64):
        for x in torch.linalg.eigvalsh(matrix[:size, :size])[4::9]:
            expected = int((values < float(x)).sum())
            assert abs(count_below(matrix, float(x), block=32) - expected) <= 1


def test_counting_two_by_two_pivots() -> None:
    # zero diagonal: LAPACK must pivot in pairs, each with one negative eigenvalue
    matrix = torch.tensor([[0.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 3, 0]])
    assert count_below(matrix, 0.0) == 2
    assert count_below(matrix, 2.5) == 3


def test_distance_at_the_nodes_is_exact_there_and_a_lower_bound_elsewhere() -> None:
    weight = layer(300, 80).double()
    values = singular_values(weight)
    first, gaps = selection(300, 210, 0), []
    nodes = ks_nodes(values, singular_values(weight[first]), 3)
    for seed in range(20):
        kept = selection(300, 210, seed)
        exact = ks_distance(values, singular_values(weight[kept]))
        fast = ks_distance_at(nodes, values, gram(weight[kept]), 80)
        assert fast <= exact + 1e-12
        gaps.append(exact - fast)
    assert gaps[0] == pytest.approx(0, abs=1e-12)  # the selection that the nodes were chosen on
    assert sum(gaps) / len(gaps) < 0.02


def test_an_outlying_direction_is_measured_in_float64() -> None:
    """The common direction is 3000 times the rest: its square drowns theirs in float32."""
    weight = layer(300, 80)
    assert single_suffices(singular_values(weight))
    outlying = (weight + 3000 * torch.randn(300, 1) @ torch.randn(1, 80)).double()
    assert not single_suffices(singular_values(outlying))
    distance, whole = SpectralDistance(1), torch.linalg.svdvals(outlying)
    for seed in range(5):
        kept = selection(300, 210, seed)
        expected = ks_2samp(whole.numpy(), torch.linalg.svdvals(outlying[kept]).numpy()).statistic
        assert distance(0, outlying, kept) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", [(300, 80), (100, 80)])  # the second keeps fewer rows than columns
def test_spectral_distance_equals_the_definition(shape: tuple[int, int]) -> None:
    weight = layer(*shape)
    exact, fast = SpectralDistance(1), SpectralDistance(1, fast=True)
    whole = torch.linalg.svdvals(weight)
    for seed in range(5):
        kept = selection(shape[0], 7 * shape[0] // 10, seed)
        expected = ks_2samp(whole.numpy(), torch.linalg.svdvals(weight[kept]).numpy()).statistic
        assert exact(0, weight, kept) == pytest.approx(expected, abs=1e-4)
        assert fast(0, weight, kept) == pytest.approx(expected, abs=0.05)


def test_spectral_distance_goes_on_from_its_state() -> None:
    weight, kept = layer(300, 80), selection(300, 210, 5)
    first = SpectralDistance(1, fast=True)
    first(0, weight, selection(300, 210, 0))
    second = SpectralDistance(1, fast=True)
    second.restore(first.state())
    assert second(0, weight, kept) == first(0, weight, kept)
    assert second.state().keys() == {"spectrum.0.values", "spectrum.0.nodes"}


def test_small_matrices_are_counted_in_float32() -> None:
    assert fast_dtype(576) == torch.float32


@pytest.mark.parametrize(
    ("units", "ratio", "multiple", "kept"),
    [
        (1536, 0.2, 32, 1216),
        (1536, 0.2, 1, 1228),
        (11008, 0.3, 32, 7712),
        (1536, 0.0, 32, 1536),
        (16, 0.25, 32, 12),  # narrower than the multiple
        (64, 0.1, 32, 57),  # rounding would remove nothing
        (64, 0.9, 32, 6),  # rounding would leave nothing
        (10, 0.7, 1, 3),  # 0.3·10 is 3, although 1 - 0.7 is below 0.3 in binary
    ],
)
def test_width(units: int, ratio: float, multiple: int, kept: int) -> None:
    assert round_width(units, ratio, multiple) == kept


@pytest.mark.parametrize(("ratio", "multiple"), [(-0.1, 32), (1.0, 32), (float("nan"), 32), (0.99, 32), (0.5, 0)])
def test_impossible_width(ratio: float, multiple: int) -> None:
    with pytest.raises(RequestError):
        round_width(40, ratio, multiple)

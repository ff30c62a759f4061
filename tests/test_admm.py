"""ADMM pruning: what it converges to under a fixed mask, how its mask grows, special cases in which nothing moves."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from secateur.tensor.admm import admm, grown_mask
from secateur.tensor.hessian import Damped, damp
from secateur.tensor.patterns import Budget, Pattern
from secateur.tensor.sweep import sweep

ROWS, COLUMNS, DEAD = 12, 40, 3


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(dtype: torch.dtype = torch.float64, fraction: float = 0.1) -> tuple[Tensor, Damped]:
    inputs = _normal(200, COLUMNS, seed=1) @ (_normal(COLUMNS, COLUMNS, seed=2) / COLUMNS**0.5 + torch.eye(COLUMNS))
    inputs[:, DEAD] = 0
    inputs[:, 5] *= 100  # one input of much more energy must not slow the others down
    return _normal(ROWS, COLUMNS, seed=0).to(dtype), damp((inputs.T @ inputs).to(dtype), fraction, "each")


def _budget(pattern: str) -> Budget:
    return Budget.uniform(Pattern.parse(pattern), (ROWS, COLUMNS))


def _least_squares(weight: Tensor, hessian: Damped, kept: Tensor) -> Tensor:
    """Row by row: ŵ_K = w H[:, K] H[K, K]⁻¹."""
    result = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        inner = hessian.matrix[mask][:, mask]
        result[row, mask] = torch.linalg.solve(inner, hessian.matrix[mask] @ weight[row])
    return result


def _loss(weight: Tensor, new: Tensor, hessian: Damped) -> float:
    delta = (weight - new).masked_fill(hessian.dead, 0)
    return float(((delta @ hessian.matrix) * delta).sum())


@pytest.mark.parametrize("fraction", [0.1, 0.01])
@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_a_fixed_mask_ends_at_masked_least_squares(rho: float, fraction: float) -> None:
    weight, hessian = _problem(fraction=fraction)
    kept = _normal(ROWS, COLUMNS, seed=4) > 0
    wanted = _least_squares(weight.masked_fill(hessian.dead, 0), hessian, kept)
    for iterations, within in ((200, 1e-4), (600, 1e-6)):
        found = admm(weight, hessian, kept, iterations, rho=rho)
        assert torch.equal(found.kept, kept)
        assert not found.weight[~kept].any()
        assert_close(found.weight, wanted, atol=within, rtol=0)


def test_twenty_iterations_are_near() -> None:
    weight, hessian = _problem()
    kept = _normal(ROWS, COLUMNS, seed=4) > 0
    best = _loss(weight, _least_squares(weight.masked_fill(hessian.dead, 0), hessian, kept), hessian)
    assert best <= _loss(weight, admm(weight, hessian, kept, 20).weight, hessian) < 1.01 * best
    assert best < _loss(weight, sweep(weight, hessian, kept).weight, hessian)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8", "3:5", "0.5/4x5"])
def test_counts_are_exact(pattern: str) -> None:
    weight, hessian = _problem()
    budget = _budget(pattern)
    found = admm(weight, hessian, budget)
    assert int((~found.kept).sum()) == budget.weights
    assert not found.weight[~found.kept].any()
    assert not found.weight[:, DEAD].any()
    if budget.pattern.of is not None:
        assert bool((found.kept.view(-1, budget.pattern.of).sum(1) == budget.pattern.kept).all())
    rows = admm(weight, hessian, budget, per="row").kept
    if pattern in ("0.5", "0.7"):
        assert (~rows).sum(1).tolist() == budget.rows()
        assert (~found.kept).sum(1).tolist() != budget.rows()


@pytest.mark.parametrize(("pattern", "per"), [("0.6", "layer"), ("0.6", "row"), ("2:4", "layer"), ("0.5/4x5", "layer")])
def test_the_mask_grows_for_every_pattern(pattern: str, per: str) -> None:
    budget, scores = _budget(pattern), _normal(ROWS, COLUMNS, seed=6).square()
    unit = budget.weights // budget.remove
    for share in (0.0, 0.1, 0.37, 0.99):
        assert int((~grown_mask(scores, budget, share, per)).sum()) == round(share * budget.remove) * unit
    assert torch.equal(grown_mask(scores, budget, 1.0, per), budget.mask(scores, per))
    if budget.pattern.of is not None:
        early = grown_mask(scores, budget, 0.3, per).view(-1, 4)
        assert bool((early.sum(1) >= 2).all())
        assert len(early.sum(1).unique()) == 3, "the lowest of the whole matrix first: some groups lose two, some none"


@pytest.mark.parametrize("pattern", ["0.6", "2:4", "0.5/4x5"])
def test_growing_finds_a_better_mask_than_wanda(pattern: str) -> None:
    weight, hessian = _problem()
    budget = _budget(pattern)
    grown, at_once = admm(weight, hessian, budget), admm(weight, hessian, budget, ramp=1)
    energy = hessian.energy
    assert torch.equal(at_once.kept, budget.mask(weight.square() * energy, "layer"))
    assert not torch.equal(grown.kept, at_once.kept)
    assert _loss(weight, grown.weight, hessian) < _loss(weight, at_once.weight, hessian)


def test_nothing_removed_or_uncorrelated_inputs_leave_the_weights_bit_for_bit() -> None:
    weight, hessian = _problem(torch.float32)
    assert torch.equal(admm(weight, hessian, _budget("0")).weight, weight.masked_fill(hessian.dead, 0))
    energy = _normal(COLUMNS, seed=3).square().float() + 0.1
    # without damping and with rho 1 a removed weight stays in competition as large as it was
    found = admm(weight, damp(torch.diag(energy), 0.0), _budget("0.5"))
    assert torch.equal(found.kept, _budget("0.5").mask(weight.abs() * energy.sqrt(), "layer"))
    assert torch.equal(found.weight, torch.where(found.kept, weight, 0))


def test_float32_is_near_float64() -> None:
    kept = _normal(ROWS, COLUMNS, seed=4) > 0
    exact, rough = _problem(), _problem(torch.float32)
    found = admm(*rough, kept).weight
    assert found.dtype == torch.float32
    assert_close(found.double(), admm(*exact, kept).weight, atol=1e-4, rtol=1e-4)


def test_a_ramp_that_would_not_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="15 of 10"):
        admm(*_problem(), _budget("0.5"), iterations=10)

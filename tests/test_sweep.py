"""SparseGPT's sweep against the plain loop over columns, its loss identity, and special cases in which all is known."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from secateur.tensor.grid import Grid
from secateur.tensor.hessian import Damped, damp
from secateur.tensor.patterns import Budget, Pattern
from secateur.tensor.sweep import LEAF, Selection, by_budget, sweep

ROWS, COLUMNS, DEAD = 30, 150, 3  # columns that neither the block nor the leaf divides
PATTERNS = ["0.5", "0.83", "2:4", "1:4", "3:5", "0.5/5x10"]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _problem(columns: int = COLUMNS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Damped]:
    inputs = _normal(400, columns, seed=1) @ (_normal(columns, columns, seed=2) / columns**0.5 + torch.eye(columns))
    inputs[:, DEAD] = 0
    return _normal(ROWS, columns, seed=0).to(dtype), damp((inputs.T @ inputs).to(dtype))


def _budget(pattern: str, columns: int = COLUMNS) -> Budget:
    found = Pattern.parse(pattern)
    columns -= columns % (found.of or (found.block[1] if found.block else 1))
    return Budget.uniform(found, (ROWS, columns))


def _plain(
    weight: Tensor, upper: Tensor, selection: Selection, quantize: Callable[[Tensor, int], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One column after another, each passing its error on to all that follow."""
    current, kept, loss = weight.clone(), torch.ones_like(weight, dtype=torch.bool), torch.zeros(len(weight)).to(weight)
    for column in range(weight.shape[1]):
        if column % selection.step == 0:
            here = slice(column, min(column + selection.step, weight.shape[1]))
            scores = (current[:, here] / upper.diagonal()[here]).square()
            kept[:, here] = selection.choose(scores, column)
        value = current[:, column].clone()
        if quantize is not None:
            value = quantize(value, column)
        value[~kept[:, column]] = 0
        error = (current[:, column] - value) / upper[column, column]
        loss += error.square() / 2
        current[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
        current[:, column] = value
    return current, kept, loss


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_the_plain_procedure(pattern: str, bits: int | None) -> None:
    budget = _budget(pattern)
    weight, hessian = _problem(budget.shape[1])
    quantize = None if bits is None else Grid.fit(weight, bits, group=64).nearest
    selection = by_budget(budget)
    found = sweep(weight, hessian, selection, quantize)
    alive = weight.masked_fill(hessian.dead, 0)
    values, kept, loss = _plain(alive, hessian.upper, selection, quantize)
    assert torch.equal(found.kept, kept)
    assert_close(found.weight, values, atol=1e-10, rtol=0)
    assert_close(found.loss, loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_float32_does(pattern: str) -> None:
    weight, hessian = _problem(148, torch.float32)
    selection = by_budget(_budget(pattern, 148))
    found = sweep(weight, hessian, selection)
    values, kept, _ = _plain(weight.masked_fill(hessian.dead, 0), hessian.upper, selection)
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.kept, kept)
    assert_close(found.weight, values, atol=1e-5, rtol=0)
    exact, damped = _problem(148)
    assert_close(sweep(exact, damped, found.kept).weight.float(), found.weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_losses_of_the_columns_are_the_loss_of_the_layer(pattern: str, bits: int | None) -> None:
    budget = _budget(pattern)
    weight, hessian = _problem(budget.shape[1])
    quantize = None if bits is None else Grid.fit(weight, bits).nearest
    found = sweep(weight, hessian, by_budget(budget), quantize)
    delta = weight.masked_fill(hessian.dead, 0) - found.weight
    assert_close(found.loss, ((delta @ hessian.matrix) * delta).sum(1) / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_exact_and_what_goes_is_zero(pattern: str) -> None:
    budget = _budget(pattern)
    weight, hessian = _problem(budget.shape[1])
    found = sweep(weight, hessian, by_budget(budget, block=60))
    assert int((~found.kept).sum()) == budget.weights
    assert not found.weight[~found.kept].any()
    assert not found.weight[:, DEAD].any()
    if budget.pattern.of is not None:
        assert bool((found.kept.view(-1, budget.pattern.of).sum(1) == budget.pattern.kept).all())
    if budget.pattern.block is None and budget.pattern.of is None:
        sizes = [60, 60, 30]
        assert [int((~part).sum()) for part in found.kept.split(sizes, dim=1)] == budget.columns(sizes)


def test_nothing_removed_is_nothing_changed() -> None:
    weight, hessian = _problem()
    found = sweep(weight, hessian, by_budget(_budget("0")))
    living = ~hessian.dead
    assert torch.equal(found.weight[:, living], weight[:, living])
    assert bool(found.kept.all())
    assert not found.loss.any()


@pytest.mark.parametrize("columns", [1, LEAF, LEAF + 1, COLUMNS])
def test_a_given_mask_is_obeyed_and_the_rest_makes_up_for_it(columns: int) -> None:
    weight, hessian = _problem()
    weight, hessian = weight[:, -columns:], damp(hessian.matrix[-columns:, -columns:])
    kept = _normal(ROWS, columns, seed=5) > 0
    found = sweep(weight, hessian, kept)
    assert torch.equal(found.kept, kept)
    assert torch.equal(found.weight != 0, kept)
    delta, cut = found.weight - weight, torch.where(kept, 0, weight)
    if columns > 1:
        assert ((delta @ hessian.matrix) * delta).sum() < ((cut @ hessian.matrix) * cut).sum()


def test_uncorrelated_inputs_need_no_update_and_are_ranked_as_by_wanda() -> None:
    weight, energy = _normal(ROWS, 96, seed=0), _normal(96, seed=3).square() + 0.1
    found = sweep(weight, damp(torch.diag(energy), 0.0), by_budget(_budget("0.5", 96), block=32))
    assert torch.equal(found.weight, torch.where(found.kept, weight, 0))
    for start, stop in pairwise([0, 32, 64, 96]):
        scores = weight[:, start:stop].abs() * energy[start:stop].sqrt()
        wanted = Budget.uniform(Pattern.parse("0.5"), (ROWS, 32)).mask(scores, "layer")
        assert torch.equal(found.kept[:, start:stop], wanted)


def test_two_inputs_by_hand() -> None:
    # removing w_1 moves w_2 to the least-squares refit w_2 + w_1 H_12 / H_22; the last column has nothing to lean on
    matrix = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    weight = torch.tensor([[3.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    found = sweep(weight, damp(matrix, 0.0), torch.tensor([[False, True], [True, False]]))
    assert_close(found.weight, torch.tensor([[0.0, 5.75], [3.0, 0.0]], dtype=torch.float64))
    assert_close(found.loss, torch.tensor([(9 * 2 - 9 / 4) / 2, 25 * 4 / 2], dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 48])
def test_kept_values_lie_on_their_grid(group: int | None, symmetric: bool) -> None:
    weight, hessian = _problem()
    grid = Grid.fit(weight, 3, group, symmetric)
    found = sweep(weight, hessian, by_budget(_budget("0.5")), grid.nearest)
    codes = torch.stack([found.weight[:, j] / grid.scale[j // grid.group] for j in range(COLUMNS)], dim=1)
    assert_close(codes, codes.round(), atol=1e-9, rtol=0)
    assert all(len(row.round().unique()) <= 8 for part in codes.split(grid.group, dim=1) for row in part)
    plain = torch.stack([grid.nearest(weight[:, j], j) for j in range(COLUMNS)], dim=1)
    rounded = sweep(weight, hessian, torch.ones_like(found.kept), grid.nearest).weight

    def loss(new: Tensor) -> float:
        delta = (weight - new).masked_fill(hessian.dead, 0)
        return float(((delta @ hessian.matrix) * delta).sum())

    assert loss(rounded) < 0.8 * loss(plain), "rounding in the sweep (GPTQ) beats rounding each weight to the nearest"


def test_the_grid_reaches_from_the_smallest_to_the_largest_and_holds_zero() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    grid = Grid.fit(weight, 2)
    assert grid.scale.tolist() == [[1.0, pytest.approx(4 / 3), 1.0]]
    assert grid.zero.tolist() == [[1.0, 0.0, 0.0]]
    assert grid.nearest(torch.tensor([9.0, -9.0, 0.2]), 0).tolist() == [2.0, 0.0, 0.0]
    assert grid.nearest(torch.zeros(3), 3).tolist() == [0.0, 0.0, 0.0]
    half = Grid.fit(weight, 2, group=3, symmetric=True)  # a shorter last group
    assert_close(half.scale, torch.tensor([[4 / 3, 2.0, 1.0], [1 / 3, 8 / 3, 1.0]]))
    assert half.zero.tolist() == [[2.0] * 3] * 2
    with pytest.raises(ValueError, match="17 bits"):
        Grid.fit(weight, 17)

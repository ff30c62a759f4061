"""Removing many weights at once: closed forms, brute force, the plain SparseGPT loop, what must never get worse."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.context import Context
from secateur.errors import RequestError
from secateur.methods.weights.apt import apt
from secateur.registry import Gram, Update, Weight
from secateur.tensor.hessian import damp
from secateur.tensor.masked_least_squares import Preconditioner, Solved, solve_by_steps, solve_directly
from secateur.tensor.multi_removal import (
    choose_at_once,
    conditional,
    diagonal_blocks,
    jointly,
    pattern_losses,
    scan,
    scan_exactly,
    singly,
)
from secateur.tensor.patterns import Budget, Pattern, keep_n_of_m, keep_overall, keep_per_row
from secateur.tensor.sweep import by_budget, sweep


def _problem(rows: int = 6, columns: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    """Weights, the Hessian of correlated inputs, its inverse."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    common = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(8 * columns, columns // 4, generator=generator, dtype=torch.float64) @ common.T
    inputs += torch.randn(8 * columns, columns, generator=generator, dtype=torch.float64)
    hessian = damp(inputs.T @ inputs)
    return weight.to(dtype), hessian.matrix.to(dtype), hessian.inverse.to(dtype)


def _mask(rows: int, columns: int, remove: list[int], seed: int = 0) -> Tensor:
    return keep_per_row(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)), remove)


def _loss(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    return ((weight - found) @ hessian * (weight - found)).sum(1) / 2


def _one_by_one(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    result = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        stays = mask.nonzero()[:, 0]
        result[row, stays] = torch.linalg.solve(hessian[stays][:, stays], (weight[row] @ hessian)[stays])
    return result


def _sparsegpt(weight: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """The published loop, column by column, for a given mask."""
    upper, weight = torch.linalg.cholesky(inverse, upper=True), weight.clone()
    for column in range(weight.shape[1]):
        error = weight[:, column].masked_fill(kept[:, column], 0) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    return weight.where(kept, 0)


def _both(weight: Tensor, hessian: Tensor, inverse: Tensor, kept: Tensor) -> list[Solved]:
    return [
        solve_directly(weight, hessian, inverse, kept),
        solve_by_steps(weight, hessian, inverse, kept, tolerance=1e-13),
    ]


def test_the_update_is_masked_least_squares() -> None:
    weight, hessian, inverse = _problem()
    # from nothing removed to everything, both sides of the smaller system
    kept = _mask(6, 24, [0, 1, 7, 12, 20, 24])
    wanted = _one_by_one(weight, hessian, kept)
    direct, steps = _both(weight, hessian, inverse, kept)
    torch.testing.assert_close(direct.weight, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(steps.weight, wanted, atol=1e-6, rtol=1e-6)
    for found in (direct, steps):
        assert bool((found.weight[~kept] == 0).all())
        torch.testing.assert_close(found.loss, _loss(weight, found.weight, hessian), atol=1e-9, rtol=1e-9)


def test_the_update_is_least_squares_on_the_inputs_themselves() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 9, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    kept = _mask(1, 9, [4])
    wanted = torch.linalg.lstsq(inputs[:, kept[0]], inputs @ weight[0]).solution
    found = solve_directly(weight, hessian, torch.linalg.inv(hessian), kept)
    torch.testing.assert_close(found.weight[0, kept[0]], wanted, atol=1e-10, rtol=1e-10)


def test_one_weight_is_optimal_brain_surgeon() -> None:
    weight, hessian, inverse = _problem()
    gone = torch.tensor([3, 0, 23, 11, 5, 5])
    kept = torch.ones_like(weight, dtype=torch.bool).scatter_(1, gone[:, None], False)
    single = weight.gather(1, gone[:, None])[:, 0] / inverse.diagonal()[gone]
    wanted = (weight - single[:, None] * inverse[gone]).where(kept, 0)
    for found in _both(weight, hessian, inverse, kept):
        torch.testing.assert_close(found.weight, wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.loss, single.square() * inverse.diagonal()[gone] / 2)


def test_losses_add_up_when_weights_go_in_two_turns() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(6, 24, [12] * 6)
    first = kept.clone()
    first[:, 10:] = True
    now, blocks = conditional(weight, inverse, first, 10, 24, 14)
    begun = solve_directly(weight, hessian, inverse, first)
    torch.testing.assert_close(now, begun.weight[:, 10:])
    rest = [
        w[~mask] @ torch.linalg.solve(block[0][~mask][:, ~mask], w[~mask]) / 2
        for w, block, mask in zip(now, blocks, kept[:, 10:], strict=True)
    ]
    whole = solve_directly(weight, hessian, inverse, kept)
    torch.testing.assert_close(whole.loss, begun.loss + torch.stack(rest), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_is_worse_than_sparsegpts(seed: int, dtype: torch.dtype) -> None:
    weight, hessian, inverse = _problem(32, 48, seed, dtype)
    kept = keep_overall(weight.square(), weight.numel() // 2)
    start = _sparsegpt(weight, inverse, kept)
    theirs = _loss(weight.double(), start.double(), hessian.double())
    for found in (
        solve_directly(weight, hessian, inverse, kept),
        solve_by_steps(weight, hessian, inverse, kept),
        solve_by_steps(weight, hessian, inverse, kept, start=start, tolerance=0.5),
    ):
        ours = _loss(weight.double(), found.weight.double(), hessian.double())
        assert bool((ours <= theirs * (1 + 1e-6)).all())
    assert float(ours.sum()) < 0.99 * float(theirs.sum())


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_steps_keep_to_their_tolerance_and_the_bound_holds(tolerance: float) -> None:
    weight, hessian, inverse = _problem(40, 64, 3)
    kept = _mask(40, 64, [*range(8, 48)])
    best = _loss(weight, _one_by_one(weight, hessian, kept), hessian)
    found = solve_by_steps(weight, hessian, inverse, kept, tolerance=tolerance)
    truth = found.loss - best
    assert bool((truth <= found.excess + 1e-12 * best).all())
    assert bool((found.excess <= tolerance * found.loss).all())
    # it stops when it may: at a loose tolerance it must not have gone on to the end
    assert tolerance < 1e-2 or float(truth.max()) > 1e-9 * float(best.max())


def test_rows_that_do_not_get_there_are_solved_directly() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(6, 24, [12] * 6)
    found = solve_by_steps(weight, hessian, inverse, kept, tolerance=1e-12, steps=1)
    torch.testing.assert_close(found.weight, _one_by_one(weight, hessian, kept), atol=1e-10, rtol=1e-10)
    assert bool((found.excess == 0).all())


def test_what_float32_cannot_factor_is_solved_in_float64() -> None:
    # whole numbers that float32 holds exactly, so that float64 sees the same matrix, positive definite by 1 in 10 million
    direction = torch.randint(3, 8, (16, 1), generator=torch.Generator().manual_seed(0)).float()
    hessian = 2.0**18 * direction @ direction.T + torch.eye(16)
    weight = _problem(4, 16, dtype=torch.float32)[0]
    kept = _mask(4, 16, [9] * 4)
    hard = torch.tensor([bool(torch.linalg.cholesky_ex(hessian[mask][:, mask]).info) for mask in kept])
    assert hard.any()
    wanted = _one_by_one(weight.double(), hessian.double(), kept)
    inverse = torch.linalg.inv(hessian.double()).float()
    found = solve_directly(weight, hessian, inverse, kept)
    torch.testing.assert_close(found.weight[hard].double(), wanted[hard], atol=1e-5, rtol=1e-5)
    naive = _loss(weight.double(), weight.double().where(kept, 0), hessian.double())
    found = solve_by_steps(weight, hessian, inverse, kept)
    assert bool((_loss(weight.double(), found.weight.double(), hessian.double()) < 1e-3 * naive).all())


def test_what_is_not_positive_definite_is_refused() -> None:
    weight, hessian, inverse = _problem()
    hessian[0, 0] = -1
    kept = _mask(6, 24, [20] * 6)
    kept[:, 0] = True
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        solve_directly(weight, hessian, inverse, kept)


def test_no_removal_gives_the_weights_bit_for_bit() -> None:
    weight, hessian, inverse = _problem(dtype=torch.float32)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for found in _both(weight, hessian, inverse, kept):
        assert torch.equal(found.weight, weight)
        assert bool((found.loss == 0).all())


def test_unrelated_inputs_need_no_update() -> None:
    weight = _problem()[0]
    energy = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    kept = _mask(6, 24, [12] * 6)
    for found in _both(weight, energy.diag(), (1 / energy).diag(), kept):
        torch.testing.assert_close(found.weight, weight.where(kept, 0), atol=1e-12, rtol=0)


def test_the_order_of_columns_does_not_matter_to_the_update() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(6, 24, [12] * 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    permuted = weight[:, order], hessian[order][:, order], inverse[order][:, order], kept[:, order]
    plain, turned = _both(weight, hessian, inverse, kept), _both(*permuted)
    for one, other, tolerance in zip(plain, turned, (1e-10, 1e-6), strict=True):
        torch.testing.assert_close(one.weight[:, order], other.weight, atol=tolerance, rtol=tolerance)


def test_rows_with_one_mask_share_it() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(1, 24, [10]).expand(6, -1)
    found = solve_directly(weight, hessian, inverse, kept)
    torch.testing.assert_close(found.weight, _one_by_one(weight, hessian, kept), atol=1e-10, rtol=1e-10)


def test_the_preconditioner_leaves_nothing_of_strong_common_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    narrow = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    hessian = 1e4 * narrow @ narrow.T + torch.rand(64, generator=generator, dtype=torch.float64).add(0.5).diag()
    mask = _mask(1, 64, [30])[0]
    kept, units = mask.expand(34, -1), torch.eye(64, dtype=torch.float64)[mask]
    preconditioner = Preconditioner(hessian, torch.linalg.inv(hessian), kept)
    root = torch.linalg.cholesky(hessian[mask][:, mask])
    assert float(torch.linalg.cond(root)) > 300
    applied = preconditioner(units)
    assert bool((applied[:, ~mask] == 0).all())
    values = torch.linalg.eigvalsh(root.T @ applied[:, mask] @ root)
    assert 0.2 < float(values.min()) < float(values.max()) < 5


def test_a_preconditioner_may_learn_of_the_mask_in_parts() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(6, 24, [12] * 6)
    parts = Preconditioner(hessian, inverse, torch.ones_like(kept))
    parts.drop(kept[:, :9], 0)
    parts.drop(kept[:, 9:], 9)
    residual = weight * kept
    torch.testing.assert_close(parts(residual), Preconditioner(hessian, inverse, kept)(residual))


@pytest.mark.parametrize(("remove", "of"), [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (3, 5)])
def test_pattern_losses_are_those_of_brute_force(remove: int, of: int) -> None:
    weight, hessian, inverse = _problem(5, 40)
    groups = diagonal_blocks(inverse, of)
    found = pattern_losses(weight.unflatten(1, (-1, of)), groups[None], remove)
    wanted = torch.stack(
        [
            torch.stack(
                [
                    _loss(
                        weight, _one_by_one(weight, hessian, _without(weight, [of * group + c for c in gone])), hessian
                    )
                    for gone in combinations(range(of), remove)
                ]
            )
            for group in range(0, 40 // of, 3)
        ]
    )
    torch.testing.assert_close(found[:, ::3].permute(1, 2, 0), wanted, atol=1e-10, rtol=1e-10)


def _without(weight: Tensor, columns: list[int]) -> Tensor:
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[:, columns] = False
    return kept


def test_rule_m_takes_the_best_pair_where_rule_s_does_not() -> None:
    # inputs 0 and 1 are nearly the same: each is cheap to remove, both together are not
    hessian = torch.tensor([[1.0, 0.99, 0, 0], [0.99, 1.0, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0.3]], dtype=torch.float64)
    weight = torch.ones(1, 4, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    single = choose_at_once(weight, inverse, singly(lambda scores, start: keep_n_of_m(scores, 2, 4)))
    joint = choose_at_once(weight, inverse, jointly(2, 4))
    assert single.tolist() == [[False, False, True, True]]
    assert joint.tolist() == [[False, True, False, True]]


def test_conditional_inverse_and_weights_are_those_of_brute_force() -> None:
    weight, hessian, inverse = _problem()
    kept = _mask(6, 24, [9] * 6)
    kept[:, 8:16] = True
    now, blocks = conditional(weight, inverse, kept, 8, 16, 4)
    solved = _one_by_one(weight, hessian, kept)
    torch.testing.assert_close(now, solved[:, 8:16], atol=1e-10, rtol=1e-10)
    for row, mask in enumerate(kept):
        left = torch.zeros_like(inverse)
        left[mask[:, None] & mask] = torch.linalg.inv(hessian[mask][:, mask]).flatten()
        torch.testing.assert_close(blocks[row], diagonal_blocks(left, 4)[2:4], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("text", ["0.5", "0.3", "2:4", "1:4", "4:8"])
def test_counts_are_exact_and_each_schedule_is_better_than_the_one_below(text: str) -> None:
    weight, hessian, inverse = _problem(48, 64, 11)
    budget = Budget.uniform(Pattern.parse(text), (48, 64))
    rule = singly(by_budget(budget, 16).choose)
    at_once = choose_at_once(weight, inverse, singly(by_budget(budget, 64).choose))
    scanned = scan(weight, hessian, inverse, rule, 16, 2)
    exact = scan_exactly(weight, inverse, rule, 16)
    losses = []
    for kept in (at_once, scanned.kept, exact):
        assert int((~kept).sum()) == budget.remove
        if budget.pattern.of is not None:
            assert bool((kept.unflatten(1, (-1, budget.pattern.of)).sum(-1) == budget.pattern.kept).all())
        losses.append(float(solve_directly(weight, hessian, inverse, kept).loss.sum()))
    assert losses[1] < losses[0]
    assert losses[1] < 1.05 * losses[2]
    # what it leaves is a start: nearer than the mask alone
    best = solve_directly(weight, hessian, inverse, scanned.kept).loss
    naive = _loss(weight, weight.where(scanned.kept, 0), hessian)
    assert bool((scanned.matrix[~scanned.kept] == 0).all())
    assert float((_loss(weight, scanned.matrix, hessian) - best).sum()) < 0.5 * float((naive - best).sum())


def test_joint_masks_lose_less_than_single_ones() -> None:
    for seed in range(4):
        weight, hessian, inverse = _problem(32, 64, seed)
        single, joint = (
            float(solve_directly(weight, hessian, inverse, choose_at_once(weight, inverse, rule)).loss.sum())
            for rule in (singly(lambda scores, start: keep_n_of_m(scores, 4, 8)), jointly(4, 8))
        )
        assert joint < single


def test_the_first_block_of_a_scan_is_chosen_from_the_dense_weights() -> None:
    weight, hessian, inverse = _problem(8, 48)
    rule = jointly(2, 4)
    wanted = choose_at_once(weight, inverse, rule)[:, :16]
    assert torch.equal(scan(weight, hessian, inverse, rule, 16, 3).kept[:, :16], wanted)
    assert torch.equal(scan_exactly(weight, inverse, rule, 16)[:, :16], wanted)


def test_one_column_at_a_time_the_scan_knows_exactly_what_the_last_one_did() -> None:
    # after one removal both the first order and the product of squares are exact, so the second choice is the exact one
    weight, hessian, inverse = _problem(32, 2)
    rule = singly(lambda scores, start: keep_overall(scores, 16))
    assert torch.equal(scan(weight, hessian, inverse, rule, 1, 1).kept, scan_exactly(weight, inverse, rule, 1))


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="12870 patterns"):
        jointly(8, 16)


def _apt(matrix: Tensor, gram: Gram, pattern: str, **parameters: Any) -> Update:
    shape = (matrix.shape[0], matrix.shape[1])
    budget = Budget.uniform(Pattern.parse(pattern), shape)
    found = apt(Weight("q", 0, None, shape, lambda: matrix), gram, budget, Context(), **parameters)
    assert int((~found.kept).sum()) == budget.weights
    assert bool((found.matrix[~found.kept] == 0).all())
    return found


@pytest.fixture
def layer() -> tuple[Tensor, Gram]:
    """A weight matrix, and a Gram matrix one of whose inputs was always 0."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(400, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    inputs[:, 5] = 0
    return torch.randn(24, 48, generator=generator), Gram(inputs.T @ inputs, 400)


@pytest.mark.parametrize("schedule", ["blocks", "exact", "fast"])
@pytest.mark.parametrize(
    ("pattern", "rule"), [("0.5", "S"), ("2:4", "S"), ("2:4", "M"), ("0.5/4x8", "S"), ("3:8", "M")]
)
def test_apt_updates_exactly_whatever_the_schedule(layer: Any, schedule: str, pattern: str, rule: str) -> None:
    matrix, gram = layer
    found = _apt(matrix, gram, pattern, schedule=schedule, mask_rule=rule)
    hessian = gram.damped()
    dense = matrix.masked_fill(hessian.dead, 0)
    best = solve_directly(dense, hessian.matrix, hessian.inverse, found.kept)
    assert bool((_loss(dense, found.matrix, hessian.matrix) <= 1.002 * best.loss).all())
    assert bool((found.matrix[:, 5] == 0).all())
    direct = _apt(matrix, gram, pattern, schedule=schedule, mask_rule=rule, solver="direct")
    assert torch.equal(direct.kept, found.kept)
    torch.testing.assert_close(direct.matrix, best.weight)
    swept = _apt(matrix, gram, pattern, schedule=schedule, mask_rule=rule, compensation="S")
    torch.testing.assert_close(swept.matrix, sweep(matrix, hessian, found.kept).weight)


def test_apt_takes_anothers_mask_and_leaves_what_loses_nothing(layer: Any) -> None:
    matrix, gram = layer
    kept = keep_n_of_m(matrix.abs(), 2, 4)
    assert torch.equal(_apt(matrix, gram, "2:4", mask=kept).kept, kept)
    assert torch.equal(_apt(matrix, gram, "0").matrix, matrix)


def test_apt_says_what_rule_m_is_for(layer: Any) -> None:
    with pytest.raises(RequestError, match="0.5 needs mask_rule=S"):
        _apt(*layer, "0.5", mask_rule="M")
    with pytest.raises(RequestError, match="12870 patterns"):
        _apt(*layer, "8:16", mask_rule="M")

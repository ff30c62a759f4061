"""Removing many weights at once: rules and schedules against brute force, and APT as a method."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from quadratic import one_by_one, problem, random_mask, row_loss
from secateur.context import Context
from secateur.methods.weights.apt import apt
from secateur.registry import Gram, Update, Weight
from secateur.tensor.masked_least_squares import Preconditioner, solve_directly
from secateur.tensor.multi_removal import (
    Rule,
    choose_at_once,
    conditional,
    diagonal_blocks,
    jointly,
    pattern_losses,
    scan,
    scan_exactly,
    singly,
)
from secateur.tensor.patterns import Budget, Pattern, keep_n_of_m
from secateur.tensor.sweep import by_budget, sweep


@pytest.mark.parametrize(("remove", "of"), [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (3, 5)])
def test_pattern_losses_are_those_of_brute_force(remove: int, of: int) -> None:
    weight, hessian, inverse = problem(5, 40)
    groups = diagonal_blocks(inverse, of)
    found = pattern_losses(weight.unflatten(1, (-1, of)), groups[None], remove)
    wanted = torch.stack(
        [
            torch.stack(
                [
                    row_loss(
                        weight, one_by_one(weight, hessian, _without(weight, [of * group + c for c in gone])), hessian
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


def test_rule_s_is_the_loss_of_each_weight_alone() -> None:
    weight, _, inverse = problem(5, 24)
    seen = []
    choose_at_once(weight, inverse, singly(lambda scores, start: seen.append(scores)))
    alone = pattern_losses(weight[:, :, None], inverse.diagonal()[None, :, None, None], 1)[..., 0]
    torch.testing.assert_close(seen[0], alone)


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
    weight, hessian, inverse = problem()
    kept = random_mask(6, 24, [9] * 6)
    kept[:, 8:16] = True
    now, blocks = conditional(weight, inverse, kept, 8, 16, 4)
    solved = one_by_one(weight, hessian, kept)
    torch.testing.assert_close(now, solved[:, 8:16], atol=1e-10, rtol=1e-10)
    for row, mask in enumerate(kept):
        left = torch.zeros_like(inverse)
        left[mask[:, None] & mask] = torch.linalg.inv(hessian[mask][:, mask]).flatten()
        torch.testing.assert_close(blocks[row], diagonal_blocks(left, 4)[2:4], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("text", ["0.5", "0.3", "2:4", "1:4", "4:8"])
def test_counts_are_exact_and_each_schedule_is_better_than_the_one_below(text: str) -> None:
    weight, hessian, inverse = problem(48, 64, 11)
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
    residual = weight * scanned.kept
    fresh = Preconditioner(hessian, inverse, scanned.kept)
    torch.testing.assert_close(scanned.preconditioner(residual), fresh(residual))
    # what it leaves is a start: nearer than the mask alone
    best = solve_directly(weight, hessian, inverse, scanned.kept).loss
    naive = row_loss(weight, weight.where(scanned.kept, 0), hessian)
    assert bool((scanned.matrix[~scanned.kept] == 0).all())
    assert float((row_loss(weight, scanned.matrix, hessian) - best).sum()) < 0.5 * float((naive - best).sum())


def test_joint_masks_lose_less_than_single_ones() -> None:
    for seed in range(4):
        weight, hessian, inverse = problem(32, 64, seed)
        single, joint = (
            float(solve_directly(weight, hessian, inverse, choose_at_once(weight, inverse, rule)).loss.sum())
            for rule in (singly(lambda scores, start: keep_n_of_m(scores, 4, 8)), jointly(4, 8))
        )
        assert joint < single


def test_the_first_block_of_a_scan_is_chosen_from_the_dense_weights() -> None:
    weight, hessian, inverse = problem(8, 48)
    rule = jointly(2, 4)
    wanted = choose_at_once(weight, inverse, rule)[:, :16]
    assert torch.equal(scan(weight, hessian, inverse, rule, 16, 3).kept[:, :16], wanted)
    assert torch.equal(scan_exactly(weight, inverse, rule, 16)[:, :16], wanted)


def test_within_one_block_the_scan_leaves_the_best_update_already() -> None:
    weight, hessian, inverse = problem(16, 16)
    found = scan(weight, hessian, inverse, jointly(2, 4), 16, 1)
    best = solve_directly(weight, hessian, inverse, found.kept).loss
    assert bool((row_loss(weight, found.matrix, hessian) < 1.05 * best).all())


@pytest.mark.parametrize("parts", [1, 2])
def test_of_one_removal_the_scan_knows_the_consequences_exactly(parts: int) -> None:
    weight, hessian, inverse = problem(8, 2)
    seen = []

    def choose(w: Tensor, blocks: Tensor, start: int) -> Tensor:
        seen.append(w.square() / blocks[..., 0, 0])
        return torch.full_like(w, start == 1, dtype=torch.bool)

    kept = scan(weight, hessian, inverse, Rule(1, choose), 1, parts).kept
    now, blocks = conditional(weight, inverse, kept, 1, 2)
    torch.testing.assert_close(seen[1], now.square() / blocks[..., 0, 0])


def test_between_two_parts_of_a_scan_the_weights_are_brought_up_to_date() -> None:
    weight, hessian, inverse = problem(16, 64)
    gone = random_mask(16, 64, [32] * 16)
    gone[:, 48:] = True
    errors = []
    for parts in (1, 4):
        seen = {}

        def choose(w: Tensor, blocks: Tensor, start: int, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[start] = w.square() / blocks[..., 0, 0]
            return gone[:, start : start + 16]

        scan(weight, hessian, inverse, Rule(1, choose), 16, parts)
        now, blocks = conditional(weight, inverse, gone, 48, 64)
        exact = (now.square() / blocks[..., 0, 0]).sqrt()
        errors.append(float((seen[48].sqrt() - exact).norm() / exact.norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(("kept", "of", "count"), [(8, 16, 12870), (16, 32, 601080390), (128, 256, "5768")])
def test_too_many_patterns_are_refused(kept: int, of: int, count: int | str) -> None:
    """They are counted, not listed: memory would run out before the refusal."""
    with pytest.raises(ValueError, match=f"{count}[0-9]* patterns"):
        jointly(kept, of)


def _apt(matrix: Tensor, gram: Gram, pattern: str, **parameters: Any) -> Update:
    shape = (matrix.shape[0], matrix.shape[1])
    budget = Budget.uniform(Pattern.parse(pattern), shape)
    found = apt(Weight("q", 0, None, shape, lambda: matrix), gram, budget, Context(), **parameters)
    assert int((~found.kept).sum()) == budget.weights
    assert bool((found.matrix[~found.kept] == 0).all())
    return found


@pytest.mark.parametrize("gone", ["the first columns", "the last column", "few", "half"])
@pytest.mark.parametrize("solver", ["steps", "direct"])
def test_no_row_of_a_given_mask_is_worse_than_sparsegpts(gone: str, solver: str) -> None:
    """Where the first columns go, SparseGPT's sweep is the best there is, and nothing short of it will do."""
    weight, hessian, _ = problem(64, 96, 5, torch.float32)
    kept = torch.ones_like(weight, dtype=torch.bool)
    if gone == "the first columns":
        kept[torch.arange(96) < torch.arange(1, 65)[:, None]] = False
    elif gone == "the last column":
        kept[:, -1] = False
    else:
        kept = random_mask(64, 96, [3 if gone == "few" else 48] * 64)
    gram = Gram(hessian, 1000)
    damped = gram.damped(0.01, "mean")
    budget = Budget.uniform(Pattern.parse("0.5"), (64, 96))
    given = Weight("q", 0, None, (64, 96), lambda: weight)
    ours = apt(given, gram, budget, Context(), mask=kept, solver=solver).matrix
    swept = sweep(weight, damped, kept).weight
    mine, theirs = (row_loss(weight.double(), each.double(), damped.matrix.double()) for each in (ours, swept))
    assert bool((mine <= theirs * (1 + 1e-5)).all())
    if gone == "half":
        assert float(mine.sum()) < 0.99 * float(theirs.sum())


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
    assert bool((row_loss(dense, found.matrix, hessian.matrix) <= 1.002 * best.loss).all())
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


def test_apts_schedules_are_what_they_are_called(layer: Any) -> None:
    matrix, gram = layer
    hessian = gram.damped()
    dense, inverse = matrix.masked_fill(hessian.dead, 0), hessian.inverse
    budget = Budget.uniform(Pattern.parse("0.5"), (24, 48))
    rule, whole = singly(by_budget(budget, 16).choose), singly(by_budget(budget, 48).choose)
    masks = {name: _apt(matrix, gram, "0.5", schedule=name).kept for name in ("blocks", "exact", "fast")}
    assert torch.equal(masks["blocks"], scan(dense, hessian.matrix, inverse, rule).kept)
    assert torch.equal(masks["exact"], scan_exactly(dense, inverse, rule, 16))
    assert torch.equal(masks["fast"], choose_at_once(dense, inverse, whole))
    assert not torch.equal(masks["blocks"], masks["exact"])
    # weights of a dead input cost nothing, so they go first
    assert not any(bool(kept[:, 5].any()) for kept in masks.values())

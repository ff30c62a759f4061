"""The best values of the weights that stay: closed forms, the plain SparseGPT loop, what must never get worse."""

import pytest
import torch
from torch import Tensor

from quadratic import one_by_one, problem, random_mask, row_loss
from secateur.tensor.masked_least_squares import Descent, Preconditioner, Solved, solve_by_steps, solve_directly
from secateur.tensor.multi_removal import conditional
from secateur.tensor.patterns import keep_overall


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
    weight, hessian, inverse = problem()
    # from nothing removed to everything, both sides of the smaller system
    kept = random_mask(6, 24, [0, 1, 7, 12, 20, 24])
    wanted = one_by_one(weight, hessian, kept)
    direct, steps = _both(weight, hessian, inverse, kept)
    torch.testing.assert_close(direct.weight, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(steps.weight, wanted, atol=1e-6, rtol=1e-6)
    for found in (direct, steps):
        assert bool((found.weight[~kept] == 0).all())
        torch.testing.assert_close(found.loss, row_loss(weight, found.weight, hessian), atol=1e-9, rtol=1e-9)


def test_the_update_is_least_squares_on_the_inputs_themselves() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 9, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    kept = random_mask(1, 9, [4])
    wanted = torch.linalg.lstsq(inputs[:, kept[0]], inputs @ weight[0]).solution
    found = solve_directly(weight, hessian, torch.linalg.inv(hessian), kept)
    torch.testing.assert_close(found.weight[0, kept[0]], wanted, atol=1e-10, rtol=1e-10)


def test_one_weight_is_optimal_brain_surgeon() -> None:
    weight, hessian, inverse = problem()
    gone = torch.tensor([3, 0, 23, 11, 5, 5])
    kept = torch.ones_like(weight, dtype=torch.bool).scatter_(1, gone[:, None], False)
    single = weight.gather(1, gone[:, None])[:, 0] / inverse.diagonal()[gone]
    wanted = (weight - single[:, None] * inverse[gone]).where(kept, 0)
    for found in _both(weight, hessian, inverse, kept):
        torch.testing.assert_close(found.weight, wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.loss, single.square() * inverse.diagonal()[gone] / 2)


def test_losses_add_up_when_weights_go_in_two_turns() -> None:
    weight, hessian, inverse = problem()
    kept = random_mask(6, 24, [12] * 6)
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
    weight, hessian, inverse = problem(32, 48, seed, dtype)
    kept = keep_overall(weight.square(), weight.numel() // 2)
    start = _sparsegpt(weight, inverse, kept)
    theirs = row_loss(weight.double(), start.double(), hessian.double())
    for found in (
        solve_directly(weight, hessian, inverse, kept),
        solve_by_steps(weight, hessian, inverse, kept),
        solve_by_steps(weight, hessian, inverse, kept, start=start, tolerance=0.5),
    ):
        ours = row_loss(weight.double(), found.weight.double(), hessian.double())
        assert bool((ours <= theirs * (1 + 1e-6)).all())
    assert float(ours.sum()) < 0.99 * float(theirs.sum())


@pytest.mark.parametrize("inputs", ["common", "chain"])
def test_steps_keep_to_their_tolerance_and_the_bound_holds(inputs: str) -> None:
    weight, hessian, inverse = problem(40, 64, 3)
    if inputs == "chain":
        # nothing narrow about it, so that what the preconditioner estimates is far too small
        place = torch.arange(64, dtype=torch.float64)
        hessian = 0.99 ** (place[:, None] - place).abs()
        inverse = torch.linalg.inv(hessian)
    kept = random_mask(40, 64, [*range(8, 48)])
    best = row_loss(weight, one_by_one(weight, hessian, kept), hessian)
    for exponent in range(1, 10):
        found = solve_by_steps(weight, hessian, inverse, kept, tolerance=10.0**-exponent)
        truth = found.loss - best
        assert bool((truth <= found.excess + 1e-12 * best).all())
        assert bool((found.excess <= 10.0**-exponent * found.loss).all())
        # it stops when it may
        assert float((truth / best).max()) > 10.0 ** -(exponent + 5)


def test_conjugate_gradients_are_done_after_as_many_steps_as_weights_stay() -> None:
    weight, hessian, inverse = problem(6, 24)
    kept = random_mask(6, 24, [16] * 6)
    descent = Descent(weight, hessian, Preconditioner(hessian, inverse, kept), weight.where(kept, 0))
    for _ in range(8):
        descent.aim()
        descent.move()
    torch.testing.assert_close(descent.matrix, one_by_one(weight, hessian, kept), atol=1e-9, rtol=1e-9)


def test_rows_that_do_not_get_there_are_solved_directly() -> None:
    weight, hessian, inverse = problem()
    kept = random_mask(6, 24, [12] * 6)
    found = solve_by_steps(weight, hessian, inverse, kept, tolerance=1e-12, steps=1)
    torch.testing.assert_close(found.weight, one_by_one(weight, hessian, kept), atol=1e-10, rtol=1e-10)
    assert bool((found.excess == 0).all())


def test_what_float32_cannot_factor_is_solved_in_float64() -> None:
    # whole numbers that float32 holds exactly, so that float64 sees the same matrix, positive definite by 1 in 10 million
    direction = torch.randint(3, 8, (16, 1), generator=torch.Generator().manual_seed(0)).float()
    hessian = 2.0**18 * direction @ direction.T + torch.eye(16)
    weight = problem(4, 16, dtype=torch.float32)[0]
    kept = random_mask(4, 16, [9] * 4)
    hard = torch.tensor([bool(torch.linalg.cholesky_ex(hessian[mask][:, mask]).info) for mask in kept])
    assert hard.any()
    wanted = one_by_one(weight.double(), hessian.double(), kept)
    inverse = torch.linalg.inv(hessian.double()).float()
    found = solve_directly(weight, hessian, inverse, kept)
    torch.testing.assert_close(found.weight[hard].double(), wanted[hard], atol=1e-5, rtol=1e-5)
    naive = row_loss(weight.double(), weight.double().where(kept, 0), hessian.double())
    found = solve_by_steps(weight, hessian, inverse, kept)
    assert bool((row_loss(weight.double(), found.weight.double(), hessian.double()) < 1e-3 * naive).all())


def test_what_is_not_positive_definite_is_refused() -> None:
    weight, hessian, inverse = problem()
    hessian[0, 0] = -1
    kept = random_mask(6, 24, [20] * 6)
    kept[:, 0] = True
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        solve_directly(weight, hessian, inverse, kept)


def test_no_removal_gives_the_weights_bit_for_bit() -> None:
    weight, hessian, inverse = problem(dtype=torch.float32)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for found in _both(weight, hessian, inverse, kept):
        assert torch.equal(found.weight, weight)
        assert bool((found.loss == 0).all())
    assert torch.equal(solve_by_steps(weight, hessian, inverse, kept, start=weight * 1.5).weight, weight)


def test_unrelated_inputs_need_no_update() -> None:
    weight = problem()[0]
    energy = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    kept = random_mask(6, 24, [12] * 6)
    for found in _both(weight, energy.diag(), (1 / energy).diag(), kept):
        torch.testing.assert_close(found.weight, weight.where(kept, 0), atol=1e-12, rtol=0)


def test_the_order_of_columns_does_not_matter_to_the_update() -> None:
    weight, hessian, inverse = problem()
    kept = random_mask(6, 24, [12] * 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    permuted = weight[:, order], hessian[order][:, order], inverse[order][:, order], kept[:, order]
    plain, turned = _both(weight, hessian, inverse, kept), _both(*permuted)
    for one, other, tolerance in zip(plain, turned, (1e-10, 1e-6), strict=True):
        torch.testing.assert_close(one.weight[:, order], other.weight, atol=tolerance, rtol=tolerance)


def test_rows_with_one_mask_share_it() -> None:
    weight, hessian, inverse = problem()
    kept = random_mask(1, 24, [10]).expand(6, -1)
    found = solve_directly(weight, hessian, inverse, kept)
    torch.testing.assert_close(found.weight, one_by_one(weight, hessian, kept), atol=1e-10, rtol=1e-10)


def test_the_preconditioner_leaves_nothing_of_strong_common_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    narrow = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    hessian = 1e4 * narrow @ narrow.T + torch.rand(64, generator=generator, dtype=torch.float64).add(0.5).diag()
    mask = random_mask(1, 64, [30])[0]
    kept, units = mask.expand(34, -1), torch.eye(64, dtype=torch.float64)[mask]
    preconditioner = Preconditioner(hessian, torch.linalg.inv(hessian), kept)
    root = torch.linalg.cholesky(hessian[mask][:, mask])
    assert float(torch.linalg.cond(root)) > 300
    applied = preconditioner(units)
    assert bool((applied[:, ~mask] == 0).all())
    values = torch.linalg.eigvalsh(root.T @ applied[:, mask] @ root)
    assert 0.2 < float(values.min()) < float(values.max()) < 5


def test_a_preconditioner_may_learn_of_the_mask_in_parts() -> None:
    weight, hessian, inverse = problem()
    kept = random_mask(6, 24, [12] * 6)
    parts = Preconditioner(hessian, inverse, torch.ones_like(kept))
    parts.drop(kept[:, :9], 0)
    parts.drop(kept[:, 9:], 9)
    residual = weight * kept
    torch.testing.assert_close(parts(residual), Preconditioner(hessian, inverse, kept)(residual))

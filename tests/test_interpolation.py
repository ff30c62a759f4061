"""Kept inputs take over removed ones: closed forms and invariants."""

import pytest
import torch

from secateur.tensor.interpolation import interpolate, interpolate_best

INPUTS, OUTPUTS, TOKENS = 12, 5, 400
KEPT = torch.tensor([0, 1, 3, 4, 6, 7, 9, 11])


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs whose means are not zero, and a matrix that reads them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    return mixed + torch.randn(INPUTS, generator=generator), torch.randn(OUTPUTS, INPUTS, generator=generator)


def moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double() / len(inputs)


def error(inputs: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor) -> float:
    return float((inputs[:, KEPT] @ columns.T + shift - inputs @ weight.T).double().square().sum())


def test_without_a_ridge_it_is_the_least_squares_refit() -> None:
    inputs, weight = drawn()
    columns, shift = interpolate(moment(inputs), weight, KEPT, ridge=0)
    wanted = torch.linalg.lstsq(inputs[:, KEPT].double(), (inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(columns.double(), wanted, atol=1e-4, rtol=1e-4)
    assert not shift.any()


def test_with_means_the_bias_is_refitted_too() -> None:
    inputs, weight = drawn(1)
    columns, shift = interpolate(moment(inputs), weight, KEPT, ridge=0, mean=inputs.double().mean(0))
    both = torch.cat([inputs[:, KEPT], torch.ones(TOKENS, 1)], dim=1).double()
    wanted = torch.linalg.lstsq(both, (inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(columns.double(), wanted[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shift.double(), wanted[:, -1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("centred", [False, True])
def test_the_error_is_never_above_that_of_plain_removal(ridge: float, centred: bool) -> None:
    inputs, weight = drawn(2)
    mean = inputs.double().mean(0) if centred else None
    columns, shift = interpolate(moment(inputs), weight, KEPT, ridge, mean)
    assert error(inputs, weight, columns, shift) < error(inputs, weight, weight[:, KEPT], torch.zeros(OUTPUTS))


def test_more_ridge_is_nearer_to_plain_removal() -> None:
    inputs, weight = drawn(3)
    changes = [
        float((interpolate(moment(inputs), weight, KEPT, ridge)[0] - weight[:, KEPT]).norm())
        for ridge in (0.0, 0.1, 1.0, 10.0, 1e6)
    ]
    assert changes == sorted(changes, reverse=True) and changes[-1] < 1e-4 * changes[0]


def test_removed_inputs_that_depend_on_kept_ones_cost_nothing() -> None:
    inputs, weight = drawn(4)
    gone = [place for place in range(INPUTS) if place not in KEPT.tolist()]
    inputs[:, gone] = inputs[:, KEPT] @ torch.randn(len(KEPT), len(gone), generator=torch.Generator().manual_seed(5))
    columns, shift = interpolate(moment(inputs), weight, KEPT, ridge=1e-9)
    assert error(inputs, weight, columns, shift) <= 1e-8 * float((inputs @ weight.T).square().sum())


def test_dead_inputs_change_nothing() -> None:
    inputs, weight = drawn(6)
    inputs[:, KEPT[2]] = 0
    columns, _ = interpolate(moment(inputs), weight, KEPT, ridge=0.1)
    assert torch.isfinite(columns).all()
    torch.testing.assert_close(columns[:, 2], weight[:, KEPT[2]])


@pytest.mark.parametrize("centred", [False, True])
def test_the_best_ridge_is_that_of_the_smallest_error_on_other_inputs(centred: bool) -> None:
    """Twelve inputs of few tokens, whose own error is least without a ridge."""
    inputs, weight = drawn(4)
    inputs = inputs + 3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(9))
    seen, judge = inputs[:14], inputs[200:]
    mean, ridges = seen.double().mean(0) if centred else None, (1e3, 10.0, 1.0, 0.1, 1e-6)
    best = interpolate_best(moment(seen), weight, KEPT, ridges, judge, mean)
    by_hand = {each: error(judge, weight, *interpolate(moment(seen), weight, KEPT, each, mean)) for each in ridges}
    assert best.ridge == min(by_hand, key=by_hand.get) not in (ridges[0], ridges[-1])
    columns, shift = interpolate(moment(seen), weight, KEPT, best.ridge, mean)
    assert torch.equal(best.columns, columns) and torch.equal(best.shift, shift)
    whole = float((judge @ weight.T).double().square().sum())
    assert best.errors == pytest.approx([by_hand[each] / whole for each in ridges], rel=1e-4)

"""Leverage scores and tuned scales: closed forms and invariants."""

import pytest
import torch

from secateur.tensor.mask_tuning import leverage_scores, tune_scales

KEPT = torch.tensor([0, 2, 3, 5, 6, 8])


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(500, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    return inputs, torch.randn(4, 9, generator=generator)


def moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double() / len(inputs)


def test_orthonormal_inputs_cost_their_columns() -> None:
    _, weight = drawn()
    torch.testing.assert_close(leverage_scores(torch.eye(9), weight, ridge=1e-9), weight.square().sum(0))


@pytest.mark.parametrize("width", [1, 3])
def test_a_score_is_the_least_error_without_the_unit(width: int) -> None:
    inputs, weight = drawn(1)
    target = inputs.double() @ weight.double().T
    for unit, score in enumerate(leverage_scores(moment(inputs), weight, width, ridge=1e-9).tolist()):
        rest = [place for place in range(9) if place // width != unit]
        refit = torch.linalg.lstsq(inputs[:, rest].double(), target).solution
        error = float((inputs[:, rest].double() @ refit - target).square().sum() / len(inputs))
        assert score == pytest.approx(error, rel=1e-4)


def test_a_duplicate_costs_next_to_nothing() -> None:
    inputs, weight = drawn(2)
    inputs[:, 4] = inputs[:, 7]
    scores = leverage_scores(moment(inputs), weight, ridge=1e-6)
    assert max(float(scores[4]), float(scores[7])) < 1e-4 * float(scores.median())


def test_dead_inputs_cost_nothing() -> None:
    inputs, weight = drawn(3)
    inputs[:, 4] = 0
    scores = leverage_scores(moment(inputs), weight)
    assert torch.isfinite(scores).all() and float(scores[4]) < 1e-9 * float(scores.median())


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_tuned_scales_never_lose_more_than_plain_removal(ridge: float) -> None:
    inputs, weight = drawn(4)

    def error(scales: torch.Tensor) -> float:
        lost = inputs[:, KEPT] @ (weight[:, KEPT] * scales).T - inputs @ weight.T
        return float(lost.double().square().sum())

    scales, ones = tune_scales(moment(inputs), weight, KEPT, ridge), torch.ones(len(KEPT))
    assert error(scales) < error(ones)
    if not ridge:
        for place in range(len(KEPT)):
            for step in (-1e-2, 1e-2):
                other = scales.clone()
                other[place] += step
                assert error(other) > error(scales), "it is the minimum"
    else:
        assert (scales - 1).norm() < (tune_scales(moment(inputs), weight, KEPT, 0) - 1).norm()


def test_all_kept_needs_no_scale() -> None:
    inputs, weight = drawn(5)
    torch.testing.assert_close(tune_scales(moment(inputs), weight, torch.arange(9), 0.1), torch.ones(9))

"""Elimination with refit: closed forms, exact special cases, brute force."""

from itertools import combinations

import pytest
import torch

from secateur.tensor.elimination import eliminate, eliminate_units


def _responses(count: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return mixed + 0.5


def _gram(responses: torch.Tensor) -> torch.Tensor:
    return responses.double().T @ responses.double() / len(responses)


def test_columns_are_the_least_squares_refit_of_what_stays() -> None:
    responses, weight = _responses(400, 12), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    kept, columns = eliminate(_gram(responses), weight, 7, ridge=1e-6, group=1)
    wanted = torch.linalg.lstsq(responses[:, kept], responses @ weight.T).solution.T
    torch.testing.assert_close(columns, wanted, atol=1e-2, rtol=1e-2)


def test_one_removal_is_the_best_of_all() -> None:
    responses, weight = _responses(300, 8, 3), torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    target = responses @ weight.T

    def error(kept: list[int]) -> float:
        refit = torch.linalg.lstsq(responses[:, kept], target).solution
        return float((responses[:, kept] @ refit - target).square().sum())

    best = min(combinations(range(8), 7), key=lambda kept: error(list(kept)))
    kept, _ = eliminate(_gram(responses), weight, 7, ridge=1e-6, group=1)
    assert tuple(kept.tolist()) == best


def test_what_others_can_say_costs_nothing() -> None:
    responses = _responses(500, 10)
    responses[:, 9] = 2 * responses[:, 0] - responses[:, 3]
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    kept, columns = eliminate(_gram(responses), weight, 9, ridge=1e-7, group=1)
    assert set(range(10)) - set(kept.tolist()) <= {0, 3, 9}
    torch.testing.assert_close(responses[:, kept] @ columns.T, responses @ weight.T, atol=1e-2, rtol=1e-2)


def test_uncorrelated_inputs_are_ranked_by_energy_and_stay_as_they_are() -> None:
    energy = torch.tensor([4.0, 0.1, 9.0, 1.0, 0.5])
    weight = torch.eye(5)
    kept, columns = eliminate(torch.diag(energy), weight, 3, group=1)
    assert kept.tolist() == [0, 2, 3]
    torch.testing.assert_close(columns, weight[:, kept])


def test_a_bias_takes_the_mean_of_what_goes_and_is_never_removed() -> None:
    # input 2 is constant: the bias alone can say all of it
    responses = torch.randn(1000, 3, generator=torch.Generator().manual_seed(5))
    responses[:, 2] = 3.0
    with_one = torch.cat([responses, torch.ones(1000, 1)], dim=1)
    weight = torch.tensor([[1.0, 2.0, 5.0, 0.25]])
    kept, columns = eliminate(_gram(with_one), weight, 2, ridge=1e-6, group=1, constant=True)
    assert kept.tolist() == [0, 1]
    assert columns.shape == (1, 3)
    assert float(columns[0, -1]) == pytest.approx(15.25, abs=1e-2)


def test_a_massive_input_survives_and_does_not_spoil_the_refit() -> None:
    responses = _responses(400, 16, 6)
    responses[:, 5] *= 1e4
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    kept, columns = eliminate(_gram(responses), weight, 10)
    assert 5 in kept.tolist()
    assert bool(torch.isfinite(columns).all())
    left = responses[:, kept] @ columns.T - responses @ weight.T
    plain = responses[:, kept] @ weight[:, kept].T - responses @ weight.T
    assert left.square().sum() < plain.square().sum()


@pytest.mark.parametrize("group", [1, 3, 16])
def test_counts_are_exact_whatever_the_group(group: int) -> None:
    responses = _responses(200, 20, 8)
    kept, columns = eliminate(_gram(responses), torch.ones(2, 20), 7, group=group)
    assert len(kept) == 7
    assert columns.shape == (2, 7)
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_a_hopeless_matrix_is_an_error_and_not_a_result() -> None:
    with pytest.raises(FloatingPointError, match="not positive definite"):
        eliminate(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), torch.ones(1, 2), 1, ridge=1e-3)


def test_dead_inputs_go_first() -> None:
    responses = _responses(200, 6, 9)
    responses[:, [1, 4]] = 0
    kept, columns = eliminate(_gram(responses), torch.ones(3, 6), 4, group=1)
    assert kept.tolist() == [0, 2, 3, 5]
    assert bool(torch.isfinite(columns).all())


def test_units_of_several_inputs_go_together_and_the_cheapest_first() -> None:
    width, units = 3, 5
    responses = _responses(400, width * units, 7)
    weight = torch.randn(4, width * units, generator=torch.Generator().manual_seed(8))
    target = responses @ weight.T

    def refit(kept: list[int]) -> tuple[float, torch.Tensor]:
        columns = [unit * width + place for unit in kept for place in range(width)]
        solution = torch.linalg.lstsq(responses[:, columns], target).solution
        return float((responses[:, columns] @ solution - target).square().sum()), solution.T

    best = min(combinations(range(units), units - 1), key=lambda kept: refit(list(kept))[0])
    kept, columns = eliminate(_gram(responses), weight, units - 1, ridge=1e-6, width=width)
    assert tuple(kept.tolist()) == best
    torch.testing.assert_close(columns, refit(list(best))[1], atol=1e-2, rtol=1e-2)


def test_a_bias_is_one_more_input() -> None:
    responses = _responses(500, 6, 9)
    generator = torch.Generator().manual_seed(10)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    kept, columns, found = eliminate_units(
        _gram(responses).float(), responses.mean(0), weight, bias, 4, ridge=1e-6, group=1
    )
    both = torch.cat([responses[:, kept], torch.ones(len(responses), 1)], dim=1)
    wanted = torch.linalg.lstsq(both, responses @ weight.T + bias).solution.T
    torch.testing.assert_close(columns, wanted[:, :-1], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found, wanted[:, -1], atol=2e-2, rtol=2e-2)
    assert eliminate_units(_gram(responses), None, weight, None, 4)[2] is None

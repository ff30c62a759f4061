"""The surrogate of sub-models: closed forms, optimality, ranks; which units are drawn and which go."""

import pytest
import torch
from scipy.stats import kendalltau

from secateur.methods.structure.bonsai import SETTINGS
from secateur.tensor.regression import best_setting, elastic_net, kendall_tau
from secateur.tensor.submodels import candidates, draw_pair, lowest, lowest_within


def _data(count: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(width, generator=generator, dtype=torch.float64) + 3 + 0.1 * torch.randn(
        count, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize(("count", "width"), [(30, 7), (7, 30)])
def test_without_lasso_it_is_ridge_regression_in_closed_form(count: int, width: int) -> None:
    x, y = _data(count, width)
    theta, bias = elastic_net(x, y, 0.3, 0.0)
    centred, target = x - x.mean(0), y - y.mean()
    gram = centred.T @ centred / count
    ridge = 0.3 * torch.linalg.eigvalsh(gram)[-1] * torch.eye(width, dtype=x.dtype)
    torch.testing.assert_close(theta, torch.linalg.solve(gram + ridge, centred.T @ target / count))
    assert bias == pytest.approx(float(y.mean() - x.mean(0) @ theta))


@pytest.mark.parametrize(("count", "width"), [(30, 7), (12, 30)])
def test_with_lasso_no_step_is_left(count: int, width: int) -> None:
    x, y = _data(count, width)
    theta, _ = elastic_net(x, y, 0.05, 0.2, steps=3000)
    centred, target = x - x.mean(0), y - y.mean()
    threshold = 0.2 * (centred.T @ target).abs().max() / count
    scale = torch.linalg.eigvalsh(centred @ centred.T / count)[-1]
    slope = centred.T @ (target - centred @ theta) / count - 0.05 * scale * theta
    zero = theta == 0
    assert 0 < int(zero.sum()) < width
    assert bool((slope[zero].abs() <= threshold * (1 + 1e-6)).all())
    torch.testing.assert_close(slope[~zero], threshold * theta[~zero].sign(), rtol=1e-4, atol=1e-6)


def test_the_scale_of_lasso_is_that_at_which_all_is_zero() -> None:
    x, y = _data(20, 5)
    assert not elastic_net(x, y, 0.0, 1.0)[0].any() and elastic_net(x, y, 0.0, 0.95)[0].any()
    theta, bias = elastic_net(torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0, 6.0]), 0.1, 0.1)
    assert not theta.any() and bias == 3


def test_kendalls_tau_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    for high in (4, 100):
        a, b = (torch.randint(high, (30,), generator=generator) for _ in range(2))
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall_tau(torch.arange(5), -torch.arange(5)) == -1 and kendall_tau(torch.ones(5), torch.arange(5)) == 0


def test_a_planted_linear_metric_is_recovered() -> None:
    """Kendall's τ of θ above 0.9 with enough sub-models, penalties chosen by the folds."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(60, generator=generator, dtype=torch.float64)
    prior = torch.rand(60, generator=generator)
    masks = torch.cat([draw_pair(prior, 1.0, 30, torch.Generator().manual_seed(i)) for i in range(100)])
    scores = masks.double() @ planted + 0.05 * torch.randn(200, generator=generator, dtype=torch.float64)
    folds = [torch.cat([2 * part, 2 * part + 1]) for part in torch.randperm(100, generator=generator).tensor_split(5)]
    setting, tau = best_setting(masks, scores, SETTINGS, folds)
    assert tau > 0.9 and setting in SETTINGS
    assert kendall_tau(elastic_net(masks, scores, *setting)[0], planted) > 0.9
    few = torch.arange(20).tensor_split(5)
    assert best_setting(masks[:20], scores[:20], SETTINGS, few)[1] < 0.9, "with a tenth of them it is not"


def test_two_sub_models_have_every_candidate_once() -> None:
    prior, alive = torch.tensor([5.0, 1, 4, 2, 3, 9, 0]), torch.tensor([True] * 6 + [False])
    found = candidates(prior, alive, 4)
    assert found.tolist() == [1, 3, 4, 2], "those present with the lowest prior; the others stay in every sub-model"
    for seed in range(20):
        pair = draw_pair(prior[found], 9.0, 1, torch.Generator().manual_seed(seed))
        assert pair.sum(1).tolist() == [3, 1] and pair.sum(0).tolist() == [1] * 4
        assert torch.equal(pair, draw_pair(prior[found], 9.0, 1, torch.Generator().manual_seed(seed)))
    assert draw_pair(torch.empty(0), 0.0, 0, torch.Generator()).shape == (2, 0)
    assert draw_pair(torch.ones(3), 1.0, 0, torch.Generator()).sum(1).tolist() == [3, 0], "none is lacking, and all"
    assert draw_pair(torch.ones(2), 1.0, 2, torch.Generator()).sum(1).tolist() == [0, 2], "all alike"


def test_a_low_prior_is_lacking_more_often() -> None:
    prior, generator = torch.tensor([0.0, 6.0, 9.0]), torch.Generator().manual_seed(0)
    lacking = sum((~draw_pair(prior, 12.0, 1, generator)[0]).long() for _ in range(4000)) / 4000
    torch.testing.assert_close(lacking, torch.tensor([12, 6, 3]) / 21, atol=0.02, rtol=0)


def test_the_lowest_go() -> None:
    theta, prior = torch.tensor([0.0, -1, 0, 3, 0]), torch.tensor([3.0, 9, 1, 0, 2])
    assert lowest(theta, prior, 4).tolist() == [1, 2, 4, 0], "equal ones by the prior"
    sizes, homes = [2, 2, 7, 2, 2], [0, 0, 1, 0, 2]
    assert lowest_within(theta, prior, sizes, homes, [9, 9, 9], 5) == [1, 4, 0], "what is too large is skipped"
    assert lowest_within(theta, prior, sizes, homes, [1, 9, 9], 5) == [1, 4], "no module loses more than it can"
    assert lowest_within(theta, prior, sizes, homes, [9, 9, 9], 0) == []

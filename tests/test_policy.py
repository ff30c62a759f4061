"""The collapsed policy and its closed-form gradients against the uncollapsed module and autograd."""

import itertools

import pytest
import torch
from torch import nn

from secateur.tensor.policy import (
    FullPolicy,
    Policy,
    StandardRows,
    drawn_direction,
    gumbel_top_k,
    published_draw,
    published_loss,
    relaxed_bernoulli,
    top_k,
    uniform,
)
from secateur.tensor.policy_learning import PublishedLearner, StableLearner


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uncollapsed(full: FullPolicy, weight: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published forward, from its description: two maps, a sigmoid, the relaxed Bernoulli sample."""
    z = ((weight @ full.a.T + full.b) @ full.r)[:, 0]
    alpha = torch.sigmoid(z)
    return z, torch.sigmoid(u.log() - (1 - u).log() + alpha.log() - (1 - alpha).log())


def case() -> tuple[FullPolicy, torch.Tensor, torch.Tensor]:
    full = FullPolicy.start(70, 24, generator(1))
    weight = torch.randn(70, 24, generator=generator(2)) * 0.3
    return full, weight, uniform(70, generator(3))


def test_start_is_a_linear_layers_default() -> None:
    full = FullPolicy.start(300, 64, generator())
    reference = nn.Linear(64, 300)
    for ours, theirs in [(full.a, reference.weight), (full.b, reference.bias)]:
        assert ours.shape == theirs.shape
        assert ours.abs().max() <= 1 / 8
        assert ours.std() == pytest.approx(theirs.std().item(), rel=0.1)
    assert full.r.shape == (300, 1)
    assert 0 <= full.r.min() < 0.1 < 0.9 < full.r.max() < 1


def test_collapsed_forward_is_the_uncollapsed_one() -> None:
    full, weight, u = case()
    z, o = uncollapsed(full, weight, u)
    collapsed = full.collapse().scores(weight)
    torch.testing.assert_close(collapsed, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(relaxed_bernoulli(collapsed, u), o, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_uncollapsed_module() -> None:
    full, weight, u = case()
    kept = top_k(torch.randn(70, generator=generator(4)), 50)
    leaves = FullPolicy(*(tensor.double().requires_grad_() for tensor in full.named().values()))
    _, o = uncollapsed(leaves, weight.double(), u.double())
    expected = -3.7 * o[kept].log().sum()
    expected.backward()
    loss, delta = published_loss(full.collapse().scores(weight), u, kept, 3.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in full.gradients(weight.T @ delta, delta.sum()).items():
        torch.testing.assert_close(gradient, leaves.named()[name].grad.float(), rtol=1e-4, atol=1e-5)


def test_steps_are_those_of_adamw_on_the_uncollapsed_module() -> None:
    full, weight, _ = case()
    kept = torch.arange(50)
    learner = PublishedLearner(70, 24, 1e-2, generator(1))
    leaves = FullPolicy(*(tensor.clone().requires_grad_() for tensor in full.named().values()))
    optimizer = torch.optim.AdamW(leaves.named().values(), lr=1e-2)
    for step in range(3):
        _, o = uncollapsed(leaves, weight, uniform(70, generator(step)))
        optimizer.zero_grad()
        (-2.0 * o[kept].log().sum()).backward()
        optimizer.step()
        assert learner.step(learner.message(weight, kept, 2.0, generator(step)))
    learner.remember(1.0)
    _, tensors = learner.result()
    for name, parameter in leaves.named().items():
        # Adam divides by the root of the square: where a gradient is all rounding its step has no correct digit
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-4, atol=1e-4)


def test_saturated_logits_are_skipped() -> None:
    learner = PublishedLearner(70, 24, 1e-3, generator(1))
    before, _ = learner.state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    weight = 1e4 * torch.ones(70, 24)
    assert not learner.step(learner.message(weight, torch.arange(50), 1.0, generator()))
    after, _ = learner.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_published_draw() -> None:
    kept = published_draw(torch.randn(70, generator=generator()), 40, generator(1))
    assert len(kept.unique()) == 40
    assert torch.equal(kept, kept.sort().values)
    with pytest.raises(FloatingPointError):
        published_draw(torch.full((70,), float("nan")), 40, generator(1))


def log_probability(z: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Plackett–Luce, from its definition."""
    left, total = list(range(len(z))), z.new_zeros(())
    for index in order:
        total = total + z[index] - z[left].logsumexp(0)
        left.remove(index)
    return total


def test_drawn_direction_is_the_gradient_of_the_log_probability() -> None:
    for count in (1, 5, 11, 12):
        z = (3 * torch.randn(12, generator=generator(5))).double().requires_grad_()
        order = gumbel_top_k(z.detach(), count, generator(6))
        (expected,) = torch.autograd.grad(log_probability(z, order.tolist()), z)
        torch.testing.assert_close(drawn_direction(z.detach(), order), expected.float())


def test_drawn_direction_stays_finite_for_extreme_logits() -> None:
    z = torch.linspace(-2000, 2000, 50)
    assert drawn_direction(z, gumbel_top_k(z, 49, generator())).isfinite().all()


def test_gumbel_top_k_draws_with_the_right_odds() -> None:
    z = torch.tensor([0.0, 1.0, -1.0, 0.5])
    draws, stream = 20000, generator(7)
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for _ in range(draws):
        counts[tuple(gumbel_top_k(z, 2, stream).tolist())] += 1
    for order, count in counts.items():
        assert count / draws == pytest.approx(log_probability(z, list(order)).exp().item(), abs=0.012)


def standardise(weight: torch.Tensor) -> torch.Tensor:
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True, correction=0)


def test_standardised_rows() -> None:
    weight = torch.randn(30, 12, generator=generator()) * 7 + 3
    v, delta = torch.randn(12, generator=generator(1)), torch.randn(30, generator=generator(2))
    rows = StandardRows(weight)
    torch.testing.assert_close(rows.scores(v), standardise(weight) @ v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.pull(delta), standardise(weight).T @ delta, rtol=1e-4, atol=1e-5)
    constant = StandardRows(torch.ones(2, 12))
    assert (constant.scores(v) == 0).all()
    assert (constant.pull(delta[:2]) == 0).all()
    policy = Policy(v, torch.tensor(0.3), standardised=True)
    torch.testing.assert_close(policy.scores(weight), policy.scores(2 * weight + 1), rtol=1e-4, atol=1e-4)


def test_stable_learner_finds_the_rows_that_pay() -> None:
    weight = torch.randn(64, 16, generator=generator(8))
    good = (standardise(weight) @ torch.randn(16, generator=generator(9))).argsort()[32:]
    learner, stream = StableLearner(16, 0.05), generator(10)
    for _ in range(60):
        drawn = [learner.draw(weight, 32, stream) for _ in range(4)]
        rewards = [torch.isin(kept, good).float().mean().item() for kept, _ in drawn]
        learner.update({index: (rewards[index], drawn[index][1]) for index in range(4)}, 0.99)
    policy, _ = learner.result()
    assert torch.isin(top_k(policy.scores(weight), 32), good).float().mean() > 0.8  # 0.5 is chance

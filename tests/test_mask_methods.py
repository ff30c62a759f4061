"""DSnoT, Pruner-Zero and MoE-Pruner on one matrix: special cases in which they are another method, or nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.errors import RequestError, RunError
from secateur.methods.weights.dsnot import dsnot
from secateur.methods.weights.moe_pruner import moe_pruner
from secateur.methods.weights.pruner_zero import pruner_zero
from secateur.registry import Budget, GatedNorms, Gradients, InputNorms, Moments, Weight
from secateur.tensor.expressions import Expression, W, X
from secateur.tensor.patterns import Pattern

SHAPE = (24, 32)


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weight(matrix: torch.Tensor | None = None) -> Weight:
    found = _normal(*SHAPE, seed=0) if matrix is None else matrix
    return Weight("layers.0.q.weight", 0, None, SHAPE, lambda: found)


def _budget(pattern: str = "0.5") -> Budget:
    return Budget.uniform(Pattern.parse(pattern), SHAPE)


def _inputs(offset: float = 0.3) -> torch.Tensor:
    return (
        _normal(200, SHAPE[1], seed=1) * (0.2 + torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(2)))
        + offset
    )


def _moments(inputs: torch.Tensor) -> Moments:
    return Moments(inputs.mean(0), inputs.var(0, correction=0), len(inputs))


def _norms(inputs: torch.Tensor) -> InputNorms:
    return InputNorms(inputs.square().sum(0), len(inputs))


def _wanda(weight: Weight, inputs: torch.Tensor, budget: Budget, per: str = "row") -> torch.Tensor:
    return budget.mask(weight.matrix.abs() * _norms(inputs).norms, per)


def _context() -> Any:
    notes: dict[str, Any] = {}
    return SimpleNamespace(notes=notes, note=notes.__setitem__)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
def test_dsnot_brings_the_mean_output_back_with_as_many_weights(pattern: str) -> None:
    inputs, weight, budget, context = _inputs(), _weight(), _budget(pattern), _context()
    mask = _wanda(weight, inputs, budget)
    before = mask.clone()
    kept = dsnot(weight, _moments(inputs), _norms(inputs), budget, context, mask=mask, length=64, same_sign=True).kept
    assert torch.equal(mask, before)
    assert torch.equal(kept.sum(1), mask.sum(1))
    if pattern == "2:4":
        assert (kept.view(-1, 4).sum(1) == 2).all()

    def lost(mask: torch.Tensor) -> torch.Tensor:
        return (inputs @ (weight.matrix * ~mask).T).mean(0).abs()

    assert (lost(kept) <= lost(mask) + 1e-4).all()
    assert float(lost(kept).mean()) < 0.8 * float(lost(mask).mean())
    told = context.notes["dsnot"]
    assert told["swaps"] > 0
    assert told["mean error"]["before"] == pytest.approx(64 * float(lost(mask).mean()), rel=1e-3)
    assert told["mean error"]["after"] == pytest.approx(64 * float(lost(kept).mean()), rel=1e-2, abs=1e-2)


def test_dsnot_leaves_the_mask_when_inputs_have_no_mean() -> None:
    inputs, weight, budget = _inputs(0.0), _weight(), _budget()
    mask = _wanda(weight, inputs, budget)
    moments = Moments(torch.zeros(SHAPE[1]), inputs.var(0), len(inputs))
    assert torch.equal(dsnot(weight, moments, _norms(inputs), budget, _context(), mask=mask).kept, mask)


@pytest.mark.parametrize("per", ["row", "layer"])
def test_pruner_zero_with_the_tree_of_wanda_is_wanda(tmp_path: Path, per: Any) -> None:
    inputs, weight, budget = _inputs(), _weight(), _budget()
    path = tmp_path / "tree.json"
    path.write_text(Expression("mul", Expression("abs", W), Expression("sqrt", X)).to_json())
    gradients = Gradients(_normal(*SHAPE, seed=3).square(), 5)
    mask = pruner_zero(weight, gradients, _norms(inputs), budget, expression=path, per=per)
    assert torch.equal(mask.kept, _wanda(weight, inputs, budget, per))
    # W is the absolute weight
    path.write_text(W.to_json())
    kept = pruner_zero(weight, gradients, _norms(inputs), budget, expression=path, per=per).kept
    assert torch.equal(kept, budget.mask(weight.matrix.abs(), per))
    # a score for each input alone is spread over the rows
    path.write_text(X.to_json())
    kept = pruner_zero(weight, gradients, _norms(inputs), budget, expression=path).kept
    assert torch.equal(kept, kept[:1].expand_as(kept))


def test_pruner_zeros_winner_does_not_see_the_scale_of_gradients_and_removes_the_smallest() -> None:
    inputs, weight, budget = _inputs(), _weight(), _budget()
    squares = _normal(*SHAPE, seed=3).square() + 0.01
    masks = [pruner_zero(weight, Gradients(squares * scale, 5), _norms(inputs), budget).kept for scale in (1, 2.0**20)]
    assert torch.equal(*masks)
    gradient = squares.sqrt()
    expected = budget.mask(weight.matrix.square() * (gradient - gradient.min()))
    assert torch.equal(masks[0], expected)
    assert not torch.equal(expected, budget.mask(weight.matrix.abs()))
    assert not masks[0].flatten()[squares.argmin()]


def test_pruner_zero_says_what_is_wrong(tmp_path: Path) -> None:
    inputs, weight = _inputs(), _weight()
    gradients = Gradients(torch.ones(SHAPE), 1)
    with pytest.raises(RequestError, match="absent.json"):
        pruner_zero(weight, gradients, _norms(inputs), _budget(), expression=tmp_path / "absent.json")
    path = tmp_path / "tree.json"
    path.write_text('{"data": "sin", "left": {"data": "W"}}')
    with pytest.raises(RequestError, match="knows no 'sin'"):
        pruner_zero(weight, gradients, _norms(inputs), _budget(), expression=path)
    infinite = Expression("exp", Expression("exp", Expression("exp", W)))
    path.write_text(Expression("sub", infinite, infinite).to_json())
    with pytest.raises(RunError, match=r"layers\.0\.q\.weight"):
        pruner_zero(_weight(torch.full(SHAPE, 9.0)), gradients, _norms(inputs), _budget(), expression=path)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_moe_pruner_with_gates_of_one_is_wanda(pattern: str) -> None:
    inputs, weight, budget = _inputs(), _weight(), _budget(pattern)
    norms = GatedNorms(inputs.square().sum(0), len(inputs))
    assert torch.equal(moe_pruner(weight, norms, budget).kept, _wanda(weight, inputs, budget))


def test_moe_pruner_loses_less_of_the_gated_output_than_wanda() -> None:
    # tokens with a large gate use the first inputs, tokens with a small gate the others
    inputs = _inputs(0.0)
    gates = torch.where(torch.arange(200) < 100, 0.9, 0.1).unsqueeze(1)
    inputs[:100, 16:] *= 0.1
    inputs[100:, :16] *= 0.1
    weight, budget = _weight(), _budget()
    gated = GatedNorms((gates * inputs).square().sum(0), 200)

    def lost(kept: torch.Tensor) -> float:
        return float(((gates * inputs) @ (weight.matrix * ~kept).T).square().sum())

    assert lost(moe_pruner(weight, gated, budget).kept) < 0.7 * lost(_wanda(weight, inputs, budget))

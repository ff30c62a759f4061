"""Expression trees: format, operations by hand, Wanda and the winner as special cases, simplification."""

import json
import math
import random

import pytest
import torch

from secateur.tensor.expressions import BINARY, LEAVES, PUBLISHED, UNARY, Expression, G, W, X, evaluate, simplify


def _values(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(6, 9, generator=generator, dtype=dtype).abs() for _ in range(2))
    return {"W": weight, "G": gradient, "X": torch.rand(1, 9, generator=generator, dtype=dtype) + 0.1}


def _random_tree(draw: random.Random, depth: int) -> Expression:
    if depth == 0 or draw.random() < 0.15:
        return Expression(draw.choice(LEAVES))
    symbol = draw.choice([*UNARY, *BINARY])
    left = _random_tree(draw, depth - 1)
    return Expression(symbol, left, _random_tree(draw, depth - 1) if symbol in BINARY else None)


def test_json_round_trip() -> None:
    draw = random.Random(0)
    for _ in range(100):
        tree = _random_tree(draw, 4)
        assert Expression.from_json(tree.to_json()) == tree


def test_the_released_winner_loads() -> None:
    square = {"data": "mul", "left": {"data": "W"}, "right": {"data": "W"}}
    released = {
        "data": "mul",
        "left": {"data": "abs", "left": square},
        "right": {"data": "mms", "left": {"data": "G"}},
    }
    assert Expression.from_json(json.dumps(released)) == PUBLISHED
    assert json.loads(PUBLISHED.to_json()) == released
    assert str(PUBLISHED) == "mul(abs(mul(W, W)), mms(G))"
    assert PUBLISHED.leaves == {"W", "G"}


def test_the_winner_by_hand() -> None:
    values = _values()
    weight, gradient = values["W"], values["G"]
    expected = weight**2 * (gradient - gradient.min()) / (gradient.max() - gradient.min())
    torch.testing.assert_close(evaluate(PUBLISHED, values), expected)
    # min-max takes scale and offset away
    torch.testing.assert_close(
        evaluate(PUBLISHED, {"W": weight, "G": 100 * gradient + 3}), expected, rtol=1e-3, atol=1e-5
    )


def test_a_tree_reproduces_wanda_bit_for_bit() -> None:
    values = _values(1)
    wanda = Expression("mul", Expression("abs", W), Expression("sqrt", X))
    assert torch.equal(evaluate(wanda, values), values["W"] * values["X"].sqrt())


def test_operations_by_hand() -> None:
    x = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    y = torch.tensor([[3.0], [4.0]])
    expected = {
        "sqr": [4, 0, 1, 9],
        "pow": [4, 0, 1, 9],
        "neg": [2, 0, -1, -3],
        "abs": [2, 0, 1, 3],
        "skp": [-2, 0, 1, 3],
        "log": [math.log(2.001), math.log(0.001), math.log(1.001), math.log(3.001)],
        "sqrt": [math.sqrt(2), 0, 1, math.sqrt(3)],
        "exp": [math.exp(-2), 1, math.e, math.exp(3)],
        "tanh": [math.tanh(-2), 0, math.tanh(1), math.tanh(3)],
        "mms": [0, 0.4, 0.6, 1],
        # mean 0.5, sum of squares about it 13
        "zsn": [value / math.sqrt(13 / 3) for value in (-2.5, -0.5, 0.5, 2.5)],
    }
    assert set(expected) == set(UNARY)
    for symbol, wanted in expected.items():
        found = evaluate(Expression(symbol, W), {"W": x})
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))
    values = {"W": x, "G": y}
    torch.testing.assert_close(evaluate(Expression("add", W, G), values), x + y)
    torch.testing.assert_close(evaluate(Expression("sub", W, G), values), x - y)
    torch.testing.assert_close(evaluate(Expression("mul", W, G), values), x * y)
    # the norm of the second operand spread to (2, 4): √(4 · (9 + 16)) = 10
    torch.testing.assert_close(evaluate(Expression("div", W, G), values), (x / 10).expand(2, 4))


def test_exp_is_clamped_and_constants_have_no_range() -> None:
    huge = torch.tensor([1.0, 500.0], dtype=torch.float64)
    assert evaluate(Expression("exp", W), {"W": huge}).tolist() == pytest.approx([math.e, math.exp(100)])
    same = torch.full((2, 3), 0.7)
    for symbol in ("mms", "zsn"):
        assert torch.equal(evaluate(Expression(symbol, W), {"W": same}), torch.zeros(2, 3))


def test_simplification_leaves_values_as_they_are() -> None:
    draw, compared, shorter = random.Random(1), 0, 0
    for seed in range(400):
        tree = _random_tree(draw, 4)
        simple = simplify(tree)
        assert simple == simplify(simple)
        values = _values(seed, torch.float64)
        try:
            expected = evaluate(tree, values)
        except FloatingPointError:
            continue
        if not expected.isfinite().all():
            continue
        found = torch.broadcast_to(evaluate(simple, values), expected.shape)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        compared += 1
        shorter += len(str(simple)) < len(str(tree))
    assert compared > 300
    assert shorter > 100


def test_simplification_by_name() -> None:
    def apply(*symbols: str) -> Expression:
        tree = W
        for symbol in reversed(symbols):
            tree = Expression(symbol, tree)
        return tree

    assert simplify(apply("sqrt", "sqr")) == W
    assert simplify(apply("sqrt", "sqr"), frozenset()) == apply("abs")
    assert simplify(apply("skp", "sqr", "sqrt", "pow", "sqrt")) == W
    assert simplify(apply("neg", "neg")) == W
    assert simplify(PUBLISHED) == Expression("mul", Expression("sqr", W), Expression("mms", G))
    # these look opposite and are not: log adds 0.001, exp is clamped
    assert simplify(apply("log", "exp")) == apply("log", "exp")
    assert simplify(apply("exp", "log")) == apply("exp", "log")
    # and the sign of z-scores is news
    assert simplify(apply("abs", "zsn")) == apply("abs", "zsn")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"data": "sin", "left": {"data": "W"}}', "knows no 'sin'"),
        ('{"data": "Y"}', "knows no 'Y'"),
        ('{"data": "mul", "left": {"data": "W"}}', "'mul' takes 2 operands"),
        ('{"data": "abs"}', "'abs' takes 1 operands"),
        ('{"data": "W", "left": {"data": "W"}}', "'W' takes 0 operands"),
        ('{"data": "abs", "right": {"data": "W"}}', "left before right"),
        ('{"data": 3}', "is written"),
        ('{"data": "W", "value": 3}', "is written"),
        ("[]", "is written"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_expression(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expression.from_json(text)


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(ValueError, match="reads G, of which nothing is known"):
        evaluate(PUBLISHED, {"W": torch.ones(2, 2)})
    endless = torch.tensor([float("inf")])
    with pytest.raises(FloatingPointError, match="not a number"):
        evaluate(Expression("sub", W, W), {"W": endless})

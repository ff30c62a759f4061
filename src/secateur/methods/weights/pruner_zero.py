"""Pruner-Zero: scores by an expression that a genetic search found.

Dong and others, "Pruner-Zero: Evolving Symbolic Pruning Metric From Scratch for Large Language Models", ICML 2024,
arXiv:2406.02924. W is |weight|, G the root of the summed squared gradients, X the mean square of each input. The
released winner is |W · W| · minmax(G); other trees of the released format load from a file
(secateur.tensor.expressions). The search itself is not published and not here.

What differs: the published gradients are kept in float16, ours in float32. They are multiplied by 100 there and here;
min-max takes that away again, but other expressions may see it. The published gradients come from WikiText-2, on whose
perplexity the search was judged: figures on it are in-domain.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from secateur.errors import RequestError, RunError
from secateur.registry import Budget, Gradients, InputNorms, Mask, Weight, method
from secateur.tensor.expressions import PUBLISHED, Expression, evaluate


def _unreadable(parameters: Mapping[str, Any]) -> str | None:
    try:
        _read(parameters["expression"])
    except RequestError as error:
        return str(error)
    return None


@method(
    "pruner_zero",
    kind="weights",
    paper="arXiv:2406.02924",
    claim="an evolved metric prunes LLaMA and LLaMA-2 better than the metrics made by hand, without weight update",
    when="after training",
    speedup="specific",
    criterion="saliency",
    schedule="one-shot",
    refuses=_unreadable,
)
def pruner_zero(
    weight: Weight,
    gradients: Gradients,
    norms: InputNorms,
    budget: Budget,
    *,
    expression: Path | None = None,
    per: Literal["row", "layer"] = "row",
) -> Mask:
    """Removes the weights to which an expression of weight, gradient and activation gives the lowest scores.

    The winner gives the weight with the smallest gradient of a matrix the score 0, however large it is.

    Args:
        expression: file with another tree than the published winner, in the released JSON format.
        per: compare scores within each output row, or within the whole matrix.
    """
    tree = _read(expression)
    values = {
        "W": weight.matrix.abs(),
        "G": 100 * gradients.squares.sqrt(),
        "X": (norms.squares / norms.tokens).unsqueeze(0),
    }
    try:
        scores = evaluate(tree, values)
    except FloatingPointError as error:
        raise RunError(f"pruner_zero, {weight.name}: {error}; use another expression.") from error
    return Mask(budget.mask(scores.broadcast_to(weight.matrix.shape), per))


def _read(path: Path | None) -> Expression:
    """The tree of a file, once for all matrices; the published one without a file. Raises RequestError."""
    if path is None:
        return PUBLISHED
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} holds no expression that can be used: {error}.") from error


@lru_cache(maxsize=4)
def _parsed(path: Path, _changed: int) -> Expression:
    return Expression.from_json(path.read_text(encoding="utf-8"))

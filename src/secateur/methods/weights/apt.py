"""APT: many weights of a row are removed at once, and every weight that stays makes up for them exactly.

Zhao and others, "Pruning Foundation Models for High Accuracy without Retraining", EMNLP Findings 2024, arXiv:2410.15567.
Where SparseGPT solves a chain of single removals and leaves what it has passed as it is, the removal of all of a row's
weights is solved as one problem (secateur.tensor.masked_least_squares), and masks are scored with its solution
(secateur.tensor.multi_removal).

What is from where. From the abstract: the problem, and that all weights that stay are updated. Algebra, re-derived and
tested: the solution and its loss. From a third party's port: the rules S (single scores) and M (joint scores of whole
patterns), for the mask and for the compensation. Ours: damping, blocks, schedules, and the iterative solver with its proof
of accuracy. The paper's own loop was not found, and its repository (piuzha/APT) holds no code, so nothing was compared.

Calibration error falls further than held-out error, because more freedom fits the calibration tokens more closely: give it
more tokens or more damping than SparseGPT.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from secateur.registry import Budget, Context, Gram, MaskFrom, Update, Weight, method
from secateur.tensor.masked_least_squares import solve_by_steps, solve_directly
from secateur.tensor.multi_removal import Rule, choose_at_once, jointly, scan, scan_exactly, singly
from secateur.tensor.patterns import Pattern
from secateur.tensor.sweep import by_budget, sweep


def _contradiction(parameters: Mapping[str, Any]) -> str | None:
    pattern = Pattern.parse(parameters["pattern"])
    if parameters["mask_rule"] == "S" or parameters["mask"] is not None:
        return None
    if pattern.kept is None or pattern.of is None:
        return f"mask_rule=M compares the patterns of N:M, such as 2:4; {pattern} needs mask_rule=S."
    try:
        jointly(pattern.kept, pattern.of)
    except ValueError as error:
        return f"{error}; use mask_rule=S."
    return None


@method(
    "apt",
    kind="weights",
    paper="arXiv:2410.15567",
    claim="better than the post-training pruning before it on transformer and Mamba LLMs, unstructured and N:M",
    when="after training",
    speedup="specific",
    criterion="reconstruction",
    schedule="one-shot",
    refuses=_contradiction,
)
def apt(
    weight: Weight,
    gram: Gram,
    budget: Budget,
    context: Context,
    *,
    damping: Annotated[float, Field(ge=0)] = 0.01,
    damping_of: Literal["mean", "each"] = "mean",
    mask_rule: Literal["S", "M"] = "S",
    compensation: Literal["M", "S"] = "M",
    schedule: Literal["blocks", "exact", "fast"] = "blocks",
    block: Annotated[int, Field(ge=1)] = 16,
    parts: Annotated[int, Field(ge=1)] = 3,
    solver: Literal["steps", "direct"] = "steps",
    tolerance: Annotated[float, Field(gt=0)] = 1e-3,
    mask: MaskFrom = None,
) -> Update:
    """Removes a row's weights jointly: every weight that stays takes the value that is best for all that go.

    Args:
        damping: fraction of the diagonal that is added to it; ten times as much is tried where a matrix is not positive
            definite.
        damping_of: of the mean diagonal, or of each entry's own.
        mask_rule: "S" scores single weights, "M" whole patterns of N:M by their joint loss.
        compensation: "M" is the exact update, "S" SparseGPT's sweep for the same mask.
        schedule: "blocks" chooses from first to last column, knowing what has gone already; "exact" does so without
            approximation and takes fifty times as long or more; "fast" chooses the whole mask from the dense weights.
        block: columns among which weights are chosen at once, all rows competing for a plain fraction and tiles; rounded
            to whole tiles or groups. "fast" heeds it not.
        parts: of "blocks", into which the columns are divided; between two of them all rows are brought up to date.
        solver: "steps" stops once every row's loss is proven to be nearly the least; "direct" factors a matrix for each
            row, which takes about ten times as long with a thousand inputs, and more with more.
        tolerance: of "steps": how far above the least a row's loss may be, as a fraction of it. With `mask` no row's
            loss is above that of SparseGPT's sweep either, with which the steps begin.
        mask: a method whose mask is used in place of APT's own.
    """
    if not budget.remove:
        return Update(weight.matrix, torch.ones_like(weight.matrix, dtype=torch.bool))
    hessian = gram.damped(damping, damping_of)
    if hessian.retries:
        context.warn(f"{weight.name}: its inputs needed a damping of {hessian.fraction:g}, in float64.")
    matrix, inverse = hessian.matrix, hessian.inverse
    dense = weight.matrix.to(hessian.dtype).masked_fill(hessian.dead, 0)
    start = preconditioner = None
    if mask is not None:
        kept = mask
        if compensation == "M" and solver == "steps":  # no row ends above where it starts
            start = sweep(dense, hessian, kept).weight
    elif schedule == "fast":
        kept = choose_at_once(dense, inverse, _rule(mask_rule, budget, weight.columns)[0])
    else:
        rule, width = _rule(mask_rule, budget, block)
        if schedule == "exact":
            kept = scan_exactly(dense, inverse, rule, width)
        else:
            kept, start, preconditioner = scan(dense, matrix, inverse, rule, width, parts)
    if compensation == "S":
        found = sweep(dense, hessian, kept).weight
    elif solver == "direct":
        found = solve_directly(dense, matrix, inverse, kept).weight
    else:
        found = solve_by_steps(dense, matrix, inverse, kept, start, tolerance, preconditioner=preconditioner).weight
    # weights of dead inputs start at 0 and may come back as rounding
    return Update(found.masked_fill(hessian.dead, 0).to(weight.matrix.dtype), kept)


def _rule(name: str, budget: Budget, block: int) -> tuple[Rule, int]:
    """The mask rule, and how many columns it chooses at once, `block` or near."""
    selection = by_budget(budget, block)
    pattern = budget.pattern
    if pattern.kept is None or pattern.of is None:
        return singly(selection.choose), selection.step
    width = max(1, block // pattern.of) * pattern.of
    return (jointly(pattern.kept, pattern.of) if name == "M" else singly(selection.choose)), width

"""Divides the budget of a step that cuts units among the blocks: by what weights say, or by scores of the dense network.

A budget of units is what blocks of equal ratios would lose in all; one in parameters or multiply-adds is met as it was asked
for, more nearly than one width for all blocks could.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.network.anatomy import NEURON_AXES, Axis
from secateur.network.scores import ErrorCurves, ScoredUnits, UnitScores
from secateur.network.source import Source
from secateur.network.views import Allocation, Matrices, Weight
from secateur.recipe import Step
from secateur.registry import Method, find
from secateur.solving import Solver
from secateur.tensor.thresholds import rounded_widths
from secateur.unit_budgets import (
    ALIGNED,
    Measure,
    Sizes,
    counted,
    measure_of,
    multiple_of,
    sets_of,
    unit_cost,
    wanted_total,
)

Scored = Mapping[str, tuple[Tensor, Tensor | None]]
"""By the name of a block's units: their scores, and what removing them in that order does to the output."""


def divider(step: Step) -> Method | None:
    """The method that divides a step's budget among blocks; None where all are treated alike."""
    return next((find(name) for name in step.parameters.get("allocation") or ()), None)


def allocated(
    source: Source, step: Step, alike: Sizes, context: Context, scored: Callable[[], Scored], device: str = "cpu"
) -> Sizes:
    """How many units each block keeps.

    Args:
        alike: how many it would keep if all were treated alike; they say the budget.
        scored: gives what the criterion says of units, asked for only by an allocation that compares scores.

    Raises RequestError where the allocation cannot be, RunError where it gives what cannot be done.
    """
    method = divider(step)
    assert method is not None, "who asks has looked"
    measure: Measure = measure_of(step) or "parameters"
    entries = [(axis, block) for axis, units in alike.items() for block in units]
    counts = {axis: {block: _count(source, axis, block) for block in units} for axis, units in alike.items()}
    costs = {(axis, block): unit_cost(source, block, axis, measure) for axis, block in entries}
    if measure_of(step):
        remove = counted(source, measure) - wanted_total(source, step, counts, {})
    else:
        remove = sum(costs[axis, block] * (counts[axis][block] - alike[axis][block]) for axis, block in entries)
    parameters = Solver.of(method, step.parameters["allocation"][method.name]).parameters
    # in the order in which tokens meet them, as methods see everything
    entries.sort(key=lambda entry: (entry[1], list(alike).index(entry[0])))
    wanted: dict[Axis, dict[int, float]] = {axis: {} for axis in alike}
    if method.scope == "matrices":
        share = remove / sum(cost * counts[axis][block] for (axis, block), cost in costs.items())
        gone = _by_matrices(source, method, parameters, entries, share, context, device)
        for axis, block in entries:
            wanted[axis][block] = (1 - gone[axis, block]) * counts[axis][block]
    else:
        found = scored()
        units = [
            ScoredUnits(name := _name(axis, block), block, axis, found[name][0], costs[axis, block], alike[axis][block])
            for axis, block in entries
        ]
        curves = {name: curve for name, (_, curve) in found.items() if curve is not None}
        given = {UnitScores: UnitScores(units, remove), ErrorCurves: ErrorCurves(curves), Context: context}
        said: Allocation = method.function(**{key: given[need] for key, need in method.needs.items()}, **parameters)
        if set(said.remove) != {each.name for each in units} or not all(
            0 <= said.remove[each.name] < each.count for each in units
        ):
            raise RunError(f"{method.name} lets a block lose more units than it has; report this.")
        for each in units:
            wanted[each.axis][each.block] = each.count - said.remove[each.name]
    widths = {
        axis: rounded_widths(wanted[axis], counts[axis], _multiples(source, step, axis, alike[axis], counts[axis]))
        for axis in alike
    }
    context.note(
        "ratios",
        {
            axis: {str(block): round(1 - kept / counts[axis][block], 4) for block, kept in units.items()}
            for axis, units in widths.items()
        },
    )
    return widths


def _multiples(
    source: Source, step: Step, axis: Axis, alike: Mapping[int, int], counts: Mapping[int, int]
) -> dict[int, int]:
    """What the width of each block is a multiple of: nothing is rounded that would not be if all were treated alike."""
    if axis not in NEURON_AXES:  # one of each set goes at a time, and earlier steps may have left other numbers of sets
        return sets_of(source, axis)
    multiple = multiple_of(step, axis)
    rounded = all(kept % multiple == 0 or kept == counts[block] for block, kept in alike.items())
    return dict.fromkeys(alike, multiple if rounded else ALIGNED if axis == "expert_neurons" else 1)


def _count(source: Source, axis: Axis, block: int) -> int:
    group = source.anatomy.blocks[block].group(axis)
    assert group is not None, "planned where it is"
    return group.count


def _name(axis: Axis, block: int) -> str:
    return f"block {block}, {axis}"  # as Units says it


def _by_matrices(
    source: Source,
    method: Method,
    parameters: Mapping[str, Any],
    entries: list[tuple[Axis, int]],
    share: float,
    context: Context,
    device: str,
) -> dict[tuple[Axis, int], float]:
    """The fraction of its units that each block loses: of all weights of the matrices that are coupled to them, the part
    that an allocation made for single weights takes away.

    share: of all those weights that is to go.
    """
    makers: list[Callable[[], Weight]] = []
    sizes: list[int] = []
    owners: dict[str, tuple[Axis, int]] = {}
    for axis, block in entries:
        whole = source.anatomy.blocks[block].group(axis)
        assert whole is not None, "planned where it is"
        group = whole.one if whole.stacked else whole
        for expert, part in product(range(whole.stacked) if whole.stacked else (None,), group.slices):
            shape = source.skeleton.get_parameter(part.parameter).shape[1 if whole.stacked else 0 :]
            if len(shape) != 2:
                continue
            length, other = group.count * part.width, shape[1 - part.dim]
            inside = "" if expert is None else f"[{expert}]"
            name = f"{part.parameter}{inside}[{part.offset}:{part.offset + length}]"
            # outputs first, whatever is stored: what the units are made of has them as rows, what reads them as columns
            reads = part is group.output
            form = (other, length) if reads else (length, other)

            def read(
                part: Any = part, length: int = length, reads: bool = reads, expert: int | None = expert
            ) -> Tensor:
                name = part.parameter
                tensor = source.parameter(name) if expert is None else source.entry(name, expert)
                tensor = tensor.narrow(part.dim, part.offset, length).to(device).float()
                return tensor.T if part.dim != int(reads) else tensor

            makers.append(lambda n=name, b=block, e=expert, f=form, r=read: Weight(n, b, e, f, r))  # type: ignore[misc]
            sizes.append(length * other)
            owners[name] = (axis, block)
    total = round(share * sum(sizes))
    given = {Matrices: Matrices(makers, total, sizes), Context: context}
    said = method.function(**{key: given[need] for key, need in method.needs.items()}, **parameters).remove
    if set(said) != set(owners) or sum(said.values()) != total:
        raise RunError(f"{method.name} divides {sum(said.values())} of {total} weights; report this.")
    held = dict(zip(owners, sizes, strict=True))
    return {
        entry: sum(said[name] for name, owner in owners.items() if owner == entry)
        / sum(held[name] for name, owner in owners.items() if owner == entry)
        for entry in entries
    }


def chooser_of(solver: Solver) -> Solver:
    """The one whose scores are compared: of a method that lets another choose, that other."""
    return chooser_of(next(iter(solver.others.values()))) if solver.others else solver


def no_scores(step: Step, chooser: Solver) -> RequestError:
    return RequestError(
        f"{chooser.method.name} states no scores of units, so {next(iter(step.parameters['allocation']))} has nothing to "
        "compare; choose another criterion, such as wanda_units or flap, or an allocation by weights, such as alphapruning."
    )


def in_order(scores: Tensor) -> Tensor:
    """(count,) units in the order in which they go: the last of those that `Units.best` would keep first."""
    return torch.flip(scores.argsort(descending=True, stable=True), (0,))

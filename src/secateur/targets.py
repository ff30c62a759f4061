"""Which matrices a step prunes, and how many weights each of them loses."""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.divergence_trials import DivergenceTrials
from secateur.context import Context, barrier, processes
from secateur.errors import RequestError, suggest
from secateur.files import write_json
from secateur.network.matrices import MatrixRef, matrices, view
from secateur.network.source import Source
from secateur.network.views import Allocation, Matrices, Weight
from secateur.recipe import Step
from secateur.registry import find
from secateur.solving import Solver
from secateur.tensor.patterns import Budget, Pattern

# A step's projection in a Mamba block is a few columns wide and decides how fast the state forgets: only when asked for.
LEFT_OUT = "mixer_step"


def chosen(source: Source, targets: list[str] | None) -> dict[int, list[MatrixRef]]:
    """The matrices to prune, by block: those whose role or name one of `targets` says, by default all in the blocks.

    Raises RequestError when there are none, or an entry fits none.
    """
    every = [ref for block in matrices(source.skeleton, source.anatomy) for ref in block]
    if not every:
        raise RequestError(f"no matrices to prune were recognised in {source.spec}.")
    if targets is None:
        for block in source.anatomy.blocks:
            # what is not recognised may hold matrices that are not listed, which would be left whole unnoticed
            if block.kind == "unknown":
                raise RequestError(
                    f"{block.path} of {source.spec} is a block of unknown kind ({block.note.partition('.')[0]}), so some of "
                    f"its matrices may not be seen; name with `targets` what to prune, such as {every[0].name}."
                )
        found = [ref for ref in every if ref.role != LEFT_OUT]
    else:
        roles = dict.fromkeys(ref.role for ref in every)
        for target in targets:
            if not any(_fits(ref, target) for ref in every):
                raise RequestError(
                    f"targets: '{target}' fits no matrix of {source.spec}.{suggest(target, roles)} Its matrices have the "
                    f"roles {', '.join(roles)} and names such as {every[0].name}; * stands for any part of a name."
                )
        found = [ref for ref in every if any(_fits(ref, target) for target in targets)]
    if not found:
        raise RequestError("targets names no matrix; leave it out to prune all matrices in the blocks.")
    result: dict[int, list[MatrixRef]] = {}
    for ref in found:
        result.setdefault(ref.block, []).append(ref)
    return result


def _fits(ref: MatrixRef, target: str) -> bool:
    # brackets name an expert here, and are no choice of letters
    return ref.role == target or fnmatch(ref.name, target.replace("[", "[[]"))


def uniform(refs: Mapping[int, list[MatrixRef]], pattern: Pattern) -> dict[str, Budget]:
    """The pattern's own fraction of every matrix. Raises RequestError naming the matrix that it does not fit."""
    result = {}
    for ref in (ref for block in refs.values() for ref in block):
        try:
            result[ref.name] = Budget.uniform(pattern, (ref.rows, ref.columns))
        except ValueError as error:
            raise RequestError(
                f"{ref.name}: {error}; choose another pattern, or other matrices with `targets`."
            ) from error
    return result


def check_targets(source: Source, step: Step) -> None:
    """Raises RequestError when what a step asks for cannot be done to the matrices of this model."""
    pattern = Pattern.parse(step.parameters["pattern"])
    uniform(chosen(source, step.parameters["targets"]), pattern)
    if step.parameters["allocation"] and pattern.fraction is None:
        raise RequestError(
            f"{step.method}: pattern {pattern} removes the same from every group, so an allocation has nothing to divide; "
            "give a fraction, such as pattern=0.5."
        )


def budgets(
    source: Source,
    step: Step,
    refs: Mapping[int, list[MatrixRef]],
    context: Context,
    state: Path,
    device: str = "cpu",
    trials: Callable[[], DivergenceTrials] | None = None,
) -> dict[str, Budget]:
    """How many weights each matrix loses: alike, or as the step's allocation divides them.

    Decided once, then read from the state; `context` has the allocation's notes either way.

    trials: gives the trials of an allocation that asks for them, in all processes, which share them.
    """
    pattern = Pattern.parse(step.parameters["pattern"])
    alike = uniform(refs, pattern)
    if not step.parameters["allocation"]:
        return alike
    path = state / "budgets.json"
    made = path.exists()
    barrier()
    [(name, parameters)] = step.parameters["allocation"].items()
    method = find(name)
    asked = DivergenceTrials in method.needs.values()
    if not made and (asked or processes()[0] == 0):

        def maker(ref: MatrixRef) -> Weight:
            def read() -> torch.Tensor:
                return view(ref, source.parameter(ref.parameter).to(device)).float()

            return Weight(ref.name, ref.block, ref.expert, (ref.rows, ref.columns), read)

        each = [lambda ref=ref: maker(ref) for block in refs.values() for ref in block]
        total = sum(budget.remove for budget in alike.values())
        units = [budget.units for budget in alike.values()]
        network = Matrices(each, total, units)
        given: dict[type, Any] = {Matrices: network, Context: context}
        if asked:
            assert trials is not None, "who prunes weights gives them"
            given[DivergenceTrials] = trials()
        arguments = {key: given[need] for key, need in method.needs.items()}
        said: Allocation = method.function(**arguments, **Solver.of(method, parameters).parameters)
        found = said.remove
        fits = set(found) == set(alike) and all(0 <= found[key] <= alike[key].units for key in alike)
        if not fits or sum(found.values()) > total or (sum(found.values()) < total and not said.short):
            raise RequestError(
                f"{name} divides {sum(found.values())} of {total} weights, or gives a matrix more than it has; report this."
            )
        if said.short:
            context.warn(said.short)
        if processes()[0] == 0:
            write_json(path, {"remove": dict(found), "notes": context.notes, "warnings": context.warnings})
    barrier()
    told = json.loads(path.read_text())
    context.notes, context.warnings = told["notes"], told["warnings"]
    counts = told["remove"]
    return {name: Budget(pattern, counts[name], budget.shape) for name, budget in alike.items()}

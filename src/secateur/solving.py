"""Calls a method for one matrix, or one block's units, with what it asks for, other methods that it names first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.statistics import INPUT_STATISTICS, Gradients, Statistics
from secateur.calibration.unit_gradients import UnitGradients
from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.network.views import Mask, Update, Weight
from secateur.registry import Method, find
from secateur.tensor.patterns import Budget
from secateur.tensor.products import linear


@dataclass(frozen=True)
class Solver:
    """A method for single weights with its parameters, and the methods whose masks it takes.

    Args:
        method: asks for a Weight, or for Units.
        parameters: its own, without those of the engine.
        others: by parameter: whose mask, or choice of units, is handed in there.
    """

    method: Method
    parameters: Mapping[str, Any]
    others: Mapping[str, "Solver"] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Method, parameters: Mapping[str, Any]) -> "Solver":
        others = {}
        for name in method.others:
            if parameters.get(name) is not None:
                [(other, given)] = parameters[name].items()
                others[name] = cls.of(find(other), given)
        own = {name: value for name, value in parameters.items() if name in method.own and name not in others}
        return cls(method, own, others)

    @property
    def needs(self) -> set[type]:
        """What all of them ask for."""
        return set(self.method.needs.values()).union(*(other.needs for other in self.others.values()))

    @property
    def statistics(self) -> set[type]:
        """What all of them ask for of a matrix's inputs: collected once."""
        return self.method.statistics.union(*(other.statistics for other in self.others.values()))

    @property
    def gradients(self) -> bool:
        """Whether one of them asks for gradients of the loss."""
        return bool({Gradients, UnitGradients} & self.needs)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration tokens."""
        return bool(self.statistics) or self.gradients

    def check(self, common: Mapping[str, Any]) -> None:
        """Raises RequestError where parameters contradict each other, or those of the step, `common`."""
        said = {**common, **self.parameters, **{name: self.others.get(name) for name in self.method.others}}
        if why := self.method.refuses(said):
            raise RequestError(f"{self.method.name}: {why}")
        for other in self.others.values():
            other.check(common)
        for name, given in (common.get("allocation") or {}).items():
            if why := find(name).refuses({**common, **given}):
                raise RequestError(f"{name}: {why}")

    def solve(
        self, weight: Weight, budget: Budget, statistics: Statistics, gradients: Gradients | None, context: Context
    ) -> Mask | Update:
        """What becomes of the matrix.

        Raises RunError naming the matrix when what the method gives is no mask or no finite matrix of its shape.
        """
        given = {Weight: weight, Budget: budget, Context: context, Gradients: gradients}
        found: Mask | Update = self.ask(given, statistics, weight.name)
        _check(found, weight, f"{self.method.name}, {weight.name}")
        return found

    def ask(self, given: Mapping[type, Any], statistics: Statistics, where: str) -> Any:
        """Calls the method with what it asks for, those that it names first: what they keep is handed in.

        given: by type; what is said of inputs comes from `statistics`. where: of what it is asked.

        Raises RunError where its algebra fails.
        """
        kept = {name: other.ask(given, statistics, where).kept for name, other in self.others.items()}
        asked = {
            name: statistics.view(need) if need in INPUT_STATISTICS else given[need]
            for name, need in self.method.needs.items()
        }
        try:
            return self.method.function(**asked, **self.parameters, **kept)
        except (torch.linalg.LinAlgError, FloatingPointError) as error:
            raise RunError(
                f"{self.method.name}, {where}: {str(error).rstrip('.')}; use more damping or more calibration tokens."
            ) from error

    def fall_back(self, weight: Weight, budget: Budget) -> Mask:
        """For a matrix that no token has reached: the smallest weights go, since nothing is known of its inputs."""
        return Mask(budget.mask(lambda rows: weight.matrix[rows].abs(), "row"))


def _check(found: Mask | Update, weight: Weight, where: str) -> None:
    shape = (weight.rows, weight.columns)
    if tuple(found.kept.shape) != shape or found.kept.dtype != torch.bool:
        raise RunError(
            f"{where}: the mask is {found.kept.dtype} of shape {list(found.kept.shape)}, not bool of {list(shape)}."
        )
    if isinstance(found, Mask):
        return
    if tuple(found.matrix.shape) != shape:
        raise RunError(f"{where}: the new weights have shape {list(found.matrix.shape)}, not {list(shape)}.")
    if not finite(found.matrix):
        raise RunError(f"{where}: the new weights are not finite; use more damping, a smaller sparsity or more tokens.")
    if not zero_where_removed(found.matrix, found.kept):
        raise RunError(f"{where}: weights that were to be removed are not zero.")


def finite(tensor: Tensor) -> bool:
    """Whether every value is finite; found by the extremes, which carry any that is not."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def zero_where_removed(matrix: Tensor, kept: Tensor, rows: int = 1024) -> bool:
    """Whether (r, d) `matrix` is zero wherever `kept` is False; some rows at a time, because it may be large."""
    return not any(
        bool((part.masked_fill(mask, 0) != 0).any())
        for part, mask in zip(matrix.split(rows), kept.split(rows), strict=True)
    )


def relative_error(
    inputs: Tensor, before: Tensor, found: Mask | Update, shift: Tensor | None = None, rows: int = 256
) -> float:
    """‖X (W − Ŵ)ᵀ − s‖² / ‖X Wᵀ‖² of the rows X of `inputs`, some outputs at a time.

    Args:
        inputs: (t, d).
        before: (r, d) W; found says Ŵ.
        shift: (r,) s, what is added to the bias.
    """
    change = whole = 0.0
    for start in range(0, len(before), rows):
        part, kept = before[start : start + rows], found.kept[start : start + rows]
        gone = part.masked_fill(kept, 0.0) if isinstance(found, Mask) else part - found.matrix[start : start + rows]
        lost = linear(inputs, gone)
        if shift is not None:
            lost = lost - shift[start : start + rows]
        change += float(lost.square().sum(dtype=torch.float64))
        whole += float(linear(inputs, part).square().sum(dtype=torch.float64))
    return change / whole if whole else 0.0

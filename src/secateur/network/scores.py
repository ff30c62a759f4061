"""What methods see that divide a budget among the units of a network: scores, errors, and how much is to go."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.network.anatomy import Axis


@dataclass(frozen=True)
class ScoredUnits:
    """The units of one kind in one block.

    Args:
        name: of the units.
        scores: (count,) of the criterion that is to choose; those with the lowest go first.
        cost: what each unit counts of the budget, in parameters or in multiply-adds.
        keep: how many stay where all blocks are treated alike.
    """

    name: str
    block: int
    axis: Axis
    scores: Tensor
    cost: int
    keep: int

    @property
    def count(self) -> int:
        return len(self.scores)


class UnitScores(Sequence[ScoredUnits]):
    """The units that a step may remove, in the order in which tokens meet them, scored in the dense network.

    Args:
        remove: how much is to go in all, counted as `cost`.
    """

    def __init__(self, units: Sequence[ScoredUnits], remove: int) -> None:
        self._units, self.remove = list(units), remove

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        return self._units[index]

    def __iter__(self) -> Iterator[ScoredUnits]:
        return iter(self._units)


@dataclass(frozen=True)
class ErrorCurves:
    """What removing units does to a block's output, beside the residual stream that the output is added to.

    Args:
        squares: by the name of the units: (count,) mean over tokens of |Δ output|² over that of |stream|², after the first,
            the first two, ... all of them went in the order of their scores, nothing made up for.
    """

    squares: Mapping[str, Tensor]

"""Scores on a card beside the original's: of tasks, of LLM-KICK, and how often greedy text is another.

Read from a card in plain data, as it stands in a receipt or in the table of a comparison, for whatever shows or judges them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.figures import at, number

Card = Mapping[str, Any]
SURE = 2.0
"""Standard errors of a change, within which it may be none."""


@dataclass(frozen=True)
class Score:
    """One score.

    kind: who asked. column: its name in a table of values. name: for people. value, reference: of the model and the
    original, None where that was not measured or has none. error, reference_error: their standard errors. change_error: of
    value - reference, over the same questions where they are known. better: 1 where more is better, -1 where less is.
    matching: LLM-KICK's own judgement. asked: how many questions. keys: where it stands in the card.
    """

    kind: Literal["task", "kick", "divergent"]
    column: str
    name: str
    value: float
    reference: float | None
    error: float | None = None
    reference_error: float | None = None
    change_error: float | None = None
    better: int = 1
    matching: bool | None = None
    asked: int | None = None
    keys: tuple[str | int, ...] = ()

    @property
    def change(self) -> float | None:
        """value - reference."""
        return None if self.reference is None else self.value - self.reference

    @property
    def fell(self) -> bool:
        """Whether it is worse by more than `SURE` standard errors of the change; of LLM-KICK's also by more than 5 %."""
        if self.change is None or self.change_error is None or self.matching is True:
            return False
        return -self.better * self.change > SURE * self.change_error


def scores_of(card: Card | None) -> list[Score]:
    """All that a card holds; none where nothing was measured."""
    return [] if not card else [*_tasks(card), *_kick(card), *_divergent(card)]


def _tasks(card: Card) -> Iterator[Score]:
    for place, told in enumerate(at(card, ("tasks",)) or ()):
        value, reference = _figure(told.get("value")), _figure(told.get("reference"))
        if value is None:
            continue
        error, other = number(told.get("stderr")), number(told.get("reference_stderr"))
        paired = number(told.get("change_stderr"))
        if paired is None and error is not None and other is not None:
            paired = math.hypot(error, other)  # not a mean over questions: as if others had been asked
        yield Score(
            "task", f"task:{told['name']}:{told['metric']}", f"{told['name']} {told['metric']}", value, reference, error,
            other, paired, -1 if told.get("higher_is_better") is False else 1, asked=told.get("n"), keys=("tasks", place),
        )  # fmt: skip


def _kick(card: Card) -> Iterator[Score]:
    for place, told in enumerate(at(card, ("kick", "scores")) or ()):
        value = _figure(told.get("value"))
        if value is None:
            continue
        error, other, paired = (number(told.get(key)) for key in ("stderr", "reference_stderr", "change_stderr"))
        yield Score(
            "kick", f"kick:{told['task']}", f"kick: {told['task']}", value, _figure(told.get("reference")), error, other,
            paired, matching=told.get("matching"), asked=told.get("n"), keys=("kick", "scores", place),
        )  # fmt: skip


def _divergent(card: Card) -> Iterator[Score]:
    share, mean = (_figure(at(card, ("divergent", key))) for key in ("share", "mean"))
    if share is not None:
        yield Score(
            "divergent", "divergent_share", "divergent tokens", share, 0.0, better=-1, keys=("divergent", "share")
        )
    if mean is not None:
        name = "tokens before the first, mean"
        yield Score("divergent", "tokens_before_divergent", name, mean, None, keys=("divergent", "mean"))


def _figure(value: Any) -> float | None:
    """A number, which may be infinite: JSON holds such as text."""
    found = float(value) if value in ("Infinity", "-Infinity", "inf", "-inf") else number(value)
    return None if found is None else float(found)

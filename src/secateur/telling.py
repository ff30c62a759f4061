"""Sentences about a run that name the figures they rest on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.contract import NEEDS
from secateur.errors import RequestError
from secateur.figures import at, number, pointer
from secateur.recipe import Recipe, Step
from secateur.registry import Method, find
from secateur.scores import Score, scores_of
from secateur.solving import Solver

Keys = Sequence[str | int]


@dataclass(frozen=True)
class Sentence:
    """text: one sentence. figures: what it rests on, {JSON Pointer into the receipt: what stands there}."""

    text: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """How much a model lost. nats: a token, beyond the reference's negative log-likelihood. text: in words, without the full
    stop. keys: of the figures that say it.
    """

    nats: float
    text: str
    keys: tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class Told:
    """A receipt, and sentences about it."""

    receipt: Mapping[str, Any]

    def at(self, *keys: str | int) -> Any:
        """What stands there, None where nothing does."""
        return at(self.receipt, keys)

    def number(self, *keys: str | int) -> float | None:
        """The finite number that stands there."""
        return number(self.at(*keys))

    def say(self, text: str, *figures: Keys) -> Sentence:
        """A sentence that rests on these figures; those that the receipt lacks are left out."""
        found = {pointer(keys): self.at(*keys) for keys in figures}
        return Sentence(text, {where: value for where, value in found.items() if value is not None})

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the recipe, () where a method or a parameter of it is not known here (any more)."""
        try:
            return Recipe.parse(self.receipt["recipe"]).steps
        except RequestError:
            return ()

    @cached_property
    def methods(self) -> list[Method | None]:
        """The method of each decision, None where it is not registered here."""
        found: list[Method | None] = []
        for decision in self.receipt["decisions"]:
            try:
                found.append(find(decision["method"]))
            except RequestError:
                found.append(None)
        return found

    def read_text(self, step: int) -> bool:
        """Whether a step read any text, for its method or for its allocation."""
        notes = self.at("decisions", step, "notes") or {}
        return "calibration" in notes or "counted" in notes

    def readers(self, step: int) -> list[str]:
        """Who read the text that a step read: its method, the allocation that divided its budget, or both."""
        if not self.read_text(step):
            return []
        name = str(self.at("decisions", step, "method"))
        divider = self.divider(step)
        if divider is None:
            return [name]
        ran = self.steps[step]
        by_method = Solver.of(ran.registered, ran.parameters).calibrated
        by_divider = any(NEEDS[need].scope == "any" and NEEDS[need].data for need in divider.needs.values())
        return [*([name] if by_method else []), *([divider.name] if by_divider else [])] or [name]

    def learned(self, step: int) -> bool:
        """Whether the method of a step read any text itself."""
        return self.at("decisions", step, "method") in self.readers(step)

    def divider(self, step: int) -> Method | None:
        """The allocation that divided the budget of a step."""
        named = self.steps[step].parameters.get("allocation") if step < len(self.steps) else None
        return find(next(iter(named))) if named else None

    @cached_property
    def scores(self) -> list[Score]:
        """Of tasks, LLM-KICK and divergent tokens, as far as they were measured."""
        return scores_of(self.at("card"))

    @property
    def loss(self) -> Loss | None:
        """From perplexity, where both models have one on the same tokens; from bits per byte where vocabularies differ;
        else from the KL on text that the original wrote itself, of which it is the expected rise of the negative
        log-likelihood.
        """
        ours, theirs = ("card", "model", "perplexity"), ("card", "reference", "perplexity")
        after, before = self.number(*ours, "nll"), self.number(*theirs, "nll")
        if after is not None and before is not None:
            if self.at(*ours, "protocol", "vocabulary") == self.at(*theirs, "protocol", "vocabulary"):
                return Loss(
                    after - before,
                    f"Perplexity {'rose' if after > before else 'went'} from {math.exp(before):.4g} to "
                    f"{_exponential(after)} ({times(math.exp(min(after - before, 700)))}), on "
                    f"{self.at(*ours, 'protocol', 'text') or 'the tokens given'}",
                    ((*ours, "perplexity"), (*theirs, "perplexity"), (*ours, "protocol", "text")),
                )
            bits = [self.number(*side, "bits_per_byte") for side in (ours, theirs)]
            if bits[0] and bits[1]:
                return Loss(
                    before * (bits[0] / bits[1] - 1),
                    f"Bits per byte went from {bits[1]:.4f} to {bits[0]:.4f} ({bits[0] / bits[1] - 1:+.1%}); perplexities "
                    "do not compare, because the vocabularies differ",
                    ((*ours, "bits_per_byte"), (*theirs, "bits_per_byte")),
                )
        kl = self.number("card", "divergence", "kl")
        if kl is None:
            return None
        return Loss(
            kl,
            f"On text that the original writes itself, perplexity is {times(math.exp(min(kl, 700)))} the original's "
            f"(KL {kl:.3g} nats a token)",
            (("card", "divergence", "kl"),),
        )


def _exponential(nats: float) -> str:
    return f"{math.exp(nats):.4g}" if nats < 700 else f"e^{nats:.0f}"


def times(factor: float) -> str:
    """1.37 times, 12 times."""
    return f"{factor:,.2f} times" if factor < 10 else f"{factor:,.0f} times" if factor < 1e6 else f"{factor:.0e} times"


def percent(share: float) -> str:
    """0.0297 -> "3.0 %"; small ones with two digits that count."""
    return f"{100 * share:.2g} %" if abs(share) < 0.01 else f"{100 * share:.1f} %"


def count(number: int, what: str) -> str:
    """1 sequence, 2 sequences."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")

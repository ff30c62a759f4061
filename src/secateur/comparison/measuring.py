"""Measures the results of a comparison, one after another, against one reference that is loaded once."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.comparison.state import RUNS, State
from secateur.comparison.summary import card_of
from secateur.context import Progress
from secateur.evaluation import speed
from secateur.evaluation.energy import Meter
from secateur.evaluation.measure import Opened, open_reference, with_speed
from secateur.files import human, read_json, write_json, write_text
from secateur.network.source import Source, load, open_model
from secateur.recipe import Evaluate
from secateur.report import measure, model_card
from secateur.run import free_memory
from secateur.workspace import RECEIPT


@dataclass
class Measuring:
    """Puts cards beside what is known of runs.

    Args:
        spec, source: what the recipes started from, as it was named and opened.
        output, state: the directory of the comparison, and what is known of its runs.
        wanted: what is measured, the same of all; False for nothing.
        max_memory: bytes that two models may take.
        pairs: interleaved pairs of speed measurements; 0 for none.
    """

    spec: str
    source: Source
    output: Path
    state: State
    wanted: Evaluate | bool
    max_memory: int
    pairs: int
    trust_remote_code: bool
    progress: Progress
    _reference: Opened | None = field(default=None, init=False)

    def lacks(self, told: Mapping[str, Any] | None) -> bool:
        """Whether a result is there that has no card and should: one that could not be measured is tried again."""
        if self.wanted is False or told is None or told["status"] != "done":
            return False
        return told.get("card") is None and self._there(told["run"])

    def measure(self, key: str) -> None:
        """Puts the card of a result beside what is known of its run; speed comes later."""
        told = self.state.read(key)
        assert told is not None, "it is done"
        result = open_model(self.output / RUNS / key, trust_remote_code=self.trust_remote_code)
        progress = labelled(self.progress, key)
        card = measure(self.source, result, self.wanted, self.max_memory, progress, self._dense(), speed=False)
        skipped = card["skipped"] if card and "skipped" in card else None
        self.state.write(key, told | {"not_measured": skipped} | ({} if skipped else {"card": card}))

    def time(self, key: str) -> None:
        """Puts the speed of a result into its card, measured in turns with the reference."""
        told = self.state.read(key)
        card = card_of(told or {})
        if told is None or card is None or card.speed is not None or not self.pairs or not self._there(key):
            return
        reference = self._dense()
        if reference is None:
            both = human(2 * 4 * self.source.anatomy.parameters)
            why = f"speed, for which two models in float32 take {both}, above --max-memory ({human(self.max_memory)})"
            self.state.write(key, told | {"not_measured": why})
            return
        module, _ = load(self.output / RUNS / key, trust_remote_code=self.trust_remote_code)
        timed = speed(
            module, reference.module, pairs=self.pairs, meter=Meter.find(), progress=labelled(self.progress, key)
        )
        card = with_speed(card, timed, module, reference.module)
        del module
        gc.collect()
        self.state.write(key, told | {"card": card.to_dict(), "not_measured": None})

    def complete(self, key: str, card: dict[str, Any]) -> None:
        """Lets a result speak of its own card, as if it had been measured alone."""
        result = self.output / RUNS / key
        path = result / RECEIPT
        if path.exists() and (receipt := read_json(path)).get("card") != card:
            receipt["card"] = card
            if (result / "README.md").exists():
                write_text(result / "README.md", model_card(receipt))
            write_json(path, receipt)

    def _there(self, key: str) -> bool:
        """Whether a result is on disk: an earlier command may have let it go."""
        return (self.output / RUNS / key / "config.json").exists()

    def _dense(self) -> Opened | None:
        """The model that all are measured against, loaded when it is first asked for; None where both do not fit."""
        if self._reference is None and 2 * 4 * self.source.anatomy.parameters <= self.max_memory:
            with self.progress("loading the reference", 1):
                self._reference = open_reference(
                    self.spec, remember=free_memory() // 4, trust_remote_code=self.trust_remote_code
                )
        return self._reference


def labelled(progress: Progress, name: str) -> Progress:
    """Progress that says of which run it is."""
    return lambda label, total: progress(f"{name}: {label}", total)

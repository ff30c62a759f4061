"""The result card: what a model is and does, beside what it was made from."""

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from secateur.errors import RequestError
from secateur.evaluation.divergence import Divergence
from secateur.evaluation.divergent import DivergentTokens
from secateur.evaluation.kick import Kick
from secateur.evaluation.memory import Memory
from secateur.evaluation.perplexity import Perplexity
from secateur.evaluation.speed import Pace, Speed
from secateur.evaluation.tasks import TaskScore
from secateur.files import human, write_text


class Column(BaseModel):
    """One model. parameters: tied once. multiply_adds: of reading `multiply_adds_tokens` tokens at once. bytes_on_disk:
    of the weight files. disk_format: "safetensors", "gguf" or "bin". What was not measured is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: int
    multiply_adds: int
    multiply_adds_tokens: int
    bytes_on_disk: int | None = None
    disk_format: str | None = None
    memory: Memory | None = None
    perplexity: Perplexity | None = None


class ResultCard(BaseModel):
    """All figures of one evaluation; divergence, divergent and speed.*.gain compare with the reference.

    more_speed: in further settings than the first, which is `speed`.

    expected_gain: multiply-adds of the reference over those of the model, minus 1: what prefill would gain if time were
    arithmetic alone. tasks, kick: scores of lm-eval's tasks, and of the LLM-KICK protocol. notes: sentences that a reader
    of the figures must know. versions: of the libraries that computed them. What was not measured is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["secateur-card/1"] = "secateur-card/1"
    model: Column
    reference: Column | None = None
    divergence: Divergence | None = None
    divergent: DivergentTokens | None = None
    speed: Speed | None = None
    more_speed: tuple[Speed, ...] = ()
    expected_gain: float | None = None
    tasks: tuple[TaskScore, ...] = ()
    kick: Kick | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON values; infinities are strings."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ResultCard":
        """The card that `to_dict` gave."""
        return cls.model_validate(values)

    def to_json(self) -> str:
        """The card as JSON text with a line break at its end."""
        return self.model_dump_json(indent=2) + "\n"


def write_json(card: ResultCard, destination: str | Path) -> None:
    """Writes the card to a file, which appears whole or not at all, or to the standard output for "-"."""
    if str(destination) == "-":
        sys.stdout.write(card.to_json())
        return
    path = Path(destination)
    if not path.parent.is_dir():
        raise RequestError(f"The card cannot be written to {path}: there is no directory {path.parent}.")
    write_text(path, card.to_json())


def findings(card: ResultCard) -> tuple[str, ...]:
    """Sentences that follow from the figures of `card` and that its reader should not have to work out."""
    model, reference = card.model, card.reference
    if reference is None:
        return ()
    said = []
    if model.parameters >= reference.parameters:
        said.append(f"The result has no fewer parameters than the reference ({model.parameters:,}).")
    if model.disk_format != reference.disk_format and None not in (model.disk_format, reference.disk_format):
        assert model.bytes_on_disk is not None
        alike = model.bytes_on_disk / model.parameters * reference.parameters
        said.append(
            f"Bytes on disk are not like with like: the reference is stored as {reference.disk_format}, the result as "
            f"{model.disk_format}; stored as the result is, the reference would take about {human(alike)}."
        )
    if reference.disk_format == "gguf" and reference.memory is not None:
        said.append(
            "The reference's peak memory includes de-quantising its GGUF file, which transformers does as it loads."
        )
    if card.speed is not None:
        said += [
            sentence
            for name, pace in (("Prefill", card.speed.prefill), ("Decoding", card.speed.decode))
            if (sentence := _about_speed(name, pace))
        ]
    return tuple(said)


def _about_speed(name: str, pace: Pace | None) -> str:
    if pace is None or pace.gain is None or pace.gain.lower > 0:
        return ""
    if pace.gain.upper < 0:
        return f"{name} is slower than the reference's."
    return f"{name} is not measurably faster: the difference lies within the spread of the measurement."

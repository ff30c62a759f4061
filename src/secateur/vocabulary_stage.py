"""A step that removes tokens: one decision, then tensors with a row for each token lose rows and all others are copied."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.samples import Calibration
from secateur.calibration.token_counts import TokenCounts, count_tokens, lines_of
from secateur.context import Context, processes
from secateur.errors import RequestError, RunError
from secateur.files import write_json, write_tensors, write_text
from secateur.network.segmentation import Coverage, check_segmentation
from secateur.network.store import companions, copy_companions
from secateur.network.stream import Fetch, Piece
from secateur.network.vocabulary import (
    KeptTokens,
    Rows,
    Vocabulary,
    cut_companions,
    cut_config,
    misnumbered,
    open_fast,
    open_vocabulary,
    token_rows,
)
from secateur.stage import Stage
from secateur.workspace import Journal


@dataclass
class VocabularyStage(Stage):
    """A step whose method sees all tokens and says which stay."""

    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        self.registered = self.step.registered
        self.kept: tuple[int, ...] = ()
        self._rows = Rows((), {}, 0)
        self._config: dict[str, Any] = {}
        self._files: dict[str, str | None] = {}

    def apply(self, module: nn.Module) -> None:
        open_vocabulary(self.source)  # refuses a live module, whose tokens nobody knows

    def expected(self) -> Fetch:
        """The source's parameters as they are: which tokens it reads and writes is said by `expected_tokens`."""

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            return {name: self._cast(name, self.source.parameter(name)).float() for name in names}

        return fetch

    def expected_tokens(self) -> Tensor:
        return torch.tensor(self.kept)

    def seconds(self) -> float:
        begun = time.time()
        self._decide(self._context("method"))
        return time.time() - begun

    def removed(self) -> int:
        """How many rows would go; nothing is written."""
        return self.source.anatomy.vocabulary - len(self._decide(self._context("method")))

    def decided(self) -> dict[str, Any]:
        return {"vocabulary": {"kept": len(self.kept), "of": self.source.anatomy.vocabulary}}

    def config(self) -> dict[str, Any]:
        return self._config

    def _prepare(self) -> None:
        def decide(context: Context) -> dict[str, Any]:
            self._say(self._decide(context))
            if processes()[0] == 0:
                self._check_tokenizer(context)
            return {"ids": list(self.kept)}

        self._say(self._once("kept", decide)["ids"])

    def _say(self, kept: Sequence[int]) -> None:
        """Takes a decision over, if a configuration can say it."""
        self.kept, self._rows = tuple(kept), token_rows(self.source)
        self._config = cut_config(self.source, self._rows, self.kept)
        self._files = cut_companions(self.source, open_vocabulary(self.source)[1], self.kept)

    def _decide(self, context: Context) -> tuple[int, ...]:
        """Which tokens stay, by the method. Raises RunError when it gives back what cannot be done."""
        words, _, fast = open_vocabulary(self.source)
        parameters = self.step.parameters
        asked = self.registered.asked(parameters)
        given: dict[type, Any] = {Vocabulary: words, Context: context}
        if TokenCounts in asked.values():
            given[TokenCounts] = count_tokens(self.calibration.data, fast, words.rows, self.progress)
        arguments = {name: given[need] if name in asked else None for name, need in self.registered.needs.items()}
        kept: KeptTokens = self.registered.function(**arguments, **self._parameters(self.registered, parameters))
        if wrong := words.wrong(kept):
            raise RunError(f"{self.step.method}: {wrong}.")
        return kept.ids

    def _check_tokenizer(self, context: Context) -> None:
        """Opens the new tokenizer as anybody would, and has it split texts beside the old one. Raises RunError."""
        words, tokens, whole = open_vocabulary(self.source)
        folder = self.state / "tokenizer"
        self._write_companions(folder)
        write_json(folder / "config.json", self._config)
        try:
            cut = open_fast(folder, "the result")
        except RequestError as error:  # the request was right, what came of it is not
            raise RunError(str(error)) from error
        if wrong := misnumbered(cut, tokens, self.kept):
            raise RunError(
                f"the tokenizer of {self.source.spec} with only {len(self.kept)} tokens gives {wrong[0]!r} another id than "
                "was written; it cannot be cut so."
            )
        check_segmentation(whole, cut, self.kept, filter(None, map(words.text_of, self.kept)))
        coverage = check_segmentation(whole, cut, self.kept, self._lines())
        if coverage.before:
            context.note("text", _told(coverage))

    def _lines(self) -> Iterator[str]:
        return lines_of(self.calibration.data) if self.step.calibrated else iter(())

    def _write_companions(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = set(self._files) | {
            path.name for path in companions(self.source) if path.suffix not in (".json", ".jinja", ".txt")
        }
        copy_companions(self.source, folder, kept)
        for name, text in self._files.items():
            if text is not None:
                write_text(folder / name, text)

    def _changed_companions(self) -> dict[str, str | None]:
        return self._files

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any]:
        kept, tensors = torch.tensor(self.kept), {}
        for key, tensor in self.source.read(piece.keys).items():
            dim = self._rows.dims.get(key)
            tensors[key] = self._cast(key, tensor if dim is None else tensor.index_select(dim, kept))
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {"tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

    def _leave(self) -> None:
        if self.artifacts is not None:
            write_tensors(self.artifacts / "vocabulary.safetensors", {"old_ids": torch.tensor(self.kept)})


def _told(coverage: Coverage) -> str:
    return (
        f"{coverage.kept / coverage.before:.2%} of its tokens are kept; it takes {coverage.after:,} tokens instead of "
        f"{coverage.before:,}"
    )

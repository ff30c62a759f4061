"""One step of a recipe on one model: what every kind of step shares. Pieces are read, changed, written, journalled."""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.context import Context, Progress, barrier, large_memory_apart, processes, silent
from secateur.errors import RunError
from secateur.files import read_json, write_json, write_text
from secateur.network.source import Source
from secateur.network.store import (
    companions,
    copy_companions,
    model_code,
    shard_name,
    stored_dtype,
    write_config,
    write_index,
)
from secateur.network.stream import Fetch, Piece, pieces
from secateur.recipe import Step
from secateur.registry import Method
from secateur.workspace import COMPANIONS, Journal

logger = logging.getLogger(__name__)


@dataclass
class Stage(ABC):
    """One step on its way from a source to a directory.

    Args:
        source: the model before the step.
        step: method and parameters.
        index: position in the recipe; addresses the random streams.
        target: directory that gets the model.
        state: folder for what a killed run needs to go on.
        artifacts: folder for what the method leaves beside the model, such as a policy.
        dtype: of the written weights, None to keep the source's.
        shard_bytes: neighbouring blocks share a shard up to this size.
        library: folder in which several runs on this source keep their calibration tokens, None where there is one run.
    """

    source: Source
    step: Step
    index: int
    seed: int
    target: Path
    state: Path
    artifacts: Path | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = 256 * 10**6
    device: str = "cpu"
    progress: Progress = silent
    library: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Writes the result to `target`; what is finished already is not done again."""
        journal = Journal(self.state)
        large_memory_apart()
        self._prepare()
        work = self._pieces()
        done = {entry["shard"] for entry in journal.entries() if (self.target / entry.get("shard", "")).is_file()}
        mine = [piece for piece in work if self._is_mine(piece)]
        with self.progress("writing", len(mine)) as bar:
            for piece in mine:
                name = shard_name(piece.index, len(work))
                if name not in done:
                    said = self._write(piece, name, journal)
                    if said is not None:
                        journal.add({"shard": name, **said})
                bar.advance()
        barrier()
        entries = list(journal.entries())
        self._conclude(entries)
        if processes()[0] == 0:
            self._finish({entry["shard"]: entry["tensors"] for entry in entries if "shard" in entry})
        barrier()

    @abstractmethod
    def expected(self) -> Fetch:
        """Parameters of the source's architecture that compute what the result is to compute: the reload check runs them."""

    def reference(self) -> AbstractContextManager[None]:
        """While it is open, the source's skeleton computes what the result is to compute, given `expected`'s parameters.

        For what no parameters can say; most need nothing.
        """
        return nullcontext()

    @abstractmethod
    def apply(self, module: nn.Module) -> None:
        """Does the step to a live module, a copy of the source's, in place and without writing anything lasting."""

    @abstractmethod
    def seconds(self) -> float:
        """How long the method is going to take for all blocks, found by trying one; nothing lasting is written."""

    @abstractmethod
    def decided(self) -> dict[str, Any]:
        """What was decided, layer by layer, for the receipt."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The configuration of the result."""

    def superseded(self) -> None:  # noqa: B027 (most leave nothing that could be)
        """A later step has cut the matrices of this one: what lies beside the model must not speak of them any more."""

    @abstractmethod
    def _prepare(self) -> None:
        """What comes before the pieces: plans, statistics of the whole."""

    @abstractmethod
    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any] | None:
        """Reads a piece, changes its blocks, writes its shard; says what the journal is to hold, None where another
        process wrote it.
        """

    def _pieces(self) -> list[Piece]:
        """What is read, changed and written together, in order."""
        return pieces(self.source, self.shard_bytes)

    def _is_mine(self, piece: Piece) -> bool:
        """Whether this process works on a piece: they are shared out."""
        rank, world = processes()
        return piece.index % world == rank

    def _conclude(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """After the last piece, in every process; `entries` is the whole journal."""
        for entry in entries:
            self.notes.update(entry.get("notes", {}))
            self.warnings += [sentence for sentence in entry.get("warnings", []) if sentence not in self.warnings]

    @abstractmethod
    def _leave(self) -> None:
        """Writes what is to lie beside the model; only the first process comes here."""

    def _changed_companions(self) -> dict[str, str | None]:
        """The files beside the weights that are not copied as they are: their text, or None for one that is left out."""
        return {}

    def expected_tokens(self) -> Tensor | None:
        """The source's ids of the result's tokens, (tokens,); None where the step leaves the vocabulary as it is."""
        return None

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype that is written, or in `dtype`. Raises RunError when a value does not fit into it."""
        dtype = dtype or stored_dtype(self.source, self.dtype, tensor.dtype)
        cast = tensor.to(dtype)
        if dtype != tensor.dtype and cast.numel() and not bool(torch.isfinite(torch.stack(cast.aminmax())).all()):
            raise RunError(
                f"{name} holds values too large for {dtype}; write another with --dtype bfloat16 or float32."
            )
        return cast

    def _once(self, name: str, decide: Callable[[Context], Mapping[str, Any]]) -> dict[str, Any]:
        """Plain data that `decide` gives, made once and kept in the state with what its context was told; what that is, is
        taken over.
        """
        path = self.state / f"{name}.json"
        made = path.exists()
        barrier()  # everybody has looked before the first process can have written it
        if not made:
            context = self._context("method")
            said = decide(context)
            if processes()[0] == 0:
                write_json(path, {**said, "notes": context.notes, "warnings": context.warnings})
            barrier()
        told = read_json(path)
        self.notes.update(told["notes"])
        self.warnings += told["warnings"]
        return told

    def _context(self, folder: str) -> Context:
        return Context(self.seed, self.index, self.state / folder, self.artifacts, self.progress)

    def _parameters(self, registered: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those that the method itself takes; others are the engine's."""
        signature = inspect.signature(registered.function).parameters.values()
        return {each.name: parameters[each.name] for each in signature if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def _finish(self, shards: Mapping[str, Mapping[str, int]]) -> None:
        stored = {stored_dtype(self.source, self.dtype, info.dtype) for info in self.source.tensors.values()}
        floats = [dtype for dtype in stored if dtype.is_floating_point]
        self._leave()
        # said before they appear, so that a restart knows them for ours
        config = self.config()
        code = model_code(self.source, config)
        changed = self._changed_companions()
        copied = [path.name for path in companions(self.source) if path.name not in changed]
        written = {name: text for name, text in (changed | code).items() if text is not None}
        write_json(self.state / COMPANIONS, {"files": [*copied, *written]})
        copy_companions(self.source, self.target, {*changed})
        write_index(self.target, shards)
        for name, text in written.items():
            write_text(self.target / name, text)
        write_config(self.target, config, floats[0] if len(floats) == 1 else None)

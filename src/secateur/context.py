"""What a running method may ask of its surroundings: random streams, resumable state, artifacts, other processes."""

import ctypes
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from secateur.errors import RunError, SecateurError
from secateur.files import read_tensors, write_json, write_tensors

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """A progress bar as seen from the work: `advance()` after each item."""

    def advance(self, steps: int = 1, /) -> None: ...


class _Silent:
    def advance(self, steps: int = 1, /) -> None:
        pass


Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def silent(label: str, total: int) -> Iterator[Advance]:
    """Progress for nobody: where there is no terminal."""
    yield _Silent()


def forget_peak() -> None:
    """Lets the kernel count the highest resident memory of this process from now on; only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.debug("the peak memory that is told includes what was done before")


_apart = False
"""Whether this process works by itself though torchrun started several. One for all threads, as torch's group is."""


def processes() -> tuple[int, int]:
    """(rank, world) of this process: (0, 1) when the run is not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _apart else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """What is done inside is done by this process for itself: nothing of it is shared out, and nobody is waited for."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE = 8 << 20


def give_back_memory() -> None:
    """Returns what is free to the system: a block's large tensors leave holes that the C library would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def large_memory_apart() -> None:
    """From now on the C library takes large tensors from the system one by one and returns each as it is let go.

    By itself it learns to keep such of up to 32 MB for the next, whose sizes differ: holes, a fifth of what a block of a
    large model takes.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is not None:
        change(_MMAP_THRESHOLD, _LARGE)


def barrier() -> None:
    if processes()[1] > 1:
        dist.barrier()


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did; leaves them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    # gloo, because what crosses processes here is small and lives on the CPU
    # a week, because ranks wait at barriers while the first one scans, converts and measures; the default of half an hour
    # would end a run on a large model, and a process that dies is noticed at once by its closed connection
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    except SecateurError as error:
        error.told = not _first(str(error))
        raise
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and "connection" not in str(error).lower():
            raise
        raise RunError(
            "another process of this run ended before its work was done; start the same command again."
        ) from error
    finally:
        dist.destroy_process_group()


def _first(sentence: str) -> bool:
    """Whether this is the first process to fail with that sentence: all meet the same error, one tells it."""
    key = "secateur/" + hashlib.sha256(sentence.encode()).hexdigest()
    try:
        return bool(dist.distributed_c10d._get_default_store().add(key, 1) == 1)
    except RuntimeError:  # who kept the count is gone
        return True


def spread(work: Callable[[int], Any], pieces: Iterable[int], small: bool) -> dict[int, Any]:
    """{piece: work(piece)}, which must not depend on each other. `small`: each is computed on one thread, and as many at
    once as there are threads; small matrices gain little from several threads, several of them gain all.
    """
    threads = torch.get_num_threads()
    if not small or threads == 1:
        return {piece: work(piece) for piece in pieces}
    pieces = list(pieces)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(pieces, pool.map(work, pieces), strict=True))
    finally:
        # the number is kept for each thread, but MKL's for all
        torch.set_num_threads(threads)


class Context:
    """One step's surroundings.

    Args:
        seed: of the run; every random stream is addressed from it.
        step: position of the step in the recipe.
        state: folder for resumable state, or None for none (Python use on a live module).
        artifacts: folder that artifacts are written to, or None.
    """

    def __init__(
        self,
        seed: int = 0,
        step: int = 0,
        state: Path | None = None,
        artifacts: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.seed = seed
        self.step = step
        self.notes: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.rank, self.world = processes()
        self.progress = progress
        self._state = state
        self._artifacts = artifacts

    def generator(self, *address: int | str) -> torch.Generator:
        """A random stream that depends on (seed, step, address) alone, never on what was drawn before."""
        text = json.dumps([self.seed, self.step, *address])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        return torch.Generator().manual_seed(number)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What `save` last kept under that name, or None."""
        path = self._state / f"{name}.safetensors" if self._state else None
        if path is None or not path.exists():
            return None
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata["state"])

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """Keeps resumable state, atomically; every process must come here, the first one writes."""
        if self._state and self.rank == 0:
            write_tensors(self._state / f"{name}.safetensors", tensors, {"state": json.dumps(dict(meta or {}))})

    def artifact(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """Writes `name`.safetensors and `name`.json into the output, such as a trained policy."""
        if self._artifacts and self.rank == 0:
            write_tensors(self._artifacts / f"{name}.safetensors", tensors)
            write_json(self._artifacts / f"{name}.json", dict(meta or {}))

    def note(self, key: str, value: Any) -> None:
        """A fact for the receipt and the card; the value must be plain data."""
        self.notes[key] = value

    def warn(self, sentence: str) -> None:
        """Something the person must read: on the card, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def mine(self, total: int) -> range:
        """Which of `total` pieces of work this process does."""
        return range(self.rank, total, self.world)

    def owner(self, index: int) -> int:
        """The process that `mine` gives piece `index` to."""
        return index % self.world

    def each(self, work: Callable[[int], Any], pieces: Iterable[int], small: bool = False) -> dict[int, Any]:
        """{piece: work(piece)}, as `spread` computes it."""
        return spread(work, pieces, small)

    def gather(self, results: Mapping[int, Any]) -> dict[int, Any]:
        """Every process's results by piece of work, in order: the same in every process."""
        if self.world == 1:
            return dict(sorted(results.items()))
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, dict(results))
        return dict(sorted((index, value) for part in parts for index, value in part.items()))

    def broadcast(self, tensor: torch.Tensor, owner: int = 0) -> torch.Tensor:
        """`tensor` as the process `owner` has it, in place; shapes must agree."""
        if self.world > 1:
            dist.broadcast(tensor, owner)
        return tensor

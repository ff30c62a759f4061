"""Calibration tokens on their way through the blocks of one step, in whichever way the recipe wants."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.collector import Collector, Enough
from secateur.calibration.propagation import Batch, Propagation
from secateur.calibration.samples import Calibration, Samples
from secateur.calibration.sequential import solve_in_passing
from secateur.calibration.statistics import CrossGram, Statistics
from secateur.context import give_back_memory, processes, spread
from secateur.errors import RequestError
from secateur.network.anatomy import Block
from secateur.network.matrices import MatrixRef
from secateur.network.source import Source
from secateur.network.verify import stored

SMALL = 1 << 22  # numbers in a matrix: up to here matrices are solved side by side, each on one thread

Rows = Callable[[str, bool], Tensor | None]
"""Some inputs that a matrix has seen, of calibration or of held-out tokens."""

Settle = Callable[[MatrixRef, Statistics, Rows], None]
"""Decides what becomes of a matrix and puts it in its place."""


class Passes:
    """Gives each matrix its statistics, block by block in order, and passes the tokens on.

    Args:
        kinds: the statistics that are asked for.
        refs: the matrices to settle, by block.
        folder: for hidden states.
        skip: tokens at the beginning of each sequence that are not counted.

    Raises RequestError where the wishes do not go together.
    """

    def __init__(
        self,
        source: Source,
        samples: Samples,
        wishes: Calibration,
        kinds: set[type],
        refs: Mapping[int, Sequence[MatrixRef]],
        folder: Path,
        device: str = "cpu",
        skip: int = 0,
    ) -> None:
        self._source, self._wishes, self._skip = source, wishes, skip
        self._wanted = {part for kind in kinds for part in kind.wants}  # type: ignore[attr-defined]
        every = [ref for block in refs.values() for ref in block]
        shortest = min(len(ids) for ids in samples.sequences)
        if skip >= shortest:
            raise RequestError(
                f"calibration: skip={skip} leaves nothing of a sequence of {shortest} tokens; give longer ones, or skip=0."
            )
        if wishes.sequential and processes()[1] > 1:
            raise RequestError("calibration: sequential runs in one process; leave it out, or torchrun.")
        widest = max(max(ref.rows, ref.columns) for ref in every)

        def tokens(name: str) -> Propagation:
            return Propagation(source, samples, folder, getattr(torch, wishes.dtype), device, widest, name)

        self._tokens = tokens("hidden")
        self._dense: Propagation | None = None
        if CrossGram in kinds:
            if wishes.sequential or wishes.inputs == "dense":
                raise RequestError(
                    "calibration: a method that compares with the dense network takes neither `sequential` nor `inputs`."
                )
            if any(ref.expert is not None for ref in every):
                raise RequestError(
                    "experts may get other tokens than in the dense network, so the two cannot be compared; choose other "
                    "matrices with `targets`, such as attention."
                )
            self._dense = tokens("dense")
        self._captured = False

    @property
    def batches(self) -> list[Batch]:
        return self._tokens.batches

    def clear(self) -> None:
        """Removes all hidden states, as if nothing had been passed yet."""
        for tokens in (self._tokens, self._dense):
            if tokens is not None:
                shutil.rmtree(tokens.folder, ignore_errors=True)

    def capture(self) -> None:
        """Sees how blocks are called, once; what lies outside them is in memory meanwhile."""
        if not self._captured:
            for tokens in (self._tokens, self._dense):
                if tokens is not None:
                    tokens.capture(stored(self._source))
            self._captured = True

    def through(self, block: Block, refs: Sequence[MatrixRef], working: Mapping[str, Tensor], settle: Settle) -> None:
        """Passes the tokens through a block whose weights are in its modules; every matrix is settled on the way.

        working: those weights, by name; `settle` changes them in place.
        """
        last = block.index + 1 == len(self._source.anatomy.blocks)
        bank = self._source.skeleton.get_submodule(block.experts.module) if block.experts else None
        collector = Collector(refs, working, self._wanted, bank, self.batches, self._skip)
        if self._wishes.sequential:
            rest = self._in_passing(block, refs, collector, settle, last)
        else:
            rest = list(refs)
            self._collect(block, refs, collector, last)
            give_back_memory()  # activations, which what the first matrix needs beside it would come on top of
        if rest:
            statistics = collector.results()
            groups: dict[int, list[MatrixRef]] = {}
            for ref in rest:  # what shares a statistic stays together, so that nothing is derived from it twice
                groups.setdefault(id(statistics[ref.name]), []).append(ref)

            def settle_group(group: int) -> None:
                for ref in groups[group]:
                    settle(ref, statistics[ref.name], collector.rows)

            # the largest first, so that no thread is left with it alone at the end
            order = sorted(groups, key=lambda group: -sum(ref.rows * ref.columns**2 for ref in groups[group]))
            together = processes()[1] > 1  # then each matrix is told to all as it comes
            spread(settle_group, order, not together and max(ref.rows * ref.columns for ref in rest) <= SMALL)
        passed_on = self._wishes.inputs == "dense" or (self._wishes.sequential and not rest)
        if not passed_on and not last:
            self._tokens.run(block.index, write=True)

    def ready(self, block: int) -> bool:
        """Whether the hidden states that this block reads are there."""
        return self._tokens.done(block) and (self._dense is None or self._dense.done(block))

    def forget(self, block: int) -> None:
        """Removes the hidden states that this block reads: nobody needs them again."""
        self._tokens.forget(block)
        if self._dense is not None:
            self._dense.forget(block)

    def bytes(self) -> int:
        """Of the hidden states that one block reads."""
        return self._tokens.bytes() * (1 if self._dense is None else 2)

    def _collect(self, block: Block, refs: Sequence[MatrixRef], collector: Collector, last: bool) -> None:
        """One pass in which everything is counted and nothing settled; the dense network beside it where it is wanted."""
        onward = self._wishes.inputs == "dense" and not last
        beside: Iterator[Batch] | None = None
        if self._dense is not None:
            beside = self._dense.steps(block.index, around=collector.recording_dense, write=not last)

        @contextmanager
        def around(batch: Batch) -> Iterator[None]:
            if beside is not None:
                next(beside)
            with collector.watching(batch, to_the_end=onward):
                yield

        if refs or onward or beside:
            self._tokens.run(block.index, around=around, write=onward, enough=Enough)
        if beside is not None:
            next(beside, None)  # its file appears at its end

    def _in_passing(
        self, block: Block, refs: Sequence[MatrixRef], collector: Collector, settle: Settle, last: bool
    ) -> list[MatrixRef]:
        """One pass in which each matrix is settled when all tokens have reached it. Returns those that are not."""
        # experts see different tokens in every batch, so there is no moment at which all have reached one
        rest = [ref for ref in refs if ref.expert is not None]
        tokens = self._tokens
        with tokens.prepared():
            states = solve_in_passing(
                tokens.module(block.index),
                tokens.calls(block.index),
                collector,
                {ref.name: ref for ref in refs if ref.expert is None},
                lambda ref, statistics: settle(ref, statistics, collector.rows),
                lambda output: tokens.states(output, block.index),
            )
        if not rest and not last:
            tokens.write(block.index + 1, states)
        return rest

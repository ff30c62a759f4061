"""A step that goes through the blocks in order: calibration tokens to the block, its matrices or units settled, and on.

A block: parameters one by one into the modules → tokens through, inputs summed → everything settled and put in its place →
tokens through again → what was decided to files → journal. Without calibration only the middle is left.
"""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.passes import Passes, Rows
from secateur.calibration.samples import LENGTH, Calibration, Samples, kept_samples
from secateur.calibration.statistics import UNSEEN, Statistics
from secateur.context import Context, barrier, give_back_memory, processes
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import Block
from secateur.network.matrices import MatrixRef
from secateur.network.store import stored_dtype
from secateur.network.stream import Piece, put_parameter
from secateur.solving import Solver
from secateur.stage import Stage
from secateur.workspace import Journal


@dataclass
class Loaded:
    """A block's parameters while it is worked on, by name.

    Args:
        working: as they lie in its modules, in the dtype of the passes.
        precise: those that may change, as they are stored, where working ones are less precise.
    """

    working: dict[str, Tensor]
    precise: dict[str, Tensor]

    def base(self, name: str) -> Tensor:
        """The most precise form."""
        return self.precise.get(name, self.working[name])


@dataclass
class BlockStage(Stage):
    """A step whose method sees one matrix, or the units of one block, at a time."""

    calibration: Calibration = field(default_factory=Calibration)
    skip = 0  # tokens at the beginning of a sequence that are not counted, unless the recipe says how many

    def __post_init__(self) -> None:
        self.solver = Solver.of(self.step.registered, self.step.parameters)
        self.refs: dict[int, list[MatrixRef]] = self._refs()
        self._passes: Passes | None = None
        self._done: set[int] = set()

    @abstractmethod
    def _refs(self) -> dict[int, list[MatrixRef]]:
        """The matrices whose inputs are watched and which are settled, by block, in the order of the block."""

    @abstractmethod
    def _settle(
        self, number: int, ref: MatrixRef, loaded: Loaded, seen: Statistics, rows: Rows, context: Context
    ) -> dict[str, Any]:
        """Decides what becomes of the matrix, `number` of its block, and puts it in its place. Returns: for the receipt."""

    @abstractmethod
    def _keep(self, block: Block, loaded: Loaded, write: bool) -> None:
        """Leaves what was decided for a block in files, in the process that writes, and nothing in memory."""

    @abstractmethod
    def _change(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        """Puts what was decided for these blocks into the stored tensors of a piece."""

    @abstractmethod
    def _kept(self, block: int) -> bool:
        """Whether the files of a block are there."""

    def _drop(self, block: int) -> None:
        """The piece of this block is written."""

    def seconds(self) -> float:
        self._decide()
        blocks = self.source.anatomy.blocks
        first = blocks[0] if self.solver.statistics else blocks[min(self.refs)]
        if not self.solver.statistics:
            return self._timed(first) * len(self.refs)
        # with one batch of tokens and with two: what both share is solving, which does not grow with the tokens
        drawn = self._drawn()
        ids, count = drawn.sequences, len(drawn.sequences)
        total = len(self._passes_of(drawn).batches)
        took = []
        for batches in (1, 2):
            self._passes = self._passes_of(Samples(list(ids[: max(1, batches * count // total)]), [], "random"))
            self._passes.clear()  # hidden states of the last try
            self._passes.capture()
            took.append(self._timed(first))
        each = max(took[1] - took[0], 0.0)
        return (max(took[0] - each, 0.0) + each * total) * len(blocks)

    def _drawn(self) -> Samples:
        """Drawn tokens, as many as the recipe wants of calibration."""
        positions = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(self.calibration.length or LENGTH, positions)
        count = self.calibration.count + self.calibration.held_out_count
        ids = torch.randint(
            self.source.anatomy.vocabulary, (count, length), generator=self._context("tokens").generator()
        )
        return Samples(list(ids), [], "random")

    def _timed(self, block: Block) -> float:
        begun = time.time()
        self._do(block)
        return time.time() - begun

    def _decide(self) -> None:
        """What is decided for all blocks before the first: budgets. May be called in a dry run too."""

    def _learn(self, samples: Samples) -> None:
        """What is learned of all blocks before the first: gradients."""

    def _prepare(self) -> None:
        self._done = {entry["block"] for entry in Journal(self.state).entries() if "block" in entry}
        self._decide()
        if self.step.calibrated:
            samples = self._samples()
            self.notes["calibration"] = samples.describe()
        if self.solver.calibrated:
            self._learn(samples)
            if self.solver.statistics and self.refs:
                self._passes = self._passes_of(samples)
                next_block = min(set(range(len(self.source.anatomy.blocks))) - self._done, default=None)
                if self._done and next_block is not None and not self._passes.ready(next_block):
                    raise RequestError(
                        "this run was begun with another number of processes; go on with as many, or say --restart."
                    )
        barrier()  # everybody has read the journal before anybody adds to it

    def _is_mine(self, piece: Piece) -> bool:
        # with statistics all processes walk through all blocks together, each with its share of the tokens
        return self._passes is not None or super()._is_mine(piece)

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any] | None:
        together, target = self._passes is not None, self.target / name
        writes = not together or processes()[0] == 0
        blocks = [self.source.anatomy.blocks[index] for index in piece.blocks]
        for index in piece.blocks:
            lost = writes and index in self._done and not self._kept(index) and not target.exists()
            if lost and together:
                raise RunError(f"{name} or what it is made of was removed meanwhile; start again with --restart.")
            if index not in self._done or lost:
                said = self._do(self.source.anatomy.blocks[index])
                if together:
                    barrier()  # the hidden states of every process are written
                if writes:
                    journal.add({"block": index, **said})
                self._done.add(index)
                if together:
                    barrier()
                self._forget(index)
        if not writes:
            return None
        tensors = self.source.read(piece.keys) if not target.exists() else {}
        if tensors:
            self._change(blocks, tensors)
            tensors = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
            write_tensors(target, tensors, {"format": "pt"})
            sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
        else:  # written by a run that was killed before it could say so
            sizes = {key: tensor.nbytes for key, tensor in read_tensors(target)[0].items()}
        for index in piece.blocks:
            self._drop(index)
        return {"tensors": sizes}

    def _do(self, block: Block) -> dict[str, Any]:
        """Statistics, solving and propagation of one block; leaves what was decided in files.

        Returns: what the journal is to hold.
        """
        refs = self.refs.get(block.index, [])
        said: dict[str, dict[str, Any]] = {}
        warnings: list[str] = []
        if self._passes is not None:
            self._passes.capture()
        with self._loaded(block, {ref.parameter for ref in refs} | self._beside(block)) as loaded:

            def settle(ref: MatrixRef, statistics: Statistics, rows: Rows) -> None:
                context = self._context(f"block-{block.index}")
                said[ref.name] = self._settle(number[ref.name], ref, loaded, statistics, rows, context)
                warnings.extend(sentence for sentence in context.warnings if sentence not in warnings)
                give_back_memory()  # what one matrix needed beside it, the next would come on top of

            number = {ref.name: place for place, ref in enumerate(refs)}
            if self._passes is None:
                for ref in refs:
                    settle(ref, UNSEEN, lambda name, held_out: None)
            else:
                self._passes.through(block, refs, loaded.working, settle)
        if missing := [ref.name for ref in refs if ref.name not in said]:
            raise RequestError(
                f"no product with {missing[0]} was seen when its block ran, so nothing is known of its inputs; name other "
                "matrices in `targets`, or use a method that needs no text."
            )
        self._keep(block, loaded, processes()[0] == 0 or self._passes is None)
        loaded.working.clear()
        loaded.precise.clear()
        give_back_memory()
        return {"settled": said, "warnings": warnings}

    def _beside(self, block: Block) -> set[str]:
        """Parameters of a block that may change beside the matrices."""
        return set()

    @contextmanager
    def _loaded(self, block: Block, names: set[str]) -> Iterator[Loaded]:
        """A block's parameters in its modules, to be run and changed; those of `names` also as they are stored."""
        compute = getattr(torch, self.calibration.dtype) if self._passes else torch.float32
        working: dict[str, Tensor] = {}
        precise: dict[str, Tensor] = {}
        # one at a time, because a file stays mapped as long as a tensor of it lives
        for name in block.parameters if self._passes else sorted(names):
            tensor = self.source.parameter(name).to(self.device)
            if name in names and torch.promote_types(compute, tensor.dtype) != compute:
                precise[name] = tensor.clone()
            # a copy, because some are changed in place and a live model's are not ours
            working[name] = tensor.to(compute, copy=True) if tensor.is_floating_point() else tensor.clone()
            del tensor
        model = self.source.skeleton
        empty = {name: model.get_parameter(name) for name in working}
        try:
            for name, tensor in working.items():
                put_parameter(model, name, nn.Parameter(tensor, requires_grad=False))
            yield Loaded(working, precise)
        finally:
            for name, parameter in empty.items():
                put_parameter(model, name, parameter)

    def _written(self, name: str) -> torch.dtype:
        """The dtype in which a parameter is written."""
        return stored_dtype(self.source, self.dtype, self.source.tensors[self.source.stored_keys(name)[0]].dtype)

    def _passes_of(self, samples: Samples) -> Passes:
        skip = self.skip if self.calibration.skip is None else self.calibration.skip
        kinds = self.solver.statistics
        return Passes(self.source, samples, self.calibration, kinds, self.refs, self.state, self.device, skip)

    def _samples(self) -> Samples:
        drawn = self._context("samples").generator("samples")
        return kept_samples(self.source, self.calibration, self.state, drawn, self.seed, self.progress, self.library)

    def _forget(self, block: int) -> None:
        if self._passes is not None:
            self._passes.forget(block)


def errors(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean errors on calibration and on held-out tokens of what was settled, for the notes."""
    found = {
        key: [entry[key] for entry in entries.values() if entry.get(key) is not None]
        for key in ("calibration_error", "held_out_error")
    }
    return {f"mean {key.replace('_', ' ')}": sum(all_) / len(all_) for key, all_ in found.items() if all_}

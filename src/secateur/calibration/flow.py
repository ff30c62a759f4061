"""What blocks do to the hidden states of calibration tokens on their way through the dense network, one block in memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.calibration.propagation import Batch, Propagation
from secateur.calibration.samples import Samples
from secateur.calibration.subflow import flow_sums, silent_modules, watched_part
from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_json, write_json
from secateur.network.anatomy import Block
from secateur.network.modelling_file import BLOCK, part_modules
from secateur.network.source import Source
from secateur.network.stream import loaded
from secateur.network.trace import first_tensor
from secateur.network.verify import stored


@dataclass(frozen=True)
class Flow:
    """How much each block changes the hidden states, x before it and y behind it.

    Args:
        cosine: (blocks,) mean over tokens of cos(x, y).
        flat: (blocks,) cosine of all x and all y as two long vectors.
        norm: (blocks,) mean over tokens of |x|.
        change: (blocks,) mean over tokens of |y − x| / |x|.
        tokens: how many were seen.
    """

    cosine: Tensor
    flat: Tensor
    norm: Tensor
    change: Tensor
    tokens: int


@dataclass(frozen=True)
class LossWithout:
    """The next-token loss on calibration tokens when a single block is left out.

    Args:
        losses: (blocks,) mean over the predicted tokens, in nats, without that block.
        dense: the same with all blocks.
    """

    losses: Tensor
    dense: float


class FlowPass:
    """One pass of calibration tokens through the dense network, that goes on from the last block that is done.

    What was seen of a batch is kept apart from that of others and all is added up without rounding: how many processes
    share the batches changes nothing.

    Args:
        folder: for hidden states and what was seen.
        losses: also pass on, beside the dense hidden states, those that lack one block each, for `LossWithout`. They are as
            many as there are blocks, each with files of its own.
        part: "block", or "attention" or "feed_forward": then x is what that part adds to and y has it added, and what is
            left out is that part alone.
    """

    def __init__(
        self,
        source: Source,
        samples: Samples,
        folder: Path,
        dtype: torch.dtype,
        device: str = "cpu",
        losses: bool = False,
        part: str = BLOCK,
    ) -> None:
        self._source, self._folder, self._losses, self._part = source, folder / "flow", losses, part
        self._dtype, self._device = dtype, device
        self._count = len(source.anatomy.blocks)
        self._samples = Samples(samples.sequences, [], samples.name)  # held-out tokens decide nothing
        inside = [name for block in source.anatomy.blocks for name in block.parameters]
        shapes = [source.skeleton.get_parameter(name).shape[-2:] for name in inside]
        widest = max(max(shape) for shape in shapes if len(shape) > 1)
        self._tokens = Propagation(source, self._samples, folder, dtype, device, widest)

    @property
    def batches(self) -> list[Batch]:
        return self._tokens.batches

    def run(self, progress: Progress = silent, blocks: Sequence[int] | None = None) -> None:
        """Passes the tokens through all blocks, or those of `blocks` from the first on; what is done is not done again.

        Raises RequestError when the pass was begun with another number of processes.
        """
        rank, world = processes()
        if any(not path.stem.endswith(f"-of-{world}") for path in self._folder.glob("*.json")):
            raise RequestError(
                "this run was begun with another number of processes; go on with as many, or say --restart."
            )
        wanted = range(self._count) if blocks is None else blocks
        ends = [self._count] if self._losses and blocks is None else []
        left = [index for index in (*wanted, *ends) if not self._seen(index, rank, world).exists()]
        if left:
            self._tokens.capture(stored(self._source))
        with progress("statistics", len(left)) as bar:
            for index in left:
                self._end() if index == self._count else self._block(index)
                bar.advance()
        barrier()  # what every process has seen is there

    def flow(self) -> Flow:
        """What all processes have seen together. Raises RunError naming a block whose hidden states are not finite."""
        sums = []
        for index in range(self._count):
            seen = self._gathered(index)
            sums.append([math.fsum(part) for part in zip(*seen, strict=True)])
            if not all(math.isfinite(value) for value in sums[-1]):
                raise RunError(
                    f"block {index} gives non-finite hidden states on the calibration tokens; check the model."
                )
        cosine, dot, xx, yy, norm, change = torch.tensor(sums, dtype=torch.float64).T
        count = sum(len(ids) for ids in self._samples.sequences)
        return Flow(cosine / count, dot / (xx * yy).sqrt(), norm / count, change / count, count)

    def loss_without(self) -> LossWithout:
        """What all processes have seen together; only where `losses` was asked for."""
        seen = self._gathered(self._count)
        predicted = sum(len(ids) - 1 for ids in self._samples.sequences)
        *losses, dense = (math.fsum(part) / predicted for part in zip(*seen, strict=True))
        return LossWithout(torch.tensor(losses, dtype=torch.float64), dense)

    def _block(self, index: int) -> None:
        """Passes everything through one block and notes what the dense hidden states become."""
        seen: dict[int, list[float]] = {}
        onward = self._losses or index + 1 < self._count

        def fetch(name: str) -> Tensor:
            return self._source.parameter(name).to(self._device, self._dtype)

        with loaded(self._source.skeleton, self._source.anatomy.blocks[index].parameters, fetch):
            for lacking in range(index) if self._losses else ():
                self._without(lacking).run(index, write=True)
            if self._losses and self._part == BLOCK:
                self._without(index).take(index + 1, self._tokens, index)
            elif self._losses:
                without = self._without(index)
                without.take(index, self._tokens, index)
                with silent_modules(self._tokens.module(index), part_modules(self._at(index), self._part)):
                    without.run(index, write=True)
                without.forget(index)
            self._tokens.run(index, around=lambda batch: self._watch(index, batch, seen), write=onward)
        self._note(index, seen)
        for tokens in (self._tokens, *(self._without(lacking) for lacking in range(index) if self._losses)):
            tokens.forget(index)

    def _watch(self, index: int, batch: Batch, seen: dict[int, list[float]]) -> AbstractContextManager[None]:
        """What a batch runs inside of on its way through a block, for what is noted of it."""
        module, width = self._tokens.module(index), self._tokens.width
        if self._part == BLOCK:
            return _watched(module, batch, width, seen)
        return watched_part(self._at(index), module, self._part, batch.index, width, seen)

    def _at(self, index: int) -> Block:
        return self._source.anatomy.blocks[index]

    def _end(self) -> None:
        """The loss of what has come through all blocks, without each of them and with all."""
        seen: dict[int, list[float]] = {batch.index: [] for batch in self.batches}
        for tokens in (*map(self._without, range(self._count)), self._tokens):
            for batch, logits in tokens.logits(stored(self._source)):
                rows = logits[:, :-1].float().flatten(0, 1)
                loss = functional.cross_entropy(rows, batch.ids[:, 1:].flatten().to(rows.device), reduction="sum")
                seen[batch.index].append(float(loss))
        self._note(self._count, seen)

    def _without(self, block: int) -> Propagation:
        return self._tokens.beside(f"without-{block}")

    def _note(self, index: int, seen: dict[int, list[float]]) -> None:
        write_json(self._seen(index, *processes()), {str(batch): sums for batch, sums in seen.items()})

    def _gathered(self, index: int) -> list[list[float]]:
        """What was seen there of every batch, by every process."""
        world = processes()[1]
        seen: dict[int, Any] = {}
        for rank in range(world):
            seen.update({int(batch): sums for batch, sums in read_json(self._seen(index, rank, world)).items()})
        return [seen[batch] for batch in sorted(seen)]

    def _seen(self, index: int, rank: int, world: int) -> Path:
        return self._folder / f"{index}-{rank}-of-{world}.json"


@contextmanager
def _watched(module: nn.Module, batch: Batch, width: int, seen: dict[int, list[float]]) -> Iterator[None]:
    """While it is open, what a block is given and gives is summed."""
    given: list[Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = first_tensor((args, kwargs), width)
        assert hidden is not None, "a block is given hidden states"
        given.append(hidden.clone())  # a block may add in place

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = first_tensor(output, width)
        assert hidden is not None, "a block gives hidden states"
        seen[batch.index] = flow_sums(given.pop().reshape(-1, width), hidden.reshape(-1, width))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""One pass of calibration tokens through the dense network, one block in memory, with something summed of each block."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.propagation import Batch, Propagation
from secateur.calibration.samples import Samples
from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import Block
from secateur.network.source import Source
from secateur.network.stream import loaded
from secateur.network.verify import stored


class DensePass(ABC):
    """Goes on from the last block that is done.

    Args:
        folder: for hidden states and what was seen.
        skip: tokens at the beginning of each sequence that are not counted.

    Raises RequestError where that leaves nothing of a sequence.
    """

    name: str
    """Of the folder for what was seen."""

    def __init__(
        self, source: Source, samples: Samples, folder: Path, dtype: torch.dtype, device: str = "cpu", skip: int = 0
    ) -> None:
        self.source, self._folder = source, folder / self.name
        self._dtype, self._device, self._skip = dtype, device, skip
        self.samples = Samples(samples.sequences, [], samples.name)  # held-out tokens decide nothing
        shortest = min(len(ids) for ids in samples.sequences)
        if skip >= shortest:
            raise RequestError(
                f"calibration: skip={skip} leaves nothing of a sequence of {shortest} tokens; give longer ones, or skip=0."
            )
        inside = [name for block in source.anatomy.blocks for name in block.parameters]
        shapes = [source.skeleton.get_parameter(name).shape[-2:] for name in inside]
        widest = max(max(shape) for shape in shapes if len(shape) > 1)
        self._tokens = Propagation(source, self.samples, folder, dtype, device, widest)

    @abstractmethod
    def watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> AbstractContextManager[None]:
        """While it is open, one batch goes through a block; what is seen of it is added to `seen`."""

    @property
    def batches(self) -> list[Batch]:
        return self._tokens.batches

    def run(self, progress: Progress = silent, blocks: Sequence[int] | None = None) -> None:
        """Passes the tokens through all blocks, or those of `blocks` from the first on; what is done is not done again.

        Raises RequestError when the pass was begun with another number of processes.
        """
        rank, world = processes()
        self.check_processes()
        every = range(len(self.source.anatomy.blocks))
        left = [index for index in blocks or every if not self._path(index, rank, world).exists()]
        if left:
            self._tokens.capture(stored(self.source))
        with progress("statistics", len(left)) as bar:
            for index in left:
                self._block(index, write=index != every[-1])
                bar.advance()
        barrier()  # what every process has seen is there

    def check_processes(self) -> None:
        """Raises RequestError when the pass was begun with another number of processes."""
        world = processes()[1]
        if any(not path.stem.endswith(f"-of-{world}") for path in self._folder.glob("*.safetensors")):
            raise RequestError(
                "this run was begun with another number of processes; go on with as many, or say --restart."
            )

    def gathered(self) -> dict[tuple[int, str], Tensor]:
        """What all processes have seen together, by block and name, added in the order of their ranks.

        Raises RunError naming a block of which something is not finite.
        """
        sums: dict[tuple[int, str], Tensor] = {}
        for block in self.source.anatomy.blocks:
            seen = self.sums(block.index, f"block {block.index}")
            sums |= {(block.index, name): tensor for name, tensor in seen.items()}
        return sums

    def sums(self, index: int, where: str) -> dict[str, Tensor]:
        """What all processes have seen under one number, added in the order of their ranks. Raises RunError naming `where`
        when something is not finite.
        """
        world, sums = processes()[1], dict[str, Tensor]()
        for rank in range(world):
            for name, tensor in read_tensors(self._path(index, rank, world))[0].items():
                if not bool(torch.isfinite(tensor).all()):
                    raise RunError(f"{where} gives non-finite activations on the calibration tokens; check the model.")
                add(sums, name, tensor)
        return sums

    def rows(self, tensor: Tensor, batch: Batch) -> Tensor:
        """(sequences, tokens, columns) without the first tokens; some modules are given all tokens in one row."""
        return tensor.detach().reshape(*batch.ids.shape, tensor.shape[-1])[:, self._skip :]

    def _block(self, index: int, write: bool) -> None:
        block, seen = self.source.anatomy.blocks[index], dict[str, Tensor]()

        def fetch(name: str) -> Tensor:
            return self.source.parameter(name).to(self._device, self._dtype)

        with loaded(self.source.skeleton, block.parameters, fetch):
            self._tokens.run(index, around=lambda batch: self.watched(block, batch, seen), write=write)
        write_tensors(self._path(index, *processes()), {name: tensor.cpu() for name, tensor in sorted(seen.items())})
        self._tokens.forget(index)

    def _path(self, index: int, rank: int, world: int) -> Path:
        return self._folder / f"{index}-{rank}-of-{world}.safetensors"


def add(seen: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Adds to what was seen so far."""
    seen[name] = seen[name] + tensor if name in seen else tensor

"""How strongly neurons, heads and channels respond to calibration tokens, in one pass of the dense network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.calibration.propagation import Batch, Propagation
from secateur.calibration.samples import Samples
from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import Block, Slice
from secateur.network.source import Source
from secateur.network.stream import loaded
from secateur.network.verify import stored

Aggregation = Literal["mean", "l2"]
Response = Literal["neurons", "products", "heads", "channels"]
"""neurons: what the output matrix of the feed-forward layer is given of each; products: what its first matrix gives, before
the nonlinearity; heads: the norm of what the output matrix of attention is given of each head, summed over the heads of a
unit; channels: what the norms of a block give, summed over norms.
"""


@dataclass(frozen=True)
class Activations:
    """Sums over sequences of aggregated responses.

    Args:
        sums: float64, by block, response and what was summed: "mean" or "l2" over the tokens of a sequence, and whether it
            or its square was summed over sequences.
        sequences: how many there were.
    """

    sums: Mapping[tuple[int, str], Tensor]
    sequences: int

    def of(self, block: int, response: Response, sequence: Aggregation = "mean", batch: Aggregation = "l2") -> Tensor:
        """(units,) the aggregated responses of a block, over the tokens of a sequence first, then over sequences.

        mean: of absolute values. l2: the root of the sum of squares.
        """
        first = self.sums[block, f"{response} {sequence}"]  # (2, units): the values and their squares
        return first[0] / self.sequences if batch == "mean" else first[1].sqrt()

    def has(self, block: int, response: Response) -> bool:
        return (block, f"{response} mean") in self.sums


def aggregated(values: Tensor) -> dict[str, Tensor]:
    """(sequences, tokens, units) responses as {"mean", "l2"}: (2, units), the aggregate over the tokens and its square,
    each summed over sequences.
    """
    size = values.double().abs()
    each = {"mean": size.mean(dim=1), "l2": size.square().sum(dim=1).sqrt()}
    return {name: torch.stack([found.sum(dim=0), found.square().sum(dim=0)]) for name, found in each.items()}


class ActivationPass:
    """One pass of calibration tokens through the dense network, that goes on from the last block that is done.

    Args:
        folder: for hidden states and what was seen.
        skip: tokens at the beginning of each sequence that are not counted.

    Raises RequestError where that leaves nothing of a sequence.
    """

    def __init__(
        self, source: Source, samples: Samples, folder: Path, dtype: torch.dtype, device: str = "cpu", skip: int = 0
    ) -> None:
        self._source, self._folder = source, folder / "activations"
        self._dtype, self._device, self._skip = dtype, device, skip
        self._samples = Samples(samples.sequences, [], samples.name)  # held-out tokens decide nothing
        shortest = min(len(ids) for ids in samples.sequences)
        if skip >= shortest:
            raise RequestError(
                f"calibration: skip={skip} leaves nothing of a sequence of {shortest} tokens; give longer ones, or skip=0."
            )
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
        if any(not path.stem.endswith(f"-of-{world}") for path in self._folder.glob("*.safetensors")):
            raise RequestError(
                "this run was begun with another number of processes; go on with as many, or say --restart."
            )
        every = range(len(self._source.anatomy.blocks))
        left = [index for index in blocks or every if not self._seen(index, rank, world).exists()]
        if left:
            self._tokens.capture(stored(self._source))
        with progress("statistics", len(left)) as bar:
            for index in left:
                self._block(index, write=index != every[-1])
                bar.advance()
        barrier()  # what every process has seen is there

    def activations(self) -> Activations:
        """What all processes have seen together. Raises RunError naming a block that responds by what is not finite."""
        world, sums = processes()[1], dict[tuple[int, str], Tensor]()
        for block in self._source.anatomy.blocks:
            for rank in range(world):
                for name, tensor in read_tensors(self._seen(block.index, rank, world))[0].items():
                    if not bool(torch.isfinite(tensor).all()):
                        raise RunError(
                            f"block {block.index} gives non-finite activations on the calibration tokens; check the model."
                        )
                    key = block.index, name
                    sums[key] = sums[key] + tensor if key in sums else tensor
        return Activations(sums, len(self._samples.sequences))

    def _block(self, index: int, write: bool) -> None:
        block, seen = self._source.anatomy.blocks[index], dict[str, Tensor]()

        def fetch(name: str) -> Tensor:
            return self._source.parameter(name).to(self._device, self._dtype)

        with loaded(self._source.skeleton, block.parameters, fetch):
            self._tokens.run(index, around=lambda batch: self._watched(block, batch, seen), write=write)
        write_tensors(self._seen(index, *processes()), {name: tensor.cpu() for name, tensor in sorted(seen.items())})
        self._tokens.forget(index)

    @contextmanager
    def _watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> Iterator[None]:
        """While it is open, what the block's units respond by is summed."""
        normed: list[Tensor] = []

        def note(response: Response, values: Tensor) -> None:
            for name, tensor in aggregated(values).items():
                key = f"{response} {name}"
                seen[key] = seen[key] + tensor if key in seen else tensor

        def rows(tensor: Tensor) -> Tensor:
            """(sequences, tokens, columns) without the first tokens; some modules are given all tokens in one row."""
            return tensor.detach().reshape(*batch.ids.shape, tensor.shape[-1])[:, self._skip :]

        def neurons(_: nn.Module, given: Any) -> None:
            note("neurons", rows(given[0]))

        def heads(_: nn.Module, given: Any) -> None:
            attention, group = block.attention, block.group("heads")
            assert attention is not None and group is not None, "watched where they are"
            norms = rows(given[0]).unflatten(-1, (group.count, -1, attention.head_dim)).double().norm(dim=-1)
            note("heads", norms.sum(dim=-1))

        def products(part: Slice) -> Callable[..., None]:
            def hook(_module: nn.Module, _given: Any, output: Tensor) -> None:
                assert block.feed_forward is not None
                note("products", rows(output.narrow(-1, part.offset, block.feed_forward.units)))

            return hook

        def channels(_module: nn.Module, _given: Any, output: Tensor) -> None:
            normed.append(rows(output).double().abs())

        handles = []
        model, hidden = self._source.skeleton, self._source.anatomy.hidden
        if block.feed_forward:
            handles.append(_module(model, block.feed_forward.down).register_forward_pre_hook(neurons))
            first = block.feed_forward.first
            handles.append(_module(model, first).register_forward_hook(products(first)))
        if group := block.group("heads"):
            handles.append(_module(model, group.output).register_forward_pre_hook(heads))
        norms = [name for name in block.norms if model.get_parameter(name).shape == (hidden,)]
        for path in dict.fromkeys(name.rpartition(".")[0] for name in norms):
            handles.append(model.get_submodule(path).register_forward_hook(channels))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if normed:
            note("channels", torch.stack(normed).sum(dim=0))

    def _seen(self, index: int, rank: int, world: int) -> Path:
        return self._folder / f"{index}-{rank}-of-{world}.safetensors"


def _module(model: nn.Module, part: Slice) -> nn.Module:
    return model.get_submodule(part.parameter.rpartition(".")[0])

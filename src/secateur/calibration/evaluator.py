"""The loss of a network with some of its units silent: forward passes alone, in the memory that inference takes.

The model is loaded once, in the dtype that it is stored in. A unit is silent where the matrix that reads it is given zeros
in its place, so no weight is copied or changed, and sequences go through one after the other.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.calibration.samples import Samples
from secateur.errors import RunError
from secateur.network.anatomy import COLUMN_AXES, Axis, Group
from secateur.network.source import Source, conversion_dtype, load

Key = tuple[int, Axis]
"""Units of one kind in one block."""

ROWS = 16  # logits whose logarithms are taken at once: inference takes none, and a vocabulary is wide


class Evaluator:
    """What a network does on calibration tokens with any of its units silent.

    Args:
        source: the network, loaded at the first question; a live module is used as it is.
        samples: the tokens; held-out ones are not used.
        axes: the kinds of units that may be silent.

    count: how many sequences there are.
    """

    def __init__(
        self, source: Source, samples: Samples, axes: Sequence[Axis] = COLUMN_AXES, device: str = "cpu"
    ) -> None:
        self._source, self._sequences, self._device = source, samples.sequences, device
        self._groups: dict[Key, Group] = {
            (block.index, axis): group
            for block in source.anatomy.blocks
            for axis in axes
            if (group := block.group(axis)) is not None
        }
        self.count = len(samples.sequences)

    def loss(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> float:
        """Mean next-token negative log-likelihood, in nats, without the units of `silent`, (k,) indices of each.

        sequences: numbers of those that are read; default all.

        Raises RunError when it is not a finite number.
        """
        total = tokens = 0.0
        with self._silenced(silent, {}):
            for ids in self._chosen(sequences):
                logits = self._logits(ids)
                for start in range(0, len(ids) - 1, ROWS):
                    stop = min(start + ROWS, len(ids) - 1)
                    rows = logits[start:stop].float()
                    total += float(functional.cross_entropy(rows, ids[start + 1 : stop + 1], reduction="sum"))
                tokens += len(ids) - 1
        if not total < float("inf"):  # also true of what is not a number
            raise RunError("the loss on the calibration tokens is not finite; check the model, or remove fewer units.")
        return total / tokens

    def sizes(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> dict[Key, Tensor]:
        """(count · width,) root of the mean square of what each output matrix reads, without the units of `silent`."""
        sums: dict[Key, Tensor] = {
            key: torch.zeros(group.count * group.output.width, dtype=torch.float64)
            for key, group in self._groups.items()
        }
        tokens = 0
        with self._silenced(silent, sums):
            for ids in self._chosen(sequences):
                self._logits(ids)
                tokens += len(ids)
        return {key: (total / tokens).sqrt().float() for key, total in sums.items()}

    @cached_property
    def _model(self) -> nn.Module:
        """As inference has it: the dtype of the files, the module itself where it is live."""
        source = self._source
        if source.live is not None:
            return source.live
        stored = [info.dtype for info in source.tensors.values() if info.dtype.is_floating_point]
        dtype = max(set(stored), key=stored.count) if stored else conversion_dtype(source.place, source.config)
        name = str(dtype).removeprefix("torch.")
        return load(source.spec, name, self._device, source.trust_remote_code)[0]

    def _chosen(self, sequences: Sequence[int] | None) -> Iterator[Tensor]:
        for index in range(self.count) if sequences is None else sequences:
            yield self._sequences[index].to(next(self._model.parameters()).device)

    @torch.inference_mode()
    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        return logits

    @contextmanager
    def _silenced(self, silent: Mapping[Key, Tensor], sums: Mapping[Key, Tensor]) -> Iterator[None]:
        """While it is open, output matrices read zeros for these units; what they read is added to `sums`, squared."""
        reached: set[Key] = set()

        def hook(key: Key, gone: Tensor | None) -> Any:
            def before(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
                if not inputs:
                    return None
                reached.add(key)
                given = inputs[0]
                if gone is not None:
                    given = given.masked_fill(gone.to(given.device), 0)
                if key in sums:
                    sums[key].add_(given.reshape(-1, given.shape[-1]).float().square().sum(0).cpu())
                return (given, *inputs[1:])

            return before

        model, watched = self._model, {*sums, *(key for key, units in silent.items() if len(units))}
        training, handles = [module for module in model.modules() if module.training], []
        try:
            model.eval()  # a live module may be in training
            for key in watched:
                part = self._groups[key].output
                gone = None
                if len(silent.get(key, ())):
                    gone = torch.zeros(self._groups[key].count * part.width, dtype=torch.bool)
                    gone[part.indices(silent[key].cpu())] = True
                module = model.get_submodule(part.parameter.rpartition(".")[0])
                handles.append(module.register_forward_pre_hook(hook(key, gone)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        if missed := watched - reached:
            block, axis = min(missed)
            raise RunError(
                f"block {block}: its {axis} could not be silenced, because their output matrix was not called."
            )


class Rehearsal(Evaluator):
    """Stands for an Evaluator while a method is timed: answers are drawn, and what they would take is added up.

    seconds: what the passes that were asked for would take, by one that was tried.
    """

    def __init__(
        self, source: Source, samples: Samples, axes: Sequence[Axis] = COLUMN_AXES, device: str = "cpu"
    ) -> None:
        super().__init__(source, samples, axes, device)
        self._drawn, self._passes = torch.Generator().manual_seed(0), 0

    @property
    def seconds(self) -> float:
        tried = Evaluator(self._source, Samples(self._sequences[:1], [], "tried"), tuple(COLUMN_AXES), self._device)
        tried.loss({})  # loads it
        begun = time.time()
        tried.loss({})
        return (time.time() - begun) * self._passes

    def loss(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> float:
        self._passes += self.count if sequences is None else len(sequences)
        return 1 + float(torch.rand(1, generator=self._drawn))

    def sizes(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> dict[Key, Tensor]:
        self._passes += self.count if sequences is None else len(sequences)
        return {
            key: torch.rand(group.count * group.output.width, generator=self._drawn)
            for key, group in self._groups.items()
        }

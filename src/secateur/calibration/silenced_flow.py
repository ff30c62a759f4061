"""What blocks do to the hidden states while given units are silent: for methods that cut in steps and measure in between.

The whole model is in memory in float32, once, and is not changed: a unit is silent when its columns of what the output
matrix reads are zero, which is what the network without it computes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.flow import flow_sums
from secateur.calibration.propagation import ACTIVATION_BYTES, MOST_TOKENS
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import InputNorms
from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.network.anatomy import Axis
from secateur.network.source import Source, dense_model
from secateur.network.trace import first_tensor
from secateur.tensor.products import FastProducts

Where = tuple[int, Axis]
"""Units of one kind in one block."""


@dataclass(frozen=True)
class SilencedSums:
    """What one measurement has seen.

    Args:
        cosine: (blocks,) mean over tokens of cos(x, y), x before the block and y behind it, float64.
        norms: of the inputs of each output matrix, (count · width,) numbers; those of silent units are 0.
    """

    cosine: Tensor
    norms: dict[Where, InputNorms]


class _Reached(Exception):  # noqa: N818 (a signal, not an error)
    """The last block is done: what comes behind it is not needed."""


class SilencedFlow:
    """Measures a network in which some units are silent.

    Args:
        skip: tokens at the beginning of each sequence that do not count for norms; for cosines all do.

    Raises RequestError where that leaves nothing of a sequence.
    """

    def __init__(self, source: Source, samples: Samples, device: str = "cpu", skip: int = 0) -> None:
        self._source, self._device, self._skip = source, device, skip
        self._sequences = samples.sequences  # held-out tokens decide nothing
        shortest = min(len(ids) for ids in self._sequences)
        if skip >= shortest:
            raise RequestError(
                f"calibration: skip={skip} leaves nothing of a sequence of {shortest} tokens; give longer ones, or skip=0."
            )

    @cached_property
    def _model(self) -> nn.Module:
        return dense_model(self._source, self._device)

    def measure(self, silenced: Mapping[Where, Tensor]) -> SilencedSums:
        """One pass of all tokens. Where several processes run, all must come here, and each takes some of the tokens.

        silenced: the (k,) units that are kept, where some are silent.

        Raises RunError naming the block where what is seen is not finite.
        """
        blocks, batches = self._source.anatomy.blocks, self._batches()
        cosines: dict[int, list[float]] = {}
        squares: dict[Where, Tensor] = {}
        context = Context()
        for batch in context.mine(len(batches)):
            cosines[batch] = [math.nan] * len(blocks)
            watched = self._watched(batches[batch], silenced, cosines[batch], squares)
            with suppress(_Reached), watched, torch.no_grad(), FastProducts():
                self._model(input_ids=batches[batch].to(self._device), use_cache=False)
        tokens = sum(map(len, self._sequences))
        sums = [math.fsum(part) for part in zip(*context.gather(cosines).values(), strict=True)]
        parts = list(context.gather({context.rank: squares}).values())
        counted = tokens - self._skip * len(self._sequences)
        norms: dict[Where, InputNorms] = {}
        for where in dict.fromkeys(key for part in parts for key in part):
            total = sum((part[where] for part in parts if where in part), torch.zeros((), dtype=torch.float64))
            norms[where] = InputNorms(total.float(), counted)
        for index, value in enumerate(sums):
            own = [norms[where].squares for where in norms if where[0] == index]
            if not math.isfinite(value) or not all(bool(torch.isfinite(each).all()) for each in own):
                raise RunError(
                    f"block {index} gives non-finite hidden states on the calibration tokens; check the model."
                )
        return SilencedSums(torch.tensor(sums, dtype=torch.float64) / tokens, norms)

    def _batches(self) -> list[Tensor]:
        """(sequences, tokens) each, of one length, small enough that what they take beside the model does not count."""
        inside = [name for block in self._source.anatomy.blocks for name in block.parameters]
        widest = max(max(self._source.skeleton.get_parameter(name).shape[-2:]) for name in inside)
        most = max(1, min(MOST_TOKENS, ACTIVATION_BYTES // (4 * widest)))
        batches: list[list[Tensor]] = []
        for ids in self._sequences:
            last = batches[-1] if batches else None
            if last and len(last[0]) == len(ids) and (len(last) + 1) * len(ids) <= most:
                last.append(ids)
            else:
                batches.append([ids])
        return [torch.stack(batch) for batch in batches]

    @contextmanager
    def _watched(
        self, ids: Tensor, silenced: Mapping[Where, Tensor], cosines: list[float], squares: dict[Where, Tensor]
    ) -> Iterator[None]:
        """While it is open, units are silent, and what is asked for is summed."""
        network = self._source.anatomy
        given: dict[int, Tensor] = {}

        def enter(index: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = first_tensor((args, kwargs), network.hidden)
            assert hidden is not None, "a block is given hidden states"
            given[index] = hidden.clone()  # a block may add in place

        def leave(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
            hidden = first_tensor(output, network.hidden)
            assert hidden is not None, "a block gives hidden states"
            before = given.pop(index).reshape(-1, network.hidden)
            cosines[index] = flow_sums(before, hidden.reshape(-1, network.hidden))[0]
            if index + 1 == len(network.blocks):
                raise _Reached

        def read(where: Where, mask: Tensor | None, _module: nn.Module, args: Any) -> Any:
            inputs = args[0] if mask is None else args[0] * mask
            counted = inputs.reshape(*ids.shape, -1)[:, self._skip :].flatten(0, 1)
            found = counted.square().sum(0, dtype=torch.float64).cpu()
            squares[where] = squares[where] + found if where in squares else found
            return (inputs, *args[1:])

        handles = []
        try:
            for block in network.blocks:
                module = self._model.get_submodule(block.path)
                handles.append(module.register_forward_pre_hook(partial(enter, block.index), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(leave, block.index)))
                for group in block.groups:
                    where, mask = (block.index, group.axis), None
                    if where in silenced:
                        mask = torch.zeros(group.count * group.output.width)
                        mask[group.output.indices(silenced[where])] = 1
                        mask = mask.to(self._device)
                    reader = self._model.get_submodule(group.output.parameter.rpartition(".")[0])
                    handles.append(reader.register_forward_pre_hook(partial(read, where, mask)))
            yield
        finally:
            for handle in handles:
                handle.remove()

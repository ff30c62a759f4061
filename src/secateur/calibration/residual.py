"""How long the hidden states are that the parts of a block add to: the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.context import processes
from secateur.network.anatomy import Axis, Block
from secateur.network.trace import first_tensor


class Residual:
    """Sums of |stream|² over tokens, by the kind of units that add to it.

    Attention adds to what the block is given. The feed-forward layer adds to what the norm before it is given, where one is
    known, else to what the block is given too. Where an output passes a norm of its own, that is not looked at.

    Args:
        width: of the hidden states.
        skip: tokens at the beginning of a sequence that are not counted.
    """

    def __init__(self, width: int, skip: int) -> None:
        self._width, self._skip = width, skip
        self._sums: dict[Axis, list[float]] = {"heads": [0.0, 0.0], "neurons": [0.0, 0.0]}

    @contextmanager
    def watching(self, model: nn.Module, block: Block) -> Iterator[None]:
        """Counts what this block is given while it is open."""
        shape: list[torch.Size] = []
        inner = block.feed_forward.norm_module if block.feed_forward else None

        def given(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = first_tensor((args, kwargs), self._width)
            assert hidden is not None, "a block is given hidden states"
            shape[:] = [hidden.shape]
            self._add("heads", hidden)
            if inner is None:
                self._add("neurons", hidden)

        def normed(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = first_tensor((args, kwargs), self._width)
            if hidden is not None and hidden.numel() == shape[0].numel():  # some flatten sequences into one
                self._add("neurons", hidden.reshape(shape[0]))

        handles = [model.get_submodule(block.path).register_forward_pre_hook(given, with_kwargs=True)]
        if inner is not None:
            handles.append(model.get_submodule(inner).register_forward_pre_hook(normed, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean(self, axis: Axis) -> float:
        """Mean over tokens, those of all processes; every process must ask."""
        mine = self._sums["heads" if axis == "queries" else axis]  # both are attention's
        every: list[Any] = [mine]
        if processes()[1] > 1:
            every = [None] * processes()[1]
            dist.all_gather_object(every, mine)
        total, tokens = (sum(part) for part in zip(*every, strict=True))
        return total / max(tokens, 1.0)

    def _add(self, axis: Axis, hidden: Tensor) -> None:
        counted = hidden[:, self._skip :].double()
        self._sums[axis][0] += float(counted.square().sum())
        self._sums[axis][1] += counted.shape[0] * counted.shape[1]

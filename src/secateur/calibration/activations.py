"""How strongly neurons, heads and channels respond to calibration tokens, in one pass of the dense network."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.calibration.dense_pass import DensePass, add
from secateur.calibration.propagation import Batch
from secateur.network.anatomy import Block, Slice

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


class ActivationPass(DensePass):
    """Sees what units and norms of each block respond by."""

    name = "activations"

    def activations(self) -> Activations:
        return Activations(self.gathered(), len(self.samples.sequences))

    @contextmanager
    def watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> Iterator[None]:
        normed: list[Tensor] = []

        def note(response: Response, values: Tensor) -> None:
            for name, tensor in aggregated(values).items():
                add(seen, f"{response} {name}", tensor)

        def rows(tensor: Tensor) -> Tensor:
            return self.rows(tensor, batch)

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
        model, hidden = self.source.skeleton, self.source.anatomy.hidden
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


def _module(model: nn.Module, part: Slice) -> nn.Module:
    return model.get_submodule(part.parameter.rpartition(".")[0])

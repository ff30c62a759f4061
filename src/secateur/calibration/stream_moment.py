"""Which directions of the residual stream calibration tokens use, in one pass of the dense network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.dense_pass import DensePass, add
from secateur.calibration.propagation import Batch
from secateur.network.anatomy import Block
from secateur.network.trace import first_tensor


@dataclass(frozen=True)
class StreamMoment:
    """The second moment of what norms are given, each token divided by its root mean square.

    Args:
        matrix: (h, h) float64, the mean over tokens and norms.
    """

    matrix: Tensor

    def share(self, basis: Tensor) -> float:
        """The share of its energy that lies in (h, d) orthonormal directions."""
        moment, basis = self.matrix.double(), basis.double()
        return float((basis * (moment @ basis)).sum() / moment.trace())


def moment(x: Tensor) -> Tensor:
    """(h, h) the sum over tokens of x̂ x̂ᵀ, x̂ = x / √mean(x²); (tokens, h) in float64. A token without any state adds 0."""
    x = x.double()
    size = x.square().mean(dim=-1, keepdim=True).sqrt()
    x = torch.where(size > 0, x / size, torch.zeros_like(x))
    return x.T @ x


class StreamPass(DensePass):
    """Sees the stream in front of every norm over it, and behind the last block."""

    name = "stream"

    def moment(self) -> StreamMoment:
        sums = self.gathered()
        total = torch.stack([tensor for (_, name), tensor in sums.items() if name == "moment"]).sum(dim=0)
        tokens = sum(float(tensor) for (_, name), tensor in sums.items() if name == "tokens")
        return StreamMoment(total / tokens)

    @contextmanager
    def watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> Iterator[None]:
        model, hidden = self.source.skeleton, self.source.anatomy.hidden

        def note(states: Tensor) -> None:
            rows = self.rows(states, batch).reshape(-1, hidden)
            add(seen, "moment", moment(rows))
            add(seen, "tokens", torch.tensor(float(len(rows)), dtype=torch.float64))

        def before(_: nn.Module, given: Any) -> None:
            note(given[0])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            found = first_tensor(output, hidden)
            assert found is not None, "a block gives hidden states"
            note(found)

        norms = [name for name in block.norms if model.get_parameter(name).shape == (hidden,)]
        paths = dict.fromkeys(name.rpartition(".")[0] for name in norms)
        handles = [model.get_submodule(path).register_forward_pre_hook(before) for path in paths]
        if block is self.source.anatomy.blocks[-1]:
            handles.append(model.get_submodule(block.path).register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

"""What trials on copies of single modules share: numbers in the place of weights, and attention whose projections are given.

A copy has no weights of its own: its projections are replaced by prepared outputs, so that a trial shows what attention does
with queries, keys and values, and costs next to nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.network.recognise import AttentionProposal, Matrix
from secateur.network.trace import TOKENS, Call, clone, set_submodule

TOLERANCE = 1e-4  # of the largest output: far above float32 rounding, far below the effect of one unit in eight


def stand_in(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers between 0.5 and 1.5 for a vector, zeros without storage for anything larger, in float32."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.ndim < 2:
        return torch.rand(tensor.shape, generator=generator) + 0.5
    return torch.zeros(()).expand(tensor.shape)


def stand_in_buffer(tensor: Tensor) -> Tensor:
    """The buffer itself, or ones for one on meta: a mask that hides nothing, a scale of one."""
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().clone().cpu()


class Given(nn.Module):
    """Gives out prepared numbers instead of a matrix's product: (outputs,) or (tokens, outputs)."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(*x.shape[:-1], self.value.shape[-1]).clone()


class _Caught(nn.Module):
    """Keeps what a matrix is given and answers with zeros of the hidden size."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        return x.new_zeros(*x.shape[:-1], self.outputs)


class AttentionTrial:
    """A copy of an attention module that runs on prepared outputs of its projections.

    Args:
        host: the module, on any device, meta included.
        proposal: its projections.
        call: what it is called with, in numbers, for `TOKENS` tokens.

    values: (tokens, outputs) noise for each of the proposal's inputs, what is given where nothing else is said.
    """

    def __init__(self, host: nn.Module, proposal: AttentionProposal, call: Call, generator: torch.Generator) -> None:
        def local(matrix: Matrix) -> str:
            return matrix.module[len(proposal.host) + 1 :] if proposal.host else matrix.module

        self.twin = clone(host, lambda tensor: stand_in(tensor, generator), stand_in_buffer)
        self.values = [torch.randn(TOKENS, matrix.outputs, generator=generator) for matrix in proposal.inputs]
        self._call = call
        self._given = [Given(value) for value in self.values]
        for matrix, module in zip(proposal.inputs, self._given, strict=True):
            set_submodule(self.twin, local(matrix), module)
        self._caught = _Caught(proposal.output.outputs)
        set_submodule(self.twin, local(proposal.output), self._caught)

    def run(self, changed: Mapping[int, Tensor] | None = None) -> Tensor:
        """(tokens, columns) what the output matrix is given; `changed` are other outputs of inputs, by place."""
        args, kwargs = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, self._call)
        for place, module in enumerate(self._given):
            module.value = (changed or {}).get(place, self.values[place])
        self._caught.value = None
        with torch.no_grad():
            self.twin(*args, **kwargs)
        if self._caught.value is None:
            raise ValueError("its output matrix was not used")
        return self._caught.value.reshape(TOKENS, -1)

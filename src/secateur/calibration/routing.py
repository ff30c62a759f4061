"""What each expert of the dense network is given and gives on calibration tokens, in one pass, one block in memory."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from secateur.calibration.flow import FlowPass
from secateur.calibration.propagation import Batch
from secateur.errors import RequestError, RunError
from secateur.network.trace import first_tensor


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens X_j that a router sends to expert j of one block; g_j is what the network multiplies its output
    f_j by.

    Args:
        tokens: (experts,) how many they are.
        gates: (experts,) Σ g_j(x).
        norms: (experts,) Σ |f_j(x)|.
        gated_norms: (experts,) Σ g_j(x) |f_j(x)|.
    """

    tokens: Tensor
    gates: Tensor
    norms: Tensor
    gated_norms: Tensor


@dataclass(frozen=True)
class Routing:
    """What became of calibration tokens in every mixture of experts, by block."""

    blocks: Mapping[int, ExpertSums]


def routed_sums(chosen: Tensor, gates: Tensor, norms: Tensor, experts: int) -> list[float]:
    """The sums behind `ExpertSums`, one after the other, from (tokens, k) experts that each token goes to, their gates and
    the norms of what they give.
    """
    index = chosen.flatten()
    rows = [torch.ones_like(norms), gates, norms, gates * norms]
    sums = [torch.zeros(experts, dtype=torch.float64).index_add_(0, index, each.double().flatten()) for each in rows]
    return [float(value) for each in sums for value in each]


class RoutingPass(FlowPass):
    """One pass of calibration tokens through the dense network that notes what experts are given and give.

    Raises RequestError naming a block whose routing could not be seen.
    """

    def routing(self) -> Routing:
        """What all processes have seen together. Raises RunError naming a block whose experts' outputs are not finite."""
        found = {}
        for block in self._source.anatomy.blocks:
            if block.experts is not None:
                seen = self._gathered(block.index)
                sums = torch.tensor([math.fsum(part) for part in zip(*seen, strict=True)], dtype=torch.float64)
                if not bool(torch.isfinite(sums).all()):
                    raise RunError(
                        f"the experts of {block.path} give non-finite outputs on the calibration tokens; check it."
                    )
                found[block.index] = ExpertSums(*sums.view(4, block.experts.count))
        return Routing(found)

    def _watch(self, index: int, batch: Batch, seen: dict[int, list[float]]) -> AbstractContextManager[None]:
        block = self._source.anatomy.blocks[index]
        if block.experts is None:
            return nullcontext()
        bank = self._source.skeleton.get_submodule(block.experts.module)
        return _asked(bank, block.path, block.experts.count, self._tokens.width, batch, seen)


@contextmanager
def _asked(
    bank: nn.Module, path: str, experts: int, width: int, batch: Batch, seen: dict[int, list[float]]
) -> Iterator[None]:
    """While it is open, a bank of experts is asked for each choice alone whenever it runs."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        chosen = next((leaf for leaf in leaves if not leaf.is_floating_point() and leaf.ndim == 2), None)
        gates = next(
            (t for t in leaves if chosen is not None and t.is_floating_point() and t.shape == chosen.shape), None
        )
        if chosen is None or gates is None:
            raise RequestError(
                f"how tokens are sent to the experts of {path} could not be seen, so nothing is known of them; choose "
                "experts by a method that needs no text."
            )
        norms = []
        for choice in range(chosen.shape[1]):
            # one choice at a time and with gates of 1 the bank gives each token what its expert says, and nothing else
            put = {id(chosen): chosen[:, choice : choice + 1], id(gates): torch.ones_like(gates[:, :1])}
            given = tree_map(lambda leaf, put=put: put.get(id(leaf), leaf), (args, kwargs))
            said = first_tensor(bank.forward(*given[0], **given[1]), width)
            assert said is not None, "experts give hidden states"
            norms.append(said.reshape(-1, width).double().norm(dim=-1))
        if len(norms[0]) != len(chosen):
            raise RunError(f"the experts of {path} were given {len(chosen)} tokens and gave {len(norms[0])}.")
        new = routed_sums(chosen.cpu(), gates.cpu(), torch.stack(norms, dim=1).cpu(), experts)
        seen[batch.index] = new

    handle = bank.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

"""How large each dimension of queries, keys and attention outputs is on calibration tokens of the dense network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.dense_pass import DensePass, add
from secateur.calibration.propagation import Batch
from secateur.calibration.statistics import Statistics, Sums
from secateur.network.anatomy import Block, Slice


class HeadSums(DensePass):
    """Sums over tokens, of each dimension and of its square, behind the norms of heads where there are some."""

    name = "head-sums"

    @contextmanager
    def watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> Iterator[None]:
        dims = block.attention.dims if block.attention else None
        model, handles = self.source.skeleton, []

        def note(name: str, values: Tensor) -> None:
            found = self.rows(values, batch).double()
            add(seen, f"{name} sum", found.sum(dim=(0, 1)))
            add(seen, f"{name} squares", found.square().sum(dim=(0, 1)))
            add(seen, f"{name} tokens", torch.tensor(float(found.shape[0] * found.shape[1]), dtype=torch.float64))

        def made(name: str, part: Slice, heads: int, norm: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _given: Any, output: Tensor) -> None:
                assert dims is not None
                values = output.narrow(-1, part.offset, heads * dims.head_dim)
                if norm:
                    split = values.unflatten(-1, (heads, dims.head_dim))
                    values = model.get_submodule(norm).forward(split).flatten(-2)
                note(name, values)

            return hook

        if dims is not None:
            for name, part, heads, norm in (
                ("queries", dims.queries[0], dims.heads, dims.query_norm),
                ("keys", dims.keys[0], dims.kv_heads, dims.key_norm),
            ):
                module = model.get_submodule(part.parameter.rpartition(".")[0])
                handles.append(module.register_forward_hook(made(name, part, heads, norm)))
            reader = model.get_submodule(dims.output.parameter.rpartition(".")[0])
            handles.append(reader.register_forward_pre_hook(lambda _, given: note("outputs", given[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def statistics_of(sums: dict[tuple[int, str], Tensor], block: int, name: str, wanted: set[type]) -> Statistics:
    """What was seen of `queries`, `keys` or `outputs` of a block, in the form in which methods ask for inputs."""
    parts = {part for kind in wanted for part in kind.wants}  # type: ignore[attr-defined]
    found = Sums(parts, len(sums[block, f"{name} sum"]))
    found.tokens = int(sums[block, f"{name} tokens"])
    for part in found.parts:
        found.parts[part] = sums[block, f"{name} {part}"]
    return Statistics(found)

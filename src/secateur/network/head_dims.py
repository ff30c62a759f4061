"""Dimensions inside attention heads: which may go, what configuration says that, and how stored tensors lose them.

Queries and keys lose the same dimensions in every head of every block, in the twos that positions turn together, because a
model has one set of frequencies. Values, and what the output matrix reads of them, lose as many in each head, chosen freely.

Two things of such a model are not what its smaller heads would say. The frequencies that stay are other ones than a head of
that size has by itself: they are stated as factors of `rope_type: longrope`, the same for short and long texts. And scores
are divided by the root of the head's size: queries are multiplied by what that changes. Norms over the dimensions of a head
are norms over those that stay, as channels have it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError
from secateur.network.anatomy import HeadDims, Slice
from secateur.network.channels import Channels, norms_over
from secateur.network.head_config import narrow_config
from secateur.network.head_trial import query_factor, scaled_norm
from secateur.network.modelling_file import is_heterogeneous
from secateur.network.source import Source
from secateur.network.store import raw_config
from secateur.network.views import Cut


def find_head_dims(source: Source) -> dict[int, HeadDims]:
    """The dimensions of the heads of each block that has attention. Raises RequestError where they cannot be told apart."""
    found: dict[int, HeadDims] = {}
    for block in source.anatomy.blocks:
        if block.attention is None:
            continue
        if block.attention.dims is None:
            raise RequestError(
                f"dimensions inside heads are cut only where queries, keys and values lie apart and it is clear which "
                f"dimensions positions turn together, which it is not in {block.path} of {source.spec}; choose other axes."
            )
        found[block.index] = block.attention.dims
    if not found:
        raise RequestError(f"no block of {source.spec} has attention that was recognised; choose other axes.")
    turned = {(dims.head_dim, dims.layout, dims.turned) for dims in found.values() if dims.turned}
    if len(turned) > 1 or len({dims.head_dim for dims in found.values()}) > 1:
        raise RequestError(
            f"heads of {source.spec} differ between blocks in their size or in which dimensions positions turn together, so "
            "they cannot all lose the same ones; choose other axes."
        )
    if is_heterogeneous(raw_config(source)):
        raise RequestError(
            f"blocks of {source.spec} differ from each other, and dimensions inside heads are cut only where blocks are "
            "alike; put the step that cuts them first."
        )
    return found


def spread(count: int, kept: int) -> Tensor:
    """(kept,) of `count` pairs, evenly spread: what stands for a choice that is not made yet."""
    return torch.arange(kept) * count // kept


@dataclass
class NarrowHeads:
    """A network whose heads have lost dimensions.

    Args:
        source: the whole one.
        pairs: (k,) sorted, which of a head's pairs of dimensions stay in queries and keys; the same everywhere.

    Raises RequestError where that cannot be, as soon as something is asked.
    """

    source: Source
    pairs: Tensor

    @cached_property
    def where(self) -> dict[int, HeadDims]:
        """By block."""
        return find_head_dims(self.source)

    @cached_property
    def whole(self) -> HeadDims:
        """What the heads of all blocks have in common; where some blocks turn nothing, what the others turn."""
        return max(self.where.values(), key=lambda dims: dims.turned)

    @cached_property
    def dims(self) -> Tensor:
        """(2 k,) sorted, the dimensions of a head that stay in queries and keys."""
        return torch.tensor(sorted(dim for pair in self.pairs.tolist() for dim in self.whole.pairs[pair]))

    def config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration, which may have other widths than the source by now, that says these dimensions.

        Raises RequestError where the architecture cannot be built so, or cannot say these frequencies.
        """
        if dict(raw) == raw_config(self.source):
            return deepcopy(self._own)
        return narrow_config(self.source, raw, list(self.where.values()), self.whole, self.pairs)

    @cached_property
    def _own(self) -> dict[str, Any]:
        """The source's configuration, with these heads and nothing else changed."""
        return narrow_config(self.source, raw_config(self.source), list(self.where.values()), self.whole, self.pairs)

    @cached_property
    def factor(self) -> float:
        """What queries are multiplied by. Raises RequestError where the smaller heads do not compute what they should."""
        return query_factor(self.source, self._own, self.where, self.dims)

    def norms(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it is open, norms over the dimensions of a head in a whole network are norms over those that stay."""
        paths = tuple(path for dims in self.where.values() for path in dims.norms)
        return norms_over(model, Channels(self.whole.head_dim, (), {}, {}, paths), self.dims)

    def cut(
        self, block: int, tensors: Mapping[str, Tensor], cut: Cut, dtype: Callable[[Tensor], torch.dtype]
    ) -> dict[str, Tensor]:
        """The parameters of a block that change, by name, in the dtype that `dtype` says from the old ones."""
        dims, values = self.where[block], _values(cut)
        stays: dict[str, tuple[int, Tensor]] = {}

        def lose(part: Slice, heads: int, kept: Callable[[int], Tensor]) -> None:
            mask = stays.setdefault(
                part.parameter, (part.dim, torch.ones(tensors[part.parameter].shape[part.dim], dtype=torch.bool))
            )[1]
            for head in range(heads):
                gone = torch.ones(dims.head_dim, dtype=torch.bool).index_fill(0, kept(head), False)
                mask[part.offset + head * dims.head_dim :][: dims.head_dim] &= ~gone

        for part in dims.queries:
            lose(part, dims.heads, lambda _: self.dims)
        for part in dims.keys:
            lose(part, dims.kv_heads, lambda _: self.dims)
        for part in dims.values:
            lose(part, dims.kv_heads, lambda head: values[head])
        lose(dims.output, dims.heads, lambda head: values[head // (dims.heads // dims.kv_heads)])
        for name in dims.scales:
            lose(Slice(name, 0, 0, dims.head_dim), 1, lambda _: self.dims)
        scaled = self._scaled(dims, tensors)
        found = {
            name: scaled.get(name, tensors[name]).index_select(dim, mask.nonzero().flatten().to(tensors[name].device))
            for name, (dim, mask) in stays.items()
        }
        if cut.output_bias is not None and dims.output_bias:
            found[dims.output_bias] = cut.output_bias
        return {name: tensor.to(dtype(tensors[name])).contiguous() for name, tensor in found.items()}

    def silence(
        self, block: int, tensors: Mapping[str, Tensor], cut: Cut, dtype: Callable[[Tensor], torch.dtype]
    ) -> dict[str, Tensor]:
        """Those of `tensors`, parameters of a block, that differ in a whole network with these dimensions silent.

        What queries are multiplied by is divided out again, in float32, of what `dtype` would round it to. Norms must be
        over what stays (`norms`), which no parameter says.
        """
        dims, values, silenced = self.where[block], _values(cut), dict[str, Tensor]()
        size, together = dims.head_dim, dims.heads // dims.kv_heads
        for name, scaled in self._scaled(dims, tensors).items():
            rounded = scaled.to(dtype(tensors[name])).float()
            silenced[name] = self._unscaled(dims, name, rounded)
        for part, heads in [
            *((part, dims.heads) for part in dims.queries),
            *((part, dims.kv_heads) for part in dims.keys),
        ]:
            if part.parameter in tensors:
                tensor = silenced.get(part.parameter, tensors[part.parameter]).clone()
                inside = tensor.narrow(part.dim, part.offset, heads * size).unflatten(part.dim, (heads, size))
                silent = torch.zeros_like(inside)
                silent.index_copy_(part.dim + 1, self.dims, inside.index_select(part.dim + 1, self.dims))
                inside.copy_(silent)
                silenced[part.parameter] = tensor
        name = dims.output.parameter
        if name in tensors:
            whole = torch.zeros_like(tensors[name])
            for head in range(dims.heads):
                columns = dims.output.offset + head * size + values[head // together]
                whole.index_copy_(dims.output.dim, columns, tensors[name].index_select(dims.output.dim, columns))
            silenced[name] = whole
        if cut.output_bias is not None and dims.output_bias in tensors:
            silenced[dims.output_bias or ""] = cut.output_bias.to(dtype(tensors[dims.output_bias or ""]))
        return silenced

    def apply(self, model: nn.Module, narrow: nn.Module) -> None:
        """Numbers of a live model that follow from the size of heads and lie in no parameter: frequencies, in place.

        narrow: the skeleton of what the live model becomes.
        """
        new = dict(narrow.named_buffers())
        for name, old in list(model.named_buffers()):
            if name in new and new[name].shape != old.shape:
                path, _, attribute = name.rpartition(".")
                # rounded where the live one was
                model.get_submodule(path)._buffers[attribute] = new[name].to(old)
        for path, module in narrow.named_modules():
            old_module = model.get_submodule(path)
            for name in [name for name, value in vars(old_module).items() if isinstance(value, Tensor)]:
                if name not in vars(module):  # what a rotation has kept of its frequencies, and makes again
                    delattr(old_module, name)
        for dims in self.where.values():
            for path in dims.norms:
                if isinstance(module := model.get_submodule(path), nn.LayerNorm):
                    module.normalized_shape = (len(self.dims),)

    def scaled_names(self, block: int) -> set[str]:
        """Parameters that hold what queries are multiplied by."""
        dims = self.where[block]
        if self.factor == 1:
            return set()
        return set(self._norm(dims)) if dims.query_norm else {part.parameter for part in dims.queries}

    def _norm(self, dims: HeadDims) -> tuple[str, ...]:
        return tuple(name for name in dims.scales if name.rpartition(".")[0] == dims.query_norm)

    def _scaled(self, dims: HeadDims, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters among `tensors` that make queries, multiplied, in float32: of a norm where queries go through one."""
        return self._times(dims, {name: tensor.float() for name, tensor in tensors.items()}, self.factor)

    def _unscaled(self, dims: HeadDims, name: str, tensor: Tensor) -> Tensor:
        return self._times(dims, {name: tensor}, 1 / self.factor)[name]

    def _times(self, dims: HeadDims, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if factor == 1:
            return found
        if dims.query_norm:
            own = {name.rpartition(".")[2]: tensors[name] for name in self._norm(dims) if name in tensors}
            scaled = scaled_norm(self.source.skeleton.get_submodule(dims.query_norm), own, factor)
            return {f"{dims.query_norm}.{name}": tensor for name, tensor in scaled.items()}
        for part in dims.queries:
            if part.parameter in tensors:
                tensor = found.get(part.parameter, tensors[part.parameter]).clone()
                tensor.narrow(part.dim, part.offset, dims.heads * dims.head_dim).mul_(factor)
                found[part.parameter] = tensor
        return found


def check_head_dims(source: Source, raw: Mapping[str, Any], kept: int, own: bool) -> dict[str, Any]:
    """A configuration for heads that keep so many pairs, whichever they are. Raises RequestError where there is none.

    own: this network's heads themselves are to lose them, so it is also tried whether they then compute what they should.
    """
    heads = NarrowHeads(source, torch.arange(0))
    heads.pairs = spread(heads.whole.head_dim // 2, kept)
    changed = heads.config(raw)
    if own:
        _ = heads.factor
    return changed


def _values(cut: Cut) -> Tensor:
    assert cut.values is not None, "a cut of dimensions says which values stay"
    return cut.values

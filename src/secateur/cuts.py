"""The cuts of one step, kept in files: saved as they are decided, read by whatever writes, checks or tells of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cut_checks import check_cut, check_expert, check_stream
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import AXES, Axis, Block, Group
from secateur.network.bases import Bases
from secateur.network.channels import (
    Channels,
    channels_config,
    embedding_factor,
    find_channels,
    silence_channels,
    stored_channels,
    turned_channels,
)
from secateur.network.checkpoint import stored_buffers
from secateur.network.head_dims import NarrowHeads
from secateur.network.modelling_file import places_of
from secateur.network.routing import unchosen
from secateur.network.source import Source
from secateur.network.store import resized_config, stored_dtype
from secateur.network.stream import Fetch
from secateur.network.surgery import cut_tensors, remade, silence_tensors
from secateur.network.views import Cut, Plan
from secateur.turning import Turning


class Cuts:
    """What becomes of the units of a network, by block and axis, and of the channels of its stream, which all blocks share.

    Args:
        folder: for the files.
        method: named where it gave what cannot be done.
        dtype: of the written weights, None to keep the source's.
    """

    def __init__(self, source: Source, folder: Path, method: str, dtype: torch.dtype | None = None) -> None:
        self._source, self._folder, self._method, self._dtype = source, folder, method, dtype
        self._heads: NarrowHeads | None = None

    def save(self, block: int, axis: Axis, cut: Cut) -> None:
        """Keeps a cut; one that cannot be done is refused before."""
        self.check(block, axis, cut)
        tensors = {"kept": cut.kept, "output": cut.output, "output_bias": cut.output_bias, "values": cut.values}
        tensors |= {f"maker {place}": made for place, made in enumerate(cut.makers or ())}
        write_tensors(
            self._path(block, axis), {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}
        )

    def read(self, block: int, axis: Axis) -> Cut:
        tensors, _ = read_tensors(self._path(block, axis))
        makers = tuple(tensors[f"maker {place}"] for place in range(sum(name.startswith("maker") for name in tensors)))
        return Cut(
            tensors["kept"], tensors.get("output"), tensors.get("output_bias"), makers or None, tensors.get("values")
        )

    def save_stream(self, plan: Plan) -> None:
        """Keeps what becomes of the stream. Raises RunError when a method returned what cannot be."""
        check_stream(self._source, self._method, plan)
        if plan.channels is not None:
            write_tensors(self._stream_path, {"kept": plan.channels.cpu()})
        elif plan.basis is not None:
            self.bases_of(1).keep(0, plan.basis, self._method)

    def bases_of(self, places: int | None = None) -> Bases:
        """Where a method leaves the directions that stay: one basis for each place of the stream, or for so many."""
        every = places_of(self._source.anatomy)
        return Bases(self._folder / "bases", self._source.anatomy.hidden, places or every)

    @cached_property
    def channels(self) -> Tensor | None:
        """(k,) the channels that stay, None where all do. Asked for when all is decided."""
        return read_tensors(self._stream_path)[0]["kept"] if self._stream_path.exists() else None

    @cached_property
    def turning(self) -> Turning | None:
        """The stream in other bases, None where it stays as it is. Asked for when all is decided."""
        found = next((bases for bases in (self.bases_of(), self.bases_of(1)) if bases.complete), None)
        if found is None:
            return None
        where = turned_channels(self._source) if found.differ else self.where
        return Turning(self._source, found, where, self._method, self._dtype, self._resized)

    @property
    def width(self) -> int | None:
        """How many channels the result has, None where they stay as they are."""
        if self.channels is not None:
            return len(self.channels)
        return None if self.turning is None else self.turning.bases.kept

    @cached_property
    def where(self) -> Channels:
        """Where the channels lie. Raises RequestError where they cannot be cut."""
        return find_channels(self._source)

    def config(self, plain: bool = False) -> dict[str, Any]:
        """The source's configuration for what stays. Raises RequestError where it cannot say that.

        plain: only a configuration that needs no code.
        """
        if self.turning is not None:
            return self.turning.config(plain)
        raw = self._resized(plain)
        return raw if self.channels is None else channels_config(self._source, self.where, raw, len(self.channels))

    def _resized(self, plain: bool = False) -> dict[str, Any]:
        """The same, with all channels."""
        raw = resized_config(self._source, {a: units for a, units in self.sizes().items() if a != "head_dims"}, plain)
        return raw if self.heads is None else self.heads.config(raw)

    @property
    def heads(self) -> NarrowHeads | None:
        """The dimensions that heads lose, None where they keep all. Asked for when that is decided."""
        if (
            self._heads is None
            and (found := next((b for b, axis in self.known() if axis == "head_dims"), None)) is not None
        ):
            self._heads = NarrowHeads(self._source, self.read(found, "head_dims").kept)
        return self._heads

    def known(self) -> list[tuple[int, Axis]]:
        """What is cut, by block and in the order in which tokens meet the units."""
        return [
            (block.index, axis)
            for block in self._source.anatomy.blocks
            for axis in AXES
            if self._path(block.index, axis).exists()
        ]

    def group(self, block: int, axis: Axis) -> Group:
        group = self._source.anatomy.blocks[block].group(axis)
        assert group is not None, "a cut is only planned where there are such units"
        return group

    def sizes(self) -> dict[Axis, dict[int, int]]:
        """How many units of each kind stay, by block."""
        sizes: dict[Axis, dict[int, int]] = {}
        for block, axis in self.known():
            sizes.setdefault(axis, {})[block] = self.read(block, axis).count
        return sizes

    def decided(self) -> dict[str, Any]:
        """For the receipt: how many units stay, of how many."""
        return {
            axis: {str(block): self._told(block, axis, kept) for block, kept in widths.items()}
            for axis, widths in self.sizes().items()
        }

    def _told(self, block: int, axis: Axis, kept: int) -> dict[str, Any]:
        group = self.group(block, axis)
        # of neurons inside experts these are numbers of each expert
        return {"kept": kept, "of": group.count} | ({"experts": group.stacked} if group.stacked else {})

    def kept(self) -> dict[str, Tensor]:
        """The units that stay, for the file beside the model."""
        units: dict[str, Tensor] = {}
        for block, axis in self.known():
            cut = self.read(block, axis)
            units[f"block {block}, {axis}"] = cut.kept
            if cut.values is not None:
                units[f"block {block}, {axis}, values"] = cut.values
        if self.turning is not None and not self.turning.bases.differ:  # many would be as large as the model
            units["basis"] = self.turning.bases.at(0).float()
        return units if self.channels is None else {**units, "channels": self.channels}

    def apply(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        """Cuts stored tensors in place of the whole ones; `blocks` are those that all lie in `tensors`."""
        for block in blocks:
            axes = [axis for index, axis in self.known() if index == block.index]
            parameters = self._source.assemble(block.parameters, tensors) if axes else {}
            for axis in axes:
                if axis == "head_dims":
                    assert self.heads is not None, "what is known is read"
                    cut = self.heads.cut(block.index, parameters, self.read(block.index, axis), self._written)
                else:
                    cut = cut_tensors(
                        parameters, self.group(block.index, axis), self.read(block.index, axis), self._written
                    )
                parameters = {**parameters, **cut}
                for parameter, tensor in cut.items():
                    apart = self._source.take_apart(parameter, tensor, tensors)
                    for key in self._source.stored_keys(parameter):
                        if key not in apart:  # experts stored apart, of which fewer are left
                            del tensors[key]
                    tensors.update(apart)
        self._cut_buffers(tensors)
        if self.channels is not None:
            for key, dims in self._stored_channels.items():
                for dim in dims if key in tensors else ():
                    tensors[key] = tensors[key].index_select(dim, self.channels)
        elif self.turning is not None:
            self.turning.apply(blocks, tensors)

    def _cut_buffers(self, tensors: dict[str, Tensor]) -> None:
        """Learned vectors that are no parameters, which lie in the piece of their block."""
        found = {
            name: self.read(block, axis).kept
            for block, axis in self.known()
            for name in self.group(block, axis).buffers
        }
        stored = stored_buffers(self._source.skeleton, self._source.tensors) if found else {}
        for name, kept in found.items():
            if (key := stored.get(name)) in tensors:
                assert key is not None
                tensors[key] = tensors[key].index_select(0, kept)

    @cached_property
    def _embedding_factor(self) -> float:
        return embedding_factor(self._source, self.where, self.config(plain=True))

    def silenced(self) -> Fetch:
        """The source's parameters with what was cut silenced instead: the reload check runs the uncut network with them.

        Nothing of what cut and wrote the result is used again, so a mistake there shows.
        """
        inside = {name: block for block in self._source.anatomy.blocks for name in block.parameters}
        if self.turning is not None:
            return self.turning.lifted()
        # found now: it runs the skeleton, which runs already when parameters are fetched
        embeddings = {} if self.channels is None else self._embeddings()

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            tensors = self._source.read_parameters(names)
            asked = {inside[name].index for name in names if name in inside}
            for block, axis in self.known():
                if block in asked and axis == "experts":
                    tensors = {**tensors, **self._never_best(block, tensors)}
                elif block in asked and axis == "head_dims":
                    assert self.heads is not None, "what is known is read"
                    own = {
                        name: tensors[name] for name in self._source.anatomy.blocks[block].parameters if name in tensors
                    }
                    tensors = {**tensors, **self.heads.silence(block, own, self.read(block, axis), self._written)}
                elif block in asked:
                    group, cut = self.group(block, axis), self.read(block, axis)
                    names_of = [
                        name
                        for name in (group.output.parameter, group.output_bias, *remade(group, cut))
                        if name in tensors
                    ]
                    # in the dtype that is written, so that what was refitted is rounded here as it was there
                    changed = {name: tensors[name].to(self._written(tensors[name])) for name in names_of if name}
                    tensors = {**tensors, **silence_tensors(changed, group, cut)}
            if self.channels is not None:
                tensors = silence_channels(tensors, self.where, self.channels, embeddings)
            return tensors

        return fetch

    @contextmanager
    def reference(self, model: nn.Module | None = None) -> Iterator[None]:
        """While it is open, the uncut network (or a live `model` of its kind) does what no silenced parameter says."""
        with ExitStack() as stack:
            stack.enter_context(self._unchosen(model))
            if self.heads is not None:
                stack.enter_context(self.heads.norms(self._source.skeleton if model is None else model))
            yield

    @cached_property
    def rounded(self) -> set[str]:
        """Parameters that `silenced` gives as they come from what is written, and which must not be rounded again."""
        if self.heads is None:
            return set()
        return {name for block, axis in self.known() if axis == "head_dims" for name in self.heads.scaled_names(block)}

    def _unchosen(self, model: nn.Module | None) -> AbstractContextManager[None]:
        """While it is open, no token goes to experts that are cut."""
        removed = {
            block: (self.group(block, axis), self._gone(block)) for block, axis in self.known() if axis == "experts"
        }
        return unchosen(self._source.skeleton if model is None else model, removed)

    def _gone(self, block: int) -> Tensor:
        everyone = torch.ones(self.group(block, "experts").count, dtype=torch.bool)
        return everyone.index_fill(0, self.read(block, "experts").kept, False).nonzero().flatten()

    def _never_best(self, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors beside the router, such as biases, by which removed experts are never chosen."""
        group, found = self.group(block, "experts"), {}
        for part in group.inputs:
            if part.parameter in tensors and tensors[part.parameter].ndim == 1:
                old = tensors[part.parameter]
                found[part.parameter] = old.index_fill(0, self._gone(block), -torch.inf)
        return found

    @cached_property
    def _stored_channels(self) -> dict[str, tuple[int, ...]]:
        return stored_channels(self._source, self.where)

    def _embeddings(self) -> dict[str, float]:
        """What the network with fewer channels multiplies embeddings by, where that is not what the source does."""
        factor = self._embedding_factor
        return {} if abs(factor - 1) < 1e-6 else dict.fromkeys(self._source.anatomy.embeddings, factor)

    def check(self, block: int, axis: Axis, cut: Cut) -> None:
        """Raises RunError naming the block when a method returned what cannot be done."""
        check_cut(self._source, self._method, block, axis, cut)

    def check_expert(self, block: int, axis: Axis, expert: int, cut: Cut) -> None:
        """The same for the neurons of one expert."""
        check_expert(self._source, self._method, block, axis, expert, cut)

    def _written(self, tensor: Tensor) -> torch.dtype:
        # refitted weights are rounded once, to what is written
        return stored_dtype(self._source, self._dtype, tensor.dtype)

    @property
    def _stream_path(self) -> Path:
        return self._folder / "stream.safetensors"

    def _path(self, block: int, axis: Axis) -> Path:
        return self._folder / axis / f"{block}.safetensors"

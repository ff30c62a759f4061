"""A network whose residual stream is turned to other bases: what is written of it, and what computes the same uncut."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RunError
from secateur.network.anatomy import Block
from secateur.network.bases import Bases, Change, passing
from secateur.network.channels import Channels, channels_config, embedding_factor
from secateur.network.examine import anatomy
from secateur.network.heterogeneous import BlockShape, heterogeneous_config
from secateur.network.modelling_file import shortcut_names
from secateur.network.norms import without_mean
from secateur.network.rotation import (
    Roles,
    centred,
    lifted,
    projected,
    roles_of,
    rotated,
    stream_entry,
    stretched,
    untied_config,
)
from secateur.network.source import Source
from secateur.network.store import build_own, stored_dtype
from secateur.network.stream import Fetch, streamed_logits
from secateur.network.verify import TOLERANCE, prompt, stored


class Turning:
    """The stream of a network in the bases that a method has kept.

    Args:
        where: the channels of the uncut network.
        method: named where it gave what cannot be done.
        dtype: of the written weights, None to keep the source's.
        raw: the configuration of the result but for its stream.
    """

    def __init__(
        self,
        source: Source,
        bases: Bases,
        where: Channels,
        method: str,
        dtype: torch.dtype | None,
        raw: Callable[[], dict[str, Any]],
    ) -> None:
        self._source, self.bases, self._where = source, bases, where
        self._method, self._dtype, self._raw = method, dtype, raw

    @cached_property
    def _plain(self) -> dict[str, Any]:
        raw = self._raw()
        if self._roles.untied:
            raw = untied_config(self._source, raw)
        return channels_config(self._source, self._where, raw, self.bases.kept)

    @cached_property
    def _with_code(self) -> dict[str, Any]:
        turned = {block.index: BlockShape(shortcuts=True) for block in self._source.anatomy.blocks}
        stream = stream_entry(self._roles, self._where, self.bases.kept)
        return heterogeneous_config(self._source, self._plain, turned, stream)

    def config(self, plain: bool = False) -> dict[str, Any]:
        """The configuration of the result. Raises RequestError where it cannot say that.

        plain: only a configuration that needs no code.
        """
        return deepcopy(self._with_code if self.bases.differ and not plain else self._plain)

    @cached_property
    def _roles(self) -> Roles:
        return roles_of(self._source, self.bases.differ)

    @cached_property
    def _embedding_factor(self) -> float:
        return embedding_factor(self._source, self._where, self._plain)

    def apply(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        """Turns the stored tensors of a piece, in place of the whole ones; an untied head becomes a tensor of its own."""
        roles, parts, old = self._roles, self._source.parts, dict(tensors)
        names = [name for name in roles.dims if parts[name][0].key in old]
        names += [roles.biases[name] for name in names if name in roles.biases]
        for block in blocks:
            for name, tensor in self._turns([block]).items():
                tensors[self._named(name, block.parameters[0], block.path)] = tensor

        def read(name: str) -> Tensor:
            return self._source.assemble([name], old)[name]

        for name, tensor in self._turned(names, read).items():
            if name == roles.untied:
                tensors[name] = tensor
            elif name in roles.behind and name not in roles.own:
                reader = roles.behind[name]
                tensors[name if reader == roles.untied else self._named(name, reader, reader.rpartition(".")[0])] = (
                    tensor
                )
            else:
                tensors.update(self._source.take_apart(name, tensor, old))
        for name in roles.norm_biases.intersection(names):
            del tensors[parts[name][0].key]

    def _named(self, name: str, beside: str, path: str) -> str:
        """How a new parameter below `path` is stored: like what stands beside it there, because checkpoints may leave out
        what all names in the model begin with.
        """
        key, inside = self._source.parts[beside][0].key, beside.removeprefix(path)
        return key.removesuffix(inside) + name.removeprefix(path) if key.endswith(inside) else name

    def check(self) -> None:
        """The rotated network, in float32 and not yet rounded, computes what the whole one does when its stream holds
        nothing but what lies in the basis. Raises RunError where it does not.

        The reload check cannot tell that: rounded weights in one basis are not rounded ones in another.
        """
        narrow, bases = build_own(self._source, self.config()), self.bases
        network, ids = self._source.anatomy, torch.tensor([prompt(self._source.anatomy.vocabulary)])
        roles, whole = self._roles, stored(self._source)
        _ = self._embedding_factor  # found now: it runs the skeleton

        def centre(names: Sequence[str]) -> Mapping[str, Tensor]:
            return centred(roles, whole(names))

        def project(names: Sequence[str]) -> Mapping[str, Tensor]:
            return projected(roles, bases, whole(names))

        def turn(names: Sequence[str]) -> Mapping[str, Tensor]:
            beside = self._turns(network.blocks, names, torch.float32)
            turned = self._turned(names, lambda name: whole([name])[name], torch.float32) | beside
            return {**whole([name for name in names if name not in turned])} | turned

        def within(place: int, x: Tensor) -> Tensor:
            basis = bases.at(place + 1).to(x)
            return (x @ basis) @ basis.T

        if roles.subtracts:  # before anything goes, a network whose norms do not subtract the mean is the same
            wanted = streamed_logits(self._source.skeleton, network, whole, ids)
            with without_mean(self._source.skeleton, roles.norms):
                self._compare(streamed_logits(self._source.skeleton, network, centre, ids), wanted, "centred")
        with self._passed(within), stretched(self._source.skeleton, roles, bases):
            wanted = streamed_logits(self._source.skeleton, network, project, ids)
        self._compare(streamed_logits(narrow, anatomy(narrow), turn, ids), wanted, "rotated")

    def _compare(self, found: Tensor, wanted: Tensor, what: str) -> None:
        difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise RunError(
                f"{self._method}: the {what} network of {self._source.spec} computes something else (its logits differ by "
                f"{difference:.2g}), so nothing was written; choose a method that cuts channels as they are."
            )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """While it is open, the uncut network, given what is `lifted`, does what the rotated one does.

        Its stream is turned beside each part as by what is written, and its norms divide as if it had no other directions.
        """
        bases = self.bases

        def past(place: int, x: Tensor) -> Tensor:
            number, part = divmod(place, (bases.places - 1) // len(self._source.anatomy.blocks))
            block = self._source.anatomy.blocks[number]
            weight = self._turns([block])[[*shortcut_names(block).values()][part]]
            z = x @ bases.at(place).to(x)
            return (z + z @ weight.to(x).T) @ bases.at(place + 1).to(x).T

        # first what reads the stream as it is
        with self._passed(past), stretched(self._source.skeleton, self._roles, bases), self._biased():
            yield

    @contextmanager
    def _biased(self) -> Iterator[None]:
        """While it is open, matrices that have no bias in the source's architecture add the one that is written."""

        def add(_module: nn.Module, _args: Any, output: Tensor, name: str) -> Tensor:
            return output + self._turned([name], self._source.parameter)[name].to(output)

        names = [name for name in self._roles.behind if name not in self._roles.own]
        modules = [self._source.skeleton.get_submodule(name.rpartition(".")[0]) for name in names]
        handles = [
            module.register_forward_hook(partial(add, name=name)) for module, name in zip(modules, names, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def lifted(self) -> Fetch:
        """What is written, turned back into the source's architecture."""
        bases, factor = self.bases, self._embedding_factor

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            tensors = self._source.read_parameters(names)
            tensors = {name: tensor.to(self._written(tensor)) for name, tensor in tensors.items()}
            tensors |= self._turned(names, self._source.parameter)
            return {name: tensor.float() for name, tensor in lifted(self._roles, bases, tensors, names, factor).items()}

        return fetch

    def _turned(
        self, names: Sequence[str], read: Callable[[str], Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Rotated parameters in the dtype that is written, or another; Raises RunError naming one that does not fit."""
        found = rotated(self._roles, self.bases, names, read, self._embedding_factor)
        for name, tensor in found.items():
            found[name] = tensor.to(dtype or self._written(read(self._roles.behind.get(name, name))))
            if not bool(torch.isfinite(found[name]).all()):
                raise RunError(f"{name} holds values too large once it is rotated; write another with --dtype float32.")
        return found

    def _turns(
        self, blocks: Sequence[Block], names: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The matrices beside the parts of these blocks, by name in the model, those of `names` by default all; in the dtype
        that is written, or another.
        """
        found: dict[str, Tensor] = {}
        for block in blocks if self.bases.differ else ():
            shortcuts = [*shortcut_names(block).values()]
            for number, name in enumerate(shortcuts):
                if names is None or name in names:
                    like = self._source.tensors[self._source.stored_keys(block.parameters[0])[0]].dtype
                    written = dtype or stored_dtype(self._source, self._dtype, like)
                    found[name] = self.bases.turn(len(shortcuts) * block.index + number).to(written)
        return found

    @contextmanager
    def _passed(self, past: Change) -> Iterator[None]:
        """While it is open, the uncut network's stream becomes `past` of it wherever it passes a part of a block."""
        with ExitStack() as stack:
            for block in self._source.anatomy.blocks if self.bases.differ else ():
                stack.enter_context(passing(self._source.skeleton, block, None, past))
            yield

    def _written(self, tensor: Tensor) -> torch.dtype:
        return stored_dtype(self._source, self._dtype, tensor.dtype)

"""Walks a network with one block in memory: for writing it, and for running it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.network.anatomy import Anatomy
from secateur.network.checkpoint import stored_buffers
from secateur.network.source import Source
from secateur.network.trace import first_tensor

Fetch = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Gives parameters by their names in the model, with the shapes and values that they are to have."""


@dataclass(frozen=True)
class Piece:
    """What is read, changed and written together: one shard of the result.

    Args:
        index: position; piece 0 holds what lies outside the blocks.
        blocks: indices of the blocks in it.
        keys: stored names of its tensors.
    """

    index: int
    blocks: tuple[int, ...]
    keys: tuple[str, ...]


def pieces(source: Source, shard_bytes: int) -> list[Piece]:
    """The network in pieces: first what lies outside the blocks, then the blocks in order.

    A piece holds one block, or as many neighbours as fit in `shard_bytes`: many tiny files help nobody.
    """
    # a learned buffer goes with its block, because what is decided there may change it
    buffers = stored_buffers(source.skeleton, source.tensors)
    blocks = [
        tuple(dict.fromkeys(key for name in block.parameters for key in source.stored_keys(name)))
        + tuple(key for name, key in buffers.items() if name.startswith(f"{block.path}."))
        for block in source.anatomy.blocks
    ]
    inside = {key for keys in blocks for key in keys}
    groups: list[list[int]] = []
    room = 0
    for block, keys in zip(source.anatomy.blocks, blocks, strict=True):
        size = sum(source.tensors[key].bytes for key in keys)
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(block.index)
        room -= size
    outside = tuple(key for key in source.tensors if key not in inside)
    members = [tuple(key for index in group for key in blocks[index]) for group in groups]
    result = [((), outside), *((tuple(group), keys) for group, keys in zip(groups, members, strict=True))]
    return [Piece(index, group, keys) for index, (group, keys) in enumerate(part for part in result if part[1])]


@torch.no_grad()
def streamed_logits(model: nn.Module, anatomy: Anatomy, fetch: Fetch, ids: Tensor) -> Tensor:
    """Runs a model whose weights are not in memory: each block's are fetched before it runs and dropped after.

    Args:
        model: skeleton (parameters on the meta device) of the network to run.
        fetch: gives the parameters; computation is in the dtype they come in.
        ids: (batch, tokens) token ids.

    Returns: (batch, tokens, vocabulary) logits.
    """
    with fetched(model, anatomy, fetch):
        return model(input_ids=ids, use_cache=False).logits


class _SeenEnough(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass once every watched module was reached; the head is never computed."""


@torch.no_grad()
def observe(
    model: nn.Module,
    anatomy: Anatomy,
    fetch: Fetch,
    ids: Tensor,
    watched: Mapping[str, int],
    see: Callable[[int, Tensor], None],
) -> None:
    """Runs a model block by block, as `streamed_logits` does, and shows the inputs of some of its modules.

    Args:
        watched: a number for each module's path; `see` is called with it and the module's input, once each.
    """
    waiting = set(watched)
    handles = []

    def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(watched[path], inputs[0])
            waiting.discard(path)
            if not waiting:
                raise _SeenEnough

        return hook

    try:
        handles += [model.get_submodule(path).register_forward_pre_hook(look(path)) for path in watched]
        with fetched(model, anatomy, fetch):
            model(input_ids=ids, use_cache=False)
    except _SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fetched(model: nn.Module, anatomy: Anatomy, fetch: Fetch) -> Iterator[None]:
    """While it is open, each module of `model` has its parameters from `fetch` while it runs, not before or after."""
    inside = {name for block in anatomy.blocks for name in block.parameters}
    outside = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in inside}
    regions = {block.path: list(block.parameters) for block in anatomy.blocks}
    for name in sorted(outside):
        regions.setdefault(name.rpartition(".")[0], []).append(name)
    kept: dict[str | None, dict[str, nn.Parameter]] = {}
    handles = []

    def wait(_module, args, kwargs):  # type: ignore[no-untyped-def]
        """Some models look at a weight before they run its module, such as for the device that tokens are to go to."""
        given = first_tensor((args, kwargs))
        kept[None] = {name: model.get_parameter(name) for name in outside}
        if given is None or not outside:
            return
        # they also look at its dtype, which is that of what is fetched; the smallest tells it
        smallest = min(sorted(outside), key=lambda name: model.get_parameter(name).numel())
        dtype = fetch([smallest])[smallest].dtype
        for name, parameter in kept[None].items():
            # a single number seen in every place; not a number, so that whoever computes with it notices
            number = torch.full((), float("nan"), device=given.device).to(dtype)
            put_parameter(model, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))

    def enter(names, path, _module, _inputs):  # type: ignore[no-untyped-def]
        kept[path] = {name: model.get_parameter(name) for name in names}
        for name, tensor in fetch(names).items():
            put_parameter(model, name, nn.Parameter(tensor, requires_grad=False))

    def leave(path, *_):  # type: ignore[no-untyped-def]
        for name, parameter in kept.pop(path, {}).items():
            put_parameter(model, name, parameter)

    handles.append(model.register_forward_pre_hook(wait, with_kwargs=True))
    for path, names in regions.items():
        module = model.get_submodule(path)
        handles += [
            module.register_forward_pre_hook(partial(enter, names, path)),
            module.register_forward_hook(partial(leave, path), always_call=True),
        ]
    handles.append(model.register_forward_hook(partial(leave, None), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def loaded(model: nn.Module, names: Sequence[str], fetch: Callable[[str], Tensor]) -> Iterator[None]:
    """While it is open, these parameters are in their places, fetched one by one."""
    empty = {name: model.get_parameter(name) for name in names}
    try:
        for name in names:
            put_parameter(model, name, nn.Parameter(fetch(name), requires_grad=False))
        yield
    finally:
        for name, parameter in empty.items():
            put_parameter(model, name, parameter)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter in its place in the model, for as long as it is needed there."""
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = parameter

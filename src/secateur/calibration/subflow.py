"""What the attention or the feed-forward of a block alone does to the hidden states: x before it is added, y behind it.

Nothing is assumed of where in the block that happens: the block runs a second time with one of its parts silent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import RequestError
from secateur.network.anatomy import Block
from secateur.network.modelling_file import ATTENTION, FEED_FORWARD, part_modules
from secateur.network.trace import first_tensor


def flow_sums(before: Tensor, after: Tensor) -> list[float]:
    """The sums over tokens behind `Flow`: cos, x·y, x·x, y·y, |x|, |y − x| / |x|. Both are (tokens, h)."""
    x, y = before.double(), after.double()
    dot, xx, yy = (x * y).sum(dim=-1), x.square().sum(dim=-1), y.square().sum(dim=-1)
    # a token without any state has no direction; it counts as unchanged only if it stays so
    tiny = torch.finfo(torch.float64).tiny
    both = (xx.sqrt() * yy.sqrt()).clamp(min=tiny)
    cosine = torch.where(xx + yy == 0, torch.ones_like(dot), dot / both)
    change = (y - x).norm(dim=-1) / xx.sqrt().clamp(min=tiny)
    sums = (cosine, dot, xx, yy, xx.sqrt(), torch.where(xx + yy == 0, torch.zeros_like(change), change))
    return [float(each.sum()) for each in sums]


@contextmanager
def silent_modules(block: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """While it is open, these modules of a block give zeros."""

    def silence(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = first_tensor(output)
        return tree_map(lambda leaf: torch.zeros_like(first) if first is not None and leaf is first else leaf, output)

    handles = [block.get_submodule(path).register_forward_hook(silence) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_part(
    block: Block, module: nn.Module, part: str, batch: int, width: int, seen: dict[int, list[float]]
) -> Iterator[None]:
    """While it is open, what a part of a block adds to is compared with what it makes of it, whenever the block runs.

    Attention: x is what the block reads, y the same with attention added, without the feed-forward. Feed-forward: x is
    what the block gives without it, y what it gives; where both parts read the same hidden states, as for attention.

    Raises RequestError where the other part was not recognised, so that it cannot be told from this one.
    """
    other = FEED_FORWARD if part == ATTENTION else ATTENTION
    alone = part == ATTENTION or block.parallel is True  # what it reads is what the block reads
    if alone and not part_modules(block, other) and not _nothing_else(block, part):
        raise RequestError(
            f"what the {part.replace('_', '-')} of {block.path} adds cannot be told from what its other parts add; choose "
            "by a metric that reads weights, or remove whole blocks."
        )
    paths = part_modules(block, other if alone else part)
    trials: list[Tensor] = []
    given: list[Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = first_tensor((args, kwargs), width)
        assert hidden is not None, "a block is given hidden states"
        given.append(hidden.clone())  # a block may add in place
        copied = tree_map(lambda leaf: leaf.clone() if leaf is hidden else leaf, (args, kwargs))
        with silent_modules(module, paths):
            trial = first_tensor(module.forward(*copied[0], **copied[1]), width)
        assert trial is not None, "a block gives hidden states"
        trials.append(trial.clone())

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden, start, trial = first_tensor(output, width), given.pop(), trials.pop()
        assert hidden is not None, "a block gives hidden states"
        x, y = (start, trial) if alone else (trial, hidden)
        seen[batch] = flow_sums(x.reshape(-1, width), y.reshape(-1, width))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing_else(block: Block, part: str) -> bool:
    """Whether a block holds nothing but this part and norms."""
    inside = tuple(f"{block.path}.{path}." for path in part_modules(block, part))
    return all(name in block.norms or (inside and name.startswith(inside)) for name in block.parameters)

"""Which dimensions of an attention head are turned together by its rotary positions, found by trials on random numbers.

Two dimensions interact where one of a query changes what attention makes of the other of a key. Turned dimensions interact
in twos; without a rotation each meets only itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur.network.recognise import AttentionProposal
from secateur.network.trace import Call, real_call
from secateur.network.trial import TOLERANCE, AttentionTrial

Layout = Literal["halves", "neighbours"]
Run = tuple[int, int, int]
"""(input, first, length) in head dimensions, as in `probe.AttentionRoles`."""


@dataclass(frozen=True)
class Turning:
    """How the positions turn a head: its first `turned` dimensions in twos, i with i + turned / 2 ("halves") or 2 i with
    2 i + 1 ("neighbours"); the others stay as they are.

    q, k, v: where queries, keys and values of one group of heads lie. query_norm, key_norm: paths, relative to the
    attention, of the norms over the dimensions of a head that they go through, "" for none.
    """

    layout: Layout
    turned: int
    q: Run
    k: Run
    v: Run
    query_norm: str = ""
    key_norm: str = ""


def pairs_of(head_dim: int, turned: int, layout: Layout) -> tuple[tuple[int, int], ...]:
    """The dimensions of a head in twos: those that are turned together by frequency, then the others side by side."""
    half = turned // 2
    first = [(i, i + half) if layout == "halves" else (2 * i, 2 * i + 1) for i in range(half)]
    return (*first, *((i, i + 1) for i in range(turned, head_dim - 1, 2)))


def try_head_dims(
    host: nn.Module,
    proposal: AttentionProposal,
    runs: tuple[Run, ...],
    roles: tuple[int, int, int],
    hidden: int,
    call: Call | None,
    norms: tuple[str, ...],
) -> Turning | None:
    """How positions turn the heads of a confirmed attention; None where that is not clear.

    Args:
        runs, roles: as `probe.AttentionRoles` says them; queries, keys and values must lie in runs of their own.
        norms: paths of norms over the dimensions of a head, relative to `host`.
    """
    together, size = proposal.heads // proposal.kv_heads, proposal.head_dim
    if size % 2 or sorted(length for _, _, length in runs) != sorted((together, 1, 1)):
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        given = real_call(call, hidden, generator)
        trial = AttentionTrial(host, proposal, given, generator)
        named = _named(trial, proposal, runs, roles)
        if named is None:
            return None
        q, k, v = named
        owners = _owners(trial, proposal, named, norms)
        if owners is None:
            return None
        dims = _Dims(trial, proposal, q, k)
        if dims.apart([(i,) for i in range(size)]):
            return Turning("halves", 0, q, k, v, *owners)
        for turned, layout in _candidates(size, given):
            pairs = pairs_of(size, turned, layout)[: turned // 2]
            rest = [(i,) for i in range(turned, size)]
            # neighbours that are not turned would pass as a pair too, so the last two must really be one
            if dims.apart([*pairs, *rest]) and not dims.apart([*((i,) for i in pairs[-1])]):
                return Turning(layout, turned, q, k, v, *owners)
    except Exception:  # a foreign module may fail in any way; then nothing is known of its heads
        return None
    return None


def _candidates(size: int, call: Call) -> Iterator[tuple[int, Layout]]:
    """Numbers of turned dimensions and their order, likeliest first: all of them, or as many as what is given has."""
    widths = {leaf.shape[-1] for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor) and leaf.ndim > 1}
    widths |= {2 * width for width in widths}  # a cosine for each pair, or the numbers that turn them
    likely = [width for width in sorted(widths) if width < size and width % 2 == 0]
    for turned in dict.fromkeys([*likely, size, *range(2, size, 2)]):
        yield turned, "halves"
        yield turned, "neighbours"


class _Dims:
    """Which dimensions of queries meet which of keys."""

    def __init__(self, trial: AttentionTrial, proposal: AttentionProposal, q: Run, k: Run) -> None:
        self._trial, self._size, self._groups = trial, proposal.head_dim, proposal.kv_heads
        self._q, self._k = q, k
        self._nothing = self._run([], [])
        self._most = float(trial.run().abs().max())

    def apart(self, classes: Sequence[tuple[int, ...]]) -> bool:
        """Whether no dimension of one class meets one of another; in one run for each binary digit of their number."""
        for bit in range(max(1, (len(classes) - 1).bit_length())):
            here = [dim for number, dims in enumerate(classes) if number >> bit & 1 for dim in dims]
            there = [dim for number, dims in enumerate(classes) if not number >> bit & 1 for dim in dims]
            for one, other in ((here, there), (there, here)):
                if float((self._run(one, other) - self._nothing).abs().max()) > TOLERANCE * self._most:
                    return False
        return True

    def _run(self, queries: list[int], keys: list[int]) -> Tensor:
        """The output where queries have these dimensions alone, and keys those."""
        values = [value.clone() for value in self._trial.values]
        for run, dims in ((self._q, queries), (self._k, keys)):
            gone = torch.ones(self._size, dtype=torch.bool)
            gone[dims] = False
            index, first, length = run
            for group in range(self._groups):
                start = (first + group * length) * self._size
                part = values[index][:, start : start + length * self._size]
                part.unflatten(1, (length, self._size))[..., gone] = 0
        return self._trial.run(dict(enumerate(values)))


def _named(
    trial: AttentionTrial, proposal: AttentionProposal, runs: tuple[Run, ...], roles: tuple[int, int, int]
) -> tuple[Run, Run, Run] | None:
    """The runs as queries, keys and values; those of a fused matrix by what they do, which its order alone does not tell."""
    if len({index for index, _, _ in runs}) == 3:
        found = {index: (index, first, length) for index, first, length in runs}
        return found[roles[0]], found[roles[1]], found[roles[2]]
    base = trial.run()
    most, token = float(base.abs().max()), len(base) // 2

    def other(run: Run, factor: Tensor) -> Tensor:
        return trial.run({run[0]: _times(trial, proposal, run, factor)})

    twice = torch.tensor(-2.0)
    values = [run for run in runs if float((other(run, twice) + 2 * base).abs().max()) <= TOLERANCE * most]
    rest = [run for run in runs if run not in values]
    # another query at one token changes that token alone
    once = torch.ones(len(base), 1).index_fill(0, torch.tensor([token]), -2.0)
    queries = [
        run
        for run in rest
        if ((other(run, once) - base).abs().amax(dim=1) > TOLERANCE * most).nonzero().flatten().tolist() == [token]
    ]
    keys = [run for run in rest if run not in queries]
    if len(values) != 1 or len(queries) != 1 or len(keys) != 1:
        return None
    return queries[0], keys[0], values[0]


def _times(trial: AttentionTrial, proposal: AttentionProposal, run: Run, factor: Tensor) -> Tensor:
    """What is given for the input of a run, with the run's numbers in all groups of heads multiplied."""
    index, first, length = run
    value = trial.values[index].clone()
    for group in range(proposal.kv_heads):
        start = (first + group * length) * proposal.head_dim
        value[:, start : start + length * proposal.head_dim] *= factor
    return value


def _owners(
    trial: AttentionTrial, proposal: AttentionProposal, runs: tuple[Run, Run, Run], norms: tuple[str, ...]
) -> tuple[str, str] | None:
    """Which norm queries go through and which keys, "" for none; None where one has another part in it, or two share one."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            seen[path] = args[0].clone()

        return hook

    handles = [trial.twin.get_submodule(path).register_forward_pre_hook(watch(path)) for path in norms]
    found: dict[int, str] = {}
    try:
        trial.run()
        before = dict(seen)
        for place, run in enumerate(runs):
            trial.run({run[0]: _times(trial, proposal, run, torch.tensor(-2.0))})
            changed = [path for path in norms if not torch.equal(seen[path], before[path])]
            if len(changed) > 1 or (changed and changed[0] in found.values()):
                return None
            if changed:
                found[place] = changed[0]
    finally:
        for handle in handles:
            handle.remove()
    if 2 in found or len(found) < len(norms):  # values would have to lose the same dimensions in every head
        return None
    return found.get(0, ""), found.get(1, "")


def norms_of_heads(host: nn.Module, size: int, is_norm: set[str]) -> tuple[str, ...]:
    """Paths of the norms in an attention that have a number for each of `size` dimensions of a head, and no others."""
    return tuple(
        path
        for path, module in host.named_modules()
        if path in is_norm
        and all(tuple(parameter.shape) == (size,) for parameter in module.parameters())
        and any(True for _ in module.parameters())
    )

"""Watches the matrices of one block at work and sums what a step asks for of their inputs.

A matrix is known by where its numbers lie, not by the module that holds it: a linear layer, a transposed one, one expert of
a fused tensor. Matrices that read the same tensor share one statistic.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.calibration.propagation import Batch
from secateur.calibration.statistics import UNSEEN, Statistics, Sums
from secateur.context import processes
from secateur.errors import RequestError, RunError
from secateur.network.matrices import MatrixRef, view

IN_HALVES = 4096
"""Width of inputs up to which the first and the second half of the calibration batches are summed apart and then added, as
two processes do: both then write the same bytes. Above it a second Gram matrix would take too much memory."""
ROWS = 256  # inputs kept of each point for the error on calibration and on held-out tokens


class Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Every matrix of the block has had its input: the rest of the pass is not needed."""


Meet = Callable[[MatrixRef, str], None]


@dataclass
class _Seat:
    """One batch on its way through the block.

    Args:
        batch: what goes through.
        waiting: matrices that have not had their input yet.
        inputs: those seen so far with their points, alive so that no other tensor takes their place in memory.
        routes: which experts each token goes to, and how much each counts.
        dense: it goes through the dense network, beside the pass that is counted.
    """

    batch: Batch
    waiting: set[str]
    meet: Meet | None
    inputs: list[tuple[Tensor, str]] = field(default_factory=list)
    routes: tuple[Tensor, Tensor] | None = None
    dense: bool = False


class Collector:
    """Statistics of a block's matrices.

    Args:
        refs: the matrices to watch.
        parameters: the block's parameters as they lie in its modules now, by name.
        wanted: parts of `Sums`.
        bank: the module that is given each token's experts and gates, None where there is none.
        batches: how many there are of calibration and of held-out tokens; says how many rows to keep of each.
        skip: tokens at the beginning of each sequence that are not counted, where sequences can be told apart.
    """

    def __init__(
        self,
        refs: Sequence[MatrixRef],
        parameters: Mapping[str, Tensor],
        wanted: set[str],
        bank: nn.Module | None,
        batches: Sequence[Batch],
        skip: int = 0,
    ) -> None:
        self._refs = {ref.name: ref for ref in refs}
        self._places = {view(ref, parameters[ref.parameter]).data_ptr(): ref for ref in refs}
        # a matrix outside experts sees every token, and one expert at least of those that lie together sees some
        together: dict[str, list[MatrixRef]] = {}
        for ref in refs:
            together.setdefault(ref.parameter, []).append(ref)
        self._certain = {
            name: [ref.name for ref in group]
            for name, group in together.items()
            if group[0].expert is None or (parameters[name].ndim == 3 and len(group) == len(parameters[name]))
        }
        self._wanted, self._skip = wanted, skip
        self._bank = bank
        held_out = sum(batch.held_out for batch in batches)
        self._quota = {True: -(-ROWS // max(held_out, 1)), False: -(-ROWS // max(len(batches) - held_out, 1))}
        self._at = threading.local()
        self._dense: dict[str, Tensor] = {}
        self._alias: dict[str, str] = {}
        self._sums: dict[str, Sums] = {}
        self._halves: dict[str, dict[int, Sums]] = {}
        self._uncounted: dict[str, list[tuple[Batch, Tensor, Tensor | None]]] = {}
        self._complete: dict[str, Statistics] = {}
        self._kept: dict[tuple[str, bool], list[Tensor]] = {}

    @contextmanager
    def watching(self, batch: Batch, to_the_end: bool = True, meet: Meet | None = None) -> Iterator[None]:
        """Sees every product that this thread computes inside.

        With `meet` several threads may be inside; what they see is counted later, in the order of the batches.

        Args:
            to_the_end: otherwise Enough is raised when every matrix has had its input.
            meet: called before each product with a matrix, with the matrix and the name of the input that it reads.
        """
        # without experts every matrix has its input in every batch, and the pass may end at the last one
        waiting = {""} if to_the_end or self._bank is not None else set(self._refs)
        self._at.seat = _Seat(batch, waiting, meet)
        hook = self._bank.register_forward_pre_hook(self._routed, with_kwargs=True) if self._bank is not None else None
        try:
            with _Products(self):
                yield
        finally:
            del self._at.seat
            if hook is not None:
                hook.remove()

    @contextmanager
    def recording_dense(self, batch: Batch) -> Iterator[None]:
        """Keeps what this batch is in the dense network, for the pass of the same batch that is watched next."""
        self._at.seat = _Seat(batch, {""}, None, dense=True)
        try:
            with _Products(self):
                yield
        finally:
            del self._at.seat

    def see(self, weight: Tensor, inputs: Tensor) -> None:
        """One product of `inputs` with something that may be one of the matrices."""
        ref = self._places.get(weight.data_ptr())
        if ref is None or inputs.shape[-1] != ref.columns:
            return
        seat: _Seat = self._at.seat
        if seat.dense:
            self._dense[ref.name] = self._counted(ref, inputs)
            return
        # the same tensor, or the same numbers in another shape
        point = next((name for seen, name in seat.inputs if _same(seen, inputs)), None)
        first, point = point is None, point or ref.name
        if self._alias.setdefault(ref.name, point) != point:
            raise RunError(
                f"{ref.name} reads one tensor in one batch and another in the next; it cannot be calibrated."
            )
        if first:
            seat.inputs.append((inputs, point))
            rows = self._counted(ref, inputs)
            gates = None if seat.batch.held_out else self._gates(ref, len(rows))
            if seat.meet is None:
                self._count(point, seat.batch, rows, gates, self._dense.get(ref.name))
            else:
                self._uncounted.setdefault(point, []).append((seat.batch, rows, gates))
        if seat.meet is not None:
            seat.meet(ref, point)
        seat.waiting.discard(ref.name)
        if not seat.waiting:
            raise Enough

    def results(self) -> dict[str, Statistics]:
        """The statistics of each matrix, those of all processes together.

        Raises RunError naming the matrix whose inputs are not finite, RequestError naming one that was never seen at work
        though tokens must have reached it.
        """
        for point in list(self._uncounted):
            self._count_late(point)
        for point in list(self._halves):
            self._join(point)
        self._merge()
        for parameter, names in self._certain.items():
            if not any(self._alias.get(name, name) in self._sums for name in names):
                raise RequestError(
                    f"no product with {parameter} was seen when its block ran, so nothing is known of its inputs; name "
                    "other matrices in `targets`, or use a method that needs no text."
                )
        shared = {point: self.complete(point) for point in self._sums}
        return {name: shared.get(self._alias.get(name, name), UNSEEN) for name in self._refs}

    @property
    def alone(self) -> bool:
        """Whether one pass at a time can be watched: what tells the experts' tokens is attached to the module itself."""
        return self._bank is not None

    def complete(self, point: str) -> Statistics:
        """The statistics of an input once all batches of this process have given theirs."""
        if point not in self._complete:
            self._count_late(point)
            self._join(point)
            sums = self._sums.get(point, UNSEEN.sums)
            sums.finish()
            if not sums.finite:
                raise RunError(
                    f"the inputs of {point} are not finite on the calibration tokens: an earlier layer diverged. Use a "
                    "smaller sparsity or float32 passes, or check the model."
                )
            self._complete[point] = Statistics(sums)
        return self._complete[point]

    def rows(self, name: str, held_out: bool) -> Tensor | None:
        """(t, d) some of the inputs that a matrix has seen, for measuring errors; None where it saw none."""
        kept = self._kept.get((self._alias.get(name, name), held_out))
        return torch.cat(kept) if kept else None

    def _routed(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Notes which experts each token goes to and how much each counts."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = next((value for value in given if not value.is_floating_point()), None)
        if chosen is not None:
            gates = next((g for g in given if g.is_floating_point() and g.shape == chosen.shape), None)
            self._at.seat.routes = None if gates is None else (chosen, gates)

    def _gates(self, ref: MatrixRef, tokens: int) -> Tensor | None:
        """(t,) what the output of this expert is multiplied by, token by token; None outside experts."""
        if ref.expert is None or "gated" not in self._wanted:
            return None
        routes = self._at.seat.routes
        if routes is None:
            raise RunError(f"how tokens are weighted among the experts of {ref.name} could not be seen.")
        chosen, gates = routes
        # experts are given their tokens choice by choice, then in order
        choice, token = torch.where(ref.expert == chosen.T)
        if len(token) != tokens:
            raise RunError(f"{ref.name} was given {tokens} tokens, but {len(token)} are routed to its expert.")
        return gates[token, choice]

    def _counted(self, ref: MatrixRef, inputs: Tensor) -> Tensor:
        """(t, d) the inputs of the tokens that count. Experts are given tokens without their place: there all do."""
        batch: Batch = self._at.seat.batch
        if self._skip and ref.expert is None and inputs.numel() == batch.ids.numel() * inputs.shape[-1]:
            inputs = inputs.reshape(*batch.ids.shape, -1)[:, self._skip :]
        return inputs.reshape(-1, inputs.shape[-1])

    def _count(self, point: str, batch: Batch, rows: Tensor, gates: Tensor | None, dense: Tensor | None = None) -> None:
        self._keep(point, batch, rows)
        if not batch.held_out:
            halves, half = self._halves.setdefault(point, {}), batch.half if rows.shape[1] <= IN_HALVES else 0
            if half not in halves:
                halves[half] = Sums(self._wanted, rows.shape[1], rows.device)
            halves[half].add(rows, gates, dense)

    def _join(self, point: str) -> None:
        """Adds the two halves of what this process has seen, as two processes add theirs."""
        for _, sums in sorted(self._halves.pop(point, {}).items()):
            if point in self._sums:
                self._sums[point].merge(sums)
            else:
                self._sums[point] = sums

    def _count_late(self, point: str) -> None:
        for batch, rows, gates in sorted(self._uncounted.pop(point, []), key=lambda seen: seen[0].index):
            self._count(point, batch, rows, gates)

    def _keep(self, point: str, batch: Batch, rows: Tensor) -> None:
        """Some of the rows, drawn: at even distances they could all be first tokens, which are like no others."""
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(batch.index))
        places = drawn[: self._quota[batch.held_out]].sort().values.to(rows.device)
        self._kept.setdefault((point, batch.held_out), []).append(rows[places].float())

    def _merge(self) -> None:
        """Adds the processes' sums in the order of their ranks, so that all have the same bits."""
        rank, world = processes()
        if world == 1:
            return
        every: list[Any] = [None] * world
        dist.all_gather_object(every, (self._alias, {name: sums.tokens for name, sums in self._sums.items()}))
        for alias, _ in every:
            self._alias = {**alias, **self._alias}
        seen_by = {name: [r for r, (_, tokens) in enumerate(every) if tokens.get(name)] for _, t in every for name in t}
        for name in sorted(seen_by):
            own = self._sums.get(name) or Sums(self._wanted, self._refs[name].columns)
            total = Sums(self._wanted, self._refs[name].columns)
            for owner in seen_by[name]:
                part = Sums(self._wanted, self._refs[name].columns)
                part.tokens = every[owner][1][name]
                for key, tensor in part.parts.items():
                    if owner == rank:
                        tensor.copy_(own.parts[key])
                    dist.broadcast(tensor, owner)
                total.merge(part)
            self._sums[name] = total
        for held_out in (False, True):
            rows = {name: torch.cat(kept) for (name, part), kept in self._kept.items() if part == held_out and kept}
            others: list[Any] = [None] * world
            dist.all_gather_object(others, rows)
            for name in {name for each in others for name in each}:
                self._kept[name, held_out] = [each[name] for each in others if name in each]


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.numel() == other.numel()
        and one.shape[-1] == other.shape[-1]
        and one.is_contiguous()
        and other.is_contiguous()
    )


class _Products(TorchFunctionMode):
    """Shows a collector every product with a weight."""

    def __init__(self, collector: Collector) -> None:
        super().__init__()
        self._collector = collector

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            self._collector.see(args[1] if len(args) > 1 else kwargs["weight"], args[0])
        elif func is torch.addmm:
            self._collector.see(args[2], args[1])
        elif func in _PRODUCTS and isinstance(args[1], Tensor):
            if args[1].dim() == 2:
                self._collector.see(args[1], args[0])
            if args[0].dim() == 2:  # W xᵀ
                self._collector.see(args[0], args[1].mT)
        return func(*args, **(kwargs or {}))


_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}

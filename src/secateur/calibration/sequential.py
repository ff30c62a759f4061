"""One pass through a block in which every matrix is solved as soon as all tokens have reached it.

Every batch runs the block's own forward in a thread of its own and waits before each product with a matrix that is not
solved yet. When all batches wait, their inputs are summed in order, the matrix is solved, and all go on through what it has
become. Batches go side by side, each on one thread of the processor: with several threads for each batch, every batch would
have a team of its own, and the teams stand in each other's way (measured: half as fast). Nothing is summed meanwhile, so the
result does not depend on scheduling. Each product is computed once, where collecting first and propagating afterwards
computes it twice; in exchange the activations of all tokens in one block are held at the same time.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.calibration.collector import Collector
from secateur.calibration.propagation import Batch, Call
from secateur.calibration.statistics import Statistics
from secateur.context import spread
from secateur.network.matrices import MatrixRef
from secateur.tensor.products import FastProducts

Solve = Callable[[MatrixRef, Statistics], None]


class _Ended(BaseException):
    """Ends the threads that wait when one of them has failed."""


class _Pass(threading.Thread):
    """One batch on its way; computes only between `go_on` and its next stop."""

    def __init__(self, work: Callable[["_Pass"], Tensor], threads: int) -> None:
        super().__init__(daemon=True)
        self._work, self._threads = work, threads
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self.point: tuple[str, str] | None = None  # the matrix that it waits at, and the name of its input
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        self._turn.acquire()
        try:
            if not self._ended:
                torch.set_num_threads(self._threads)
                with torch.no_grad(), FastProducts():  # both hold for a thread alone
                    self.output = self._work(self)
        except BaseException as error:
            self.error = error
        self.point = None
        self._stopped.release()

    def wait_at(self, point: tuple[str, str]) -> None:
        """Called from inside: lets the others compute until this pass may go on."""
        self.point = point
        self._stopped.release()
        self._turn.acquire()
        if self._ended:
            raise _Ended

    def go_on(self) -> None:
        """Called from outside: computes until the next stop."""
        self._turn.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        if self.is_alive():
            self._ended = True
            self._turn.release()
            self.join()


def solve_in_passing(
    module: nn.Module,
    calls: list[tuple[Batch, Call]],
    collector: Collector,
    refs: dict[str, MatrixRef],
    solve: Solve,
    output: Callable[[object], Tensor],
) -> list[Tensor]:
    """Runs all batches through a block side by side and solves its matrices on the way.

    Args:
        calls: how the block is called for each batch; the hidden states come when they are asked for.
        refs: the matrices to solve, by name; products with others go through as they are.
        solve: changes the matrix in place.
        output: finds the hidden states in what the block gives.

    Returns: the hidden states that the block gives, batch by batch.
    """
    solved: set[str] = set()

    def work(batch: Batch, call: Call) -> Callable[[_Pass], Tensor]:
        def run(own: _Pass) -> Tensor:
            def meet(ref: MatrixRef, point: str) -> None:
                if ref.name in refs and ref.name not in solved:
                    own.wait_at((ref.name, point))

            args, kwargs = call()
            with collector.watching(batch, meet=meet):
                return output(module(*args, **kwargs))

        return run

    threads = torch.get_num_threads()
    together = not collector.alone and len(calls) >= threads
    passes = [_Pass(work(batch, call), 1 if together else threads) for batch, call in calls]

    def go_on() -> None:
        moving = [place for place, each in enumerate(passes) if each.is_alive()]
        spread(lambda place: passes[place].go_on(), moving, together)

    try:
        go_on()
        while waiting := {each.point: None for each in passes if each.point is not None}:
            for name, point in waiting:
                solve(refs[name], collector.complete(point))
                solved.add(name)
            go_on()
    finally:
        for each in passes:
            each.end()
    return [each.output for each in passes if each.output is not None]

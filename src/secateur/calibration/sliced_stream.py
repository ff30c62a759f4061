"""Which directions of the residual stream calibration tokens use at each place, behind what has been sliced before it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.calibration.dense_pass import DensePass, add
from secateur.calibration.propagation import Batch
from secateur.calibration.samples import Samples
from secateur.calibration.stream_moment import StreamMoment, moment
from secateur.context import Advance, Progress, barrier, processes, silent
from secateur.errors import RunError
from secateur.files import write_tensors
from secateur.network.anatomy import Block
from secateur.network.bases import Bases, passing
from secateur.network.modelling_file import ATTENTION, FEED_FORWARD, passed_parts
from secateur.network.rotation import stretched
from secateur.network.source import Source
from secateur.network.stream import loaded
from secateur.network.stream_roles import Roles, find_roles
from secateur.network.verify import stored


class _SeenEnough(Exception):  # noqa: N818 (a signal, not an error)
    """What comes later in the block need not run yet."""


class SlicedStream(DensePass):
    """The stream on its way through the network, in front of each norm over it; one block in memory.

    At each place it is asked which directions stay, and goes on as its part within these alone: through the norm, which
    divides by all channels as that of the result will, and past the attention or the feed-forward (where both are side by
    side, past both). It goes on from the last place that is decided.

    Args:
        bases: for what is kept.
        method: named where it gave what cannot be done.
    """

    name = "sliced"

    def __init__(
        self,
        source: Source,
        samples: Samples,
        folder: Path,
        dtype: torch.dtype,
        device: str,
        skip: int,
        bases: Bases,
        method: str,
        progress: Progress = silent,
    ) -> None:
        super().__init__(source, samples, folder, dtype, device, skip)
        self.bases, self._method, self._progress = bases, method, progress
        self._asked: tuple[int, StreamMoment] | None = None

    def moments(self) -> Iterator[tuple[int, StreamMoment]]:
        """The places that are not decided yet, in order, each with the second moment of the stream there. `keep` must be
        called for one before the next is asked for.

        Raises RunError where that was not done, or something is not finite.
        """
        self.check_processes()
        blocks, known = self.source.anatomy.blocks, self.bases.known
        if not (left := sum(not known(place) for place in range(self.bases.places))):
            return
        self._tokens.capture(stored(self.source))

        def fetch(name: str) -> Tensor:
            return self.source.parameter(name).to(self._device, self._dtype)

        with self._progress("statistics", left) as bar:
            for block in blocks:
                first, after = (len(passed_parts(block)) * index for index in (block.index, block.index + 1))
                if known(after):
                    continue
                yield from self._ask(first, partial(self._between, block.index), bar)
                if not known(after - 1) or not self._tokens.done(block.index + 1):
                    with loaded(self.source.skeleton, block.parameters, fetch):
                        if after - first > 1:
                            yield from self._ask(first + 1, partial(self._inside, block), bar)
                        if not self._tokens.done(block.index + 1):
                            self._tokens.run(block.index, around=partial(self._within, block), write=True)
                barrier()  # the hidden states of every process are written
                self._tokens.forget(block.index)
            yield from self._ask(self.bases.places - 1, partial(self._between, len(blocks)), bar)
            self._tokens.forget(len(blocks))

    def keep(self, basis: Tensor) -> None:
        """Decides the last place of `moments`: (h, d) orthonormal directions that stay, of all places equally many."""
        assert self._asked is not None, "asked for first"
        place, seen = self._asked
        if processes()[0] == 0:
            self.bases.keep(place, basis, self._method, seen.share(basis))
        barrier()
        self._path(place, *processes()).unlink(missing_ok=True)

    @contextmanager
    def watched(self, block: Block, batch: Batch, seen: dict[str, Tensor]) -> Iterator[None]:
        """Up to the norm in front of the feed-forward, with the attention reading what is kept for it."""

        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._add(seen, given[0], batch)
            raise _SeenEnough

        [norm], _ = passed_parts(block)[FEED_FORWARD]
        handle = self.source.skeleton.get_submodule(f"{block.path}.{norm}").register_forward_pre_hook(look)
        try:
            with self._within(block, batch, (ATTENTION,)):
                yield
        finally:
            handle.remove()

    def _ask(
        self, place: int, look: Callable[[], Mapping[str, Tensor]], bar: Advance
    ) -> Iterator[tuple[int, StreamMoment]]:
        """A place that is not decided yet, with what all processes see there."""
        if self.bases.known(place):
            return
        path = self._path(place, *processes())
        if not path.exists():
            write_tensors(path, {name: tensor.cpu() for name, tensor in look().items()})
        barrier()  # what every process has seen is there
        sums = self.sums(place, f"place {place} of the residual stream")
        self._asked = place, StreamMoment(sums["moment"] / float(sums["tokens"]))
        yield self._asked
        if not self.bases.known(place):
            raise RunError(f"{self._method}: no directions were kept at place {place}; nothing was cut.")
        bar.advance()

    def _between(self, index: int) -> dict[str, Tensor]:
        """What is seen of the stream that a block is given, or that the last one gives."""
        seen: dict[str, Tensor] = {}
        for batch, states in self._tokens.hidden(index):
            self._add(seen, states, batch)
        return seen

    def _inside(self, block: Block) -> dict[str, Tensor]:
        """What is seen of the stream behind a block's attention."""
        seen: dict[str, Tensor] = {}
        self._tokens.run(block.index, around=lambda batch: self.watched(block, batch, seen), enough=_SeenEnough)
        return seen

    def _add(self, seen: dict[str, Tensor], states: Tensor, batch: Batch) -> None:
        rows = self._centred(self.rows(states, batch).reshape(-1, self.source.anatomy.hidden))
        add(seen, "moment", moment(rows))
        add(seen, "tokens", torch.tensor(float(len(rows)), dtype=torch.float64))

    @contextmanager
    def _within(self, block: Block, _: Batch, parts: tuple[str, ...] | None = None) -> Iterator[None]:
        """While it is open, parts of a block read, and are added to, what lies in their bases."""

        def project(place: int, x: Tensor) -> Tensor:
            basis = self.bases.at(place).to(x)
            return (self._centred(x) @ basis) @ basis.T

        # first what reads the stream as it is
        with (
            passing(self.source.skeleton, block, project, lambda _, kept: kept, parts),
            stretched(self.source.skeleton, self._roles, self.bases),
        ):
            yield

    @cached_property
    def _roles(self) -> Roles:
        return find_roles(self.source.skeleton, self.source.anatomy, self.source.spec)

    def _centred(self, x: Tensor) -> Tensor:
        """The stream without what norms subtract from it."""
        return x - x.mean(dim=-1, keepdim=True) if self._roles.subtracts else x

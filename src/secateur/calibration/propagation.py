"""Hidden states of calibration tokens on their way through a network, one block in memory at a time.

The model's own forward runs once, with nothing but what lies outside the blocks, and every block notes how it is called
(positions, masks); after that blocks are called one by one. Hidden states lie in files: block n reads file n and writes
file n + 1, which appears by a rename, so that a killed run goes on from the last block that is done.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from secateur.calibration.samples import Samples
from secateur.context import processes
from secateur.errors import RequestError, RunError
from secateur.files import atomic
from secateur.network.source import Source
from secateur.network.stream import Fetch, fetched
from secateur.network.trace import describe, first_tensor
from secateur.tensor.products import FastProducts

Call = Callable[[], tuple[Any, Any]]
"""Gives the positional and the keyword arguments of one call of a block."""

MOST_TOKENS = 4096  # of a batch: more gain nothing on a CPU
ACTIVATION_BYTES = 16 * 10**6  # of the widest activation of a batch: what a wide model takes beside its weights


@dataclass(frozen=True)
class Batch:
    """Sequences of one length that go through a block together.

    Args:
        ids: (sequences, tokens) token ids.
        start: tokens of this process's batches before it: where its hidden states lie.
        held_out: to judge by, never to solve on.
        half: of the calibration batches: 0 of the first half, 1 of the second, which two processes would share out so.
    """

    index: int
    ids: Tensor
    start: int
    held_out: bool
    half: int = 0


@dataclass(frozen=True)
class _Hidden:
    """Stands for a block's hidden states in a recorded call."""


class _Reached(Exception):  # noqa: N818 (a signal, not an error)
    """The head was reached: what comes after the blocks is not needed."""


class Propagation:
    """Calibration tokens and what becomes of them.

    Args:
        source: the network; only its skeleton is run, filled with weights that the caller gives.
        folder, name: for the files of hidden states, one folder for each process.
        dtype: of hidden states and of the passes through blocks.
        widest: largest width of an activation inside a block; bounds the batches.
    """

    def __init__(
        self,
        source: Source,
        samples: Samples,
        folder: Path,
        dtype: torch.dtype,
        device: str = "cpu",
        widest: int = 0,
        name: str = "hidden",
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        rank, world = processes()
        # another number of processes shares the tokens out in another way
        self.folder = folder / f"{name}-{rank}-of-{world}"
        self.width = source.anatomy.hidden
        tokens = max(1, min(MOST_TOKENS, ACTIVATION_BYTES // (dtype.itemsize * max(widest, self.width))))
        self.batches: list[Batch] = []
        start = 0
        # whole batches are shared out, so that a process computes the same numbers for them as a single one would
        every = list(_batches(samples, tokens))
        counts = {kind: sum(held_out == kind for _, held_out in every) for kind in (False, True)}
        for index, (ids, held_out) in enumerate(every):
            place, count = (index - counts[False] if held_out else index), counts[held_out]
            # neighbours together, so that two processes count what a single one counts in each half, in the same order
            if rank == place * world // count:
                self.batches.append(Batch(index, ids, start, held_out, place * 2 // count))
                start += ids.numel()
        self._calls: list[list[tuple[Any, Any]]] = []
        self._as_tuple = False  # whether blocks give their hidden states inside a tuple
        self._shared: dict[Any, list[Tensor]] = {}

    def capture(self, fetch: Fetch) -> None:
        """Notes how the blocks are called, and writes their first hidden states unless a later file is there.

        fetch: gives the parameters outside the blocks.

        Raises RequestError when the model does not simply pass hidden states from each block to the next.
        """
        model, blocks, head = self.source.skeleton, self.source.anatomy.blocks, self.source.anatomy.head
        inside = {name for block in blocks for name in block.parameters}
        modules = [model.get_submodule(block.path) for block in blocks]
        states: list[Tensor] = []
        seen: list[Tensor] = []  # the hidden states that each block was given in this batch
        self._calls = [[] for _ in blocks]

        def record(number: int, as_tuple: bool) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = first_tensor((args, kwargs), self.width)
                if hidden is None or hidden.dim() != 3:
                    raise _OtherForm("a block is given no hidden states")
                # each block stands for one that changes nothing, so a change comes from what lies between
                if number != len(seen) or (seen and hidden is not seen[-1] and not torch.equal(hidden, seen[-1])):
                    raise RequestError(
                        f"{self.source.spec} does not run its blocks once each and one after the other (seen at "
                        f"{blocks[number].path}), so calibration tokens cannot be passed through them one by one; use a "
                        "method that needs none."
                    )
                seen.append(hidden)
                if number == 0:
                    states.append(hidden.to(self.dtype))
                self._calls[number].append(self._noted(args, kwargs, hidden))
                return (hidden,) if as_tuple else hidden

            return forward

        def reached(*_: Any) -> None:
            if len(seen) == len(blocks):
                raise _Reached

        def embeddings(names: Sequence[str]) -> dict[str, Tensor]:
            wanted = [name for name in names if name not in inside]
            return {name: tensor.to(self.device, self.dtype) for name, tensor in fetch(wanted).items()}

        path = self._path(0)
        later = any(self.folder.glob("*.states"))

        def run(as_tuple: bool) -> None:
            self._as_tuple = as_tuple
            self._calls = [[] for _ in blocks]
            self._shared.clear()
            states.clear()
            for module, number in zip(modules, range(len(blocks)), strict=True):
                module.forward = record(number, as_tuple)
            with _writing(path, later) as file:
                for batch in self.batches:
                    seen.clear()
                    with suppress(_Reached):
                        model(input_ids=batch.ids.to(self.device), use_cache=False)
                    if file is not None:
                        file.write(_raw(states.pop()))
                    states.clear()

        last: RemovableHandle | None = None
        try:
            with torch.no_grad(), self.prepared(), fetched(model, self.source.anatomy, embeddings):
                if head is not None:  # what it computes is not needed; before it is fetched
                    module = model.get_submodule(head.rpartition(".")[0])
                    last = module.register_forward_pre_hook(reached, prepend=True)
                try:
                    run(as_tuple=False)
                except (_OtherForm, AttributeError, IndexError, TypeError, ValueError):
                    # blocks of some architectures give a tuple, of which the model takes the first entry
                    try:
                        run(as_tuple=True)
                    except (_OtherForm, AttributeError, IndexError, TypeError, ValueError) as error:
                        raise RequestError(
                            f"how {self.source.spec} runs its blocks is not understood ({describe(error)}), so calibration "
                            "tokens cannot be passed through them; use a method that needs none."
                        ) from error
        finally:
            if last is not None:
                last.remove()
            for module in modules:
                module.__dict__.pop("forward", None)

    def run(self, block: int, **options: Any) -> None:
        """Passes all tokens through a block; arguments as `steps` takes them."""
        for _ in self.steps(block, **options):
            pass

    @torch.no_grad()
    def steps(
        self,
        block: int,
        around: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
        write: bool = False,
        enough: type[Exception] | tuple[()] = (),
    ) -> Iterator[Batch]:
        """Passes all tokens through a block whose weights are in place, one batch for each that is taken from here.

        Args:
            around: what each batch runs inside of.
            write: write the next block's hidden states.
            enough: what, raised inside, ends the pass of a batch: nothing later in it is needed.

        Raises RunError naming the block when a hidden state is not finite.
        """
        module = self.module(block)
        with self.prepared(), _writing(self._path(block + 1), not write) as file:
            for number, batch in enumerate(self.batches):
                hidden = self._read(block, batch)
                args, kwargs = self._call(block, number, hidden)
                try:
                    with around(batch):
                        output = module(*args, **kwargs)
                    states = self.states(output, block) if file is not None else None
                except enough:
                    states = None
                if states is not None:
                    file.write(_raw(states))
                yield batch

    def beside(self, name: str) -> "Propagation":
        """The same tokens and calls, with other hidden states: their files lie in a folder `name` inside this one's."""
        other = copy(self)
        other.folder = self.folder / name
        return other

    def take(self, block: int, other: "Propagation", there: int) -> None:
        """Makes the hidden states that another propagation's block `there` reads those that this one's `block` reads."""
        with atomic(self._path(block), lasting=False) as partial:
            shutil.copyfile(other._path(there), partial)

    @torch.no_grad()
    def logits(self, fetch: Fetch) -> Iterator[tuple[Batch, Tensor]]:
        """What the model makes of the hidden states behind its last block: (sequences, tokens, vocabulary), by batch.

        fetch: gives the parameters outside the blocks.
        """
        model, blocks = self.source.skeleton, self.source.anatomy.blocks
        inside = {name for block in blocks for name in block.parameters}
        modules = [model.get_submodule(block.path) for block in blocks]
        states: list[Tensor] = []

        def outside(names: Sequence[str]) -> dict[str, Tensor]:
            wanted = [name for name in names if name not in inside]
            return {name: tensor.to(self.device, self.dtype) for name, tensor in fetch(wanted).items()}

        def give(*_: Any, **__: Any) -> Any:
            return (states[-1],) if self._as_tuple else states[-1]

        try:
            for module in modules:
                module.forward = give
            with self.prepared(), fetched(model, self.source.anatomy, outside):
                for batch in self.batches:
                    states[:] = [self._read(len(blocks), batch)]
                    yield batch, model(input_ids=batch.ids.to(self.device), use_cache=False).logits
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    def calls(self, block: int) -> list[tuple[Batch, Call]]:
        """How a block is called for each batch; its hidden states are read when the call is asked for."""

        def call(number: int, batch: Batch) -> Call:
            return lambda: self._call(block, number, self._read(block, batch))

        return [(batch, call(number, batch)) for number, batch in enumerate(self.batches)]

    def hidden(self, block: int) -> Iterator[tuple[Batch, Tensor]]:
        """The hidden states that a block reads, batch by batch; of the number of blocks, those that the last one gave."""
        return ((batch, self._read(block, batch)) for batch in self.batches)

    def module(self, block: int) -> nn.Module:
        return self.source.skeleton.get_submodule(self.source.anatomy.blocks[block].path)

    def states(self, output: Any, block: int) -> Tensor:
        """The hidden states in what a block gives. Raises RunError naming the block when they are not finite."""
        found = first_tensor(output, self.width)
        assert found is not None, "a block gives hidden states"
        if not bool(torch.isfinite(torch.stack(found.aminmax())).all()):
            raise RunError(
                f"block {block} gives non-finite hidden states on the calibration tokens; use a smaller sparsity, or "
                "float32 passes, or check the model."
            )
        return found.to(self.dtype)

    def write(self, block: int, states: Sequence[Tensor]) -> None:
        """The hidden states that this block reads, batch by batch."""
        with _writing(self._path(block), False) as file:
            for each in states:
                file.write(_raw(each))

    def done(self, block: int) -> bool:
        """Whether the hidden states that this block reads are there."""
        return self._path(block).exists()

    def forget(self, block: int) -> None:
        """Removes the hidden states that this block reads: nobody needs them again."""
        self._path(block).unlink(missing_ok=True)

    def bytes(self) -> int:
        """Of one file of hidden states."""
        return sum(batch.ids.numel() for batch in self.batches) * self.width * self.dtype.itemsize

    def _path(self, block: int) -> Path:
        return self.folder / f"{block}.states"

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Products are fast inside, and experts run one by one, each as a matrix of its own: that is where their inputs are
        seen.
        """
        config = getattr(self.source.skeleton, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if before is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]
        try:
            with FastProducts():
                yield
        finally:
            if before is not None:
                config._experts_implementation = before  # type: ignore[union-attr]

    def _noted(self, args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
        """A call with a mark in the place of the hidden states; tensors that equal an earlier call's are held once."""

        def note(value: Any) -> Any:
            if value is hidden:
                return _Hidden()
            if not isinstance(value, Tensor):
                return value
            known = self._shared.setdefault((tuple(value.shape), value.dtype), [])
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            known.append(value)
            return value

        return tree_map(note, args), tree_map(note, kwargs)

    def _call(self, block: int, number: int, hidden: Tensor) -> tuple[Any, Any]:
        args, kwargs = self._calls[block][number]

        def fill(value: Any) -> Any:
            return hidden if isinstance(value, _Hidden) else value

        return tree_map(fill, args), tree_map(fill, kwargs)

    def _read(self, block: int, batch: Batch) -> Tensor:
        count = batch.ids.numel() * self.width
        size = count * self.dtype.itemsize
        with self._path(block).open("rb") as file:
            file.seek(batch.start * self.width * self.dtype.itemsize)
            raw = bytearray(size)
            if file.readinto(raw) != size:
                raise RunError(f"{self._path(block)} is cut short; start again with --restart.")
        return torch.frombuffer(raw, dtype=self.dtype).view(*batch.ids.shape, self.width).to(self.device)


class _OtherForm(Exception):  # noqa: N818 (a signal, not an error)
    """A block was given something else than hidden states: the one before it gives its output in another form."""


def _batches(samples: Samples, tokens: int) -> Iterator[tuple[Tensor, bool]]:
    """Sequences of equal length together, up to `tokens` tokens, at least one sequence each; held-out ones apart."""
    for held_out, sequences in ((False, samples.sequences), (True, samples.held_out)):
        group: list[Tensor] = []
        for ids in sequences:
            if group and (len(ids) != len(group[0]) or len(ids) * (len(group) + 1) > tokens):
                yield torch.stack(group), held_out
                group = []
            group.append(ids)
        if group:
            yield torch.stack(group), held_out


def _raw(states: Tensor) -> memoryview:
    return states.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextmanager
def _writing(path: Path, nothing: bool) -> Iterator[Any]:
    """A file that appears by a rename when all is written; None when nothing is to be."""
    if nothing:
        yield None
        return
    with atomic(path, lasting=False) as partial, partial.open("wb") as file:
        yield file
        file.flush()

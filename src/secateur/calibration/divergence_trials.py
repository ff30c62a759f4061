"""How soon greedy text leaves the dense network's when single matrices lose some of their weights.

The dense network goes on with prompts from the calibration tokens, greedily. A trial removes weights from matrices of that
same network, reads its text in one pass, and puts them back: where the largest logit is another token's, text would have
diverged (`secateur.evaluation.divergent`). The whole model is in memory, in the dtype of the calibration passes, and what
each block gave out in the dense pass beside it: a trial begins at the first block that it changes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.calibration.collector import Collector
from secateur.calibration.propagation import Batch
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import UNSEEN, Statistics
from secateur.context import processes
from secateur.errors import RequestError
from secateur.evaluation.divergent import (
    BATCH,
    Continuations,
    compare_forced,
    counted_tokens,
    end_tokens,
    first_divergent,
    greedy,
    tie_tolerance,
    together,
)
from secateur.evaluation.forward import check_length, dtype_of, evaluating, logits_of
from secateur.network.matrices import MatrixRef, view
from secateur.network.source import Source, load

Prune = Callable[[MatrixRef, Tensor, int, Statistics], Tensor]
"""The (r, d) mask of what stays of a (r, d) float32 matrix that is to lose so many weights (tiles, where a pattern removes
tiles), given what the dense network says of its inputs."""


class Trial(NamedTuple):
    """What a trial shows, as parts of all tokens, 0 to 1: 0 is what the dense network does.

    first: what lies behind the first divergent token of each continuation, that one included. corrected: how many would have
    to be put right.
    """

    first: float
    corrected: float


@dataclass
class _Part:
    """Some prompts that go through together: their text, what of it counts, and what each block gave out."""

    prompts: Tensor
    text: Tensor
    counted: Tensor
    outputs: list[Any] = field(default_factory=list)


class DivergenceTrials:
    """Trials on the dense network.

    Args:
        source: the network, loaded at the first question; a live module is used as it is, and left as it was.
        samples: prompts are cut from their sequences; held-out ones are not used.
        refs: the matrices that may lose weights.
        prune: says which.
        kinds: statistics of the matrices' inputs that `prune` reads, collected in the dense pass.
        dtype: that the model is loaded in.
    """

    def __init__(
        self,
        source: Source,
        samples: Samples,
        refs: Sequence[MatrixRef],
        prune: Prune,
        kinds: set[type] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        self._source, self._samples, self._dtype, self._device = source, samples, dtype, device
        self._refs = {ref.name: ref for ref in refs}
        self._prune = prune
        self._wanted = {part for kind in kinds or () for part in kind.wants}  # type: ignore[attr-defined]
        self._parts: list[_Part] = []
        self._seen: dict[str, Statistics] = {}
        self._from_the_middle = False

    def write(self, written: Continuations) -> int:
        """Lets the dense network write; comes before any trial. Returns how many tokens count.

        Raises RequestError where the samples hold too few prompts, or the model has too few positions.
        """
        check_length(self._source.skeleton, written.prompt + written.continuation, "A prompt with its continuation")
        prompts = self._prompts(written)
        ends = end_tokens(self._model)
        self._parts = []
        with evaluating(self._model):
            for batch in prompts.split(together(self._model, written)):
                text = greedy(self._model, batch, written.continuation, what="the dense network")
                part = _Part(batch, text, counted_tokens(text, ends))
                with self._recorded(part):
                    logits = logits_of(self._model, _read(part))
                self._parts.append(part)
            if self._wanted:
                self._seen = self._statistics()
            # tried, not assumed: nothing but what a block gives out may pass from one to the next
            self._from_the_middle = all(
                self._same_logits(begin, logits) for begin in {1, len(self._blocks) // 2, len(self._blocks)}
            )
        return sum(int(part.counted.sum()) for part in self._parts)

    def removing(self, remove: Mapping[str, int]) -> Trial:
        """The network without so many weights of these matrices, the others whole."""
        behind = corrected = counted = 0
        begin = min((self._refs[name].block for name in remove), default=0) if self._from_the_middle else 0
        tolerance = tie_tolerance(dtype_of(self._model))
        with evaluating(self._model), self._without(remove):
            for part in self._parts:
                with self._known(part, begin):
                    found = compare_forced(self._model, part.prompts, part.text, tolerance)
                differs, lengths = found.differs & part.counted, part.counted.sum(1).tolist()
                corrected += int(differs.sum())
                counted += sum(lengths)
                behind += sum(lengths) - sum(first_divergent(differs, lengths))
        return Trial(behind / counted, corrected / counted)

    def _same_logits(self, begin: int, logits: Tensor) -> bool:
        """Whether the last prompts give these logits too when they begin at block `begin`."""
        with self._known(self._parts[-1], begin):
            return torch.equal(logits_of(self._model, _read(self._parts[-1])), logits)

    def _prompts(self, written: Continuations) -> Tensor:
        windows = [
            window
            for ids in self._samples.sequences
            for window in ids.split(written.prompt)
            if len(window) == written.prompt
        ]
        if len(windows) < written.prompts:
            raise RequestError(
                f"{written.prompts} prompts of {written.prompt} tokens are asked for, but the calibration sequences of "
                f"{self._samples.name} hold {len(windows)}; ask for fewer or shorter prompts, or calibrate on more."
            )
        return torch.stack([windows[place * len(windows) // written.prompts] for place in range(written.prompts)])

    @cached_property
    def _model(self) -> nn.Module:
        source = self._source
        if source.live is not None:
            return source.live
        return load(source.spec, self._dtype, self._device, source.trust_remote_code)[0]

    @property
    def _blocks(self) -> list[str]:
        return [block.path for block in self._source.anatomy.blocks]

    def _statistics(self) -> dict[str, Statistics]:
        """What the dense network says of the matrices' inputs; processes share the batches."""
        rank, world = processes()
        batches = [Batch(index, _read(part), 0, False) for index, part in enumerate(self._parts)][rank::world]
        held = {ref.parameter: self._model.get_parameter(ref.parameter).data for ref in self._refs.values()}
        collector = Collector(list(self._refs.values()), held, self._wanted, None, batches)
        for batch in batches:
            with collector.watching(batch):
                logits_of(self._model, batch.ids)
        return collector.results()

    @contextmanager
    def _recorded(self, part: _Part) -> Iterator[None]:
        """While it is open, what each block gives out is kept."""

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            part.outputs.append(_copied(output))

        handles = [self._model.get_submodule(path).register_forward_hook(keep) for path in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _known(self, part: _Part, begin: int) -> Iterator[None]:
        """While it is open, blocks before `begin` give out what they gave in the dense pass, without computing it."""
        swapped: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for path in self._blocks[:begin]:
                parent, _, name = path.rpartition(".")
                host, block = self._model.get_submodule(parent), self._model.get_submodule(path)
                swapped.append((host, name, block))
                host.register_module(name, _Known(block, part.outputs[begin - 1]))
            yield
        finally:
            for host, name, block in swapped:
                host.register_module(name, block)

    @contextmanager
    def _without(self, remove: Mapping[str, int]) -> Iterator[None]:
        """While it is open, these matrices lack so many weights each."""
        with ExitStack() as stack:
            for name, count in remove.items():
                ref = self._refs[name]
                matrix = view(ref, self._model.get_parameter(ref.parameter).data)
                kept = self._prune(ref, matrix.float(), count, self._seen.get(name, UNSEEN))
                stack.callback(matrix.copy_, matrix.clone())
                matrix.masked_fill_(~kept.to(matrix.device), 0)
            yield


class RehearsedTrials(DivergenceTrials):
    """Stands for trials while a method is timed: what is asked for would take longer the more goes, and is counted.

    seconds: what the passes that were asked for would take, by one that was tried on drawn tokens.
    """

    _asked = 0.0

    def write(self, written: Continuations) -> int:
        self._written = written
        self._asked += (
            2 + written.continuation / 4
        )  # generation reads little at a time, and as often as there are tokens
        return written.prompts * written.continuation

    def removing(self, remove: Mapping[str, int]) -> Trial:
        self._asked += 0.5 if len(remove) == 1 else 1  # on average a trial begins half way
        part = max(
            (count / self._refs[name].rows / self._refs[name].columns for name, count in remove.items()), default=0
        )
        return Trial(part**2, part**3)

    @property
    def seconds(self) -> float:
        length = self._written.prompt + self._written.continuation
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(
            self._source.anatomy.vocabulary, (min(BATCH, self._written.prompts), length), generator=drawn
        )
        with evaluating(self._model):
            logits_of(self._model, ids[:1])  # what is done once
            begun = time.time()
            logits_of(self._model, ids)
        return (time.time() - begun) * self._asked * self._written.prompts / len(ids)


class _Known(nn.Module):
    """In the place of a block: gives out what is known, and is otherwise what the block is."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        # past nn.Module, which would make it a part
        self.__dict__["block"], self.__dict__["output"] = block, output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _copied(self.output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


def _copied(output: Any) -> Any:
    """A copy of all tensors, because a block may add in place."""
    return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, output)


def _read(part: _Part) -> Tensor:
    """What is read in the pass over a text."""
    return torch.cat([part.prompts, part.text[:, :-1]], dim=1)

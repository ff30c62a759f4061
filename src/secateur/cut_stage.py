"""What steps that cut units or channels share, however they are decided."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cuts import Cuts
from secateur.errors import RequestError
from secateur.evaluation.arithmetic import multiply_adds
from secateur.files import write_tensors
from secateur.network.anatomy import Axis
from secateur.network.channels import cut_channels, norms_over
from secateur.network.store import build, build_own, raw_config
from secateur.network.stream import Fetch, streamed_logits
from secateur.network.surgery import adopt_buffers, adopt_numbers, cut_module
from secateur.network.verify import prompt
from secateur.network.views import Cut
from secateur.network.widths import round_width
from secateur.stage import Stage
from secateur.unit_budgets import asked_for, reached, tokens_counted
from secateur.units import asked_axes, asked_channels

logger = logging.getLogger(__name__)

_ABSENT = object()
SKIP = 4  # first tokens of a sequence, whose activations can be a hundred times as large: they do not count for units


class CutStage(Stage):
    """What steps that cut units or channels share: the cuts are in files, and the result follows from them."""

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.source, self.state / "cuts", self.step.method, self.dtype)

    def decided(self) -> dict[str, Any]:
        channels, of = self.cuts.width, self.source.anatomy.hidden
        told = {"units": self.cuts.decided(), "budget": self._budget()}
        if channels is None:
            return told
        asked, entry = asked_channels(self.step), {"kept": channels, "of": of}
        if asked is not None and (wanted := round_width(of, *asked)) != channels:
            entry["asked"] = wanted
        return told | {"channels": entry}

    def _budget(self) -> dict[str, Any]:
        found = reached(self.source, self.cuts.sizes())
        if self.cuts.width is not None:  # every matrix is smaller: what the result is built from tells
            narrow = build_own(self.source, self.cuts.config())
            found["parameters"]["after"] = sum(parameter.numel() for parameter in narrow.parameters())
            found["multiply_adds"]["after"] = multiply_adds(narrow, tokens_counted(self.source))
        before, after = found["parameters"]["before"], found["parameters"]["after"]
        larger = (
            f"{self.step.method}: the result has more parameters than the model ({after:,} instead of {before:,}): a head "
            "that shared the embedding has a matrix of its own, or matrices beside parts of blocks outweigh what went."
        )
        if after > before and larger not in self.warnings:
            self.warnings.append(larger)
        return {"asked": asked_for(self.step), "reached": found}

    def config(self) -> dict[str, Any]:
        return self.cuts.config()

    @contextmanager
    def reference(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.cuts.turning is not None:
                stack.enter_context(self.cuts.turning.reference())
            elif self.cuts.channels is not None:
                stack.enter_context(norms_over(self.source.skeleton, self.cuts.where, self.cuts.channels))
            stack.enter_context(self.cuts.reference())
            yield

    def expected(self) -> Fetch:
        fetch = self.cuts.silenced()
        if self.cuts.turning is not None:  # rounded as it is written, and turned back: it would be rounded twice
            return fetch
        rounded = self.cuts.rounded
        return lambda names: {
            name: tensor if name in rounded else self._cast(name, tensor).float()
            for name, tensor in fetch(names).items()
        }

    def apply(self, module: nn.Module) -> None:
        self._decide_all()
        budget = self._budget()  # before the module that its source shows has other shapes
        cuts = {where: self.cuts.read(*where) for where in self.cuts.known()}
        if self.cuts.turning is not None:
            raise RequestError(f"{self.step.method} does not rotate live modules; give a directory and an output.")
        if self.cuts.channels is not None:
            self._narrow(module, cuts)
            self.notes["budget"] = budget
            return
        heads = any(axis != "neurons" for _, axis in cuts)  # modules keep numbers of them
        wanted = None
        if heads:
            silenced = self._silenced(module)
            with self.cuts.reference(silenced):
                wanted = self._outputs(silenced)
        try:
            # so that a module whose widths its configuration can say may be saved
            raw = self.cuts.config(plain=True)
            if heads and (after := build(self.source, raw)) is not None:
                before = build(self.source, raw_config(self.source))
                adopt_numbers(module, before or after, after)
                if self.cuts.heads is not None:
                    self.cuts.heads.apply(module, after)
            for key, value in raw.items():
                if getattr(self.source.config, key, _ABSENT) != value:
                    setattr(self.source.config, key, value)
        except RequestError as error:
            logger.info("the cut module keeps the configuration that it had: %s", error)
        cut_module(module, self.source.anatomy, cuts, self.cuts.heads)
        if wanted is not None:
            self._compare(module, wanted)
        self.notes["budget"] = budget
        self._note_kept()

    def _note_kept(self) -> None:
        self.notes["kept"] = {axis: {str(b): n for b, n in kept.items()} for axis, kept in self.cuts.sizes().items()}
        if self.cuts.channels is not None:
            self.notes["kept"]["channels"] = len(self.cuts.channels)

    def _narrow(self, module: nn.Module, cuts: Mapping[tuple[int, Axis], Cut]) -> None:
        """Cuts channels, and units beside them, out of a live module, in place; its configuration must be able to say it."""
        raw, ids = self.cuts.config(plain=True), torch.tensor([prompt(self.source.anatomy.vocabulary)])
        before, after = build(self.source, raw_config(self.source)), build(self.source, raw)
        assert after is not None and self.cuts.channels is not None, "the configuration was found by building it"
        with self.reference():
            wanted = streamed_logits(self.source.skeleton, self.source.anatomy, self.expected(), ids)
        cut_module(module, self.source.anatomy, cuts)
        cut_channels(module, self.cuts.where, self.cuts.channels)
        adopt_numbers(module, before or after, after)
        adopt_buffers(module, after)
        for key, value in raw.items():
            if getattr(self.source.config, key, _ABSENT) != value:
                setattr(self.source.config, key, value)
        self._compare(module, wanted)
        self._note_kept()

    def _silenced(self, module: nn.Module) -> nn.Module:
        """A copy with nothing cut, and what is to be cut silent."""
        copy = deepcopy(module).float() if self.cuts.rounded else deepcopy(module)
        names = [name for name, _ in module.named_parameters()]
        with torch.no_grad():
            for name, tensor in self.cuts.silenced()(names).items():
                copy.get_parameter(name).copy_(tensor)
        return copy

    @torch.no_grad()
    def _outputs(self, module: nn.Module) -> Tensor:
        """Logits of a live module on a fixed prompt, the last ones in a second call that reads the cache of the first."""
        device = next(module.parameters()).device
        ids = torch.tensor([prompt(self.source.anatomy.vocabulary)], device=device)
        first = module(ids[:, :-2], use_cache=True)
        second = module(ids[:, -2:], use_cache=True, past_key_values=first.past_key_values)
        return torch.cat([first.logits, second.logits], dim=1).float()

    def _compare(self, module: nn.Module, wanted: Tensor) -> None:
        """Modules may keep the number of their heads or experts unseen. Raises RequestError when they then err."""
        try:
            # what is rounded once in the one and not in the other is compared in float32
            found = self._outputs(deepcopy(module).float() if self.cuts.rounded else module).to(wanted.device)
            same = bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())
        except Exception as error:  # whatever a foreign module does with fewer heads
            logger.info("the cut module does not run: %s", error)
            same = False
        if not same:
            what = "channels" if self.cuts.channels is not None else " or ".join(asked_axes(self.step))
            raise RequestError(
                f"{type(module).__name__} does not compute with fewer {what} as a live module; give its directory and an "
                "output, or choose axis=neurons."
            )

    @abstractmethod
    def _decide_all(self) -> None:
        """Decides every cut, for a live module."""

    def _leave(self) -> None:
        if self.artifacts is not None and (kept := self.cuts.kept()):
            write_tensors(self.artifacts / "kept.safetensors", kept)

"""A step that removes whole blocks: statistics of all blocks, one decision, then the others are copied under new numbers."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.flow import Flow, FlowPass, LossWithout
from secateur.calibration.gradients import BlockGradients, learn_block_gradients
from secateur.calibration.samples import LENGTH, Calibration, Samples, kept_samples
from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.files import write_json, write_tensors
from secateur.network.blocks import Blocks, Kept, lacking
from secateur.network.depth import StoredNumbers, blocks_to_remove, drop_blocks, shortened_config
from secateur.network.heterogeneous import BlockShape, heterogeneous_config
from secateur.network.modelling_file import BLOCK, frame, nothings, part_parameters
from secateur.network.store import raw_config
from secateur.network.stream import Fetch, Piece
from secateur.network.trace import set_submodule
from secateur.stage import Stage
from secateur.workspace import Journal


@dataclass
class LayerStage(Stage):
    """A step whose method sees all blocks and says which stay."""

    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        self.registered = self.step.registered
        self.asked = set(self.registered.asked(self.step.parameters).values())
        self.kept = Kept(())
        self.part: str = self.step.parameters["part"]
        self._config: dict[str, Any] = {}
        self._saved = True  # otherwise no configuration need say what is left

    def apply(self, module: nn.Module) -> None:
        self._saved = False
        self._prepare()
        if self.part != BLOCK:
            self._empty(module)
            self.notes["blocks"] = self.decided()["blocks"]
            return
        drop_blocks(module, self.source.anatomy, self.kept.blocks, self._config)
        self.notes["blocks"] = self.decided()["blocks"]

    def expected(self) -> Fetch:
        """The source's parameters with those of removed blocks zero, so that they add nothing to the hidden states.

        That it has this effect was tried by `check_skippable`. Nothing of what renamed and wrote the result is used again.
        """
        gone = self._gone()

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            found = {}
            for name in names:
                if name in gone:
                    found[name] = torch.zeros(self.source.skeleton.get_parameter(name).shape)
                else:
                    found[name] = self._cast(name, self.source.parameter(name)).float()
            return found

        return fetch

    def _gone(self) -> set[str]:
        """The parameters that are removed, by name in the model."""
        blocks = [block for block in self.source.anatomy.blocks if block.index not in self.kept.blocks]
        return {name for block in blocks for name in part_parameters(block, self.part)}

    def _empty(self, module: nn.Module) -> None:
        """Puts what adds nothing in the place of the part, in the blocks of a live module that lose it."""
        plain = frame(raw_config(self.source), type(self.source.config))
        if plain is None:
            raise RequestError(
                f"{type(module).__name__} is no class of transformers, so no part of its blocks can go alone."
            )
        removed = set(self.decided()["blocks"]["removed"])
        for path, make in nothings(plain, self.part).items():
            for block in self.source.anatomy.blocks:
                if block.index in removed:
                    set_submodule(module, f"{block.path}.{path}", make(block.index))

    def seconds(self) -> float:
        blocks = self.source.anatomy.blocks
        begun = time.time()
        if not self.asked & {Flow, LossWithout}:
            first = Blocks(self.source, 0, device=self.device, part=self.part)[0]
            for tensor in first.matrices():
                tensor.abs().sum()
            return (time.time() - begun) * len(blocks)
        positions = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(self.calibration.length or LENGTH, positions)
        drawn = self._context("tokens").generator()
        ids = list(torch.randint(self.source.anatomy.vocabulary, (self.calibration.count, length), generator=drawn))
        batches = self._pass(Samples(ids, [], "random")).batches
        begun = time.time()
        self._pass(Samples(list(batches[0].ids), [], "random"), losses=False).run(blocks=[0])
        # hidden states that lack a block go through all blocks behind it, and through the head
        times = len(blocks) if LossWithout not in self.asked else len(blocks) * (len(blocks) + 3) / 2
        return (time.time() - begun) * len(batches) * times

    def decided(self) -> dict[str, Any]:
        without = lacking(self.source, self.part)
        count = len(self.source.anatomy.blocks) - len(without)
        removed = [block.index for block in self.source.anatomy.blocks if block.index not in self.kept.blocks]
        scores = {str(index): score for index, score in sorted(self.kept.scores.items())}
        kept = [index for index in self.kept.blocks if index not in without]
        said = {"kept": kept, "removed": removed, "of": count, "scores": scores}
        return {"blocks": said if self.part == BLOCK else {"part": self.part, **said}}

    def config(self) -> dict[str, Any]:
        return self._config

    def _prepare(self) -> None:
        def decide(context: Context) -> dict[str, Any]:
            kept = self._decide(context)
            self._say(kept)
            return {"kept": list(kept.blocks), "scores": {str(index): score for index, score in kept.scores.items()}}

        told = self._once("kept", decide)
        self._say(Kept(tuple(told["kept"]), {int(index): score for index, score in told["scores"].items()}))

    def _say(self, kept: Kept) -> None:
        """Takes a decision over, if a configuration and stored names can say it."""
        self.kept = kept
        if self.part == BLOCK:
            self._config = shortened_config(self.source, kept.blocks)
            self._numbers = StoredNumbers(self.source)
            return
        gone = [block.index for block in self.source.anatomy.blocks if block.index not in kept.blocks]
        self._keys = {key for name in self._gone() for key in self.source.stored_keys(name)}
        self._config = raw_config(self.source)
        if gone and self._saved:
            shapes = {index: BlockShape(skip=(self.part,)) for index in gone}
            self._config = heterogeneous_config(self.source, self._config, shapes)

    def _decide(self, context: Context) -> Kept:
        """Which blocks stay, by the method. Raises RunError when it gives back what cannot be done."""
        parameters, count = self.step.parameters, len(self.source.anatomy.blocks)
        remove = blocks_to_remove(self.step.method, parameters, count, lacking(self.source, self.part))
        if not remove and parameters["remove"] is None and parameters["ratio"]:
            context.warn(
                f"{self.step.method}: ratio={parameters['ratio']} of {count} blocks is less than half a block."
            )
        blocks = Blocks(self.source, remove, parameters["protect"] or (), self.device, self.part)
        given: dict[type, Any] = {Blocks: blocks, Context: context, **self._statistics(context)}
        asked = self.registered.asked(parameters)
        arguments = {name: given[need] if name in asked else None for name, need in self.registered.needs.items()}
        kept: Kept = self.registered.function(**arguments, **self._parameters(self.registered, parameters))
        wrong = [index for index, score in kept.scores.items() if not math.isfinite(score)]
        if wrong:
            raise RunError(f"{self.step.method}: the score of block {wrong[0]} is not finite; check the model.")
        ordered = list(kept.blocks) == sorted(set(kept.blocks) & set(range(count)))
        if not ordered or len(kept.blocks) != count - remove or not blocks.protected <= set(kept.blocks):
            raise RunError(
                f"{self.step.method}: blocks {list(kept.blocks)} were kept, which is not what was asked for."
            )
        return kept

    def _statistics(self, context: Context) -> dict[type, Any]:
        """What the method asks for of calibration tokens, collected once and kept in the state."""
        found: dict[type, Any] = {}
        if not self.step.calibrated:
            return found
        drawn = self._context("samples").generator("samples")
        wishes = self.calibration
        if wishes.held_out is None:  # nothing is solved on the tokens, so there is no error to see on others
            wishes = wishes.model_copy(update={"held_out": 0})
        samples = kept_samples(self.source, wishes, self.state, drawn, self.seed, self.progress, self.library)
        context.note("calibration", samples.describe())
        if BlockGradients in self.asked:
            path = self.state / "gradients.json"
            found[BlockGradients] = learn_block_gradients(
                self.source, samples, path, self.device, self.progress, self.part
            )
        if self.asked & {Flow, LossWithout}:
            tokens = self._pass(samples)
            tokens.run(self.progress)
            if Flow in self.asked:
                found[Flow] = tokens.flow()
            if LossWithout in self.asked:
                found[LossWithout] = tokens.loss_without()
        return found

    def _pass(self, samples: Samples, losses: bool = True) -> FlowPass:
        dtype = getattr(torch, self.calibration.dtype)
        losses = losses and LossWithout in self.asked
        return FlowPass(self.source, samples, self.state, dtype, self.device, losses, self.part)

    def _pieces(self) -> list[Piece]:
        """Those of the source without what belongs to removed blocks."""
        left: list[Piece] = []
        for piece in super()._pieces():
            keys = tuple(key for key in piece.keys if self._renamed(key) is not None)
            blocks = tuple(index for index in piece.blocks if index in self.kept.blocks or self.part != BLOCK)
            if keys:
                left.append(replace(piece, index=len(left), blocks=blocks, keys=keys))
        return left

    def _renamed(self, key: str) -> str | None:
        if self.part != BLOCK:  # the blocks keep their numbers
            return None if key in self._keys else key
        return self._numbers.renamed(key, self.kept.blocks)

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any]:
        read = self.source.read(piece.keys)
        tensors = {self._renamed(key) or key: self._cast(key, tensor) for key, tensor in read.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {"tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

    def _leave(self) -> None:
        if self.artifacts is not None:
            write_json(self.artifacts / "blocks.json", self.decided()["blocks"])

"""A step that removes feed-forward neurons: plan or cut block by block, then write narrower tensors."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.synthetic import SyntheticGram, synthetic_grams
from secateur.context import Context, barrier, processes
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_json, write_tensors, write_text
from secateur.network.store import resized_config
from secateur.network.stream import Fetch, Piece
from secateur.network.surgery import cut_module, cut_tensors, silence_tensors
from secateur.network.views import Cut, Network, Plan, Units
from secateur.stage import Stage
from secateur.workspace import Journal

logger = logging.getLogger(__name__)


@dataclass
class UnitStage(Stage):
    """A step whose method sees the neurons of one block, or all of them, and says which stay."""

    grams: dict[int, SyntheticGram] = field(default_factory=dict)

    def _prepare(self) -> None:
        plan = self._plan() if self.step.registered.scope == "network" else None
        if plan is not None:
            resized_config(self.source, {block: len(cut.kept) for block, cut in plan.cuts.items()})
        if SyntheticGram in self.step.registered.needs.values():
            self._collect()

    def apply(self, module: nn.Module) -> None:
        cuts = self.cuts_in_memory()
        try:
            # so that a module whose widths its configuration can say may be saved
            for key, value in resized_config(
                self.source, {b: len(c.kept) for b, c in cuts.items()}, plain=True
            ).items():
                if getattr(self.source.config, key, value) != value:
                    setattr(self.source.config, key, value)
        except RequestError as error:
            logger.info("the cut module keeps the configuration that it had: %s", error)
        cut_module(module, self.source.anatomy, cuts)
        self.notes["kept"] = {str(block): len(cut.kept) for block, cut in cuts.items()}

    def seconds(self) -> float:
        begun = time.time()
        self.collect_in_memory()
        once, begun = time.time() - begun, time.time()
        layers = [block.index for block in self.source.anatomy.blocks if block.feed_forward]
        self.cuts_in_memory(layers[:1])
        return once + (time.time() - begun) * len(layers)

    def decided(self) -> dict[str, Any]:
        blocks = self.source.anatomy.blocks
        units = {
            str(block): {"kept": width, "of": blocks[block].feed_forward.units}  # type: ignore[union-attr]
            for block, width in self.widths().items()
        }
        return {"units": units}

    def config(self) -> dict[str, Any]:
        return resized_config(self.source, self.widths())

    def _leave(self) -> None:
        if self.artifacts is not None:
            kept = {f"block {block}": self.cut(block).kept for block in self._cut_blocks()}
            write_tensors(self.artifacts / "kept.safetensors", kept)

    def cuts_in_memory(self, blocks: Sequence[int] | None = None) -> dict[int, Cut]:
        """The cuts alone, nothing written: for live modules, and for timing on some `blocks` only."""
        layers = [b for b in self.source.anatomy.blocks if b.feed_forward and (blocks is None or b.index in blocks)]
        context = Context(self.seed, self.index, progress=self.progress)
        cuts: dict[int, Cut] = {}
        if self.step.registered.scope == "network":
            cuts = dict(self._call(Network(self.source, self.device, blocks), context).cuts)
            for index, cut in cuts.items():
                self._check_cut(index, cut)
        self.collect_in_memory()
        for block in layers if self.step.registered.scope == "units" else []:
            assert block.feed_forward is not None
            cuts[block.index] = self._call(Units(self.source, block.index, block.feed_forward, self.device), context)
            self._check_cut(block.index, cuts[block.index])
        self.notes, self.warnings = context.notes, context.warnings
        return cuts

    def collect_in_memory(self) -> None:
        """The statistics that the method asks for, if any; once."""
        if SyntheticGram in self.step.registered.needs.values() and not self.grams:
            synthetic_grams(self.source, Context(self.seed, self.index).generator("zipf"), self.grams.__setitem__)

    def widths(self) -> dict[int, int]:
        """Units kept in each block, as they were written."""
        return {block: len(self.cut(block).kept) for block in self._cut_blocks()}

    def cut(self, block: int) -> Cut:
        """The cut of a block, as it was planned and kept in the state."""
        tensors, _ = read_tensors(self.state / "cuts" / f"{block}.safetensors")
        return Cut(tensors["kept"], tensors.get("down"), tensors.get("down_bias"))

    def expected(self) -> Fetch:
        """The source's parameters with what was cut silenced instead: the reload check runs the uncut network with them.

        Nothing of what cut and wrote the result is used again, so a mistake there shows.
        """
        inside = {name: block for block in self.source.anatomy.blocks for name in block.parameters}
        cut_blocks = set(self._cut_blocks())

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            tensors = self.source.read_parameters(names)
            for block in {inside[name].index: inside[name] for name in names if name in inside}.values():
                if block.index in cut_blocks and block.feed_forward:
                    tensors.update(silence_tensors(tensors, block.feed_forward, self.cut(block.index)))
            return {name: self._cast(name, tensor).float() for name, tensor in tensors.items()}

        return fetch

    def _cut_blocks(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.state / "cuts").glob("*.safetensors"))

    def _call(self, scope: Network | Units, context: Context) -> Any:
        registered = self.step.registered
        provided = {Context: lambda: context, SyntheticGram: lambda: self._grams(scope)}
        given = {name: provided.get(need, lambda: scope)() for name, need in registered.needs.items()}
        # gradients stay possible: weights come without them, and a method that learns takes its own
        return registered.function(**given, **self._parameters(registered, self.step.parameters))

    def _grams(self, scope: Any) -> SyntheticGram:
        return self.grams.get(scope.block) or SyntheticGram.read(self.state / "grams" / f"{scope.block}.safetensors")

    def _collect(self) -> None:
        """Statistics of every block, kept in the state; the first process computes them for all."""
        marker = self.state / "grams" / "complete"
        if processes()[0] == 0 and not marker.exists():
            blocks = sum(block.feed_forward is not None for block in self.source.anatomy.blocks)
            with self.progress("statistics", blocks) as bar:

                def keep(block: int, gram: SyntheticGram) -> None:
                    gram.write(self.state / "grams" / f"{block}.safetensors")
                    bar.advance()

                synthetic_grams(self.source, self._context("grams").generator("zipf"), keep)
            write_text(marker, "")
        barrier()

    def _plan(self) -> Plan:
        """The plan of a method that sees the whole network: made once, then read from the state."""
        marker = self.state / "plan.json"
        made = marker.exists()
        barrier()  # everybody has looked before the first process can have written it
        if not made:
            context = self._context("method")
            plan = self._call(Network(self.source, self.device), context)
            if processes()[0] == 0:
                for block, cut in plan.cuts.items():
                    self._save(block, cut)
                write_json(marker, {"notes": context.notes, "warnings": context.warnings})
            barrier()
        said = json.loads(marker.read_text())
        self.notes.update(said["notes"])
        self.warnings += said["warnings"]
        return Plan({block: self.cut(block) for block in self._cut_blocks()})

    def _check_cut(self, block: int, cut: Cut) -> None:
        """Raises RunError naming the block when a method returned what cannot be done, before any of it is kept."""
        feed_forward = self.source.anatomy.blocks[block].feed_forward
        assert feed_forward is not None
        kept, where = cut.kept, f"{self.step.method}, block {block}"
        ordered = len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
        if not ordered or int(kept[0]) < 0 or int(kept[-1]) >= feed_forward.units:
            raise RunError(f"{where}: an impossible set of neurons was kept; nothing was cut there.")
        for name, tensor, shape in (
            ("output weights", cut.down, (feed_forward.hidden, len(kept))),
            ("output bias", cut.down_bias, (feed_forward.hidden,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RunError(f"{where}: new {name} have shape {list(tensor.shape)}, not {list(shape)}.")
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{where}: the new {name} hold non-finite values; use a smaller ratio, other parameters of the method "
                    "or another seed."
                )

    def _save(self, block: int, cut: Cut) -> None:
        self._check_cut(block, cut)
        tensors = {"kept": cut.kept, "down": cut.down, "down_bias": cut.down_bias}
        write_tensors(
            self.state / "cuts" / f"{block}.safetensors",
            {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None},
        )

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any]:
        """Reads a piece, cuts its blocks, writes its shard; says what the journal is to hold."""
        tensors = self.source.read(piece.keys)
        said: dict[str, Any] = {"notes": {}, "warnings": []}
        for index in piece.blocks:
            block = self.source.anatomy.blocks[index]
            if self.step.registered.scope == "units" and block.feed_forward:
                context = self._context(f"block-{index}")
                self._save(index, self._call(Units(self.source, index, block.feed_forward, self.device), context))
                said["notes"].update({f"block {index}: {key}": value for key, value in context.notes.items()})
                said["warnings"] += context.warnings
            if (self.state / "cuts" / f"{index}.safetensors").exists() and block.feed_forward:
                cut = self.cut(index)
                before = self.source.assemble(block.parameters, tensors)
                for parameter, tensor in cut_tensors(before, block.feed_forward, cut).items():
                    tensors.update(self.source.take_apart(parameter, tensor, tensors))
        tensors = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {**said, "tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

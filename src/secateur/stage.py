"""One step of a recipe applied to one model: plan, cut, write, block by block."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.context import Context, Progress, barrier, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_json, write_tensors
from secateur.network.source import Source
from secateur.network.store import copy_companions, resized_config, shard_name, stored_dtype, write_config, write_index
from secateur.network.stream import Fetch, Piece, pieces
from secateur.network.surgery import cut_tensors
from secateur.network.views import Cut, Network, Units
from secateur.recipe import Step
from secateur.registry import Plan
from secateur.tensor.widths import round_width
from secateur.workspace import Journal

logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """One step on its way from a source to a directory.

    Args:
        source: the model before the step.
        step: method and parameters.
        index: position in the recipe; addresses the random streams.
        target: directory that gets the model.
        state: folder for what a killed run needs to go on.
        dtype: of the written weights, None to keep the source's.
        shard_bytes: neighbouring blocks share a shard up to this size.
    """

    source: Source
    step: Step
    index: int
    seed: int
    target: Path
    state: Path
    dtype: torch.dtype | None = None
    shard_bytes: int = 256 * 10**6
    device: str = "cpu"
    progress: Progress = silent
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises RequestError before anything is written when this step cannot be done to this model."""
        require_units(self.source, self.step)
        widths = planned_widths(self.source, self.step)
        # any narrower width shows whether the configuration can say it
        some = {
            block.index: max(1, block.feed_forward.units - 1)
            for block in self.source.anatomy.blocks
            if block.feed_forward
        }
        resized_config(self.source, widths or some)

    def run(self) -> None:
        """Writes the result to `target`; what is finished already is not done again."""
        journal = Journal(self.state)
        plan = self._plan() if self.step.registered.scope == "network" else None
        if plan is not None:
            resized_config(self.source, {block: len(cut.kept) for block, cut in plan.cuts.items()})
        work = pieces(self.source, self.shard_bytes)
        done = {entry["shard"] for entry in journal.entries() if (self.target / entry["shard"]).exists()}
        rank, world = processes()
        mine = [piece for piece in work if piece.index % world == rank]
        with self.progress("writing", len(mine)) as bar:
            for piece in mine:
                name = shard_name(piece.index, len(work))
                if name not in done:
                    journal.add({"shard": name, **self._write(piece, name)})
                bar.advance()
        barrier()
        entries = {entry["shard"]: entry for entry in journal.entries()}
        for entry in entries.values():
            self.notes.update(entry.get("notes", {}))
            self.warnings += [sentence for sentence in entry.get("warnings", []) if sentence not in self.warnings]
        if rank == 0:
            self._finish({name: entry["tensors"] for name, entry in entries.items()})
        barrier()

    def cuts_in_memory(self, blocks: Sequence[int] | None = None) -> dict[int, Cut]:
        """The cuts alone, nothing written: for live modules, and for timing on some `blocks` only."""
        layers = [b for b in self.source.anatomy.blocks if b.feed_forward and (blocks is None or b.index in blocks)]
        context = Context(self.seed, self.index, progress=self.progress)
        cuts: dict[int, Cut] = {}
        if self.step.registered.scope == "network":
            cuts = dict(self._call(Network(self.source, self.device, blocks), context).cuts)
        for block in layers if self.step.registered.scope == "units" else []:
            assert block.feed_forward is not None
            cuts[block.index] = self._call(Units(self.source, block.index, block.feed_forward, self.device), context)
        self.notes, self.warnings = context.notes, context.warnings
        return cuts

    def widths(self) -> dict[int, int]:
        """Units kept in each block, as they were written."""
        return {block: len(self.cut(block).kept) for block in self._cut_blocks()}

    def cut(self, block: int) -> Cut:
        """The cut of a block, as it was planned and kept in the state."""
        tensors, _ = read_tensors(self.state / "cuts" / f"{block}.safetensors")
        return Cut(tensors["kept"], tensors.get("down"), tensors.get("down_bias"))

    def expected(self) -> Fetch:
        """Every parameter of the result as this step computes it from the source: what the reload check compares with."""
        inside = {name: block for block in self.source.anatomy.blocks for name in block.parameters}
        cut_blocks = set(self._cut_blocks())

        def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
            keys = {name: self.source.keys[name] for name in names}
            stored = self.source.read(dict.fromkeys(keys.values()))
            tensors = {name: stored[key] for name, key in keys.items()}
            for block in {inside[name].index: inside[name] for name in names if name in inside}.values():
                if block.index in cut_blocks and block.feed_forward:
                    tensors.update(cut_tensors(tensors, block.feed_forward, self.cut(block.index)))
            return {name: self._cast(tensor).float() for name, tensor in tensors.items()}

        return fetch

    def _cut_blocks(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.state / "cuts").glob("*.safetensors"))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(stored_dtype(self.source, self.dtype, tensor.dtype))

    def _context(self, folder: str) -> Context:
        return Context(self.seed, self.index, self.state / folder, self.target / "secateur", self.progress)

    def _call(self, scope: Network | Units, context: Context) -> Any:
        registered = self.step.registered
        given = {name: context if need is Context else scope for name, need in registered.needs.items()}
        parameters = {
            name: self.step.parameters[name]
            for name, parameter in inspect.signature(registered.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        with torch.no_grad():
            return registered.function(**given, **parameters)

    def _plan(self) -> Plan:
        """The plan of a method that sees the whole network: made once, then read from the state."""
        marker = self.state / "plan.json"
        if not marker.exists():
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

    def _save(self, block: int, cut: Cut) -> None:
        units = next(b.feed_forward.units for b in self.source.anatomy.blocks if b.index == block and b.feed_forward)
        kept = cut.kept
        if len(kept) == 0 or not bool((kept[1:] > kept[:-1]).all()) or int(kept[0]) < 0 or int(kept[-1]) >= units:
            raise RunError(
                f"{self.step.method} kept an impossible set of neurons in block {block}; nothing was cut there."
            )
        tensors = {"kept": kept, "down": cut.down, "down_bias": cut.down_bias}
        write_tensors(
            self.state / "cuts" / f"{block}.safetensors",
            {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None},
        )

    def _write(self, piece: Piece, name: str) -> dict[str, Any]:
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
                keys = {parameter: self.source.keys[parameter] for parameter in block.parameters}
                before = {parameter: tensors[key] for parameter, key in keys.items()}
                for parameter, tensor in cut_tensors(before, block.feed_forward, cut).items():
                    tensors[keys[parameter]] = tensor
        tensors = {key: self._cast(tensor) for key, tensor in tensors.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {**said, "tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

    def _finish(self, shards: Mapping[str, Mapping[str, int]]) -> None:
        raw = resized_config(self.source, self.widths())
        stored = {self._cast(torch.empty(0, dtype=info.dtype)).dtype for info in self.source.tensors.values()}
        floats = [dtype for dtype in stored if dtype.is_floating_point]
        copy_companions(self.source, self.target)
        write_index(self.target, shards)
        write_config(self.target, raw, floats[0] if len(floats) == 1 else None)


def require_units(source: Source, step: Step) -> None:
    """Raises RequestError naming the first block whose feed-forward a method of this kind cannot see."""
    for block in source.anatomy.blocks:
        if block.feed_forward is None:
            raise RequestError(
                f"{step.method} cuts feed-forward neurons, but {block.path} of {source.spec} is a {block.kind} block: "
                f"{block.note or 'no feed-forward was recognised in it'}."
            )


def planned_widths(source: Source, step: Step) -> dict[int, int] | None:
    """Units that a width method will keep, by block, from its `ratio`, `ratios` and `multiple_of`; None if it has none."""
    parameters = step.parameters
    if "ratio" not in parameters:
        return None
    layers = [block for block in source.anatomy.blocks if block.feed_forward]
    ratios = parameters.get("ratios") or [parameters["ratio"]] * len(layers)
    if len(ratios) != len(layers):
        raise RequestError(
            f"{step.method}: ratios has {len(ratios)} values, but {source.spec} has {len(layers)} layers."
        )
    return {
        block.index: round_width(block.feed_forward.units, ratio, parameters.get("multiple_of", 1))
        for block, ratio in zip(layers, ratios, strict=True)
        if block.feed_forward
    }

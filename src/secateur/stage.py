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

from secateur.calibration.synthetic import SyntheticGram, synthetic_grams
from secateur.context import Context, Progress, barrier, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_tensors, write_json, write_tensors, write_text
from secateur.network.source import Source
from secateur.network.store import (
    companions,
    copy_companions,
    resized_config,
    shard_name,
    stored_dtype,
    write_config,
    write_index,
)
from secateur.network.stream import Fetch, Piece, pieces
from secateur.network.surgery import cut_tensors, silence_tensors
from secateur.network.views import Cut, Network, Units
from secateur.network.widths import round_width
from secateur.recipe import Step
from secateur.registry import Plan
from secateur.workspace import COMPANIONS, Journal

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
        artifacts: folder for what the method leaves beside the model, such as a policy.
        dtype: of the written weights, None to keep the source's.
        shard_bytes: neighbouring blocks share a shard up to this size.
    """

    source: Source
    step: Step
    index: int
    seed: int
    target: Path
    state: Path
    artifacts: Path | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = 256 * 10**6
    device: str = "cpu"
    progress: Progress = silent
    grams: dict[int, SyntheticGram] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Writes the result to `target`; what is finished already is not done again."""
        journal = Journal(self.state)
        plan = self._plan() if self.step.registered.scope == "network" else None
        if plan is not None:
            resized_config(self.source, {block: len(cut.kept) for block, cut in plan.cuts.items()})
        if SyntheticGram in self.step.registered.needs.values():
            self._collect()
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
            keys = {name: self.source.keys[name] for name in names}
            stored = self.source.read(dict.fromkeys(keys.values()))
            tensors = {name: stored[key] for name, key in keys.items()}
            for block in {inside[name].index: inside[name] for name in names if name in inside}.values():
                if block.index in cut_blocks and block.feed_forward:
                    tensors.update(silence_tensors(tensors, block.feed_forward, self.cut(block.index)))
            return {name: self._cast(name, tensor).float() for name, tensor in tensors.items()}

        return fetch

    def _cut_blocks(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.state / "cuts").glob("*.safetensors"))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """In the dtype that is written. Raises RunError when a value does not fit into it."""
        dtype = stored_dtype(self.source, self.dtype, tensor.dtype)
        cast = tensor.to(dtype)
        if dtype != tensor.dtype and cast.numel() and not bool(torch.isfinite(torch.stack(cast.aminmax())).all()):
            raise RunError(
                f"{name} holds values too large for {dtype}; write another with --dtype bfloat16 or float32."
            )
        return cast

    def _context(self, folder: str) -> Context:
        return Context(self.seed, self.index, self.state / folder, self.artifacts, self.progress)

    def _call(self, scope: Network | Units, context: Context) -> Any:
        registered = self.step.registered
        provided = {Context: lambda: context, SyntheticGram: lambda: self._grams(scope)}
        given = {name: provided.get(need, lambda: scope)() for name, need in registered.needs.items()}
        parameters = {
            name: self.step.parameters[name]
            for name, parameter in inspect.signature(registered.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        # gradients stay possible: weights come without them, and a method that learns takes its own
        return registered.function(**given, **parameters)

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
        tensors = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {**said, "tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

    def _finish(self, shards: Mapping[str, Mapping[str, int]]) -> None:
        raw = resized_config(self.source, self.widths())
        stored = {stored_dtype(self.source, self.dtype, info.dtype) for info in self.source.tensors.values()}
        floats = [dtype for dtype in stored if dtype.is_floating_point]
        if self.artifacts is not None:
            kept = {f"block {block}": self.cut(block).kept for block in self._cut_blocks()}
            write_tensors(self.artifacts / "kept.safetensors", kept)
        # said before they appear, so that a restart knows them for ours
        write_json(self.state / COMPANIONS, {"files": [path.name for path in companions(self.source)]})
        copy_companions(self.source, self.target)
        write_index(self.target, shards)
        write_config(self.target, raw, floats[0] if len(floats) == 1 else None)


def check_steps(source: Source, steps: Sequence[Step], saved: bool = True) -> dict[int, int] | None:
    """Raises RequestError when these steps cannot be done to this model; nothing is read or written for that.

    saved: the result is to be written, so its configuration must be able to say the widths.

    Returns: the width of each layer after the last step, by block, None where no step has a `ratio` to tell it by.
    """
    network = source.anatomy
    if saved and network.head is None:
        raise RequestError(
            f"{source.spec} holds {type(source.skeleton).__name__}, which has no head that predicts tokens, so a result "
            "could not be checked; save it as a whole language model (such as LlamaForCausalLM)."
        )
    original = {block.index: block.feed_forward.units for block in network.blocks if block.feed_forward}
    widths: dict[int, int] | None = None
    for step in steps:
        _require_units(source, step)
        planned = _planned_widths(source, step, widths or original)
        widths = planned or widths
        if saved:
            # without a plan any narrower width shows whether the configuration can say it
            resized_config(source, planned or {index: max(1, units - 1) for index, units in original.items()})
    return widths


def _require_units(source: Source, step: Step) -> None:
    """Raises RequestError naming the first block whose feed-forward a method of this kind cannot see."""
    for block in source.anatomy.blocks:
        if block.feed_forward is None:
            raise RequestError(
                f"{step.method} cuts feed-forward neurons, but {block.path} of {source.spec} is a {block.kind} block: "
                f"{(block.note or 'no feed-forward was recognised in it').rstrip('.')}."
            )


def _planned_widths(source: Source, step: Step, units: Mapping[int, int]) -> dict[int, int] | None:
    """Units kept of `units`, by block, from a step's `ratio`, `ratios` and `multiple_of`; None if it has none."""
    parameters = step.parameters
    if "ratio" not in parameters:
        return None
    ratios = parameters.get("ratios") or [parameters["ratio"]] * len(units)
    if len(ratios) != len(units):
        raise RequestError(
            f"{step.method}: ratios has {len(ratios)} values, but {source.spec} has {len(units)} layers."
        )
    return {
        index: round_width(units[index], ratio, parameters.get("multiple_of", 1))
        for index, ratio in zip(units, ratios, strict=True)
    }

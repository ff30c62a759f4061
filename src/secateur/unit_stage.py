"""Steps that remove whole units, decided block by block."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.block_stage import BlockStage, Loaded, errors
from secateur.calibration.passes import Passes, Rows
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import UNSEEN, HeldOutInputs, Statistics
from secateur.calibration.synthetic import SyntheticGram, synthetic_grams
from secateur.calibration.unit_gradients import (
    UnitGradients,
    learn_unit_gradients,
    pretend_unit_gradients,
    read_unit_gradients,
)
from secateur.context import Context, barrier, processes
from secateur.cut_stage import SKIP, CutStage
from secateur.errors import RunError
from secateur.files import write_text
from secateur.head_dim_choice import choose_head_dims, time_head_dims
from secateur.network.anatomy import AXES, Axis, Block
from secateur.network.channel_views import ChannelUnits
from secateur.network.matrices import MatrixRef, view
from secateur.network.store import resized_config
from secateur.network.surgery import remade, silence_tensors
from secateur.network.views import Cut, Plan, Units, Update, norm_products, units_of
from secateur.solving import relative_error
from secateur.unit_allocation import Scored, allocated, divider
from secateur.unit_budgets import Sizes
from secateur.unit_scores import score_units
from secateur.units import asked_axes, cuts_channels, output_matrices, planned_channels, planned_sizes


@dataclass
class UnitStage(CutStage, BlockStage):
    """A step whose method sees the units of one kind in one block."""

    skip = SKIP

    def __post_init__(self) -> None:
        self.sizes = planned_sizes(self.source, self.step) or {}
        self.settled: dict[str, dict[str, Any]] = {}
        self._found: dict[int, dict[tuple[Axis, int | None], Cut]] = {}
        super().__post_init__()

    def _refs(self) -> dict[int, list[MatrixRef]]:
        refs = output_matrices(self.source, asked_axes(self.step))
        self._axes: dict[str, Axis] = {
            ref.name: axis for block in refs.values() for ref in block for axis in AXES if ref.role == axis
        }
        return refs

    def _decide_all(self) -> None:
        self._prepare()
        said = []
        for block in self.source.anatomy.blocks:
            said.append(self._do(block))
            self._forget(block.index)
        self._conclude(said)

    def seconds(self) -> float:
        begun = time.time()
        self._collect()
        if cuts_channels(self.step):
            self._choose_channels(self._context("method"))
        if not self.refs:  # dimensions inside heads alone, or channels, which no walk decides
            if "head_dims" not in asked_axes(self.step):
                return time.time() - begun
            drawn = self._drawn() if self.solver.statistics else None
            return time.time() - begun + time_head_dims(self, drawn, self._context("method"))
        if self.solver.gradients:
            # what they are does not matter here; nothing is known of how long they take
            first = 0 if self.solver.statistics else min(self.refs)
            groups = [
                group for axis in asked_axes(self.step) if (group := self.source.anatomy.blocks[first].group(axis))
            ]
            pretend_unit_gradients(self.state / "gradients", first, groups)
        # scores are taken in a walk of their own, which is no longer than that in which units are cut
        walks = 2 if (method := divider(self.step)) and method.scope == "widths" else 1
        return time.time() - begun + super().seconds() * walks

    def decided(self) -> dict[str, Any]:
        told = super().decided()
        units = told["units"]
        for name, entry in self.settled.items():
            ref = next(ref for refs in self.refs.values() for ref in refs if ref.name == name)
            of = units[self._axes[name]][str(ref.block)]
            if ref.expert is None:
                of |= entry
            elif entry:
                of.setdefault("by_expert", {})[str(ref.expert)] = entry
        return told

    def _prepare(self) -> None:
        self._collect()
        self._allocate()
        if "head_dims" in asked_axes(self.step):
            samples = self._samples() if self.solver.statistics else None
            self._once("head-dims", lambda context: choose_head_dims(self, samples, context))
        if cuts_channels(self.step):
            self._once("channels", self._choose_channels)
        super()._prepare()

    def _choose_channels(self, context: Context) -> dict[str, Any]:
        """Which channels of the stream stay: asked once, for the whole network."""
        units_left: Sizes = {axis: left for axis, left in self.sizes.items() if axis != "head_dims"}
        keep = planned_channels(self.source, self.step, self.cuts.where, resized_config(self.source, units_left))
        assert keep is not None, "what cuts units has a ratio"
        units = ChannelUnits(self.source, self.cuts.where, keep, self.device)
        cut: Cut = self.solver.ask({Units: units, Context: context}, UNSEEN, units.name)
        if cut.count != keep:
            raise RunError(f"{self.step.method}: {cut.count} channels were kept, not {keep}.")
        if keep < units.count and processes()[0] == 0:
            self.cuts.save_stream(Plan(channels=cut.kept.cpu()))
        return {}

    def _allocate(self) -> None:
        """Divides the budget among the blocks, once; without an allocation all are treated alike."""
        if divider(self.step) is None:
            return
        if self.step.calibrated:
            self.notes["calibration"] = self._samples().describe()

        def decide(context: Context) -> dict[str, Any]:
            alike: Sizes = self.sizes

            def scored() -> Scored:
                if self.solver.gradients:
                    self._learn(self._samples())
                return score_units(self, self._samples)

            return {"widths": allocated(self.source, self.step, alike, context, scored, self.device)}

        widths = self._once("allocation", decide)["widths"]
        self.sizes = {axis: {int(block): kept for block, kept in units.items()} for axis, units in widths.items()}

    def units(self, block: int, axis: Axis, expert: int | None = None) -> Units:
        """The units of a block, and how many of them are to stay; of neurons inside experts those of one."""
        return units_of(self.source, block, axis, self.sizes[axis][block], self.device, expert)

    def given(self, units: Units, context: Context, held_out: Tensor | None = None) -> dict[type, Any]:
        """What a method may ask for of these units, beside what is said of their inputs.

        held_out: (t, d) some of these on held-out tokens.
        """
        given: dict[type, Any] = {Units: units, Context: context, HeldOutInputs: HeldOutInputs(held_out)}
        if SyntheticGram in self.solver.needs:
            given[SyntheticGram] = SyntheticGram.read(self._gram(units.block))
        if self.solver.gradients:
            group = self.cuts.group(units.block, units.axis)
            given[UnitGradients] = read_unit_gradients(self.state / "gradients", units.block, group)
        return given

    def context(self, folder: str) -> Context:
        return self._context(folder)

    @contextmanager
    def running(self, block: Block, passes: Passes) -> Iterator[dict[str, Tensor]]:
        """A block's weights, by name, in its modules, for tokens to pass through."""
        self._passes = passes
        try:
            with self._loaded(block, set()) as loaded:
                yield loaded.working
        finally:
            self._passes = None

    def _conclude(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super()._conclude(entries)
        for entry in entries:
            self.settled.update(entry.get("settled", {}))
        self.notes.update(errors(self.settled))

    def _learn(self, samples: Samples) -> None:
        if self.solver.gradients:
            folder, axes = self.state / "gradients", asked_axes(self.step)
            learn_unit_gradients(self.source, samples, axes, folder, self.device, self.progress)

    def _beside(self, block: Block) -> set[str]:
        groups = (block.group(axis) for axis in asked_axes(self.step))
        return {group.output_bias for group in groups if group and group.output_bias}

    def _settle(
        self, number: int, ref: MatrixRef, loaded: Loaded, seen: Statistics, rows: Rows, context: Context
    ) -> dict[str, Any]:
        axis = self._axes[ref.name]
        group = self.cuts.group(ref.block, axis)
        units = self.units(ref.block, axis, ref.expert)
        entry: dict[str, Any] = {}
        if self.solver.statistics and not seen.tokens:
            cut = self._unseen(units, context)
            entry["unseen"] = True
        else:
            cut = self.solver.ask(self.given(units, context, rows(ref.name, True)), seen, units.name)
        if ref.expert is None:
            self.cuts.check(ref.block, axis, cut)
        else:
            group = group.one
            self.cuts.check_expert(ref.block, axis, ref.expert, cut)
        if cut.count != units.keep:
            raise RunError(f"{self.step.method}, {units.name}: {cut.count} units were kept, not {units.keep}.")
        self._found.setdefault(ref.block, {})[axis, ref.expert] = cut
        if context.notes:
            entry["notes"] = context.notes
        if axis == "experts":  # chosen by weights alone, so no tokens pass that they would have to be hidden from
            return entry
        names = [name for name in (group.output.parameter, group.output_bias) if name]
        names += remade(group, cut)
        for name in names:  # without tokens only what may change is there, and what makes units seldom does
            if name not in loaded.working:
                loaded.working[name] = self.source.parameter(name).to(self.device, copy=True)

        def entry_of(tensor: Tensor) -> Tensor:
            return tensor if ref.expert is None else tensor[ref.expert]

        silenced = silence_tensors({name: entry_of(loaded.base(name)) for name in names}, group, cut)
        before = {name: entry_of(loaded.base(name)).clone() for name in names}
        for name, tensor in silenced.items():
            rounded = self._cast(name, tensor, self._written(name))
            for place in {id(t): t for t in (loaded.base(name), loaded.working[name])}.values():
                entry_of(place).copy_(rounded)
        old, new = (view(ref, tensors[ref.parameter]).float() for tensors in (before, silenced))
        shift = None
        if group.output_bias and cut.output_bias is not None:
            shift = (silenced[group.output_bias] - before[group.output_bias]).float()
        for held_out, key in ((False, "calibration_error"), (True, "held_out_error")):
            inputs = rows(ref.name, held_out)
            if inputs is not None and cut.makers is None:  # what makes units anew gives other inputs than those seen
                entry[key] = relative_error(inputs, old, Update(new, torch.ones_like(new, dtype=torch.bool)), shift)
        return entry

    def _unseen(self, units: Units, context: Context) -> Cut:
        """What becomes of units that no token has reached: of one expert those with the smallest weights go, since nothing
        is known of its inputs.

        Raises RunError for any others.
        """
        if units.expert is None:
            raise RunError(f"{units.name}: no calibration token reached it, so nothing is known of its units.")
        context.warn(
            f"block {units.block}: some experts were reached by no calibration token (`unseen` in the receipt), so their "
            "neurons were chosen by weight norms; more tokens would reach them."
        )
        return units.best(norm_products(units))

    def _keep(self, block: Block, loaded: Loaded, write: bool) -> None:
        found = self._found.pop(block.index, {})
        for axis in dict.fromkeys(axis for axis, _ in found) if write else ():
            cuts = {expert: cut for (each, expert), cut in found.items() if each == axis}
            if None in cuts:
                self.cuts.save(block.index, axis, cuts[None])
            else:
                self.cuts.save(block.index, axis, self._stacked(block.index, axis, cuts))

    def _stacked(self, block: int, axis: Axis, cuts: Mapping[int | None, Cut]) -> Cut:
        """One cut of the neurons of all experts; those that keep their columns say so, where others give new ones."""
        every = [cuts[expert] for expert in range(self.cuts.group(block, axis).stacked)]
        if any(cut.output is not None for cut in every):
            for expert, cut in enumerate(every):
                if cut.output is None:
                    units = self.units(block, axis, expert)
                    every[expert] = replace(cut, output=units.output[:, units.columns(cut.kept)].cpu())
        if any(cut.makers is not None for cut in every):
            for expert, cut in enumerate(every):
                if cut.makers is None:
                    coupled = self.units(block, axis, expert).coupled
                    every[expert] = replace(cut, makers=tuple(rows[cut.kept].cpu() for rows in coupled))
        return Cut.stacked(every)

    def _change(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        self.cuts.apply(blocks, tensors)

    def _do(self, block: Block) -> dict[str, Any]:
        with self.cuts.heads.norms(self.source.skeleton) if self.cuts.heads else nullcontext():
            return super()._do(block)

    @contextmanager
    def _loaded(self, block: Block, names: set[str]) -> Iterator[Loaded]:
        """Dimensions inside heads, which are decided before, are silent while tokens pass."""
        with super()._loaded(block, names) as loaded:
            if self.cuts.heads is not None and self._passes is not None and block.index in self.cuts.heads.where:
                cut = self.cuts.read(block.index, "head_dims")
                silenced = self.cuts.heads.silence(block.index, loaded.working, cut, lambda old: old.dtype)
                for name, tensor in silenced.items():
                    loaded.working[name].copy_(tensor)
            yield loaded

    def _kept(self, block: int) -> bool:
        decided_here = {ref.role for ref in self.refs.get(block, ())}
        return decided_here <= {axis for index, axis in self.cuts.known() if index == block}

    def _gram(self, block: int) -> Path:
        return self.state / "grams" / f"{block}.safetensors"

    def _collect(self) -> None:
        """Statistics without data of every block, kept in the state; the first process computes them for all."""
        if SyntheticGram not in self.solver.needs:
            return
        marker = self.state / "grams" / "complete"
        if processes()[0] == 0 and not marker.exists():
            blocks = sum(block.feed_forward is not None for block in self.source.anatomy.blocks)
            with self.progress("statistics", blocks) as bar:

                def keep(block: int, gram: SyntheticGram) -> None:
                    gram.write(self._gram(block))
                    bar.advance()

                synthetic_grams(self.source, self._context("grams").generator("zipf"), keep)
            write_text(marker, "")
        barrier()

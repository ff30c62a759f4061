"""Steps that remove whole units: planned for the network at once, or decided block by block."""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.block_stage import BlockStage, Loaded, errors
from secateur.calibration.evaluator import Evaluator, Rehearsal
from secateur.calibration.passes import Passes, Rows
from secateur.calibration.routing import Routing, RoutingPass
from secateur.calibration.samples import LENGTH, Calibration, Samples, kept_samples
from secateur.calibration.silenced_flow import SilencedFlow
from secateur.calibration.statistics import Statistics
from secateur.calibration.synthetic import SyntheticGram, synthetic_grams
from secateur.calibration.unit_gradients import (
    UnitGradients,
    learn_unit_gradients,
    pretend_unit_gradients,
    read_unit_gradients,
)
from secateur.context import Context, barrier, give_back_memory, processes
from secateur.cuts import Cuts
from secateur.errors import RequestError, RunError
from secateur.files import write_tensors, write_text
from secateur.network.anatomy import AXES, Axis, Block
from secateur.network.matrices import MatrixRef, view
from secateur.network.store import build, raw_config, resized_config
from secateur.network.stream import Fetch, Piece
from secateur.network.surgery import adopt_numbers, cut_module, remade, silence_tensors
from secateur.network.verify import prompt
from secateur.network.views import Cut, Network, Plan, Units, Update, units_of
from secateur.solving import relative_error
from secateur.stage import Stage
from secateur.unit_allocation import Scored, allocated, divider
from secateur.unit_budgets import Sizes, asked_for, reached
from secateur.unit_scores import score_units
from secateur.units import asked_axes, output_matrices, planned_sizes
from secateur.workspace import Journal

logger = logging.getLogger(__name__)

_ABSENT = object()
SKIP = 4  # tokens at the beginning of a sequence that do not count for units


class _CutsUnits(Stage):
    """What both kinds share: the cuts are in files, and the result follows from them."""

    @property
    def cuts(self) -> Cuts:
        return Cuts(self.source, self.state / "cuts", self.step.method, self.dtype)

    def decided(self) -> dict[str, Any]:
        return {"units": self.cuts.decided(), "budget": self._budget()}

    def _budget(self) -> dict[str, Any]:
        return {"asked": asked_for(self.step), "reached": reached(self.source, self.cuts.sizes())}

    def config(self) -> dict[str, Any]:
        return resized_config(self.source, self.cuts.sizes())

    def expected(self) -> Fetch:
        fetch = self.cuts.silenced()
        return lambda names: {name: self._cast(name, tensor).float() for name, tensor in fetch(names).items()}

    def reference(self) -> AbstractContextManager[None]:
        return self.cuts.unchosen()

    def apply(self, module: nn.Module) -> None:
        self._decide_all()
        budget = self._budget()  # before the module that its source shows has other shapes
        cuts = {where: self.cuts.read(*where) for where in self.cuts.known()}
        heads = any(axis != "neurons" for _, axis in cuts)  # modules keep numbers of them
        wanted = None
        if heads:
            silenced = self._silenced(module)
            with self.cuts.unchosen(silenced):
                wanted = self._outputs(silenced)
        try:
            # so that a module whose widths its configuration can say may be saved
            raw = resized_config(self.source, self.cuts.sizes(), plain=True)
            if heads and (after := build(self.source, raw)) is not None:
                before = build(self.source, raw_config(self.source))
                adopt_numbers(module, before or after, after)
            for key, value in raw.items():
                if getattr(self.source.config, key, _ABSENT) != value:
                    setattr(self.source.config, key, value)
        except RequestError as error:
            logger.info("the cut module keeps the configuration that it had: %s", error)
        cut_module(module, self.source.anatomy, cuts)
        if wanted is not None:
            self._compare(module, wanted)
        self.notes["kept"] = {axis: {str(b): n for b, n in kept.items()} for axis, kept in self.cuts.sizes().items()}
        self.notes["budget"] = budget

    def _silenced(self, module: nn.Module) -> nn.Module:
        """A copy with nothing cut, and what is to be cut silent."""
        copy = deepcopy(module)
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
            found = self._outputs(module)
            same = bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())
        except Exception as error:  # whatever a foreign module does with fewer heads
            logger.info("the cut module does not run: %s", error)
            same = False
        if not same:
            raise RequestError(
                f"{type(module).__name__} does not compute with fewer {' or '.join(asked_axes(self.step))} as a live "
                "module; give its directory and an output, or choose axis=neurons."
            )

    @abstractmethod
    def _decide_all(self) -> None:
        """Decides every cut, for a live module."""

    def _leave(self) -> None:
        if self.artifacts is not None:
            write_tensors(self.artifacts / "kept.safetensors", self.cuts.kept())


@dataclass
class PlanStage(_CutsUnits):
    """A step whose method sees the units of the whole network at once and says which stay."""

    calibration: Calibration = field(default_factory=Calibration)

    def seconds(self) -> float:
        begun = time.time()
        context = Context(self.seed, self.index)
        if Evaluator in self._asked:
            rehearsal = Rehearsal(self.source, self._drawn(), asked_axes(self.step), self.device)
            self._ask(context, statistics={Evaluator: rehearsal})
            return time.time() - begun + rehearsal.seconds
        if Routing in self._asked:  # choosing by it takes no time
            samples = self._drawn()
            batches = self._routing(samples).batches
            first = next(block.index for block in self.source.anatomy.blocks if block.experts)
            begun = time.time()
            self._routing(Samples(list(batches[0].ids), [], "random")).run(blocks=range(first + 1))
            return (time.time() - begun) / (first + 1) * len(batches) * len(self.source.anatomy.blocks)
        if SilencedFlow in self._asked:  # by one sequence and by two: what both share does not grow with the tokens
            took = []
            for count in (1, 2):
                begun = time.time()
                self._ask(context, statistics={SilencedFlow: self._silenced_flow(self._drawn(count))})
                took.append(time.time() - begun)
            return took[0] + max(took[1] - took[0], 0.0) * (self.calibration.count - 1)
        layers = [block.index for block in self.source.anatomy.blocks if block.feed_forward]
        self._ask(context, layers[:1])
        return (time.time() - begun) * len(layers)

    def _prepare(self) -> None:
        self._decide_all()
        resized_config(self.source, self.cuts.sizes())

    def _decide_all(self) -> None:
        def decide(context: Context) -> dict[str, Any]:
            plan = self._ask(context)
            for (block, axis), cut in plan.cuts.items() if processes()[0] == 0 else ():
                self.cuts.save(block, axis, cut)
            return {}

        self._once("plan", decide)
        give_back_memory()

    def _ask(
        self, context: Context, blocks: Sequence[int] | None = None, statistics: Mapping[type, Any] | None = None
    ) -> Plan:
        """What the method plans for these blocks, all by default; with these statistics, by default those of the recipe."""
        registered, parameters = self.step.registered, self.step.parameters
        network: Network[Units] = Network(self.source, self.device, blocks, asked_axes(self.step))
        given: dict[type, Any] = {Network: network, Context: context}
        if statistics is not None:
            given |= statistics
        elif self.step.calibrated:
            given |= self._statistics(context)
        asked = registered.asked(parameters)
        arguments = {name: given[need] if name in asked else None for name, need in registered.needs.items()}
        # gradients stay possible: weights come without them, and a method that learns takes its own
        plan: Plan = registered.function(**arguments, **self._parameters(registered, parameters))
        return plan

    def _statistics(self, context: Context) -> dict[type, Any]:
        """What the method asks for of calibration tokens, by type, collected once and kept in the state."""
        wishes = self.calibration
        if wishes.held_out is None:  # nothing is solved on the tokens, so there is no error to see on others
            wishes = wishes.model_copy(update={"held_out": 0})
        drawn = self._context("samples").generator("samples")
        samples = kept_samples(self.source, wishes, self.state, drawn, self.seed, self.progress)
        context.note("calibration", samples.describe())
        found: dict[type, Any] = {}
        if Evaluator in self._asked:
            found[Evaluator] = Evaluator(self.source, samples, asked_axes(self.step), self.device)
        if Routing in self._asked:
            tokens = self._routing(samples)
            tokens.run(self.progress)
            found[Routing] = tokens.routing()
        if SilencedFlow in self._asked:
            found[SilencedFlow] = self._silenced_flow(samples)
        return found

    @property
    def _asked(self) -> set[type]:
        return set(self.step.registered.asked(self.step.parameters).values())

    def _drawn(self, count: int | None = None) -> Samples:
        """Drawn tokens, as many as the recipe wants of calibration."""
        positions = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        shape = (count or self.calibration.count, min(self.calibration.length or LENGTH, positions))
        ids = torch.randint(self.source.anatomy.vocabulary, shape, generator=self._context("tokens").generator())
        return Samples(list(ids), [], "random")

    def _routing(self, samples: Samples) -> RoutingPass:
        return RoutingPass(self.source, samples, self.state, getattr(torch, self.calibration.dtype), self.device)

    def _silenced_flow(self, samples: Samples) -> SilencedFlow:
        return SilencedFlow(
            self.source, samples, self.device, SKIP if self.calibration.skip is None else self.calibration.skip
        )

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any]:
        tensors = self.source.read(piece.keys)
        self.cuts.apply([self.source.anatomy.blocks[index] for index in piece.blocks], tensors)
        tensors = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {"tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}


@dataclass
class UnitStage(_CutsUnits, BlockStage):
    """A step whose method sees the units of one kind in one block."""

    skip = SKIP

    def __post_init__(self) -> None:
        self.sizes = planned_sizes(self.source, self.step) or {}
        self.settled: dict[str, dict[str, Any]] = {}
        self._found: dict[int, dict[Axis, Cut]] = {}
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
            axis, block = self._axes[name], next(index for index, refs in self.refs.items() if _named(refs, name))
            units[axis][str(block)] |= entry
        return told

    def _prepare(self) -> None:
        self._collect()
        self._allocate()
        super()._prepare()

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

    def units(self, block: int, axis: Axis) -> Units:
        """The units of a block, and how many of them are to stay."""
        return units_of(self.source, block, axis, self.sizes[axis][block], self.device)

    def given(self, units: Units, context: Context) -> dict[type, Any]:
        """What a method may ask for of these units, beside what is said of their inputs."""
        given: dict[type, Any] = {Units: units, Context: context}
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
        axis = self._axes[ref.parameter]
        group = self.cuts.group(ref.block, axis)
        units = self.units(ref.block, axis)
        given = self.given(units, context)
        if self.solver.statistics and not seen.tokens:
            raise RunError(f"{units.name}: no calibration token reached it, so nothing is known of its units.")
        cut: Cut = self.solver.ask(given, seen, units.name)
        self.cuts.check(ref.block, axis, cut)
        if len(cut.kept) != units.keep:
            raise RunError(f"{self.step.method}, {units.name}: {len(cut.kept)} units were kept, not {units.keep}.")
        self._found.setdefault(ref.block, {})[axis] = cut
        if axis == "experts":  # chosen by weights alone, so no tokens pass that they would have to be hidden from
            return {"notes": context.notes} if context.notes else {}
        entry: dict[str, Any] = {"notes": context.notes} if context.notes else {}
        names = [name for name in (group.output.parameter, group.output_bias) if name]
        names += remade(group, cut)
        for name in names:  # without tokens only what may change is there, and what makes units seldom does
            if name not in loaded.working:
                loaded.working[name] = self.source.parameter(name).to(self.device, copy=True)
        silenced = silence_tensors({name: loaded.base(name) for name in names}, group, cut)
        before = {name: loaded.base(name).clone() for name in names}
        for name, tensor in silenced.items():
            rounded = self._cast(name, tensor, self._written(name))
            for place in {id(t): t for t in (loaded.base(name), loaded.working[name])}.values():
                place.copy_(rounded)
        old, new = (view(ref, tensors[ref.parameter]).float() for tensors in (before, silenced))
        shift = None
        if group.output_bias and cut.output_bias is not None:
            shift = (silenced[group.output_bias] - before[group.output_bias]).float()
        for held_out, key in ((False, "calibration_error"), (True, "held_out_error")):
            inputs = rows(ref.name, held_out)
            if inputs is not None and cut.makers is None:  # what makes units anew gives other inputs than those seen
                entry[key] = relative_error(inputs, old, Update(new, torch.ones_like(new, dtype=torch.bool)), shift)
        return entry

    def _keep(self, block: Block, loaded: Loaded, write: bool) -> None:
        found = self._found.pop(block.index, {})
        for axis, cut in found.items() if write else ():
            self.cuts.save(block.index, axis, cut)

    def _change(self, blocks: Sequence[Block], tensors: dict[str, Tensor]) -> None:
        self.cuts.apply(blocks, tensors)

    def _kept(self, block: int) -> bool:
        return any(index == block for index, _ in self.cuts.known())

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


def _named(refs: Sequence[MatrixRef], name: str) -> bool:
    return any(ref.name == name for ref in refs)

"""Steps that remove whole units: planned for the network at once, or decided block by block."""

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.block_stage import BlockStage, Loaded, errors
from secateur.calibration.activations import ActivationPass, Activations
from secateur.calibration.dense_pass import DensePass
from secateur.calibration.passes import Rows
from secateur.calibration.samples import LENGTH, Calibration, Samples, kept_samples
from secateur.calibration.statistics import Statistics
from secateur.calibration.stream_moment import StreamMoment, StreamPass
from secateur.calibration.synthetic import SyntheticGram, synthetic_grams
from secateur.context import Context, barrier, processes
from secateur.cuts import Cuts
from secateur.errors import RequestError, RunError
from secateur.files import write_tensors, write_text
from secateur.network.anatomy import AXES, Axis, Block
from secateur.network.channels import cut_channels, norms_over
from secateur.network.matrices import MatrixRef, view
from secateur.network.rotation import stretched
from secateur.network.store import build, raw_config
from secateur.network.stream import Fetch, Piece, streamed_logits
from secateur.network.surgery import adopt_buffers, adopt_numbers, cut_module, silence_tensors
from secateur.network.verify import prompt
from secateur.network.views import Cut, Network, Plan, Units, Update, units_of
from secateur.solving import relative_error
from secateur.stage import Stage
from secateur.units import asked_axes, output_matrices, planned_sizes
from secateur.workspace import Journal

logger = logging.getLogger(__name__)

PassT = TypeVar("PassT", bound=DensePass)
_PASSES: dict[type, type[ActivationPass] | type[StreamPass]] = {Activations: ActivationPass, StreamMoment: StreamPass}
_ABSENT = object()
SKIP = 4  # first tokens of a sequence, whose activations can be a hundred times as large


class _CutsUnits(Stage):
    """What both kinds share: the cuts are in files, and the result follows from them."""

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.source, self.state / "cuts", self.step.method, self.dtype)

    def decided(self) -> dict[str, Any]:
        kept, of = self.cuts.width, self.source.anatomy.hidden
        return {"units": self.cuts.decided()} | ({} if kept is None else {"channels": {"kept": kept, "of": of}})

    def config(self) -> dict[str, Any]:
        return self.cuts.config()

    def reference(self) -> AbstractContextManager[None]:
        if self.cuts.basis is not None:
            return stretched(self.source.skeleton, self.cuts.where, self.cuts.basis.shape[1])
        kept = self.cuts.channels
        return super().reference() if kept is None else norms_over(self.source.skeleton, self.cuts.where, kept)

    def expected(self) -> Fetch:
        fetch = self.cuts.silenced()
        if self.cuts.basis is not None:  # rounded as it is written, and turned back: it would be rounded twice
            return fetch
        return lambda names: {name: self._cast(name, tensor).float() for name, tensor in fetch(names).items()}

    def apply(self, module: nn.Module) -> None:
        self._decide_all()
        cuts = {where: self.cuts.read(*where) for where in self.cuts.known()}
        heads = any(axis == "heads" for _, axis in cuts)
        if self.cuts.basis is not None:
            raise RequestError(f"{self.step.method} does not rotate live modules; give a directory and an output.")
        if self.cuts.channels is not None:
            self._narrow(module, cuts)
            return
        wanted = self._outputs(self._silenced(module)) if heads else None
        try:
            # so that a module whose widths its configuration can say may be saved
            raw = self.cuts.config(plain=True)
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
        """Attention may keep the number of its heads where nobody sees it. Raises RequestError when it then errs."""
        try:
            found = self._outputs(module).to(wanted.device)
            same = bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())
        except Exception as error:  # whatever a foreign module does with fewer heads
            logger.info("the cut module does not run: %s", error)
            same = False
        if not same:
            what = "attention heads" if self.cuts.channels is None else "channels"
            raise RequestError(
                f"{type(module).__name__} does not compute with fewer {what} as a live module; give its directory and an "
                "output, or choose axis=neurons."
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
        if kinds := [
            kind for need, kind in _PASSES.items() if need in self._asked
        ]:  # next to them the method itself takes no time
            positions = getattr(self.source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
            length = min(self.calibration.length or LENGTH, positions)
            drawn = self._context("tokens").generator()
            ids = torch.randint(self.source.anatomy.vocabulary, (self.calibration.count, length), generator=drawn)
            batches = self._pass(Samples(list(ids), [], "random"), kinds[0]).batches
            self._pass(Samples(list(batches[0].ids), [], "random"), kinds[0]).run(blocks=[0])
            return (time.time() - begun) * len(batches) * len(self.source.anatomy.blocks)
        layers = [block.index for block in self.source.anatomy.blocks if block.feed_forward]
        self._ask(Context(self.seed, self.index), layers[:1])
        return (time.time() - begun) * len(layers)

    def _prepare(self) -> None:
        self._decide_all()
        self.cuts.config()
        if self.cuts.basis is not None and not any(Journal(self.state).entries()):
            self.cuts.check_rotation()

    def _decide_all(self) -> None:
        def decide(context: Context) -> dict[str, Any]:
            plan = self._ask(context)
            for (block, axis), cut in plan.cuts.items() if processes()[0] == 0 else ():
                self.cuts.save(block, axis, cut)
            if processes()[0] == 0:
                self.cuts.save_stream(plan)
            return {}

        self._once("plan", decide)

    def _ask(self, context: Context, blocks: Sequence[int] | None = None) -> Plan:
        registered, parameters = self.step.registered, self.step.parameters
        network: Network[Units] = Network(self.source, self.device, blocks, asked_axes(self.step))
        given: dict[type, Any] = {Network: network, Context: context}
        if self.step.calibrated:
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
        for need, kind in _PASSES.items():
            if need in self._asked:
                tokens = self._pass(samples, kind)
                tokens.run(self.progress)
                found[need] = tokens.activations() if isinstance(tokens, ActivationPass) else tokens.moment()
        return found

    @property
    def _asked(self) -> set[type]:
        return set(self.step.registered.asked(self.step.parameters).values())

    def _pass(self, samples: Samples, kind: type[PassT]) -> PassT:
        skip = SKIP if self.calibration.skip is None else self.calibration.skip
        return kind(self.source, samples, self.state, getattr(torch, self.calibration.dtype), self.device, skip)

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
        return time.time() - begun + super().seconds()

    def decided(self) -> dict[str, Any]:
        units = super().decided()["units"]
        for name, entry in self.settled.items():
            axis, block = self._axes[name], next(index for index, refs in self.refs.items() if _named(refs, name))
            units[axis][str(block)] |= entry
        return {"units": units}

    def _prepare(self) -> None:
        self._collect()
        super()._prepare()

    def _conclude(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super()._conclude(entries)
        for entry in entries:
            self.settled.update(entry.get("settled", {}))
        self.notes.update(errors(self.settled))

    def _beside(self, block: Block) -> set[str]:
        groups = (block.group(axis) for axis in asked_axes(self.step))
        return {group.output_bias for group in groups if group and group.output_bias}

    def _settle(
        self, number: int, ref: MatrixRef, loaded: Loaded, seen: Statistics, rows: Rows, context: Context
    ) -> dict[str, Any]:
        axis = self._axes[ref.parameter]
        group = self.cuts.group(ref.block, axis)
        units = units_of(self.source, ref.block, axis, self.sizes[axis][ref.block], self.device)
        given: dict[type, Any] = {Units: units, Context: context}
        if SyntheticGram in self.solver.needs:
            given[SyntheticGram] = SyntheticGram.read(self._gram(ref.block))
        if self.solver.statistics and not seen.tokens:
            raise RunError(f"{units.name}: no calibration token reached it, so nothing is known of its units.")
        cut: Cut = self.solver.ask(given, seen, units.name)
        self.cuts.check(ref.block, axis, cut)
        if len(cut.kept) != units.keep:
            raise RunError(f"{self.step.method}, {units.name}: {len(cut.kept)} units were kept, not {units.keep}.")
        self._found.setdefault(ref.block, {})[axis] = cut
        entry: dict[str, Any] = {"notes": context.notes} if context.notes else {}
        names = [name for name in (group.output.parameter, group.output_bias) if name]
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
            if inputs is not None:
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

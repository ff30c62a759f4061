"""Steps that remove units of the whole network, or channels, by one decision for all."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from secateur.calibration.activations import ActivationPass, Activations
from secateur.calibration.dense_pass import DensePass
from secateur.calibration.evaluator import Evaluator, Rehearsal
from secateur.calibration.routing import Routing, RoutingPass
from secateur.calibration.samples import LENGTH, Calibration, Samples, kept_samples
from secateur.calibration.silenced_flow import SilencedFlow
from secateur.calibration.sliced_stream import SlicedStream
from secateur.calibration.stream_moment import StreamMoment, StreamPass
from secateur.context import Context, give_back_memory, processes
from secateur.cut_stage import SKIP, CutStage
from secateur.files import write_tensors
from secateur.network.stream import Piece
from secateur.network.views import Network, Plan, Units
from secateur.tensor.directions import principal_directions
from secateur.units import asked_axes
from secateur.workspace import Journal

PassT = TypeVar("PassT", bound=DensePass)
_PASSES: dict[type, type[ActivationPass] | type[StreamPass]] = {Activations: ActivationPass, StreamMoment: StreamPass}


@dataclass
class PlanStage(CutStage):
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
        if SlicedStream in self._asked:
            return self._time_of_slicing()
        if kinds := [kind for need, kind in _PASSES.items() if need in self._asked]:
            # beside them the method itself takes no time
            samples = self._drawn()
            batches = self._pass(samples, kinds[0]).batches
            begun = time.time()
            self._pass(Samples(list(batches[0].ids), [], "random"), kinds[0]).run(blocks=[0])
            return (time.time() - begun) * len(batches) * len(self.source.anatomy.blocks)
        layers = [block.index for block in self.source.anatomy.blocks if block.feed_forward]
        self._ask(context, layers[:1])
        return (time.time() - begun) * len(layers)

    def _time_of_slicing(self) -> float:
        """By the first block on one batch of tokens; what is decided there takes as long whatever their number."""
        samples = self._drawn()
        batches = self._sliced(samples).batches
        stream = self._sliced(Samples(list(batches[0].ids), [], "random"))
        begun, decided = time.time(), 0.0
        for place, moment in stream.moments():
            if place == 2:
                break
            asked = time.time()
            stream.keep(principal_directions(moment.matrix))
            decided += time.time() - asked
        passed = time.time() - begun - decided
        return (passed * len(batches) + decided) * len(self.source.anatomy.blocks)

    def _prepare(self) -> None:
        self._decide_all()
        self.cuts.config()
        if self.cuts.turning is not None and not any(Journal(self.state).entries()):
            self.cuts.turning.check()

    def _decide_all(self) -> None:
        def decide(context: Context) -> dict[str, Any]:
            plan = self._ask(context)
            for (block, axis), cut in plan.cuts.items() if processes()[0] == 0 else ():
                self.cuts.save(block, axis, cut)
            if processes()[0] == 0:
                self.cuts.save_stream(plan)
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
        samples = kept_samples(self.source, wishes, self.state, drawn, self.seed, self.progress, self.library)
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
        if SlicedStream in self._asked:
            found[SlicedStream] = self._sliced(samples)
        for need, kind in _PASSES.items():
            if need in self._asked:
                seen = self._pass(samples, kind)
                seen.run(self.progress)
                found[need] = seen.activations() if isinstance(seen, ActivationPass) else seen.moment()
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

    def _sliced(self, samples: Samples) -> SlicedStream:
        # the directions of first tokens, large as these are, must not go: attention rests on them
        skip = self.calibration.skip or 0
        dtype, bases = getattr(torch, self.calibration.dtype), self.cuts.bases_of()
        return SlicedStream(
            self.source, samples, self.state, dtype, self.device, skip, bases, self.step.method, self.progress
        )

    def _pass(self, samples: Samples, kind: type[PassT]) -> PassT:
        skip = SKIP if self.calibration.skip is None else self.calibration.skip
        return kind(self.source, samples, self.state, getattr(torch, self.calibration.dtype), self.device, skip)

    def _write(self, piece: Piece, name: str, journal: Journal) -> dict[str, Any]:
        tensors = self.source.read(piece.keys)
        self.cuts.apply([self.source.anatomy.blocks[index] for index in piece.blocks], tensors)
        tensors = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
        write_tensors(self.target / name, tensors, {"format": "pt"})
        return {"tensors": {key: tensor.nbytes for key, tensor in tensors.items()}}

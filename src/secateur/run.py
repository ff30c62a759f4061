"""Does a recipe: opens, checks, streams through the steps, verifies, measures, writes the receipt."""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.checks import check_steps
from secateur.conclusion import reload_check, what_was_done
from secateur.context import Progress, barrier, process_group, processes, silent
from secateur.errors import RequestError, RunError
from secateur.files import read_json, sha256, write_json, write_text
from secateur.layer_stage import LayerStage
from secateur.network.clean_load import peak
from secateur.network.source import Source, check_device, open_model
from secateur.network.store import check_output
from secateur.network.verify import CleanProcess
from secateur.plan_stage import PlanStage
from secateur.recipe import Evaluate, Recipe
from secateur.report import measure, model_card
from secateur.stage import Stage
from secateur.unit_stage import UnitStage
from secateur.units import Left
from secateur.vocabulary_stage import VocabularyStage
from secateur.weight_stage import WeightStage
from secateur.workspace import RECEIPT, Workspace

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run gave.

    Args:
        output: directory of the model, None when a live module was only cut in memory.
        receipt: everything about the run in plain data, as in secateur.json.
        model: the cut module when a live one was given.
    """

    output: Path | None
    receipt: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None


def compress(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | Path | str | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    max_memory: int | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    evaluate: bool = True,
    shard_bytes: int = 256 * 10**6,
    progress: Progress = silent,
    clean: CleanProcess | None = None,
    shared: Path | None = None,
) -> Result:
    """Compresses a model by one method, or by a recipe, and writes it as an ordinary model directory.

    Args:
        model: a directory, hub id, `.gguf` file, `package:NAME`, or a live transformers module.
        method: name of a registered method, with its `parameters`; or else give `recipe`.
        recipe: a Recipe, or the path of a YAML recipe or of a receipt.
        output: directory to write; may be left out for a live module, which is then returned cut, uncut one untouched.
        dtype: of the written weights; None keeps the source's (bfloat16 for GGUF).
        max_memory: bytes that a whole model may take when it is checked and measured; default half of what is free.
        restart: start over instead of going on with what an interrupted run left.
        shard_bytes: neighbouring blocks share a shard of the result up to this size.
        clean: an open clean process for the reload check, where many results are checked one after another.
        shared: a folder for what several runs on one model need alike, each of which then does it once: the conversion of
            the source, its scan, calibration tokens. It must not outlive a change of the source.

    Raises RequestError when the request is wrong (nothing was written), RunError when the run failed and can go on.
    """
    plan, spec = request(model, method, parameters, recipe, seed, dtype)
    if isinstance(spec, nn.Module) and output is None:
        return _in_memory(spec, plan, device, progress)
    if output is None:
        raise RequestError("no output directory was named.")
    run = Run(
        spec, plan, Path(output), device, free_memory() // 2 if max_memory is None else max_memory, trust_remote_code,
        evaluate, shard_bytes, progress, clean, shared,
    )  # fmt: skip
    with process_group():
        try:
            return run.go(restart)
        except OSError as error:
            # what is written goes through secateur.files, which explains itself; this is the rest
            raise RunError(
                f"{error.filename or output}: {error.strerror or error}; remove the cause and start the same command "
                "again: it goes on from there."
            ) from error


def request(
    model: Any,
    method: str | None,
    parameters: Mapping[str, Any] | None,
    recipe: Recipe | Path | str | None,
    seed: int | None,
    dtype: str | None,
) -> tuple[Recipe, Any]:
    """The recipe, and the model that it is for. Raises RequestError where one of them is missing."""
    plan = _recipe(model, method, parameters, recipe, seed, dtype)
    spec = model if model is not None else plan.model
    if spec is None:
        raise RequestError("no model was named: give one, or a recipe with `model`.")
    plan.check_files()
    return plan, spec


def _recipe(
    model: Any,
    method: str | None,
    parameters: Mapping[str, Any] | None,
    recipe: Recipe | Path | str | None,
    seed: int | None,
    dtype: str | None,
) -> Recipe:
    if (method is None) == (recipe is None):
        raise RequestError("give either a method or a recipe.")
    if recipe is None:
        plan = Recipe.parse({"steps": [{method: dict(parameters or {})}]})
    else:
        plan = recipe if isinstance(recipe, Recipe) else Recipe.read(Path(recipe))
    changes = {
        "model": str(model) if isinstance(model, str | Path) else plan.model,
        "seed": plan.seed if seed is None else seed,
        "dtype": dtype or plan.dtype,
    }
    return Recipe.parse({**plan.plain(), **changes})


def free_memory() -> int:
    """Bytes of memory that are free for use now."""
    info = Path("/proc/meminfo")
    if info.exists():
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass
class Run:
    """One run, from the request to the receipt; parameters as `compress` takes them."""

    spec: str | Path | nn.Module
    recipe: Recipe
    output: Path
    device: str
    max_memory: int
    trust_remote_code: bool
    evaluate: bool
    shard_bytes: int
    progress: Progress
    clean: CleanProcess | None
    shared: Path | None = None

    def look(self, restart: bool) -> tuple[Source, Workspace, str, Left | None]:
        """Everything that can be refused before the weights are read; writes nothing.

        Returns: the source, the output directory and what it is to this run, what is left after the last step.
        """
        check_device(self.device)
        if self.evaluate and isinstance(self.recipe.evaluate, Evaluate):
            self.recipe.evaluate.check(self.trust_remote_code)
        source = open_model(self.spec, trust_remote_code=self.trust_remote_code)
        check_output(self.output, source)
        workspace = Workspace(self.output, self._identity(source))
        found = workspace.check(restart)
        left = check_steps(source, self.recipe.steps) if found != "finished" else None
        if source.tensors and found == "fresh":
            _ = source.parts  # a checkpoint that lacks a parameter is refused here
        return source, workspace, found, left

    def go(self, restart: bool) -> Result:
        started = time.time()
        source, workspace, found, _ = self.look(restart)
        barrier()  # nobody writes before everybody has looked
        if found == "finished":
            shutil.rmtree(workspace.state, ignore_errors=True)
            return Result(self.output, json.loads((self.output / RECEIPT).read_text()) if processes()[0] == 0 else {})
        hashes = self._scan(source) if source.tensors and found == "fresh" else None
        workspace.begin(restart)
        timings: dict[str, float] = {}
        try:
            if not source.tensors:
                source = self._convert(workspace)
            original, hashes = source, self._hashes(source, workspace, hashes)
            timings["opening"] = time.time() - started
            stages = self._steps(source, workspace, timings)
        except RequestError:
            # a method or a conversion found the request wrong: nothing is to have been written
            if found == "fresh" and processes()[0] == 0:
                workspace.abandon()
            raise
        if processes()[0] != 0:
            barrier()
            return Result(self.output)
        try:
            receipt = self._conclude(original, stages, workspace, hashes, timings, started)
        finally:
            barrier()
        return Result(self.output, receipt)

    def _identity(self, source: Source) -> dict[str, Any]:
        return {
            **self.recipe.identity(),
            "source": source.quick_print(),
            "threads": torch.get_num_threads(),
            "device": self.device,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "shard_bytes": self.shard_bytes,
            "versions": {name: version(name) for name in ("secateur", "torch", "transformers")},
        }

    def _scan(self, source: Source) -> dict[str, str]:
        """Hashes of the source's files; stops at the first non-finite tensor. The first process reads for all."""
        outcome: list[Any] = [None]
        if processes()[0] == 0:
            try:
                outcome[0] = scanned(source, self.shared, self.progress)
            except RequestError as error:
                outcome[0] = error
        if processes()[1] > 1:
            torch.distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], RequestError):
            raise outcome[0]
        return dict(outcome[0])

    def _convert(self, workspace: Workspace) -> Source:
        """The source as safetensors in the state folder: the first process converts, the others find it done."""
        for turn in (processes()[0] == 0, processes()[0] != 0):
            if turn:
                work = self.shared or workspace.state
                source = open_model(self.spec, work=work, trust_remote_code=self.trust_remote_code)
            barrier()
        return source

    def _hashes(self, source: Source, workspace: Workspace, known: dict[str, str] | None = None) -> dict[str, str]:
        """The hashes of the source, kept in the state, so that a run that goes on need not read everything again."""
        path = workspace.state / "scan.json"
        exists = path.exists()
        barrier()  # everybody has looked before the first process can have written it
        if known is None:
            known = json.loads(path.read_text()) if exists else self._scan(source)
            if not exists and (originals := source.place.originals):
                # what was converted was scanned; what counts as the source are the files that the person named
                known = {file.name: sha256(file) for file in originals}
        if processes()[0] == 0:
            write_json(path, known)
        barrier()
        return known

    def _stage(self, source: Source, index: int, target: Path, state: Path) -> Stage:
        last = index == len(self.recipe.steps) - 1
        # between steps weights stay as precise as they came; only the last step writes the wanted dtype
        wanted = self.recipe.dtype if last else ("float32" if source.place.weights == "gguf" else None)
        beside = self.output / "secateur"
        artifacts = beside if len(self.recipe.steps) == 1 else beside / f"step-{index}"
        return make_stage(
            self.recipe, index, source, target, state / f"step-{index}", artifacts=artifacts,
            dtype=getattr(torch, wanted) if wanted else None, shard_bytes=self.shard_bytes, device=self.device,
            progress=self.progress, library=self.shared if index == 0 else None,
        )  # fmt: skip

    def _steps(self, source: Source, workspace: Workspace, timings: dict[str, float]) -> list[Stage]:
        """Runs every step; each but the last writes a whole model into the state, which the next one opens."""
        stages: list[Stage] = []
        for index, step in enumerate(self.recipe.steps):
            begun = time.time()
            last = index == len(self.recipe.steps) - 1
            target = self.output if last else workspace.state / f"model-{index}"
            try:
                stage = self._stage(source, index, target, workspace.state)
                stage.run()
            except RequestError as error:
                if not stages:
                    raise
                # only what the steps before left shows that this one cannot be done; their work is not to be lost
                before = workspace.state / f"model-{index - 1}"
                raise RunError(
                    f"step {index} ({step.method}) cannot follow those before it: {error} What they made is kept in "
                    f"{before}: compress that further, or change the recipe and start over with --restart."
                ) from error
            stages.append(stage)
            timings[f"step {index}: {step.method}"] = time.time() - begun
            if not last:
                place = source.place
                source = open_model(target, trust_remote_code=self.trust_remote_code)
                # what the first source was decides dtype, licence and base model of the result
                source.place = place
        return stages

    def _conclude(
        self,
        source: Source,
        stages: Sequence[Stage],
        workspace: Workspace,
        hashes: Mapping[str, str],
        timings: dict[str, float],
        started: float,
    ) -> dict[str, Any]:
        begun = time.time()
        result, checked = reload_check(self.output, stages, self.max_memory, self.clean, self.trust_remote_code)
        timings["reload check"] = time.time() - begun
        for place, stage in enumerate(stages):
            if any(later.step.registered.scope != "weight" for later in stages[place + 1 :]):
                stage.superseded()
        begun = time.time()
        receipt = what_was_done(self.recipe, source, result, stages, checked, hashes)
        receipt["card"] = measure(
            source, result, self.recipe.evaluate if self.evaluate else False, self.max_memory, self.progress
        )
        timings["measuring"] = time.time() - begun
        receipt["timings"] = {**{name: round(value, 3) for name, value in timings.items()}}
        receipt["seconds"] = round(time.time() - started, 3)
        receipt["peak_memory"] = peak()
        write_text(self.output / "README.md", model_card(receipt))
        workspace.finish(receipt)
        return receipt


def scanned(source: Source, shared: Path | None, progress: Progress = silent) -> dict[str, str]:
    """SHA-256 of the source's files, read once, from the folder `shared` where another run on it has left them.

    Raises RequestError naming the first tensor with a value that is not finite.
    """
    path = shared / "scan.json" if shared else None
    told = read_json(path) if path and path.exists() else None
    if told is not None and told["source"] == source.quick_print():
        return dict(told["sha256"])
    with progress("reading", source.bytes) as bar:
        found = source.scan(bar.advance)
    if path:
        write_json(path, {"source": source.quick_print(), "sha256": found})
    return found


def _in_memory(module: nn.Module, recipe: Recipe, device: str, progress: Progress) -> Result:
    """Cuts a copy of a live module; widths may differ between layers here."""
    check_steps(open_model(module), recipe.steps, saved=False)
    copy = deepcopy(module)
    notes: list[dict[str, Any]] = []
    for index, step in enumerate(recipe.steps):
        with tempfile.TemporaryDirectory() as state:
            stage = make_stage(
                recipe, index, open_model(copy), Path(state), Path(state), device=device, progress=progress
            )
            stage.apply(copy)
        notes.append({"method": step.method, **stage.notes})
    return Result(None, {"recipe": recipe.plain(), "decisions": notes}, copy)


def make_stage(recipe: Recipe, index: int, source: Source, target: Path, state: Path, **options: Any) -> Stage:
    """The stage that does step `index` of a recipe; which kind follows from what its method asks for."""
    step = recipe.steps[index]
    kinds: dict[str, Callable[..., Stage]] = {
        "network": PlanStage,
        "units": UnitStage,
        "weight": WeightStage,
        "blocks": LayerStage,
        "vocabulary": VocabularyStage,
    }
    return kinds[step.registered.scope](
        source, step, index, recipe.seed, target, state, **options, calibration=recipe.calibration
    )

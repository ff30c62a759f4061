"""What a run would cut, write and need, before anything is written."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.activations import Activations
from secateur.calibration.divergence_trials import DivergenceTrials
from secateur.calibration.evaluator import Evaluator
from secateur.calibration.flow import Flow, LossWithout
from secateur.calibration.gradients import BlockGradients
from secateur.calibration.propagation import ACTIVATION_BYTES
from secateur.calibration.routing import Routing
from secateur.calibration.samples import LENGTH, SELF, Calibration
from secateur.calibration.silenced_flow import SilencedFlow
from secateur.calibration.sliced_stream import SlicedStream
from secateur.calibration.statistics import CrossGram, Gram
from secateur.calibration.stream_moment import StreamMoment
from secateur.calibration.synthetic import SyntheticGram
from secateur.checks import check_steps
from secateur.context import silent
from secateur.evaluation.divergent import LOGITS
from secateur.network.blocks import lacking
from secateur.network.channels import find_channels, turned_channels
from secateur.network.depth import blocks_to_remove
from secateur.network.matrices import MatrixRef
from secateur.network.modelling_file import BLOCK, part_parameters, passed_parts, places_of
from secateur.network.source import Source, conversion_dtype
from secateur.network.store import each_alone, group_left, stored_dtype
from secateur.network.stream import pieces
from secateur.network.stream_roles import find_roles
from secateur.network.vocabulary import token_rows
from secateur.recipe import Recipe, Step
from secateur.registry import ErrorCurves
from secateur.run import Run, make_stage, request
from secateur.solving import Solver
from secateur.targets import chosen, uniform
from secateur.tensor.patterns import Pattern
from secateur.unit_allocation import divider
from secateur.unit_budgets import Measure, asked_for, counted, tokens_counted
from secateur.units import Left, Sizes, asked_axes, output_matrices, rotates, turns
from secateur.vocabulary_stage import VocabularyStage

SHARD_BYTES = 256 * 10**6


def dry_run(
    model: str | Path | None = None,
    *,
    recipe: Recipe | Path | str | None = None,
    output: str | Path,
    seed: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    restart: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What `compress` would cut, write and need: plain data. Reads headers, and one block's weights to time the method."""
    plan, spec = request(model, None, None, recipe, seed, dtype)
    run = Run(spec, plan, Path(output), device, 0, trust_remote_code, True, SHARD_BYTES, silent, None)
    source, _, _, remaining = run.look(restart)
    wanted = getattr(torch, plan.dtype) if plan.dtype else None
    rows = rows_removed(source, plan, device)
    said = _needs(source, remaining or Left(), Path(output), wanted, plan, rows)
    place = next(path for path in (Path(output).absolute(), *Path(output).absolute().parents) if path.exists())
    said["disk_free"] = shutil.disk_usage(place).free
    if not source.tensors:
        said["time"] = "not known before the weights are converted"
        return said
    step = plan.steps[0]
    if step.registered.scope == "network" and isinstance(
        step.parameters.get("ratios"), list
    ):  # one for each layer, of which one is tried
        tried = step.model_copy(update={"parameters": {**step.parameters, "ratios": step.parameters["ratios"][:1]}})
        plan = plan.model_copy(update={"steps": (tried, *plan.steps[1:])})
    with tempfile.TemporaryDirectory() as folder:
        method = make_stage(plan, 0, source, Path(folder), Path(folder), device=device).seconds()
    begun = time.time()
    keys = {key for name in source.anatomy.blocks[0].parameters for key in source.stored_keys(name)}
    # summed, so that what is mapped from the file is really read
    size = sum(tensor.nbytes for tensor in source.read(keys).values() if tensor.float().sum() is not None)
    rest = (time.time() - begun) * 3 * source.bytes / max(size, 1)
    said["seconds"] = method + rest
    beside = "the reload check and measuring"
    solved = step.registered.scope in ("weight", "units")
    if (solved and Solver.of(step.registered, step.parameters).gradients) or BlockGradients in _asked(step):
        beside = f"gradients, {beside}"
    if step.calibrated and plan.calibration.data == SELF:
        beside = f"the writing of the calibration text, {beside}"
    said["time"] = f"about {method + rest:.0f} s by one block, besides {beside}"
    return said


def foretold(source: Source, plan: Recipe, rows: int) -> dict[str, Any]:
    """What `dry_run` tells of sizes, for a source that is open: from headers and shapes alone, nothing is timed.

    rows: how many tokens go, as `rows_removed` counts them. Raises RequestError where the steps cannot be done.
    """
    wanted = getattr(torch, plan.dtype) if plan.dtype else None
    return _needs(source, check_steps(source, plan.steps), Path(), wanted, plan, rows)


def _needs(
    original: Source,
    remaining: Left,
    output: Path,
    dtype: torch.dtype | None,
    plan: Recipe,
    rows: int,
) -> dict[str, Any]:
    """What a run would cut, zero, write and need, from headers and shapes alone. The disk it needs is an upper bound:
    models between steps and kept statistics are counted at the width that the source has.

    rows: how many tokens go.
    """
    steps, sizes = plan.steps, remaining.sizes
    cut = {
        axis: {
            index: (kept, group)
            for index, kept in widths.items()
            if (group := original.anatomy.blocks[index].group(axis)) is not None
        }
        for axis, widths in sizes.items()
    }

    count = left = len(original.anatomy.blocks)
    for step in steps:
        if step.registered.scope == "blocks" and step.parameters["part"] == BLOCK:
            left -= blocks_to_remove(step.method, step.parameters, left)
    # which blocks go is not known yet; counted are the last, which mostly are like all others
    gone = [block for block in original.anatomy.blocks if block.index >= left]
    removed: dict[str, int] = {
        name: original.skeleton.get_parameter(name).numel() for block in gone for name in block.parameters
    }
    parts: list[dict[str, Any]] = []
    lost: dict[str, set[int]] = {}  # which blocks earlier steps are counted to have left without a part
    for step in steps:
        if step.registered.scope == "blocks" and (part := step.parameters["part"]) != BLOCK:
            without = lacking(original, part) | lost.get(part, set())
            having = [block for block in original.anatomy.blocks[:left] if block.index not in without]
            fewer = blocks_to_remove(step.method, step.parameters, left, without)
            going = having[len(having) - fewer :]
            lost.setdefault(part, set()).update(block.index for block in going)
            names = [name for block in going for name in part_parameters(block, part)]
            removed |= {name: original.skeleton.get_parameter(name).numel() for name in names}
            parts.append({"part": part, "kept": len(having) - fewer, "of": len(having)})
    if rows:
        again = {name for group in original.anatomy.tied for name in group[1:]}
        dims = token_rows(original).dims
        for name, parameter in original.skeleton.named_parameters(remove_duplicate=False):
            dim = dims.get(original.stored_keys(name)[0])
            if dim is not None and name not in again:
                removed[name] = parameter.numel() // parameter.shape[dim] * rows
    for axis, widths in each_alone(original, sizes).items():
        for index, kept in widths.items():
            group = group_left(original.anatomy.blocks[index], axis, sizes)
            assert group is not None, "planned where it is"
            for part in group.slices:
                parameter = original.skeleton.get_parameter(part.parameter)
                fewer = parameter.numel() // parameter.shape[part.dim] * (group.count - kept) * part.width
                removed[part.parameter] = removed.get(part.parameter, 0) + fewer
    if channels := remaining.channels:
        turned = any(turns(step) for step in steps)
        _remove_channels(original, channels, removed, turned)
        if any(rotates(step) for step in steps) and (head := _untied(original)):
            removed[head] = removed.get(head, 0) - channels * original.anatomy.vocabulary  # it gets a matrix of its own
        if turned:  # a matrix more beside each part
            for block in original.anatomy.blocks[:left]:
                more = len(passed_parts(block)) * channels**2
                removed[block.parameters[0]] = removed.get(block.parameters[0], 0) - more
    total = original.anatomy.parameters
    if original.tensors:

        def written_bytes(key: str, count: int) -> int:
            return count * stored_dtype(original, dtype, original.tensors[key].dtype).itemsize

        written = sum(written_bytes(key, torch.Size(info.shape).numel()) for key, info in original.tensors.items())
        written -= sum(written_bytes(original.stored_keys(name)[0], fewer) for name, fewer in removed.items())
        largest = max(sum(original.tensors[key].bytes for key in piece.keys) for piece in pieces(original, 0))
        extra, between = 0, original.bytes
    else:
        precise = conversion_dtype(original.place, original.config)
        written = (total - sum(removed.values())) * stored_dtype(original, dtype, precise).itemsize
        largest = extra = between = precise.itemsize * total
    pruning = [
        _Pruning.of_step(original, step, plan.calibration) for step in steps if step.registered.scope == "weight"
    ]
    passing = [step for step in steps if step.registered.scope in ("blocks", "network")]
    flows = [_flow_needs(original, step, plan.calibration) for step in passing]
    flows += [_unit_needs(original, step, plan.calibration) for step in steps if step.registered.scope == "units"]
    flows += [_plan_needs(original, step, plan.calibration) for step in steps if step.registered.scope == "network"]
    flows += [(0, 4 * original.anatomy.parameters) for step in steps if SilencedFlow in _asked(step)]
    extra += between * (len(steps) - 1) + sum(each.disk for each in pruning)
    extra += sum(disk for disk, _ in flows)
    beside = max([each.memory for each in pruning] + [memory for _, memory in flows], default=0)
    return {
        "parameters": total,
        "parameters_after": total - sum(removed.values()),
        "undecided": list(remaining.undecided),  # methods whose cuts are not in these numbers
        "blocks": {"kept": left, "of": count} if left < count else None,
        "parts": parts,
        "vocabulary": {"kept": original.anatomy.vocabulary - rows, "of": original.anatomy.vocabulary} if rows else None,
        "channels": {"kept": channels, "of": original.anatomy.hidden} if channels else None,
        "units": {
            axis: {str(block): {"kept": kept, "of": group.count} for block, (kept, group) in units.items()}
            for axis, units in cut.items()
        },
        "budgets": [
            {"method": step.method, "asked": asked, "allocation": method.name if (method := divider(step)) else None}
            for step in steps
            if "axis" in step.parameters and (asked := asked_for(step))
        ],
        # every matrix is smaller where channels go, which widths of units do not tell
        "multiply_adds": _multiply_adds(original, sizes, left) if not rows and not channels else None,
        "zeros": [{"removed": each.removed, "of": each.of, "matrices": each.matrices} for each in pruning],
        "bytes_written": written,
        "disk_needed": written + extra,
        "memory_needed": 3 * largest + 400 * 10**6 + beside,
        "output": str(output),
    }


def _multiply_adds(source: Source, sizes: Sizes, blocks: int) -> dict[str, int]:
    measure: Measure = "multiply_adds"
    after = counted(source, measure, sizes, blocks)
    return {"before": counted(source, measure), "after": after, "tokens": tokens_counted(source)}


def _untied(source: Source) -> str | None:
    """The head that shares the embedding."""
    return next((group[-1] for group in source.anatomy.tied if source.anatomy.head in group), None)


def _remove_channels(source: Source, kept: int, removed: dict[str, int], turned: bool) -> None:
    """Adds what goes with channels to what goes with units, by parameter.

    turned: whether the stream is turned from place to place; biases of norms then go into those of the matrices behind them.
    """
    again = {name for group in source.anatomy.tied for name in group[1:]}
    roles = find_roles(source.skeleton, source.anatomy, source.spec) if turned else None
    for name, dims in (turned_channels if turned else find_channels)(source).dims.items():
        if name not in again:
            whole = source.skeleton.get_parameter(name).numel()
            left = whole - removed.get(name, 0)
            removed[name] = whole - left * kept ** len(dims) // source.anatomy.hidden ** len(dims)
    if roles is None:
        return
    for bias, reader in roles.behind.items():
        if bias not in roles.own:
            rows = source.skeleton.get_parameter(reader).numel() // source.anatomy.hidden
            removed[reader] = removed.get(reader, 0) - rows
    for name in roles.norm_biases:
        removed[name] = source.skeleton.get_parameter(name).numel()


def rows_removed(source: Source, plan: Recipe, device: str) -> int:
    """How many tokens go, decided in full where the tokenizer can be read: no weights are needed for that."""
    removed = 0
    for index, step in enumerate(plan.steps if source.tensors else ()):
        if step.registered.scope == "vocabulary":
            with tempfile.TemporaryDirectory() as folder:
                stage = make_stage(plan, index, source, Path(folder), Path(folder), device=device)
                assert isinstance(stage, VocabularyStage), "the scope says so"
                removed = max(removed, stage.removed())
    return removed


def _plan_needs(source: Source, step: Step, wishes: Calibration) -> tuple[int, int]:
    """Disk and memory that a step which plans a network needs for what it asks for."""
    if not step.calibrated:
        return 0, 0
    length = min(wishes.length or LENGTH, _positions(source))
    # the model as it is stored, a sequence's logits, and a few of its activations
    memory = source.bytes or 4 * source.anatomy.parameters
    memory += 4 * length * source.anatomy.vocabulary + 4 * ACTIVATION_BYTES if Evaluator in _asked(step) else 0
    if wishes.data == SELF:
        memory = max(memory, 4 * source.anatomy.parameters)
    return 8 * length * (wishes.count + wishes.held_out_count), memory


def _positions(source: Source) -> int:
    return getattr(source.config.get_text_config(), "max_position_embeddings", None) or LENGTH


def _asked(step: Step) -> set[type]:
    return set(step.registered.asked(step.parameters).values())


def _flow_needs(source: Source, step: Step, wishes: Calibration) -> tuple[int, int]:
    """Disk and memory, beside a block's weights, that a step which sees the whole network needs for what it asks for."""
    asked, network = _asked(step), source.anatomy
    if not step.calibrated:
        return 0, 0
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    tokens = (wishes.count + wishes.held_out_count) * min(wishes.length or LENGTH, positions)
    disk = memory = 0
    if asked & {Flow, LossWithout, Routing, Activations, SlicedStream, StreamMoment}:
        copies = len(network.blocks) + 1 if LossWithout in asked else 1
        # those that a block reads and those that it writes
        disk = 2 * copies * tokens * network.hidden * getattr(torch, wishes.dtype).itemsize
        memory = 4 * ACTIVATION_BYTES
    if SlicedStream in asked:  # float64: a basis for each place in files, and what one place needs to be decided
        disk += 8 * places_of(network) * network.hidden**2
        memory += 8 * 8 * network.hidden**2
    if BlockGradients in asked:
        memory = 2 * 4 * network.parameters
    elif wishes.data == SELF:
        memory = max(memory, 4 * network.parameters)
    return disk + 8 * tokens, memory


@dataclass(frozen=True)
class _Pruning:
    """What a step that zeroes single weights does and needs.

    Args:
        removed, of, matrices: weights that it zeroes, of how many, in how many matrices.
        disk: what lies there beside the model before the end, masks included.
        memory: beside a block's weights.
    """

    removed: int
    of: int
    matrices: int
    disk: int
    memory: int

    @classmethod
    def of_step(cls, source: Source, step: Step, wishes: Calibration) -> "_Pruning":
        targets = chosen(source, step.parameters["targets"])
        budgets = uniform(targets, Pattern.parse(step.parameters["pattern"]))
        solver = Solver.of(step.registered, step.parameters)
        sizes = {
            index: {ref.parameter: source.skeleton.get_parameter(ref.parameter).numel() for ref in refs}
            for index, refs in targets.items()
        }
        of = sum(ref.rows * ref.columns for refs in targets.values() for ref in refs)
        whole = sum(sum(block.values()) for block in sizes.values())
        # what is changed waits for the other blocks of its shard, at most in float32
        disk = of // 8 + min(4 * whole, SHARD_BYTES + 4 * max(sum(block.values()) for block in sizes.values()))
        memory = 0
        if solver.statistics:
            more, memory = _pass_needs(source, solver, wishes, targets)
            disk += more
        if solver.gradients:
            disk += 4 * whole
            memory = max(memory, 4 * source.anatomy.parameters + 8 * whole)
        if (method := divider(step)) and DivergenceTrials in method.needs.values():
            # the model in the dtype of the passes, and the logits of a few texts
            held = getattr(torch, wishes.dtype).itemsize * source.anatomy.parameters
            memory = max(memory, held + 4 * LOGITS + 4 * ACTIVATION_BYTES)
            disk += 8 * (wishes.length or LENGTH) * (wishes.count + wishes.held_out_count)
        if step.calibrated and wishes.data == SELF:
            memory = max(memory, 4 * source.anatomy.parameters)
        return cls(sum(budget.weights for budget in budgets.values()), of, len(budgets), disk, memory)


def _pass_needs(
    source: Source,
    solver: Solver,
    wishes: Calibration,
    targets: Mapping[int, Sequence[MatrixRef]],
    kinds: Set[type] = frozenset(),
) -> tuple[int, int]:
    """Disk and memory that calibration tokens take on their way to these matrices; `kinds` are collected beside."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    tokens = (wishes.count + wishes.held_out_count) * min(wishes.length or LENGTH, positions)
    width = getattr(torch, wishes.dtype).itemsize
    copies = 2 if CrossGram in solver.statistics else 1
    disk = 8 * tokens + 2 * copies * tokens * source.anatomy.hidden * width
    # matrices that share their input are counted one by one, because headers do not say which do
    grams = any("gram" in kind.wants for kind in solver.statistics | kinds)  # type: ignore[attr-defined]
    sums = max(sum(4 * ref.columns ** (2 if grams else 1) for ref in refs) for refs in targets.values())
    memory = copies * sums + 4 * ACTIVATION_BYTES
    if wishes.sequential:
        widest = max(max(ref.rows, ref.columns) for refs in targets.values() for ref in refs)
        memory += tokens * width * (4 * source.anatomy.hidden + 3 * widest)
    return disk, memory


def _unit_needs(source: Source, step: Step, wishes: Calibration) -> tuple[int, int]:
    """Disk and memory that a step which cuts units block by block needs beside the model and a block's weights."""
    solver, targets = Solver.of(step.registered, step.parameters), output_matrices(source, asked_axes(step))
    # what is refitted waits in float32 for the other blocks
    disk = sum(4 * ref.rows * ref.columns for refs in targets.values() for ref in refs)
    if SyntheticGram in solver.needs:
        layers = [block.feed_forward for block in source.anatomy.blocks if block.feed_forward]
        disk += sum(SyntheticGram.bytes(layer.units) for layer in layers)
    kinds, method = solver.statistics, divider(step)
    if method is not None and ErrorCurves in method.needs.values():
        kinds = kinds | {Gram}
    more = memory = 0
    if kinds and targets:
        more, memory = _pass_needs(source, solver, wishes, targets, kinds)
    if solver.statistics and "head_dims" in asked_axes(step):  # a pass of its own, before
        tokens = (wishes.count + wishes.held_out_count) * min(wishes.length or LENGTH, _positions(source))
        more = max(more, 8 * tokens + 2 * tokens * source.anatomy.hidden * getattr(torch, wishes.dtype).itemsize)
        memory = max(memory, 4 * ACTIVATION_BYTES)
    if solver.gradients:
        groups = [group for block in source.anatomy.blocks for axis in asked_axes(step) if (group := block.group(axis))]
        names = {part.parameter for group in groups for part in group.slices}
        coupled = sum(source.skeleton.get_parameter(name).numel() for name in names)
        memory = max(memory, 4 * source.anatomy.parameters + 8 * coupled)
    if step.calibrated and wishes.data == SELF:
        memory = max(memory, 4 * source.anatomy.parameters)
    return disk + more, memory

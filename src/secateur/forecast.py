"""What a run would cut, write and need, before anything is written."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.samples import SELF
from secateur.calibration.synthetic import SyntheticGram
from secateur.context import silent
from secateur.network.source import Source, conversion_dtype
from secateur.network.store import stored_dtype
from secateur.network.stream import pieces
from secateur.recipe import Recipe, Step
from secateur.run import Run, make_stage, request


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
    run = Run(spec, plan, Path(output), device, 0, trust_remote_code, False, 256 * 10**6, silent, None)
    source, _, _, widths = run.look(restart)
    wanted = getattr(torch, plan.dtype) if plan.dtype else None
    said = _needs(source, widths, Path(output), wanted, plan.steps)
    place = next(path for path in (Path(output).absolute(), *Path(output).absolute().parents) if path.exists())
    said["disk_free"] = shutil.disk_usage(place).free
    if not source.tensors:
        said["time"] = "not known before the weights are converted"
        return said
    step = plan.steps[0]
    if step.parameters.get("ratios"):  # one for each layer, of which one is tried
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
    if step.calibrated and plan.calibration.data == SELF:
        beside = f"the writing of the calibration text, {beside}"
    said["time"] = f"about {method + rest:.0f} s by one block, besides {beside}"
    return said


def _needs(
    original: Source,
    stage_widths: Mapping[int, int] | None,
    output: Path,
    dtype: torch.dtype | None,
    steps: Sequence[Step],
) -> dict[str, Any]:
    """What a run would cut, write and need, from headers and shapes alone. The disk it needs is an upper bound: models
    between steps and kept statistics are counted at the width that the source has.
    """
    cut = {
        block.index: (stage_widths[block.index], block.feed_forward.units)
        for block in original.anatomy.blocks
        if stage_widths and block.feed_forward and block.index in stage_widths
    }

    def statistics(step: Step) -> int:
        if SyntheticGram not in step.registered.needs.values():
            return 0
        layers = [block.feed_forward for block in original.anatomy.blocks if block.feed_forward]
        # what refits from a statistic leaves new output weights in float32 beside it until the end
        return sum(SyntheticGram.bytes(layer.units) + 4 * layer.hidden * layer.units for layer in layers)

    removed: dict[str, int] = {}
    for block in original.anatomy.blocks:
        for part in block.feed_forward.slices if block.feed_forward and block.index in cut else ():
            kept, of = cut[block.index]
            parameter = original.skeleton.get_parameter(part.parameter)
            fewer = parameter.numel() // parameter.shape[part.dim] * (of - kept)
            removed[part.parameter] = removed.get(part.parameter, 0) + fewer
    total = original.anatomy.parameters
    if original.tensors:

        def written_bytes(key: str, count: int) -> int:
            return count * stored_dtype(original, dtype, original.tensors[key].dtype).itemsize

        written = sum(written_bytes(key, torch.Size(info.shape).numel()) for key, info in original.tensors.items())
        written -= sum(written_bytes(original.stored_keys(name)[0], count) for name, count in removed.items())
        largest = max(sum(original.tensors[key].bytes for key in piece.keys) for piece in pieces(original, 0))
        extra, between = 0, original.bytes
    else:
        precise = conversion_dtype(original.place, original.config)
        written = (total - sum(removed.values())) * stored_dtype(original, dtype, precise).itemsize
        largest = extra = between = precise.itemsize * total
    extra += between * (len(steps) - 1) + sum(map(statistics, steps))
    return {
        "parameters": total,
        "parameters_after": total - sum(removed.values()),
        "widths": {str(block): {"kept": kept, "of": of} for block, (kept, of) in cut.items()},
        "bytes_written": written,
        "disk_needed": written + extra,
        "memory_needed": 3 * largest + 400 * 10**6,
        "output": str(output),
    }

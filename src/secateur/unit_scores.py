"""One walk through the dense network in which the units of every block are scored, and nothing is cut."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.calibration.passes import Passes, Rows
from secateur.calibration.residual import Residual
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import UNSEEN, Gram, Statistics
from secateur.context import barrier, processes
from secateur.errors import RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import Axis, Block
from secateur.network.matrices import MatrixRef
from secateur.registry import ErrorCurves
from secateur.tensor.thresholds import removal_squares
from secateur.unit_allocation import Scored, chooser_of, divider, in_order, no_scores

if TYPE_CHECKING:
    from secateur.unit_stage import UnitStage


def score_units(stage: "UnitStage", samples: Callable[[], Samples]) -> Scored:
    """The scores of all units, and their error curves where the allocation asks for them; what is done is not done again.

    Raises RequestError when the criterion states no scores.
    """
    method, chooser = divider(stage.step), chooser_of(stage.solver)
    assert method is not None, "who asks has looked"
    curves = ErrorCurves in method.needs.values()
    kinds = chooser.statistics | ({Gram} if curves else set())
    folder, blocks = stage.state / "allocation", [b for b in stage.source.anatomy.blocks if b.index in stage.refs]
    done = {block.index for block in blocks if (folder / f"{block.index}.safetensors").exists()}
    barrier()  # everybody has looked before the first process writes
    passes: Passes | None = None
    if kinds and len(done) < len(blocks):
        drawn = samples()
        dense = stage.calibration.model_copy(update={"inputs": "dense", "sequential": False})
        skip = stage.skip if dense.skip is None else dense.skip
        # held-out tokens decide nothing
        seen = Samples(drawn.sequences, [], drawn.name)
        passes = Passes(stage.source, seen, dense, kinds, stage.refs, folder, stage.device, skip)
        passes.capture()
    with stage.progress("scores", len(blocks)) as bar:
        for block in stage.source.anatomy.blocks:
            if block.index in stage.refs and block.index not in done:
                found = _score(stage, block, passes, curves)
                if processes()[0] == 0:
                    write_tensors(_path(folder, block.index), found)
                barrier()
                bar.advance()
            if passes is not None:
                passes.forget(block.index)
    told: dict[str, tuple[Tensor, Tensor | None]] = {}
    for block in blocks:
        tensors, _ = read_tensors(_path(folder, block.index))
        for ref in stage.refs[block.index]:
            name = f"block {block.index}, {ref.role}"
            told[name] = (tensors[f"{ref.role}.scores"], tensors.get(f"{ref.role}.squares"))
    return told


def _score(stage: "UnitStage", block: Block, passes: Passes | None, curves: bool) -> dict[str, Tensor]:
    refs: Sequence[MatrixRef] = stage.refs[block.index]
    chooser, found = chooser_of(stage.solver), dict[str, Tensor]()

    inside: dict[tuple[str, int], Tensor] = {}

    def settle(ref: MatrixRef, seen: Statistics, rows: Rows | None = None) -> None:
        axis: Axis = ref.role  # type: ignore[assignment]
        units = stage.units(block.index, axis, ref.expert)
        if ref.expert is not None and chooser.statistics and not seen.tokens:
            inside[axis, ref.expert] = torch.zeros(units.count)  # nothing is lost with an expert that no token reaches
            return
        if (curves or chooser.statistics) and not seen.tokens:
            raise RunError(f"{units.name}: no calibration token reached it, so nothing is known of its units.")
        chooser.ask(stage.given(units, stage.context(f"block-{block.index}")), seen, units.name)
        if units.scores is None:
            raise no_scores(stage.step, chooser)
        if not bool(torch.isfinite(units.scores).all()):
            raise RunError(f"{chooser.method.name}, {units.name}: the scores are not finite; check the model.")
        if ref.expert is not None:
            inside[axis, ref.expert] = units.scores.cpu()
            return
        found[f"{axis}.scores"] = units.scores.cpu()
        if curves:
            gram: Gram = seen.view(Gram)
            squares = removal_squares(gram.matrix / gram.tokens, units.output, in_order(units.scores), units.width)
            found[f"{axis}.squares"] = squares.cpu()

    if passes is None:
        for ref in refs:
            settle(ref, UNSEEN)
        return found | _of_all_experts(inside)
    with stage.running(block, passes) as working:
        skip = stage.skip if stage.calibration.skip is None else stage.calibration.skip
        stream = Residual(stage.source.anatomy.hidden, skip)
        with stream.watching(stage.source.skeleton, block):
            passes.through(block, refs, working, settle)
    for ref in refs if curves else ():
        found[f"{ref.role}.squares"] /= stream.mean(ref.role)  # type: ignore[arg-type]
    return found | _of_all_experts(inside)


def _of_all_experts(scores: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    """(count,) what goes with the first neuron of every expert, with the second, ...: each of them loses its own, in the
    order of its scores.
    """
    axes = sorted({axis for axis, _ in scores})
    return {
        f"{axis}.scores": torch.stack([scores[key].sort().values for key in sorted(scores) if key[0] == axis]).sum(0)
        for axis in axes
    }


def _path(folder: Path, block: int) -> Path:
    return folder / f"{block}.safetensors"

"""Which dimensions inside heads stay: decided for all blocks at once, before a step walks through them.

A criterion is asked twice of each block: for pairs of queries and keys, whose scores are added up over the network because
all blocks lose the same ones, and for values, of which each head loses its own. It sees the dense network.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.calibration.head_sums import HeadSums, statistics_of
from secateur.calibration.samples import Samples
from secateur.calibration.statistics import UNSEEN, Statistics
from secateur.context import Context, processes
from secateur.errors import RequestError, RunError
from secateur.network.head_dims import NarrowHeads
from secateur.network.head_views import PairUnits, ValueUnits, common_pairs
from secateur.network.views import Cut, Units

if TYPE_CHECKING:
    from secateur.unit_stage import UnitStage


def choose_head_dims(stage: "UnitStage", samples: Samples | None, context: Context) -> dict[str, Any]:
    """Decides and keeps the cuts of dimensions of a step.

    samples: calibration tokens, where the criterion asks for what it sees of inputs.

    Returns: which pairs stay. Raises RequestError when the criterion states no scores.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    if samples is not None:
        tokens = _pass(stage, samples)
        tokens.run(stage.progress)
        sums = tokens.gathered()
    kept, cuts = _decided(stage, sums, context)
    for block, cut in cuts.items() if processes()[0] == 0 else ():
        stage.cuts.save(block, "head_dims", cut)
    return {"pairs": kept.tolist()}


def time_head_dims(stage: "UnitStage", samples: Samples | None, context: Context) -> float:
    """How many seconds deciding takes, by one batch in the first block where tokens are read."""
    begun = time.time()
    if samples is None:
        _decided(stage, {}, context)
        return time.time() - begun
    batches = _pass(stage, samples).batches
    begun = time.time()
    _pass(stage, Samples(list(batches[0].ids), [], "random")).run(blocks=[0])
    return (time.time() - begun) * len(batches) * len(stage.source.anatomy.blocks)


def _pass(stage: "UnitStage", samples: Samples) -> HeadSums:
    skip = stage.skip if stage.calibration.skip is None else stage.calibration.skip
    dtype = getattr(torch, stage.calibration.dtype)
    return HeadSums(stage.source, samples, stage.state / "head-dims", dtype, stage.device, skip)


def _decided(
    stage: "UnitStage", sums: dict[tuple[int, str], Tensor], context: Context
) -> tuple[Tensor, dict[int, Cut]]:
    """The pairs that stay, and the cut of each block."""
    heads = NarrowHeads(stage.source, torch.arange(0))
    sizes, whole = stage.sizes["head_dims"], heads.whole
    [keep] = set(sizes.values())
    scores: dict[int, Tensor] = {}
    for block, dims in heads.where.items():
        keys = None
        if sums:
            keys = sums[block, "keys squares"] / sums[block, "keys tokens"]
            keys = keys.float().view(dims.kv_heads, dims.head_dim).to(stage.device)
        units = PairUnits(stage.source, block, dims, whole.pairs, keep, stage.device, keys)
        _ask(stage, units, sums, "queries", context)
        if units.scores is None:
            raise RequestError(
                f"{stage.step.method} states no scores, so pairs of dimensions cannot be compared over all blocks; choose "
                "another method, or another axis."
            )
        scores[block] = units.scores
    kept = common_pairs(scores, keep, whole.turned // 2)
    cuts: dict[int, Cut] = {}
    for block, dims in heads.where.items():
        values = ValueUnits(stage.source, block, dims, 2 * keep * dims.kv_heads, stage.device)
        said: Cut = _ask(stage, values, sums, "outputs", context)
        if len(said.kept) != values.keep or said.output is not None or said.makers is not None:
            raise RunError(
                f"{stage.step.method}, {values.name}: dimensions are cut as they are, {values.keep} of them stay."
            )
        cuts[block] = Cut(kept, output_bias=said.output_bias, values=values.by_head(said.kept.cpu()))
    return kept, cuts


def _ask(stage: "UnitStage", units: Units, sums: Mapping[tuple[int, str], Tensor], name: str, context: Context) -> Any:
    seen: Statistics = statistics_of(dict(sums), units.block, name, stage.solver.statistics) if sums else UNSEEN
    if sums and not seen.tokens:
        raise RunError(f"{units.name}: no calibration token reached it, so nothing is known of its dimensions.")
    return stage.solver.ask({Units: units, Context: context}, seen, units.name)

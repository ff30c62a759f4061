"""Adapt-Pruner: units go in many small steps, and each step takes more from the layers that change the stream least.

"Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training", 2025, arXiv:2502.03460; the
algorithm is read from its code. For t = 1 … T: I_l = −mean cosine of what block l of the network AS CUT SO FAR reads and
gives; Ĩ_l = I_l less its mean, over the largest |·|; s_l(t) = clip(s_l(t−1) + S/T − A Ĩ_l, 0, 0.99); every kind of units
loses its lowest until s_l of its ORIGINAL number is gone. The code runs T = 50 steps towards S = 1 with A = 0.02 (0.03 is
its own default), stops at a number of parameters, and scores by first-order Taylor on 512 samples of 64 tokens. By reading,
its euclidean and manhattan distances have the wrong sign, so the cosine is the only measure here.

What differs: S is the fraction that goes in all, so that T steps end there; the default of 10 steps of 0.02 for S = 0.2
takes as much in a step as the code does. What goes is counted in units of each kind, exactly t/T of it after step t,
whatever clipping and rounding do. Scores that need gradients are not there yet; activation × output weight (as
wanda_units) and magnitude stand in for them: OURS. Training between steps (Adapt-Accel), behind most of the paper's claims,
has its place in the loop below and is not there yet. Blocks end with different widths.
"""

from math import floor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.calibration.statistics import InputNorms
from secateur.errors import RequestError
from secateur.registry import Axes, Context, Cut, Network, Plan, Ratio, SilencedFlow, Units, method
from secateur.tensor.layer_ratios import largest_removals, next_ratios, relative_importance, removals

Score = Literal["activation", "magnitude"]


@method(
    "adapt_pruner",
    kind="structure",
    paper="arXiv:2502.03460",
    claim="1 to 7 % better on average than LLM-Pruner, FLAP and SliceGPT on LLaMA-3.1-8B",
    when="after training",
    speedup="universal",
    criterion=("similarity", "activation", "magnitude"),
    schedule="iterative",
    comparison="global",
    uneven=True,
    axes=("heads", "neurons"),
)
def adapt_pruner(
    network: Network[Units],
    flow: SilencedFlow,
    context: Context,
    *,
    overall: Ratio = 0.2,
    steps: Annotated[int, Field(ge=1)] = 10,
    strength: Annotated[float, Field(ge=0)] = 0.02,
    score: Score = "activation",
    axis: Axes = ["neurons"],  # noqa: B006 (never changed; a recipe holds lists)
    multiple_of: Annotated[int, Field(ge=1)] = 32,
) -> Plan:
    """Removes units step by step, most where blocks change the hidden states least, measured anew in every step.

    Args:
        overall: fraction of all units of each kind that goes, over the whole network; blocks differ.
        steps: in how many steps; the paper's code takes 50 towards 1.
        strength: A, by how much the ratio of a block can move away from the others in one step; 0 is the same for all.
        score: which units of a block go: those of the smallest activation × output weight, or of the smallest weights.
        axis: which units: neurons, heads, or a list of both, as in the paper.
        multiple_of: neurons go in groups of this many, where all widths are multiples of it; 1 for none.
    """
    layers = {kind: [units for units in network if units.axis == kind] for kind in axis}
    blocks = sorted({units.block for units in network})
    kept = {(units.block, units.axis): torch.arange(units.count) for units in network}
    ratios, history, begun = torch.zeros(len(blocks), dtype=torch.float64), list[list[float]](), 0
    if (saved := context.load("steps")) is not None:
        tensors, meta = saved
        begun, history, ratios = meta["step"], meta["history"], tensors.pop("ratios")
        kept = {where: tensors[f"{where[0]}, {where[1]}"] for where in kept}
    for kind, every in layers.items():
        count, most = sum(units.count for units in every), sum(largest_removals([units.count for units in every]))
        if overall * count > most + 0.5:
            raise RequestError(
                f"adapt_pruner: overall={overall} of {count} {kind} cannot go, because some stay in every block; at most "
                f"{floor(1e4 * most / count) / 1e4} can."
            )
    with context.progress("pruning in steps", steps) as bar:
        bar.advance(begun)
        for step in range(begun, steps if overall else 0):
            seen = flow.measure(kept)
            importance = relative_importance(seen.cosine[blocks])
            ratios = next_ratios(ratios, importance, overall / steps, strength)
            for kind, every in layers.items():
                group = _group(every, multiple_of if kind == "neurons" else 1)
                gone = [(units.count - len(kept[units.block, kind])) // group for units in every]
                sizes = [units.count // group for units in every]
                wanted = [float(ratios[blocks.index(units.block)]) for units in every]
                total = int(overall * sum(sizes) * (step + 1) / steps + 0.5)
                for units, count in zip(every, removals(wanted, sizes, gone, total), strict=True):
                    where = (units.block, units.axis)
                    left = units.count - count * group
                    if left < len(kept[where]):
                        kept[where] = _best(_scores(units, score, seen.norms[where]), kept[where], left)
            history.append([round(float(ratio), 6) for ratio in ratios])
            # TRAINING BETWEEN STEPS hooks in here: the network as cut so far is trained on the next part of the data, with
            # one schedule of the learning rate over all steps, before it is measured again.
            state = {f"{block}, {kind}": units for (block, kind), units in kept.items()}
            context.save("steps", {"ratios": ratios, **state}, {"step": step + 1, "history": history})
            bar.advance()
    context.note("ratios after each step", history)
    context.note("training between steps", "none")
    counts = {(units.block, units.axis): units.count for units in network}
    return Plan({where: Cut(units) for where, units in kept.items() if len(units) < counts[where]})


def _scores(units: Units, score: Score, norms: InputNorms) -> Tensor:
    """(count,) how much each unit matters; gradients (first-order Taylor) will be one more line here."""
    output = units.output
    if score == "activation":
        return units.per_unit((output.norm(dim=0) * norms.norms).square()).sum(1)
    return sum(
        (rows.flatten(1).square().sum(1) for rows in units.coupled), units.per_unit(output.square().sum(0)).sum(1)
    )


def _best(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """The `count` of the units `kept` with the highest scores, in order; among equals the first."""
    return kept[scores.cpu()[kept].argsort(descending=True, stable=True)[:count]].sort().values


def _group(every: list[Units], multiple_of: int) -> int:
    """How many units go together, so that widths stay multiples."""
    fits = all(units.count % multiple_of == 0 and units.count > multiple_of for units in every)
    return multiple_of if fits else 1

"""Minitron: neurons, heads and channels that respond least to calibration text go; one uniform shape stays.

Muralidharan and others, "Compact Language Models via Pruning and Knowledge Distillation", NeurIPS 2024, arXiv:2407.14679.
A neuron's score is what the first matrix gives of it (response=product), or what the output matrix is given of it, as in
NVIDIA's ModelOpt (response=activation, which also says what is meant where the layer is gated); a head's the norm of its
attention output; a channel's what norms give of it, summed over the norms of all blocks. |·| is aggregated over the tokens
of a sequence, then over sequences: mean and l2 in the paper's best setting.

The paper's depth axis, by block influence or by perplexity without a block, is `layer_drop` (metric=influence or
metric=perplexity) as another step of the same recipe. Its retraining by distillation is no part of this method.

What differs here, or is ours:
- Scores leave out the first four tokens of a sequence (calibration.skip), and the norm behind the last block.
- Our heads are the groups that share keys and values: a group's score is the sum of its heads', and whole groups go.
- residuals: the paper adds them before it retrains (ModelOpt does not), so they are off unless asked for. All heads in
  order of their scores, head_i + (head_i − head_{2K−i+1}), done to queries, keys and values, as the paper does not say to
  which matrices. Where heads share keys and values it is done to queries alone, as in the paper; but there it stands for
  queries of a group that lost some, here a group takes over what the queries of a whole other group differ by.
- Scales of norms are only trimmed. The cut model divides by the mean square of the channels that stay, so it computes what
  the whole one does with the others silent and norms over the rest; that is what the result is checked against.
- target: shapes are ranked by the share of the scores that stays, where the paper retrains each candidate for a while.
"""

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from secateur.contract import CutAxes, count_of
from secateur.errors import RequestError
from secateur.network.anatomy import CutAxis
from secateur.network.widths import round_width
from secateur.registry import Activations, Context, Cut, Network, Plan, Ratio, Units, method
from secateur.tensor.head_residuals import residual_partners

Widths = dict[CutAxis, int]
NEAR = 0.05  # candidates have within this of the wanted number of parameters
LISTED = 20
STEPS = 16  # widths tried for each axis, evenly spread


def _share_or_count(value: Any) -> Any:
    return value if isinstance(value, float) and value < 1 else count_of(value)


def _contradiction(given: Mapping[str, Any]) -> str | None:
    axis, ratios = given["axis"], given["ratios"] or {}
    if given["residuals"] and "heads" not in axis:
        return "residuals are those of heads; add heads to `axis`, or leave residuals out."
    if ratios and given["target"] is not None:
        return "give either ratios or a target: both say what stays."
    if other := [name for name in ratios if name not in axis]:
        return f"ratios names {other[0]}, which `axis` does not; add it there, or leave it out."
    return None


@method(
    "minitron",
    kind="structure",
    paper="arXiv:2407.14679",
    claim="15B to 8B and 4B with up to 40 times fewer training tokens than from scratch, after distillation",
    when="after training",
    speedup="universal",
    criterion="activation",
    schedule="one-shot",
    comparison=("layer", "global"),
    axes=("heads", "neurons", "channels"),
    refuses=_contradiction,
)
def minitron(
    network: Network[Units],
    activations: Activations,
    context: Context,
    *,
    axis: CutAxes = ["neurons"],  # noqa: B006 (read by the schema, never changed)
    ratio: Ratio = 0.2,
    ratios: dict[CutAxis, Ratio] | None = None,
    target: Annotated[float | None, Field(gt=0), BeforeValidator(_share_or_count)] = None,
    sequence: Literal["mean", "l2"] = "mean",
    batch: Literal["mean", "l2"] = "l2",
    response: Literal["activation", "product"] = "activation",
    residuals: bool = False,
    multiple_of: Annotated[int, Field(ge=1)] = 32,
) -> Plan:
    """Keeps the neurons, heads and channels that respond most to text, as many in every block.

    Args:
        axis: what is cut: neurons, heads (those that share keys and values together), channels of the residual stream, or a
            list of them.
        ratio: fraction removed of each of them, 0 ≤ ratio < 1.
        ratios: another ratio for single axes, {axis: ratio}.
        target: instead of ratios, how many parameters the result is to have, such as 100e6 or "100M", or which fraction of
            them (below 1); the shape is the one within 5 % below (above, where there is none) that keeps most of the
            scores, and the candidates are told in the receipt.
        sequence: how responses are aggregated over the tokens of a sequence.
        batch: how over sequences.
        response: of a neuron: activation is what the output matrix is given, product what the first matrix gives.
        residuals: heads that stay take over what those that go differ by, for retraining afterwards.
        multiple_of: neurons and channels kept are rounded to the nearest multiple of this where the ratio allows it, and
            channels to what the configuration can say.
    """
    scores: dict[CutAxis, list[Tensor]] = {
        "neurons": [
            activations.of(u.block, "neurons" if response == "activation" else "products", sequence, batch)
            for u in network.of("neurons")
        ],
        "heads": [activations.of(u.block, "heads", sequence, batch) for u in network.of("heads")],
    }
    if "channels" in axis:
        blocks = sorted({block for block, _ in activations.sums if activations.has(block, "channels")})
        scores["channels"] = [torch.stack([activations.of(b, "channels", sequence, batch) for b in blocks]).sum(dim=0)]
    scores = {name: found for name, found in scores.items() if name in axis}
    if target is None:
        shares = {name: (ratios or {}).get(name, ratio) for name in scores}
        keep: dict[CutAxis, list[int]] = {
            name: [round_width(len(s), shares[name], 1 if name == "heads" else multiple_of) for s in found]
            for name, found in scores.items()
            if name != "channels"
        }
        if "channels" in scores:
            others = {name: kept[0] for name, kept in keep.items() if kept}
            keep["channels"] = [network.channels(shares["channels"], multiple_of, others)]
    else:
        shape = _shape(network, scores, target, multiple_of, context)
        keep = {name: [shape[name]] * len(found) for name, found in scores.items()}
    plan = Plan()
    for units in network:
        place = network.of(units.axis).index(units)
        score, count = scores[units.axis][place], keep[units.axis][place]
        cut = Cut(_best(score, count))
        if residuals and units.axis == "heads" and count < units.count:
            cut = residual_cut(score, count, units)
        plan.cuts[units.block, units.axis] = cut
    if "channels" in axis and keep["channels"][0] < network.hidden:
        return Plan(plan.cuts, _best(scores["channels"][0], keep["channels"][0]))
    return plan


def residual_cut(score: Tensor, keep: int, units: Units) -> Cut:
    """Heads that stay take over, in what makes them, what those that go differ by: head_i + (head_i − head_j)."""
    kept, partners = residual_partners(score, keep)
    mixed = units.residual_inputs
    makers = tuple(
        rows[kept] + (rows[kept] - rows[partners]) if place in mixed else rows[kept]
        for place, rows in enumerate(units.coupled)
    )
    return Cut(kept, makers=makers)


def _best(scores: Tensor, keep: int) -> Tensor:
    """The places of the highest scores, among equals the first, sorted."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def _shape(
    network: Network[Units], scores: dict[CutAxis, list[Tensor]], target: float, multiple_of: int, context: Context
) -> Widths:
    """The shape within a budget that keeps most of the scores. Raises RequestError where there is none."""
    for name, found in scores.items():
        if len({len(score) for score in found}) > 1:
            raise RequestError(f"minitron: blocks have different numbers of {name}; give a ratio instead of a target.")
    wanted = target if target >= 1 else target * network.parameters
    counter = network.counter("channels" in scores)
    near, counted = [], []
    for shape in candidates({name: len(found[0]) for name, found in scores.items()}, multiple_of):
        count = counter.count(shape)
        counted.append(count)
        if abs(count - wanted) <= NEAR * wanted:
            near.append((count, kept_share(scores, shape), shape))
    if not near:
        raise RequestError(
            f"minitron: no shape with half of the {' and '.join(scores)} or more has about {wanted:,.0f} parameters; the "
            f"nearest of those tried has {min(counted, key=lambda count: abs(count - wanted)):,}."
        )
    # a budget is kept to if it can be
    within = [each for each in near if each[0] <= wanted] or near
    near.sort(key=lambda each: -each[1])
    within = [each for each in near if each in within]
    chosen = next((each for each in within if network.can_be(each[2])), within[0])
    listed = [{"parameters": c, "scores kept": round(s, 4), **w} for c, s, w in near[:LISTED]]
    context.note("shapes", {"wanted": round(wanted), "of": len(near), "candidates": listed, "chosen": chosen[2]})
    return chosen[2]


def candidates(sizes: Widths, multiple_of: int) -> list[Widths]:
    """Uniform shapes with half of everything or more; neurons and channels in multiples, thinned out evenly."""
    tried = []
    for name, size in sizes.items():
        step = 1 if name == "heads" else multiple_of
        widths = [width for width in range(step, size + 1, step) if 2 * width >= size] or [size]
        if widths[-1] != size:
            widths.append(size)
        thin = -(-len(widths) // STEPS)
        tried.append([(name, width) for width in widths[::-1][::thin]])
    return [dict(combination) for combination in product(*tried)]


def kept_share(scores: dict[CutAxis, list[Tensor]], shape: Widths) -> float:
    """The share of the scores that a shape keeps, multiplied over axes: 1 for the whole network."""

    def share(found: list[Tensor], keep: int) -> float:
        kept = [float(s.sort(descending=True).values[:keep].sum() / s.sum().clamp(min=1e-30)) for s in found]
        return sum(kept) / len(kept)

    return prod(share(found, shape[name]) for name, found in scores.items())

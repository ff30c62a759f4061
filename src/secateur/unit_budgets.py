"""Budgets of steps that cut units: what a unit and a whole network count, which widths meet a budget, what was reached.

Everything is counted from shapes, nothing is estimated from a ratio. Multiply-adds are those of the result card: reading
`TOKENS` tokens at once.
"""

from collections.abc import Mapping
from math import lcm, prod
from typing import Any, Literal

from secateur.errors import RequestError
from secateur.evaluation.arithmetic import attention_pairs, linear_multiply_adds, multiply_adds, visited_experts
from secateur.evaluation.forward import maximum_positions, text_config
from secateur.evaluation.speed import PREFILL
from secateur.network.anatomy import AXES, NEURON_AXES, Axis
from secateur.network.source import Source
from secateur.network.store import each_alone, group_left
from secateur.network.widths import round_width
from secateur.recipe import Step

Measure = Literal["parameters", "multiply_adds"]
Sizes = dict[Axis, dict[int, int]]
"""How many units of each kind there are, by block."""
ALIGNED = 8
"""Widths of experts are multiples of it: transformers multiplies all experts at once, by kernels that want every row to
begin at a multiple of 16 bytes, which are eight numbers in half precision."""


def measure_of(step: Step) -> Measure | None:
    """What a step's budget is counted in; None where it is a fraction of the units of every block."""
    of = step.parameters.get("of", "units")
    if of == "units":
        return "parameters" if step.parameters.get("target") else None
    return "multiply_adds" if of == "multiply_adds" else "parameters"


def tokens_counted(source: Source) -> int:
    """How many tokens are read at once where multiply-adds are counted."""
    return min(PREFILL, maximum_positions(source.skeleton) or PREFILL)


def unit_cost(
    source: Source, block: int, axis: Axis, measure: Measure, left: Mapping[Axis, Mapping[int, int]] | None = None
) -> int:
    """What a unit counts: its share of every coupled tensor, or the multiply-adds of its matrices and of its attention.

    left: units that are left of other kinds: heads and their dimensions lie across each other.
    """
    found = source.anatomy.blocks[block]
    group, attention = group_left(found, axis, left or {}), found.attention
    assert group is not None, "asked for where it is"
    heads = size = 0
    if attention is not None and axis == "head_dims":
        heads, size = group.output.width // 2, 2
    elif attention is not None:
        heads, size = attention.heads // group.count, attention.head_dim
        if block in (left or {}).get("head_dims", {}):
            size = 2 * (left or {})["head_dims"][block]
    tokens, cost = tokens_counted(source), 0
    for part in group.slices:
        shape, width = source.skeleton.get_parameter(part.parameter).shape, part.width
        if attention is not None and axis in ("heads", "queries"):
            width = width * size // attention.head_dim
        if measure == "parameters":
            cost += shape.numel() // shape[part.dim] * width
        elif axis == "expert_neurons":  # of those experts that a token goes to
            visited = visited_experts(text_config(source.skeleton)) or 0
            cost += tokens * visited * prod(shape[1:]) // shape[part.dim] * width if len(shape) == 3 else 0
        elif len(shape) == 2 and axis != "experts":  # a token goes to as many, and routers are not counted
            cost += tokens * shape.numel() // shape[part.dim] * width
    if measure == "multiply_adds" and axis in ("heads", "queries", "head_dims"):
        pairs = attention_pairs(text_config(source.skeleton), tokens)
        cost += 2 * heads * size * (pairs[block] if block < len(pairs) else 0)
    return cost


def multiple_of(step: Step, axis: Axis) -> int:
    """What the number of units that a step keeps is rounded to a multiple of."""
    multiple = int(step.parameters.get("multiple_of", 1)) if axis in NEURON_AXES else 1
    return lcm(multiple, ALIGNED) if axis == "expert_neurons" else multiple


def sets_of(source: Source, axis: Axis, before: Mapping[Axis, Mapping[int, int]] | None = None) -> dict[int, int]:
    """In how many equal runs the units of each block lie, of which each keeps as many.

    before: what earlier steps leave: heads that went have taken their run of queries along.
    """
    runs = {block.index: group.sets for block in source.anatomy.blocks if (group := block.group(axis))}
    return runs | dict((before or {}).get("heads", {})) if axis == "queries" else runs


def counted(
    source: Source, measure: Measure, sizes: Mapping[Axis, Mapping[int, int]] | None = None, blocks: int | None = None
) -> int:
    """What the network counts with `sizes` units; what they do not name stays.

    blocks: how many of the first blocks there are; default all.
    """
    network = source.anatomy
    blocks = len(network.blocks) if blocks is None else blocks
    total = network.parameters if measure == "parameters" else multiply_adds(source.skeleton, tokens_counted(source))
    for block in network.blocks[blocks:]:
        total -= _block(source, block.index, measure)
    for axis, units in each_alone(source, sizes or {}).items():
        for index, kept in units.items():
            group = network.blocks[index].group(axis)
            if index < blocks and group is not None:
                # heads go as they were, and what is left of them loses dimensions
                left = sizes if axis == "head_dims" else None
                total -= (group.count - kept) * unit_cost(source, index, axis, measure, left)
    return total


def _block(source: Source, index: int, measure: Measure) -> int:
    block, model = source.anatomy.blocks[index], source.skeleton
    if measure == "parameters":
        return sum(model.get_parameter(name).numel() for name in block.parameters)
    tokens, config = tokens_counted(source), text_config(model)
    total = tokens * linear_multiply_adds(model.get_submodule(block.path), config)
    if block.attention:
        pairs = attention_pairs(config, tokens)
        total += 2 * block.attention.heads * block.attention.head_dim * (pairs[index] if index < len(pairs) else 0)
    return total


def wanted_total(
    source: Source,
    step: Step,
    present: Sizes,
    before: Mapping[Axis, Mapping[int, int]],
    blocks: int | None = None,
) -> int:
    """What the whole model is to count behind a step that has a budget in parameters or multiply-adds.

    Args:
        present: the units that the step may cut.
        before: the units that earlier steps leave, of whatever kind.
        blocks: how many blocks they leave; default all.

    Raises RequestError where no cut reaches it.
    """
    measure, parameters = measure_of(step), step.parameters
    assert measure is not None, "who asks has looked"
    if parameters.get("ratios"):
        raise RequestError(f"{step.method}: ratios are fractions of the units of each block; leave out of and target.")
    if measure == "multiply_adds" and "experts" in present:
        raise RequestError(
            f"{step.method}: a token of {source.spec} goes to as many experts however many there are, so cutting them saves "
            "no multiply-adds; cut them in a step of their own, with of=units or of=parameters."
        )
    whole = counted(source, measure, {**before, **present}, blocks)
    target = parameters.get("target")
    total = round((1 - parameters["ratio"]) * whole) if target is None else int(target)
    named = measure.replace("_", "-")
    if total > whole:
        raise RequestError(
            f"{step.method}: target={total:,} is more than the {whole:,} {named} that {source.spec} has; ask for fewer."
        )
    runs = {axis: sets_of(source, axis, before) for axis in present}
    one = {axis: {index: runs[axis][index] for index in units} for axis, units in present.items()}
    smallest = counted(source, measure, {**before, **one}, blocks)
    if total < smallest:
        raise RequestError(
            f"{step.method}: {total:,} {named} cannot be reached by cutting {' and '.join(present)} of {source.spec}: with "
            f"the fewest that a block can have {smallest:,} are left; ask for no fewer, or give `axis` more kinds of units."
        )
    return total


def budgeted_sizes(
    source: Source,
    step: Step,
    present: Sizes,
    before: Mapping[Axis, Mapping[int, int]],
    blocks: int | None = None,
) -> Sizes:
    """Units kept so that the whole model counts as nearly as possible what a step asks for, one ratio for all blocks.

    Every kind of units is asked for the same ratio. Heads are few, so they are rounded first, and neurons make up for it.

    Raises RequestError where no cut reaches it.
    """
    measure = measure_of(step)
    assert measure is not None, "who asks has looked"
    total = wanted_total(source, step, present, before, blocks)
    left = counted(source, measure, {**before, **present}, blocks) - total
    # one of each run goes at a time
    sets = {axis: sets_of(source, axis, before) for axis in present}
    present = {axis: {i: count // sets[axis][i] for i, count in units.items()} for axis, units in present.items()}
    costs = {
        axis: {i: sets[axis][i] * unit_cost(source, i, axis, measure, before) for i in units}
        for axis, units in present.items()
    }
    free = sum(costs[axis][i] * count for axis, units in present.items() for i, count in units.items())
    ratio = left / free
    planned: Sizes = {}
    *coarse, fine = present
    most = sum(costs[fine][i] * (count - 1) for i, count in present[fine].items())
    for axis in coarse:
        units = present[axis]

        def cut(sizes: Mapping[int, int], axis: Axis = axis, units: Mapping[int, int] = units) -> int:
            return sum(costs[axis][i] * (units[i] - kept) for i, kept in sizes.items())

        # the nearest whole number, unless the units that come after could not make up for it
        tries = [
            {i: min(count, max(1, int((1 - ratio) * count + offset))) for i, count in units.items()}
            for offset in (0.5, 1.0, 0.0)
        ]
        if axis in NEURON_AXES:  # beside those inside experts: in round numbers as these
            tries.insert(0, _rounded(units, ratio, multiple_of(step, axis)))
        tries.append(dict.fromkeys(units, 1))
        planned[axis] = next(each for each in tries if 0 <= left - cut(each) <= most or each is tries[-1])
        left -= cut(planned[axis])
    planned[fine] = _nearest(present[fine], costs[fine], left, multiple_of(step, fine))
    return {axis: {i: kept * sets[axis][i] for i, kept in units.items()} for axis, units in planned.items()}


def _nearest(units: Mapping[int, int], costs: Mapping[int, int], remove: int, multiple: int) -> dict[int, int]:
    """Widths of one ratio that remove as nearly as possible `remove`; the wider ones where two are equally near.

    What is removed grows with the ratio in steps, so the two steps around `remove` are found by halving.
    """

    def widths(ratio: float) -> dict[int, int]:
        return _rounded(units, ratio, multiple)

    def removed(ratio: float) -> int:
        return sum(costs[i] * (units[i] - kept) for i, kept in widths(ratio).items())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) <= remove else (low, middle)
    return widths(min((low, high), key=lambda ratio: abs(removed(ratio) - remove)))


def _rounded(units: Mapping[int, int], ratio: float, multiple: int) -> dict[int, int]:
    return {i: round_width(count, min(ratio, 1 - 1 / count), multiple) for i, count in units.items()}


def asked_for(step: Step) -> dict[str, Any]:
    """A step's budget, as it was asked for; {} where a method has rules of its own."""
    given = step.parameters
    if "ratio" not in given:
        return {}
    if given.get("target"):
        return {"target": given["target"], "of": measure_of(step)}
    if given.get("ratios"):
        return {"ratios": given["ratios"], "of": "units"}
    return {"ratio": given["ratio"], "of": given.get("of", "units")}


def reached(source: Source, sizes: Mapping[Axis, Mapping[int, int]]) -> dict[str, Any]:
    """What a step that leaves these units makes of the network, before and after, counted from shapes: units of all blocks
    that have some, those that lose none too.
    """
    units = {}
    for axis in AXES:
        if axis in sizes:
            every = {block.index: group.count for block in source.anatomy.blocks if (group := block.group(axis))}
            units[axis] = {
                "before": sum(every.values()),
                "after": sum({**every, **sizes[axis]}.values()),
                "blocks": len(every),
            }
    measures: tuple[Measure, ...] = ("parameters", "multiply_adds")
    told: dict[str, Any] = {
        measure: {"before": counted(source, measure), "after": counted(source, measure, sizes)} for measure in measures
    }
    told["multiply_adds"]["tokens"] = tokens_counted(source)
    return {"units": units, **told}

"""What can be refused before anything is read or written: whether these steps can be done to this model."""

from collections.abc import Mapping, Sequence

from secateur.errors import RequestError
from secateur.network.anatomy import NEURON_AXES, Axis
from secateur.network.blocks import lacking
from secateur.network.channels import channels_config, find_channels, turned_channels
from secateur.network.depth import blocks_to_remove, check_skippable, shortened_config
from secateur.network.head_dims import check_head_dims
from secateur.network.heterogeneous import BlockShape, heterogeneous_config
from secateur.network.modelling_file import BLOCK, FEED_FORWARD, frame, is_heterogeneous, is_turned, nothings
from secateur.network.rotation import roles_of, stream_entry, untied_config
from secateur.network.source import Source
from secateur.network.store import raw_config, resized_config
from secateur.network.vocabulary import open_vocabulary, token_rows
from secateur.recipe import Step
from secateur.solving import Solver
from secateur.targets import check_targets
from secateur.unit_allocation import chooser_of, divider, no_scores
from secateur.unit_budgets import measure_of, sets_of
from secateur.units import (
    Left,
    Sizes,
    asked_axes,
    asked_channels,
    cuts_channels,
    planned_channels,
    planned_sizes,
    present_sizes,
    rotates,
    turns,
)


def check_steps(source: Source, steps: Sequence[Step], saved: bool = True) -> Left:
    """Raises RequestError when these steps cannot be done to this model; nothing is read or written for that.

    saved: the result is to be written, so its configuration must be able to say the widths.

    Returns: what is left after the last step.
    """
    network = source.anatomy
    if saved and network.head is None:
        raise RequestError(
            f"{source.spec} holds {type(source.skeleton).__name__}, which has no head that predicts tokens, so a result "
            "could not be checked; save it as a whole language model (such as LlamaForCausalLM)."
        )
    sizes: Sizes = {}
    count = len(network.blocks)
    other_vocabulary = False
    left_channels: int | None = None
    undecided: list[str] = []
    uneven: Step | None = None  # the first that leaves blocks that differ
    fewer_parts: dict[str, int] = {}  # in how many blocks earlier steps remove a part
    for number, step in enumerate(steps):
        solver = Solver.of(step.registered, step.parameters)
        solver.check(step.parameters)
        compares = (method := divider(step)) is not None and method.scope == "widths"
        if compares and not (chooser := chooser_of(solver)).method.scores:
            raise no_scores(step, chooser)
        if step.registered.scope == "blocks":
            _check_bases(source, steps[:number], step)
            if step.parameters["part"] == BLOCK:
                _check_alike(source, step, uneven, "removes whole blocks")
            count = _check_blocks(source, step, count, fewer_parts)
            uneven = uneven or (step if step.parameters["part"] != BLOCK else None)
            # which blocks go is not known yet; mostly they are alike, and only how many are left matters here
            sizes = {axis: {index: n for index, n in units.items() if index < count} for axis, units in sizes.items()}
            continue
        if step.registered.scope == "vocabulary":
            other_vocabulary = True
            _check_alike(source, step, uneven, "leaves fewer tokens")
            token_rows(source)
            if source.tensors or source.live is not None:  # what is converted first brings its tokenizer then
                open_vocabulary(source)
            continue
        if step.registered.scope == "weight":
            check_targets(source, step)
            continue
        _check_order(steps[:number], step, uneven)
        present = present_sizes(source, step)
        present = {
            axis: sizes.get(axis)
            or _left(axis, {index: n for index, n in units.items() if index < count}, source, sizes)
            for axis, units in present.items()
        }
        # how many parameters a smaller vocabulary leaves is not known yet, and units are counted at the width that the
        # stream has now, so nor are the widths of a budget in them behind such steps
        known = not ((other_vocabulary or left_channels is not None) and measure_of(step))
        planned = planned_sizes(source, step, present, sizes, count) if known else None
        if planned and "heads" in planned and "queries" in sizes:  # they take theirs along
            queries = {i: n // present["heads"][i] * planned["heads"][i] for i, n in sizes["queries"].items()}
            sizes = {**sizes, "queries": queries}
        sizes |= planned or {}
        if planned is None and asked_channels(step) is None:
            undecided.append(step.method)
        uneven = uneven or (step if _leaves_uneven(source, step, planned or {}) else None)
        if planned and step.parameters.get("allocation") and saved:
            resized_config(
                source, {axis: _uneven(source, axis, _for_all(source, axis, units)) for axis, units in planned.items()}
            )
        if saved:
            # without a plan any narrower width shows whether the configuration can say it; where blocks come out with
            # widths of their own, one that is narrower than the others
            alike = planned is not None or bool(step.parameters.get("target"))
            differ = not step.parameters.get("uniform", alike)
            narrower: Sizes = {
                axis: {i: units if differ and i else _fewer(source, axis, i, units) for i, units in widths.items()}
                for axis, widths in present.items()
            }
            told = sizes | (planned or narrower)
            raw = resized_config(
                source, {axis: _for_all(source, axis, units) for axis, units in told.items() if axis != "head_dims"}
            )
            if cuts_channels(step):
                channels = turned_channels(source) if turns(step) else find_channels(source)
                kept = planned_channels(source, step, channels, raw, left_channels)
                left_channels = kept or left_channels
                roles = roles_of(source, turns(step)) if rotates(step) else None
                if roles is not None and roles.untied and source.tensors:
                    raw = untied_config(source, raw)
                if kept is not None:
                    raw = channels_config(source, channels, raw, kept)
                if turns(step):
                    every = {block.index: BlockShape(shortcuts=True) for block in network.blocks}
                    assert roles is not None, "what turns the stream place by place rotates it"
                    stream = stream_entry(roles, channels, kept or channels.count)
                    raw = heterogeneous_config(source, raw, every, stream)
            if dims := told.get("head_dims"):
                check_head_dims(source, raw, next(iter(dims.values())), own="head_dims" in present)
    return Left(sizes, left_channels, tuple(undecided))


def _check_bases(source: Source, before: Sequence[Step], step: Step) -> None:
    """Raises RequestError where blocks, or parts of them, cannot go because the stream has another basis behind each."""
    earlier = next((each.method for each in before if turns(each)), "")
    if is_turned(source.anatomy) or earlier:
        raise RequestError(
            f"{step.method} removes blocks, but the residual stream of {source.spec} has another basis behind each of them"
            f"{f' once {earlier} has turned it' if earlier else ''}, so the next one could not read it; remove blocks first."
        )


def _leaves_uneven(source: Source, step: Step, planned: Sizes) -> bool:
    """Whether blocks come out with widths of their own."""
    given = step.parameters
    own_rules = "ratio" not in given or not given.get("uniform", True) or bool(given.get("allocation"))
    return own_rules or turns(step) or any(_differ(source, axis, units) for axis, units in planned.items())


def _differ(source: Source, axis: Axis, units: Mapping[int, int]) -> bool:
    """Whether blocks that were alike are no more; shared experts and layers of blocks without may have had other widths."""
    kept: dict[int, set[int]] = {}
    for index, left in units.items():
        group = source.anatomy.blocks[index].group(axis)
        kept.setdefault(group.count if group else 0, set()).add(left)
    return any(len(each) > 1 for each in kept.values())


def _check_order(before: Sequence[Step], step: Step, uneven: Step | None) -> None:
    """Raises RequestError where earlier steps leave blocks in which this one cannot cut what it is asked to."""
    if uneven is not None and "head_dims" in asked_axes(step):
        raise RequestError(
            f"{step.method} cuts dimensions inside heads, but {uneven.method} before it leaves blocks that differ; put the "
            "step that cuts dimensions first."
        )
    if uneven is not None and cuts_channels(step):
        raise RequestError(
            f"{step.method} cuts channels, but {uneven.method} before it leaves blocks that differ, and no configuration of "
            "such says fewer channels; put the step that cuts channels first."
        )
    for earlier in before:
        if earlier.registered.scope == "blocks" and (part := earlier.parameters["part"]) != BLOCK:
            units = NEURON_AXES if part == FEED_FORWARD else ("heads", "queries", "head_dims")
            if lost := [axis for axis in asked_axes(step) if axis in units]:
                raise RequestError(
                    f"{step.method} cuts {lost[0]} of every block, but {earlier.method} before it removes the "
                    f"{part.replace('_', '-')} of some; put the step that cuts {lost[0]} first."
                )


def _check_alike(source: Source, step: Step, uneven: Step | None, what: str) -> None:
    """Raises RequestError where blocks differ, or will by then: their configuration says each one's widths by itself."""
    if uneven is not None:
        raise RequestError(
            f"{step.method} {what}, but {uneven.method} before it leaves blocks that differ, to which that cannot be done "
            f"yet; put {step.method} first."
        )
    if is_heterogeneous(raw_config(source)):
        raise RequestError(
            f"{step.method} {what}, but the blocks of {source.spec} differ, to which that cannot be done yet; do it to the "
            "model that this one was made from, before its blocks are made to differ."
        )


def _for_all(source: Source, axis: Axis, units: Mapping[int, int]) -> dict[int, int]:
    """What the last block has also for those behind it: an earlier step removes them, but they are still in this source."""
    last = units[max(units)]
    return {block.index: units.get(block.index, last) for block in source.anatomy.blocks if block.group(axis)}


def _fewer(source: Source, axis: Axis, block: int, units: int) -> int:
    """A smaller number of units that a block could have."""
    if axis == "heads":  # some numbers of heads must divide the hidden size, which half of them does
        return max(1, units // 2)
    run = sets_of(source, axis)[block]
    return max(run, units - run)


def _left(axis: Axis, units: Mapping[int, int], source: Source, sizes: Sizes) -> dict[int, int]:
    """How many units there are when heads that earlier steps removed have taken their queries along."""
    runs = sets_of(source, axis)
    now = sets_of(source, axis, sizes)
    return {index: count // runs[index] * now[index] for index, count in units.items()}


def _uneven(source: Source, axis: Axis, units: Mapping[int, int]) -> dict[int, int]:
    """Other widths of the same blocks, of which the first differs from the rest: whether a configuration can say such."""
    first, count = next(iter(units.items()))
    run = sets_of(source, axis)[first]  # one of each goes at a time
    return {**units, first: count - run if count > run else count + run}


def _check_blocks(source: Source, step: Step, count: int, fewer: dict[str, int]) -> int:
    """How many of `count` blocks a step leaves. Raises RequestError when it cannot remove blocks from this model.

    fewer: in how many blocks earlier steps remove a part, to which this one adds.
    """
    if (part := step.parameters["part"]) != BLOCK:
        fewer[part] = fewer.get(part, 0) + _check_parts(source, step, part, count, fewer.get(part, 0))
        return count
    left = count - blocks_to_remove(step.method, step.parameters, count)
    check_skippable(source, step.method)
    # whichever go, the configuration must be able to say a smaller number
    shortened_config(source, range(left))
    return left


def _check_parts(source: Source, step: Step, part: str, count: int, fewer: int) -> int:
    """How many blocks lose a part. Raises RequestError when a step cannot remove the attention or feed-forward of blocks."""
    without = lacking(source, part)
    if len(without) == len(source.anatomy.blocks):
        raise RequestError(
            f"{step.method} removes the {part.replace('_', '-')} of blocks, but none of {source.spec} has one that was "
            "recognised and can be left out alone; remove whole blocks."
        )
    # which of those that have it earlier steps take is not known yet; mostly they are alike
    having = [block.index for block in source.anatomy.blocks if block.index not in without]
    remove = blocks_to_remove(step.method, step.parameters, count, without | set(having[len(having) - fewer :]))
    raw = raw_config(source)
    if plain := frame(raw, type(source.config)):
        nothings(plain, part)
    heterogeneous_config(source, raw, {index: BlockShape(skip=(part,)) for index in having[: max(remove, 1)]})
    return remove

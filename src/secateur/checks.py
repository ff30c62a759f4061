"""What can be refused before anything is read or written: whether these steps can be done to this model."""

from collections.abc import Mapping, Sequence

from secateur.errors import RequestError
from secateur.network.depth import blocks_to_remove, check_skippable, shortened_config
from secateur.network.source import Source
from secateur.network.store import resized_config
from secateur.network.widths import round_width
from secateur.recipe import Step
from secateur.targets import check_targets


def check_steps(source: Source, steps: Sequence[Step], saved: bool = True) -> dict[int, int] | None:
    """Raises RequestError when these steps cannot be done to this model; nothing is read or written for that.

    saved: the result is to be written, so its configuration must be able to say the widths.

    Returns: the width of each layer after the last step, by block, None where no step has a `ratio` to tell it by.
    """
    network = source.anatomy
    if saved and network.head is None:
        raise RequestError(
            f"{source.spec} holds {type(source.skeleton).__name__}, which has no head that predicts tokens, so a result "
            "could not be checked; save it as a whole language model (such as LlamaForCausalLM)."
        )
    original = {block.index: block.feed_forward.units for block in network.blocks if block.feed_forward}
    widths: dict[int, int] | None = None
    count = len(network.blocks)
    for step in steps:
        if step.registered.scope == "blocks":
            count = _check_blocks(source, step, count)
            # which blocks go is not known yet; mostly they are alike, and only how many are left matters here
            original = {index: units for index, units in original.items() if index < count}
            widths = widths and {index: units for index, units in widths.items() if index < count}
            continue
        if step.registered.scope == "weight":
            check_targets(source, step)
            continue
        _require_units(source, step)
        planned = _planned_widths(source, step, widths or original)
        widths = planned or widths
        if saved:
            # without a plan any narrower width shows whether the configuration can say it
            wanted = planned or {index: max(1, units - 1) for index, units in original.items()}
            # blocks that an earlier step removes are still in this source
            last = wanted[max(wanted)]
            resized_config(source, {block.index: wanted.get(block.index, last) for block in network.blocks})
    return widths


def _check_blocks(source: Source, step: Step, count: int) -> int:
    """How many of `count` blocks a step leaves. Raises RequestError when it cannot remove blocks from this model."""
    left = count - blocks_to_remove(step.method, step.parameters, count)
    check_skippable(source, step.method)
    # whichever go, the configuration must be able to say a smaller number
    shortened_config(source, range(left))
    return left


def _require_units(source: Source, step: Step) -> None:
    """Raises RequestError naming the first block whose feed-forward a method of this kind cannot see."""
    for block in source.anatomy.blocks:
        if block.feed_forward is None:
            raise RequestError(
                f"{step.method} cuts feed-forward neurons, but {block.path} of {source.spec} is a {block.kind} block: "
                f"{(block.note or 'no feed-forward was recognised in it').rstrip('.')}."
            )


def _planned_widths(source: Source, step: Step, units: Mapping[int, int]) -> dict[int, int] | None:
    """Units kept of `units`, by block, from a step's `ratio`, `ratios` and `multiple_of`; None if it has none."""
    parameters = step.parameters
    if "ratio" not in parameters:
        return None
    ratios = parameters.get("ratios") or [parameters["ratio"]] * len(units)
    if len(ratios) != len(units):
        raise RequestError(
            f"{step.method}: ratios has {len(ratios)} values, but {source.spec} has {len(units)} layers."
        )
    return {
        index: round_width(units[index], ratio, parameters.get("multiple_of", 1))
        for index, ratio in zip(units, ratios, strict=True)
    }

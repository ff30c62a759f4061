"""What can be refused before anything is read or written: whether these steps can be done to this model."""

from collections.abc import Mapping, Sequence

from secateur.errors import RequestError
from secateur.network.channels import channels_config, find_channels
from secateur.network.depth import blocks_to_remove, check_skippable, shortened_config
from secateur.network.rotation import find_roles, untied_config
from secateur.network.source import Source
from secateur.network.store import resized_config
from secateur.network.vocabulary import open_vocabulary, token_rows
from secateur.recipe import Step
from secateur.targets import check_targets
from secateur.units import Sizes, cuts_channels, planned_channels, planned_sizes, present_sizes, rotates


def check_steps(source: Source, steps: Sequence[Step], saved: bool = True) -> Sizes:
    """Raises RequestError when these steps cannot be done to this model; nothing is read or written for that.

    saved: the result is to be written, so its configuration must be able to say the widths.

    Returns: how many units of each kind are left after the last step, as far as steps have a `ratio` to tell it by.
    """
    network = source.anatomy
    if saved and network.head is None:
        raise RequestError(
            f"{source.spec} holds {type(source.skeleton).__name__}, which has no head that predicts tokens, so a result "
            "could not be checked; save it as a whole language model (such as LlamaForCausalLM)."
        )
    sizes: Sizes = {}
    count = len(network.blocks)
    for step in steps:
        if step.registered.scope == "blocks":
            count = _check_blocks(source, step, count)
            # which blocks go is not known yet; mostly they are alike, and only how many are left matters here
            sizes = {axis: {index: n for index, n in units.items() if index < count} for axis, units in sizes.items()}
            continue
        if step.registered.scope == "vocabulary":
            token_rows(source)
            if source.tensors or source.live is not None:  # what is converted first brings its tokenizer then
                open_vocabulary(source)
            continue
        if step.registered.scope == "weight":
            check_targets(source, step)
            continue
        present = present_sizes(source, step)
        present = {
            axis: sizes.get(axis) or {index: n for index, n in units.items() if index < count}
            for axis, units in present.items()
        }
        planned = planned_sizes(source, step, present)
        sizes |= planned or {}
        if saved:
            # without a plan any narrower width shows whether the configuration can say it
            narrower: Sizes = {
                # some numbers of heads must divide the hidden size, which half of them does
                axis: {index: max(1, units // 2 if axis == "heads" else units - 1) for index, units in widths.items()}
                for axis, widths in present.items()
            }
            raw = resized_config(
                source, {axis: _for_all(source, units) for axis, units in (sizes | (planned or narrower)).items()}
            )
            if cuts_channels(step):
                channels, kept = find_channels(source), planned_channels(source, step)
                if rotates(step) and source.tensors and find_roles(source, channels).untied:
                    raw = untied_config(source, raw)
                if kept is not None:
                    channels_config(source, channels, raw, kept)
    return sizes


def _for_all(source: Source, units: Mapping[int, int]) -> dict[int, int]:
    """What the last block has also for those behind it: an earlier step removes them, but they are still in this source."""
    last = units[max(units)]
    return {block.index: units.get(block.index, last) for block in source.anatomy.blocks}


def _check_blocks(source: Source, step: Step, count: int) -> int:
    """How many of `count` blocks a step leaves. Raises RequestError when it cannot remove blocks from this model."""
    left = count - blocks_to_remove(step.method, step.parameters, count)
    check_skippable(source, step.method)
    # whichever go, the configuration must be able to say a smaller number
    shortened_config(source, range(left))
    return left

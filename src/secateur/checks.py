"""What can be refused before anything is read or written: whether these steps can be done to this model."""

from collections.abc import Sequence

from secateur.errors import RequestError
from secateur.network.source import Source
from secateur.network.store import resized_config
from secateur.recipe import Step
from secateur.targets import check_targets
from secateur.units import Sizes, planned_sizes, present_sizes


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
    for step in steps:
        if step.registered.scope == "weight":
            check_targets(source, step)
            continue
        present = present_sizes(source, step)
        present = {axis: sizes.get(axis, units) for axis, units in present.items()}
        planned = planned_sizes(source, step, present)
        sizes |= planned or {}
        if saved:
            # without a plan any narrower width shows whether the configuration can say it
            narrower: Sizes = {
                axis: {index: max(1, count - 1) for index, count in units.items()} for axis, units in present.items()
            }
            resized_config(source, {**sizes, **(planned or narrower)})
    return sizes

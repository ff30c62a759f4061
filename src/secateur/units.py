"""Which units a step removes, and how many of each kind every block keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.calibration.stream_moment import StreamMoment
from secateur.errors import RequestError
from secateur.network.anatomy import AXES, Axis
from secateur.network.matrices import MatrixRef
from secateur.network.source import Source
from secateur.network.widths import round_width
from secateur.recipe import Step

Sizes = dict[Axis, dict[int, int]]
"""How many units of each kind there are, by block."""


def asked_axes(step: Step) -> tuple[Axis, ...]:
    """The kinds of units that a step cuts, in the order in which tokens meet them."""
    asked = step.parameters.get("axis", step.registered.axes)
    return tuple(axis for axis in AXES if axis in asked)


def present_sizes(source: Source, step: Step) -> Sizes:
    """What there is of the units that a step cuts.

    Raises RequestError naming the first block whose units a method cannot see, or that has but one.
    """
    sizes: Sizes = {}
    for axis in asked_axes(step):
        sizes[axis] = {}
        for block in source.anatomy.blocks:
            group = block.group(axis)
            if group is None:
                what = "feed-forward neurons" if axis == "neurons" else "attention heads"
                raise RequestError(
                    f"{step.method} cuts {what}, but {block.path} of {source.spec} is a {block.kind} block: "
                    f"{(block.note or f'no {what} that can be told apart were recognised in it').rstrip('.')}."
                )
            if axis == "heads" and group.count == 1 and wanted_ratio(step.parameters) > 0:
                raise RequestError(
                    f"all attention heads of {block.path} of {source.spec} share their keys and values, or are normalised "
                    "together, so none can be removed alone; choose axis=neurons."
                )
            sizes[axis][block.index] = group.count
    return sizes


def cuts_channels(step: Step) -> bool:
    return "channels" in step.parameters.get("axis", step.registered.axes)


def rotates(step: Step) -> bool:
    """Whether it asks for directions of the stream, to which it turns the network."""
    return StreamMoment in step.registered.needs.values()


def planned_channels(source: Source, step: Step) -> int | None:
    """How many channels of the residual stream stay; None where the step cuts none, or its `ratio` does not tell."""
    parameters = step.parameters
    if not cuts_channels(step) or "ratio" not in parameters or parameters.get("target"):
        return None
    ratio = (parameters.get("ratios") or {}).get("channels", parameters["ratio"])
    return round_width(source.anatomy.hidden, ratio, parameters.get("multiple_of", 1))


def output_matrices(source: Source, axes: Sequence[Axis]) -> dict[int, list[MatrixRef]]:
    """The matrices that read the units, by block in the order in which tokens meet them; their role is the axis."""
    refs: dict[int, list[MatrixRef]] = {}
    for block in source.anatomy.blocks:
        for axis in axes:
            if group := block.group(axis):
                name, columns = group.output.parameter, group.count * group.output.width
                transposed = group.output.dim == 0
                refs.setdefault(block.index, []).append(
                    MatrixRef(name, name, None, source.anatomy.hidden, columns, transposed, block.index, axis)
                )
    return refs


def wanted_ratio(parameters: Mapping[str, Any]) -> float:
    """The largest fraction that is to be removed of any block."""
    if "ratio" not in parameters or parameters.get("target"):
        return 1.0
    ratios = parameters.get("ratios") or []
    return max([parameters["ratio"], *(ratios.values() if isinstance(ratios, Mapping) else ratios)])


def planned_sizes(source: Source, step: Step, present: Sizes | None = None) -> Sizes | None:
    """Units kept of those `present`, from a step's `ratio`, `ratios` and `multiple_of`; None if it has none.

    Raises RequestError when a width cannot be.
    """
    present = present or present_sizes(source, step)
    parameters = step.parameters
    if "ratio" not in parameters or parameters.get("target"):
        return None
    planned: Sizes = {}
    for axis, units in present.items():
        ratios = parameters.get("ratios") or {}
        if isinstance(ratios, Mapping):  # by axis
            ratios = [ratios.get(axis, parameters["ratio"])] * len(units)
        if len(ratios) != len(units):
            raise RequestError(
                f"{step.method}: ratios has {len(ratios)} values, but {source.spec} has {len(units)} layers."
            )
        multiple = parameters.get("multiple_of", 1) if axis == "neurons" else 1
        planned[axis] = {
            index: round_width(count, ratio, multiple)
            for (index, count), ratio in zip(units.items(), ratios, strict=True)
        }
    return planned

"""Which units a step removes, and how many of each kind every block keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.calibration.sliced_stream import SlicedStream
from secateur.calibration.stream_moment import StreamMoment
from secateur.errors import RequestError
from secateur.network.anatomy import AXES, NEURON_AXES, Axis, Block
from secateur.network.channels import Channels, nearest_channels
from secateur.network.head_dims import find_head_dims
from secateur.network.matrices import MatrixRef
from secateur.network.parts import stacked
from secateur.network.scores import ErrorCurves
from secateur.network.source import Source
from secateur.network.widths import round_width
from secateur.recipe import Step
from secateur.registry import find
from secateur.unit_budgets import ALIGNED, Sizes, budgeted_sizes, measure_of, multiple_of, sets_of

WORDS: dict[Axis, str] = {
    "neurons": "feed-forward neurons",
    "heads": "attention heads",
    "queries": "query heads",
    "head_dims": "dimensions inside attention heads",
    "expert_neurons": "neurons inside experts",
    "experts": "experts",
}


@dataclass
class Left:
    """What is left of a network behind the steps of a recipe, as far as steps have a `ratio` to tell it by.

    sizes: units of each kind, by block. channels: of the residual stream, None where all stay. undecided: methods that find
        out in the run how many units go.
    """

    sizes: Sizes = field(default_factory=dict)
    channels: int | None = None
    undecided: tuple[str, ...] = ()


def asked_axes(step: Step) -> tuple[Axis, ...]:
    """The kinds of units that a step cuts, in the order in which tokens meet them: neurons are those inside experts too,
    where the method and those that it names can cut these.
    """
    asked = {*step.parameters.get("axis", step.registered.axes)}
    named = [name for key in step.registered.others for name in step.parameters.get(key) or ()]
    if "neurons" in asked and all("expert_neurons" in each.axes for each in (step.registered, *map(find, named))):
        asked.add("expert_neurons")
    return tuple(axis for axis in AXES if axis in asked)


def present_sizes(source: Source, step: Step) -> Sizes:
    """What there is of the units that a step cuts.

    Raises RequestError naming the first block whose units a method cannot see, or that has but one.
    """
    sizes: Sizes = {}
    if cuts_channels(step) and step.registered.scope == "units":
        _check_channels(step)
    if {"heads", "queries"} <= set(asked_axes(step)):
        raise RequestError(
            f"{step.method}: which queries there are follows from the heads, so one step cannot cut both; make two of it."
        )
    if "head_dims" in asked_axes(step):
        _check_dims(source, step)
    for axis in asked_axes(step):
        sizes[axis] = {}
        for block in source.anatomy.blocks:
            group = block.group(axis)
            if axis == "head_dims":
                if group is not None:  # some architectures mix blocks with and without attention
                    sizes[axis][block.index] = group.count
                continue
            if axis in ("experts", "expert_neurons"):
                if block.experts is not None:  # some architectures mix blocks of both kinds
                    sizes[axis][block.index] = _experts(source, block, axis)
                continue
            if axis == "neurons" and block.experts is not None:
                if "expert_neurons" not in asked_axes(step):
                    raise RequestError(
                        f"{step.method} cuts no neurons inside experts, and {block.path} of {source.spec} is a mixture of "
                        f"{block.experts.count}; choose another method, such as wanda_units, or another axis."
                    )
                if group is not None:  # of an expert that all tokens go through
                    sizes[axis][block.index] = group.count
                continue
            if group is None:
                what = WORDS[axis]
                raise RequestError(
                    f"{step.method} cuts {what}, but {block.path} of {source.spec} is a {block.kind} block: "
                    f"{(block.note or f'no {what} that can be told apart were recognised in it').rstrip('.')}."
                    + (
                        " Where every head has keys and values of its own, choose axis=heads."
                        if axis == "queries"
                        else ""
                    )
                )
            if axis == "heads" and group.count == 1 and wanted_ratio(step.parameters) > 0:
                raise RequestError(
                    f"all attention heads of {block.path} of {source.spec} share their keys and values, or are normalised "
                    "together, so none can be removed alone; choose axis=neurons."
                )
            sizes[axis][block.index] = group.count
        if not sizes[axis] and axis not in ("neurons", "expert_neurons"):
            raise RequestError(f"{step.method} cuts experts, but no block of {source.spec} holds a mixture of them.")
    if {"experts", "expert_neurons"} <= {axis for axis, units in sizes.items() if units}:
        raise RequestError(
            f"{step.method}: neurons inside experts go with their experts, so one step cannot cut both; make two of it."
        )
    sizes = {axis: units for axis, units in sizes.items() if units or axis not in ("neurons", "expert_neurons")}
    if not sizes and not cuts_channels(step):
        raise RequestError(
            f"{step.method} cuts neurons inside experts, but no block of {source.spec} holds a mixture of them."
        )
    return sizes


def _check_dims(source: Source, step: Step) -> None:
    """Raises RequestError where a step cannot cut dimensions inside heads as it is asked to."""
    if other := [axis for axis in asked_axes(step) if axis in ("heads", "queries")]:
        raise RequestError(
            f"{step.method}: {other[0]} and dimensions inside heads lie across each other, so one step cannot cut both; "
            "make two of it."
        )
    if step.parameters.get("allocation"):
        raise RequestError(
            f"{step.method}: heads of all blocks must keep the same dimensions, so there is nothing to divide among blocks; "
            "leave allocation out, or cut head_dims in a step of their own."
        )
    find_head_dims(source)


def _experts(source: Source, block: Block, axis: Axis) -> int:
    """How many experts a block has, or neurons each of them. Raises RequestError where none can go alone."""
    group, why, inside = block.group(axis), "", axis == "expert_neurons"
    what = "width" if inside else "number"
    if group is None and inside:
        why = "they do not lie together in tensors in which their neurons were recognised"
    elif group is None:
        why = "they do not lie together in one tensor behind a router that was recognised"
    elif source.tensors and source.live is None:
        parts = [source.parts[part.parameter] for part in group.slices]
        if any((each[0].region or each[0].taken) and not stacked(each) for each in parts):
            why = f"the checkpoint stores them in a layout in which their {what} cannot be changed"
    if why or group is None:
        raise RequestError(f"the experts of {block.path} of {source.spec} cannot be cut: {why}.")
    return group.count


def cuts_channels(step: Step) -> bool:
    return "channels" in step.parameters.get("axis", step.registered.axes)


def rotates(step: Step) -> bool:
    """Whether it asks for directions of the stream, to which it turns the network."""
    return not {StreamMoment, SlicedStream}.isdisjoint(step.registered.needs.values())


def turns(step: Step) -> bool:
    """Whether it asks for directions place by place, between which matrices turn the stream beside every part."""
    return SlicedStream in step.registered.asked(step.parameters).values()


def asked_channels(step: Step) -> tuple[float, int] | None:
    """Which fraction of the channels of the residual stream is to go, and what their number is to be a multiple of; None
    where the step cuts none, or its `ratio` does not tell.
    """
    parameters = step.parameters
    if not cuts_channels(step) or "ratio" not in parameters or parameters.get("target"):
        return None
    return (parameters.get("ratios") or {}).get("channels", parameters["ratio"]), parameters.get("multiple_of", 1)


def planned_channels(
    source: Source, step: Step, channels: Channels, raw: Mapping[str, Any], before: int | None = None
) -> int | None:
    """How many channels of the residual stream stay: the number that the configuration can say nearest to what was asked
    for; None where the step cuts none, or its `ratio` does not tell.

    Args:
        raw: the configuration with what the step leaves of units.
        before: how many channels earlier steps leave; by default all.
    """
    if (asked := asked_channels(step)) is None:
        return None
    return nearest_channels(source, channels, raw, *asked, before)


def _check_channels(step: Step) -> None:
    """Raises RequestError where a step has a budget in which channels cannot be counted, block by block as others are."""
    asked = step.parameters
    if name := next((name for name in ("ratios", "allocation", "target") if asked.get(name)), None):
        raise RequestError(
            f"{step.method}: all blocks share the channels of the residual stream, so {name} does not go with them; give "
            "one ratio, or cut them in a step of their own."
        )
    if asked.get("of", "units") != "units":
        raise RequestError(
            f"{step.method}: channels lie across all other units, so of={asked['of']} does not tell how many go; leave `of` "
            "out, or let minitron look for a shape (target)."
        )


def output_matrices(source: Source, axes: Sequence[Axis]) -> dict[int, list[MatrixRef]]:
    """The matrices that read the units, by block in the order in which tokens meet them; their role is the axis."""
    refs: dict[int, list[MatrixRef]] = {}
    for block in source.anatomy.blocks:
        for axis in axes:
            # what reads them is known, but they are decided for all blocks at once
            if axis != "head_dims" and (group := block.group(axis)):
                name, columns = group.output.parameter, group.count * group.output.width
                transposed, hidden = (group.one if group.stacked else group).output.dim == 0, source.anatomy.hidden
                for expert in range(group.stacked) if group.stacked else (None,):
                    own = name if expert is None else f"{name}[{expert}]"
                    refs.setdefault(block.index, []).append(
                        MatrixRef(own, name, expert, hidden, columns, transposed, block.index, axis)
                    )
    return refs


def wanted_ratio(parameters: Mapping[str, Any]) -> float:
    """The largest fraction that is to be removed of any block."""
    if "ratio" not in parameters or parameters.get("target"):
        return 1.0
    ratios = parameters.get("ratios") or []
    return max([parameters["ratio"], *(ratios.values() if isinstance(ratios, Mapping) else ratios)])


def planned_sizes(
    source: Source,
    step: Step,
    present: Sizes | None = None,
    before: Sizes | None = None,
    blocks: int | None = None,
) -> Sizes | None:
    """Units kept of those `present`, from a step's `ratio`, `ratios`, `of`, `target` and `multiple_of`; None if it has none,
    or is not uniform.

    before: what earlier steps leave of units of any kind. blocks: how many blocks they leave, by default all. Where an
    allocation divides the budget, this is what each block would keep without it.

    Raises RequestError when a width cannot be.
    """
    present = present or present_sizes(source, step)
    parameters = step.parameters
    if "ratio" not in parameters or not parameters.get("uniform", True):
        return None
    if step.registered.scope == "network" and parameters.get("target"):  # the method looks for the shape itself
        return None
    if parameters.get("ratios") and parameters.get("allocation"):
        raise RequestError(f"{step.method}: give either ratios or an allocation: both say what each block keeps.")
    if parameters.get("allocation") and "experts" in present:
        raise RequestError(
            f"{step.method}: every mixture of {source.spec} must keep as many experts, because each token goes to a fixed "
            "number of them; leave allocation out."
        )
    if "expert_neurons" in present and ErrorCurves in _asks(parameters.get("allocation")):
        raise RequestError(
            f"{step.method}: {next(iter(parameters['allocation']))} compares what blocks lose of their output, which is not "
            "known of neurons inside experts; choose another allocation, such as flap_search or alphapruning."
        )
    planned = (
        budgeted_sizes(source, step, present, before or {}, blocks)
        if measure_of(step)
        else _by_ratio(source, step, present, before or {})
    )
    check_expert_widths(source, step, planned.get("expert_neurons", {}))
    if len(set(planned.get("head_dims", {}).values())) > 1:
        raise RequestError(
            f"{step.method}: heads of all blocks of {source.spec} must keep the same dimensions, so they cannot lose "
            "differing fractions; give one ratio."
        )
    for index, kept in planned.get("experts", {}).items():
        experts = source.anatomy.blocks[index].experts
        if experts and experts.chosen and kept < experts.chosen:
            raise RequestError(
                f"{step.method} would leave {kept} of {experts.count} experts in {source.anatomy.blocks[index].path} of "
                f"{source.spec}, but each token goes to {experts.chosen} of them; choose a smaller ratio."
            )
    return planned


def _asks(allocation: Mapping[str, Any] | None) -> set[type]:
    return {need for name in allocation or () for need in find(name).needs.values()}


def check_expert_widths(source: Source, step: Step, kept: Mapping[int, int]) -> None:
    """Raises RequestError where experts would have a width in which transformers cannot multiply them together."""
    for index, width in kept.items():
        block = source.anatomy.blocks[index]
        if width % ALIGNED and block.experts and width != block.experts.width:
            raise RequestError(
                f"{step.method} would leave {width} of {block.experts.width} neurons in every expert of {block.path} of "
                f"{source.spec}, but transformers multiplies all experts at once, in widths that are multiples of "
                f"{ALIGNED}; choose a ratio that leaves such a number."
            )


def _by_ratio(source: Source, step: Step, present: Sizes, before: Sizes) -> Sizes:
    """Units kept by a ratio of the units of each block."""
    parameters = step.parameters
    planned: Sizes = {}
    # neurons and those inside experts share the ratios of their blocks, of which some architectures have both kinds
    both = sorted({index for axis in NEURON_AXES for index in present.get(axis, {})})
    for axis, units in present.items():
        blocks = both if axis in NEURON_AXES else list(units)
        ratios = parameters.get("ratios") or {}
        if isinstance(ratios, Mapping):  # by axis
            ratios = [ratios.get(axis, parameters["ratio"])] * len(blocks)
        if len(ratios) != len(blocks):
            raise RequestError(
                f"{step.method}: ratios has {len(ratios)} values, but {source.spec} has {len(blocks)} layers."
            )
        of, sets = dict(zip(blocks, ratios, strict=True)), sets_of(source, axis, before)
        planned[axis] = {
            index: sets[index] * round_width(count // sets[index], of[index], multiple_of(step, axis))
            for index, count in units.items()
        }
    return planned

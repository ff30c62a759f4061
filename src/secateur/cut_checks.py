"""What a method may say is to become of units and channels: anything else is refused before it is kept."""

import torch
from torch import Tensor

from secateur.errors import RunError
from secateur.network.anatomy import Axis, Group
from secateur.network.source import Source
from secateur.network.views import Cut, Plan


def check_cut(source: Source, method: str, block: int, axis: Axis, cut: Cut) -> None:
    """Raises RunError naming the method and the block when a method returned what cannot be done."""
    group, where = _group(source, block, axis), f"{method}, block {block}"
    if group.stacked:
        if tuple(cut.kept.shape[:-1]) != (group.stacked,):
            raise RunError(f"{where}: nothing is said of some experts; nothing was cut there.")
        for expert in range(group.stacked):
            check_expert(source, method, block, axis, expert, cut.of(expert))
        return
    _check(source, where, group, cut)
    if axis == "head_dims":
        _check_values(source, where, block, cut)


def check_expert(source: Source, method: str, block: int, axis: Axis, expert: int, cut: Cut) -> None:
    """The same for the neurons of one expert."""
    _check(source, f"{method}, block {block}, expert {expert}", _group(source, block, axis).one, cut, expert=True)


def _group(source: Source, block: int, axis: Axis) -> Group:
    group = source.anatomy.blocks[block].group(axis)
    assert group is not None, "a cut is only planned where there are such units"
    return group


def _check(source: Source, where: str, group: Group, cut: Cut, expert: bool = False) -> None:
    kept, axis = cut.kept, group.axis
    ordered = len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
    size = group.count // group.sets
    uneven = group.sets > 1 and len(set((kept // size).bincount(minlength=group.sets).tolist())) > 1
    if not ordered or int(kept[0]) < 0 or int(kept[-1]) >= group.count or uneven:
        raise RunError(f"{where}: an impossible set of {axis} was kept; nothing was cut there.")
    if axis == "experts" and (cut.output is not None or cut.output_bias is not None):
        raise RunError(f"{where}: experts have no output matrix of their own that could be given anew.")
    hidden = source.anatomy.hidden
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("output weights", cut.output, (hidden, len(kept) * group.output.width)),
        ("output bias", cut.output_bias, (hidden,)),
    ]
    if cut.makers is not None:
        if len(cut.makers) != len(group.inputs):
            raise RunError(
                f"{where}: {len(cut.makers)} tensors make the {axis} that were kept, not {len(group.inputs)}."
            )
        for part, made in zip(group.inputs, cut.makers, strict=True):
            whole = tuple(source.skeleton.get_parameter(part.parameter).shape)[1 if expert else 0 :]
            inputs = () if len(whole) == 1 else (whole[1 - part.dim],)
            wanted.append((f"values of {part.parameter}", made, (len(kept), part.width, *inputs)))
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RunError(f"{where}: new {name} have shape {list(tensor.shape)}, not {list(shape)}.")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{where}: the new {name} hold non-finite values; use a smaller ratio, other parameters of the method "
                "or another seed."
            )


def _check_values(source: Source, where: str, block: int, cut: Cut) -> None:
    attention, values = source.anatomy.blocks[block].attention, cut.values
    assert attention is not None, "it has heads"
    shape = (attention.kv_heads, 2 * len(cut.kept))
    ordered = values is not None and tuple(values.shape) == shape and bool((values[:, 1:] > values[:, :-1]).all())
    if values is None or not ordered or int(values.min()) < 0 or int(values.max()) >= attention.head_dim:
        raise RunError(f"{where}: an impossible set of dimensions of values was kept; nothing was cut there.")
    if cut.output is not None or cut.makers is not None:
        raise RunError(f"{where}: dimensions inside heads are cut as they are; no weights can be given anew.")


def check_stream(source: Source, method: str, plan: Plan) -> None:
    """Raises RunError when a method returned what cannot become of the channels of the stream."""
    hidden, kept = source.anatomy.hidden, plan.channels
    if (plan.basis is not None or plan.bases is not None) and plan.cuts:
        raise RunError(f"{method}: a network that is turned cannot lose units in the same step.")
    if kept is not None:
        ordered = kept.dim() == 1 and len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
        if not ordered or int(kept[0]) < 0 or int(kept[-1]) >= hidden:
            raise RunError(f"{method}: an impossible set of channels was kept; nothing was cut.")
    elif plan.basis is None and plan.bases is not None and not plan.bases.complete:
        raise RunError(f"{method}: directions were not kept for every place of the stream; nothing was cut.")

"""What a method may say is to become of units and channels: anything else is refused before it is kept."""

import torch
from torch import Tensor

from secateur.errors import RunError
from secateur.network.anatomy import Axis
from secateur.network.source import Source
from secateur.network.views import Cut, Plan


def check_cut(source: Source, method: str, block: int, axis: Axis, cut: Cut) -> None:
    """Raises RunError naming the method and the block when a method returned what cannot be done."""
    group = source.anatomy.blocks[block].group(axis)
    assert group is not None, "a cut is only planned where there are such units"
    kept, where = cut.kept, f"{method}, block {block}"
    ordered = len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
    size = group.count // group.sets
    uneven = group.sets > 1 and len(set((kept // size).bincount(minlength=group.sets).tolist())) > 1
    if not ordered or int(kept[0]) < 0 or int(kept[-1]) >= group.count or uneven:
        raise RunError(f"{where}: an impossible set of {axis} was kept; nothing was cut there.")
    if axis == "head_dims":
        _check_values(source, where, block, cut)
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
            whole = source.skeleton.get_parameter(part.parameter)
            inputs = () if whole.dim() == 1 else (whole.shape[1 - part.dim],)
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
    hidden, kept, basis = source.anatomy.hidden, plan.channels, plan.basis
    if kept is not None:
        ordered = kept.dim() == 1 and len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
        if not ordered or int(kept[0]) < 0 or int(kept[-1]) >= hidden:
            raise RunError(f"{method}: an impossible set of channels was kept; nothing was cut.")
    elif basis is not None:
        if plan.cuts:
            raise RunError(f"{method}: a network that is turned cannot lose units in the same step.")
        basis = basis.double().cpu()
        far = (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max()
        if len(basis) != hidden or not float(far) < 1e-6:
            raise RunError(f"{method}: the directions kept are not orthonormal; nothing was cut.")

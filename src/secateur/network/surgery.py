"""Cuts units out of every tensor that is coupled to them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RunError
from secateur.network.anatomy import Anatomy, Axis, Group
from secateur.network.head_dims import NarrowHeads
from secateur.network.views import Cut


def cut_tensors(
    tensors: Mapping[str, Tensor],
    group: Group,
    cut: Cut,
    dtype: Callable[[Tensor], torch.dtype] = lambda old: old.dtype,
) -> dict[str, Tensor]:
    """The parameters that change when `cut` is applied, by parameter name; the others are not returned.

    Args:
        tensors: parameters of the block by their name in the model, at least all that are coupled.
        group: where its units lie.
        cut: which units stay.
        dtype: says from the old tensor in which dtype new weights are given back.

    Raises RunError when a new weight is not finite in that dtype.
    """
    if group.stacked:
        each = [
            cut_tensors(
                {part.parameter: tensors[part.parameter][expert] for part in group.slices},
                group.one,
                cut.of(expert),
                dtype,
            )
            for expert in range(group.stacked)
        ]
        return {name: torch.stack([found[name] for found in each]) for name in each[0]}
    units = torch.ones(group.count, dtype=torch.bool)
    units[cut.kept.cpu()] = False
    gone = units.nonzero().flatten()
    stays: dict[str, tuple[int, Tensor]] = {}
    for part in group.slices:  # a fused tensor may hold several, and what is no unit's
        everything = torch.ones(tensors[part.parameter].shape[part.dim], dtype=torch.bool)
        stays.setdefault(part.parameter, (part.dim, everything))[1][part.indices(gone)] = False
    made = {name: tensors[name].to(dtype(tensors[name]), copy=True) for name in stays} if cut.makers is not None else {}
    for part, new in zip(group.inputs, cut.makers or (), strict=False):
        rows = new.flatten(0, 1).to(made[part.parameter].dtype)  # as in torch.nn.Linear, whatever is stored
        made[part.parameter].index_copy_(part.dim, part.indices(cut.kept), rows if part.dim == 0 else rows.T)
    changed = {
        name: (made or tensors)[name].index_select(dim, mask.nonzero().flatten().to(tensors[name].device))
        for name, (dim, mask) in stays.items()
    }
    output = group.output
    if cut.output is not None:
        changed[output.parameter] = cut.output if output.dim == 1 else cut.output.T
    if cut.output_bias is not None and group.output_bias:
        changed[group.output_bias] = cut.output_bias
    for name, tensor in changed.items():
        changed[name] = tensor = tensor.to(dtype(tensors[name])).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} would hold non-finite values after the cut: the method's solution diverged there. "
                "Use a smaller ratio or a stronger ridge."
            )
    return changed


def silence_tensors(tensors: Mapping[str, Tensor], group: Group, cut: Cut) -> dict[str, Tensor]:
    """The tensors of the uncut block that compute what the cut one does: removed columns of the output matrix are zero, and
    where the cut changes what makes the units, those that stay are made anew and the others as before.

    Shares nothing with `cut_tensors`: what it gives is what a cut is checked against.

    tensors: the output matrix, its bias, and what `remade` names, in the dtype that is written.
    """
    if group.stacked:
        changed = {name: tensors[name].clone() for name in (group.output.parameter, *remade(group, cut))}
        for expert in range(group.stacked):
            own = {name: tensor[expert] for name, tensor in tensors.items() if name in changed}
            for name, tensor in silence_tensors(own, group.one, cut.of(expert)).items():
                changed[name][expert] = tensor
        return changed
    part, old = group.output, tensors[group.output.parameter]
    columns = (cut.kept[:, None] * part.width + torch.arange(part.width)).view(-1)
    new = old.index_select(part.dim, columns)
    if cut.output is not None:
        new = (cut.output if part.dim == 1 else cut.output.T).to(old.dtype)
    silenced = {part.parameter: torch.zeros_like(old).index_copy(part.dim, columns, new)}
    if cut.output_bias is not None and group.output_bias:
        silenced[group.output_bias] = cut.output_bias.to(tensors[group.output_bias].dtype)
    for made, rows in zip(group.inputs if cut.makers is not None else (), cut.makers or (), strict=True):
        whole = silenced.get(made.parameter)  # another part of a fused tensor may have been made already
        whole = tensors[made.parameter].clone() if whole is None else whole
        units = whole.narrow(made.dim, made.offset, group.count * made.width).unflatten(made.dim, (-1, made.width))
        if made.dim == 0:
            units[cut.kept] = rows.to(whole.dtype)
        else:  # (inputs, count, rows) where a matrix is stored the other way
            units[:, cut.kept] = rows.to(whole.dtype).movedim(2, 0)
        silenced[made.parameter] = whole
    return silenced


def remade(group: Group, cut: Cut) -> tuple[str, ...]:
    """Parameters of what makes the units, where a cut changes them."""
    return () if cut.makers is None else tuple(dict.fromkeys(part.parameter for part in group.inputs))


def cut_module(
    model: nn.Module, anatomy: Anatomy, cuts: Mapping[tuple[int, Axis], Cut], heads: NarrowHeads | None = None
) -> None:
    """Applies cuts to a live model, in place, each named by block and axis; widths may differ between layers.

    heads: what they lose of their dimensions, where one of the cuts is of these.
    """
    for (index, axis), cut in cuts.items():
        group = anatomy.blocks[index].group(axis)
        assert group is not None, "a cut is only planned where there are such units"
        if axis == "head_dims":
            assert heads is not None, "it is known which dimensions go"
            whole = {name: model.get_parameter(name).detach() for name in anatomy.blocks[index].parameters}
            for name, tensor in heads.cut(index, whole, cut, lambda old: old.dtype).items():
                replace_parameter(model, name, tensor)
            continue
        for name in group.buffers:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = model.get_buffer(name).index_select(0, cut.kept)
        parameters = {part.parameter for part in group.slices} | {group.output_bias or ""} - {""}
        tensors = {name: model.get_parameter(name).detach() for name in parameters}
        for name, tensor in cut_tensors(tensors, group, cut).items():
            replace_parameter(model, name, tensor)


def adopt_numbers(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Numbers that modules keep of themselves, such as how many heads there are, in place: those that differ between the
    skeletons that the configurations build, `before` the cut and `after` it.
    """
    new = dict(after.named_modules())
    for path, old in before.named_modules():
        for name, value in vars(old).items():
            other = vars(new[path]).get(name, value) if path in new else value
            if type(value) in (int, float) and type(other) is type(value) and other != value:
                setattr(module.get_submodule(path), name, other)


def adopt_buffers(module: nn.Module, after: nn.Module) -> None:
    """Numbers that modules keep in buffers, such as what embeddings are multiplied by, in place, as in a skeleton."""
    new = dict(after.named_buffers())
    for name, old in module.named_buffers():
        other = new.get(name)
        if other is not None and not other.is_meta and other.shape == old.shape and old.numel() == 1:
            old.copy_(other)


def replace_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts `tensor` in the place of a parameter and corrects what its module says of its own size."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    module._parameters[attribute] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    if attribute != "weight" or tensor.dim() != 2:
        return
    # torch.nn.Linear stores (out, in); the Conv1D of transformers (in, out), and it reshapes by its `nf`
    sizes: dict[str, Any] = (
        {"nf": tensor.shape[1], "nx": tensor.shape[0]}
        if hasattr(module, "nf")
        else {"out_features": tensor.shape[0], "in_features": tensor.shape[1]}
    )
    for size, value in sizes.items():
        if hasattr(module, size):
            setattr(module, size, value)

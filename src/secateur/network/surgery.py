"""Cuts units out of every tensor that is coupled to them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RunError
from secateur.network.anatomy import Anatomy, FeedForward
from secateur.network.views import Cut


def cut_tensors(tensors: Mapping[str, Tensor], feed_forward: FeedForward, cut: Cut) -> dict[str, Tensor]:
    """The parameters that change when `cut` is applied, by parameter name; the others are not returned.

    Args:
        tensors: parameters of the block by their name in the model, at least all that are coupled.
        feed_forward: where its neurons lie.
        cut: which neurons stay; new output weights are cast to the stored dtype.

    Raises RunError when a new weight is not finite in that dtype.
    """
    kept: dict[str, tuple[int, list[Tensor]]] = {}
    for part in feed_forward.slices:
        kept.setdefault(part.parameter, (part.dim, []))[1].append(cut.kept + part.offset)
    # sorted, because a fused tensor may hold its parts in another order than the anatomy names them
    changed = {
        name: tensors[name].index_select(dim, torch.cat(indices).sort().values) for name, (dim, indices) in kept.items()
    }
    down = feed_forward.down
    if cut.down is not None:
        changed[down.parameter] = cut.down if down.dim == 1 else cut.down.T
    if cut.down_bias is not None and feed_forward.down_bias:
        changed[feed_forward.down_bias] = cut.down_bias
    for name, tensor in changed.items():
        changed[name] = tensor = tensor.to(tensors[name].dtype).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} would hold non-finite values after the cut: the method's solution diverged there. "
                "Use a smaller ratio or a stronger ridge."
            )
    return changed


def silence_tensors(tensors: Mapping[str, Tensor], feed_forward: FeedForward, cut: Cut) -> dict[str, Tensor]:
    """The output matrix and bias of the uncut block that compute what the cut one does: removed columns are zero.

    Shares nothing with `cut_tensors`: what it gives is what a cut is checked against.
    """
    down, old = feed_forward.down, tensors[feed_forward.down.parameter]
    columns = old.index_select(down.dim, cut.kept)
    if cut.down is not None:
        columns = (cut.down if down.dim == 1 else cut.down.T).to(old.dtype)
    silenced = {down.parameter: torch.zeros_like(old).index_copy(down.dim, cut.kept, columns)}
    if cut.down_bias is not None and feed_forward.down_bias:
        silenced[feed_forward.down_bias] = cut.down_bias.to(tensors[feed_forward.down_bias].dtype)
    return silenced


def cut_module(model: nn.Module, anatomy: Anatomy, cuts: Mapping[int, Cut]) -> None:
    """Applies cuts to a live model, in place; widths may differ between layers."""
    for index, cut in cuts.items():
        feed_forward = anatomy.blocks[index].feed_forward
        assert feed_forward is not None, "a cut is only planned for a block with a recognised feed-forward"
        parameters = {part.parameter for part in feed_forward.slices} | {feed_forward.down_bias or ""} - {""}
        tensors = {name: model.get_parameter(name).detach() for name in parameters}
        for name, tensor in cut_tensors(tensors, feed_forward, cut).items():
            replace_parameter(model, name, tensor)


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

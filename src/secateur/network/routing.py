"""A network in which some experts are never chosen: what a network without them is checked against.

No weights can say that of a router without a bias: a row that loses on every token does not exist. So the router's own
product is followed, and the logits of these experts become -inf before anything reads them. A softmax over what is left is
then that of a router without them, and the largest are chosen among the others alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.network.anatomy import Group

_LOWEST = -torch.inf


class _Unchosen(TorchFunctionMode):
    """Watches for the products of routers, which are known by where their numbers lie, wherever they lie just now."""

    def __init__(self, model: nn.Module, gone: Mapping[str, tuple[int, Tensor]]) -> None:
        super().__init__()
        self._model, self._gone = model, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        weight = None
        if func is functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
        elif func is torch.addmm:
            weight = args[2]
        elif func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else None
        if isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
            for name, (count, gone) in self._gone.items():
                router = self._model.get_parameter(name)
                alike = router.numel() == weight.numel() and not router.is_meta
                if output.shape[-1] == count and alike and router.data_ptr() == weight.data_ptr():
                    output = output.index_fill(-1, gone.to(output.device), _LOWEST)
        return output


_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}


@contextmanager
def unchosen(model: nn.Module, removed: Mapping[int, tuple[Group, Tensor]]) -> Iterator[None]:
    """While it is open, no token of `model` is sent to the experts `removed`: (k,) indices by block, with their group.

    Nothing of what cuts experts is used.
    """
    gone = {group.output.parameter: (group.count, indices) for group, indices in removed.values()}
    with ExitStack() as stack, torch.no_grad():
        for group, indices in removed.values():
            for name in group.buffers:  # what is added to the scores may be positive, and a score be 0 at the lowest
                buffer = model.get_buffer(name)
                stack.callback(buffer.copy_, buffer.clone())
                buffer[indices.to(buffer.device)] = _LOWEST
        if gone:
            stack.enter_context(_Unchosen(model, gone))
        yield

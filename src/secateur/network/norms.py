"""What a norm does beside dividing: whether it subtracts the mean, what it adds to its scale; and norms without mean."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.network.probe import norm_roles
from secateur.network.trace import clone


@dataclass(frozen=True)
class Norm:
    """A norm over the residual stream.

    scale, bias: names of its parameters in the model, None where it has none. added: what it adds to the scale before it
    multiplies, 0 or 1. centres: whether it subtracts the mean. epsilon: None where it does not tell it.
    """

    scale: str | None
    bias: str | None
    added: float
    centres: bool
    epsilon: float | None


def norm_of(model: nn.Module, path: str, width: int) -> Norm | None:
    """What the module at `path` does to `width` channels, None where it is no norm over them."""
    module = model.get_submodule(path)
    if (names := norm_roles(module, width)) is None:
        return None
    scale, bias = (f"{path}.{name}" if name else None for name in names)
    epsilon = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    return Norm(scale, bias, _added(module) if scale else 0.0, centres(module, width), epsilon)


def centres(module: nn.Module, width: int) -> bool:
    """Whether a norm subtracts the mean: its output does not change when every channel grows by the same number."""
    twin = clone(module, lambda tensor: torch.ones(tensor.shape), lambda buffer: buffer)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return bool((twin(x + 1) - twin(x)).abs().max() < 1e-3)


def _added(module: nn.Module) -> float:
    """What a norm adds to its scale: its output for a scale of 0, relative to the difference that 1 makes."""
    outputs = []
    for value in (0.0, 1.0):
        twin = clone(
            module,
            lambda tensor, value=value: torch.full(tensor.shape, value),  # type: ignore[misc]
            lambda buffer: buffer,
        )
        with torch.no_grad():
            # half of it +1 and half -1, so that nothing changes where the mean is subtracted, nor by a bias
            width = next(module.parameters()).numel()
            x = torch.ones(1, width)
            x[:, : width // 2] = -1
            found = twin(x)
            outputs.append(float((found[:, width // 2 :].mean() - found[:, : width // 2].mean()) / 2))
    return round(outputs[0] / (outputs[1] - outputs[0]), 3)


@contextmanager
def without_mean(model: nn.Module, norms: Mapping[str, Norm]) -> Iterator[None]:
    """While it is open, those of `norms` that subtract the mean do not: they divide by the root mean square, as they would
    anyway for a stream without a mean.
    """

    def divide(module: nn.Module, args: tuple[Any, ...], output: Tensor, norm: Norm) -> Tensor:
        x, here = args[0].float(), dict(module.named_parameters())
        found = nn.functional.rms_norm(x, x.shape[-1:], eps=norm.epsilon)
        if norm.scale:
            found = found * (here[norm.scale.rpartition(".")[2]] + norm.added)
        if norm.bias:
            found = found + here[norm.bias.rpartition(".")[2]]
        return found.to(output.dtype)

    handles = [
        model.get_submodule(path).register_forward_hook(partial(divide, norm=norm))
        for path, norm in norms.items()
        if norm.centres
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

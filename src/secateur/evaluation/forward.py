"""How the evaluation engine runs a model: evaluation mode, logits, and decoding with a cache.

Everything here works on a transformers causal language model, and on a plain `nn.Module` that maps token ids of shape
(batch, tokens) to logits of shape (batch, tokens, vocabulary).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError, RunError


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Switches dropout and gradients off inside; every submodule's training flag is put back afterwards."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part of `model`, or None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def maximum_positions(model: nn.Module) -> int | None:
    """The longest sequence `model` was made for, in tokens; None where its configuration sets no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(model: nn.Module, tokens: int, what: str) -> None:
    """Raises RequestError when `what` of `tokens` tokens is longer than `model` can read."""
    limit = maximum_positions(model)
    if limit is not None and tokens > limit:
        raise RequestError(
            f"{what} of {tokens} tokens is longer than the model's {limit} positions; ask for at most {limit}."
        )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a module without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> str:
    """The name of the dtype that most floating-point parameters have, such as "float32"."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(counts, key=lambda key: counts[key]) if counts else torch.get_default_dtype()
    return str(dtype).removeprefix("torch.")


def has_cache(model: nn.Module) -> bool:
    """Whether `model` decodes with a key-value cache that it takes and gives back as `past_key_values`."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def _call(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    with_options = options if hasattr(model, "config") else {}
    return model(ids.to(device_of(model)), **with_options)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of shape (batch, tokens, vocabulary) for `ids` of shape (batch, tokens); no cache is kept."""
    out = _call(model, ids, **({"use_cache": False} if has_cache(model) else {}))
    return _tensor(out)


def step(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Reads `ids` (batch, new tokens) after what `cache` holds (None: nothing yet).

    Returns the logits (batch, new tokens, vocabulary) and the grown cache. Only for models with `has_cache`.
    """
    out = _call(model, ids, past_key_values=cache, use_cache=True)
    return _tensor(out), out.past_key_values


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"The model returned {type(out).__name__} without logits; a causal language model is needed."
        )
    return logits


def finite(logits: Tensor, where: str) -> Tensor:
    """Returns `logits`, or raises RunError that says where a non-finite value was met."""
    # A sum is non-finite as soon as one term is, and is far cheaper than a mask over the vocabulary; float64 keeps
    # large finite values from overflowing.
    if not torch.isfinite(logits.sum(dtype=torch.float64)):
        count = int((~torch.isfinite(logits)).sum())
        raise RunError(
            f"{count} of {logits.numel()} logits are not finite in {where}; the model's weights or this dtype do not "
            "hold: look for non-finite weights with `secateur inspect`, or evaluate in float32."
        )
    return logits


def synchronize(device: torch.device) -> None:
    """Waits until the accelerator has done what was asked of it; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

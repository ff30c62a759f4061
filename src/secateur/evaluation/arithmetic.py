"""Counted work and size: multiply-adds and parameters, from shapes alone (a model on meta will do)."""

import math
from typing import Any

from torch import nn

from secateur.errors import RequestError
from secateur.evaluation.forward import text_config


def parameters(model: nn.Module) -> int:
    """Number of parameters; tensors that several modules share (tied embeddings) count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, tokens: int, context: int = 0) -> int:
    """Multiply-adds of reading `tokens` tokens at once, behind `context` tokens that a cache already holds.

    Counted: every linear map (`nn.Linear`, the transposed `Conv1D` of transformers, convolutions along the sequence, the
    matrices beside the parts of blocks that turn the residual stream)
    for each token, the head among them for all tokens; the routed experts that a token visits; attention's scores and
    weighted values, 2 · heads · head_dim for each pair of a token and a key it may see. Causal attention is counted
    exactly, token i seeing context + i + 1 keys (fewer in sliding windows), not as the full square. Not counted:
    embeddings (looked up), norms, activations, rotations, routers and the scans of state-space blocks.

    With one token and a context this is the work of one decoding step.
    """
    if tokens < 1 or context < 0:
        raise RequestError(
            f"{tokens} tokens behind {context} cannot be counted; at least 1 token and no negative context."
        )
    config = text_config(model)
    return tokens * linear_multiply_adds(model, config) + _attention(config, tokens, context)


def linear_multiply_adds(model: nn.Module, config: Any) -> int:
    """Multiply-adds of all linear maps of a module for one token; `config` is the language model's."""
    total = 0
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # Not weight.numel(): packed low-bit weights hold several values in one element.
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Conv1d) or type(module).__name__ in ("Conv1D", "Shortcut"):
            total += module.weight.numel()
        else:
            total += _experts(module, config)
    return total


def _experts(module: nn.Module, config: Any) -> int:
    """Multiply-adds for one token of the experts stacked in three-dimensional parameters (experts, rows, columns)."""
    stacked = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    visited = visited_experts(config)
    if not stacked or visited is None:
        return 0
    return sum(math.prod(parameter.shape[1:]) * visited for parameter in stacked)


def visited_experts(config: Any) -> int | None:
    """How many experts a token goes to, None where the configuration does not say it."""
    names = ("num_experts_per_tok", "experts_per_token", "moe_topk")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _attention(config: Any, tokens: int, context: int) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = attention_pairs(config, tokens, context)
    every = [heads] * len(pairs)
    if getattr(config, "is_heterogeneous", False):  # blocks have numbers of their own
        own = [config.per_layer_config[index] for index in range(len(pairs))]
        every = [0 if "attention" in (getattr(each, "skip", None) or ()) else each.num_attention_heads for each in own]
    return sum(2 * count * head_dim * seen for count, seen in zip(every, pairs, strict=True))


def attention_pairs(config: Any, tokens: int, context: int = 0) -> list[int]:
    """(layers,) pairs of a token and a key that it may see; 0 where a layer has no attention that can be counted."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return []
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = getattr(config, "sliding_window", None) or context + tokens
    counted = {
        "full_attention": tokens * context + tokens * (tokens + 1) // 2,
        "sliding_attention": sum(min(context + index + 1, window) for index in range(tokens)),
    }
    return [counted.get(kind, 0) for kind in kinds]

"""What the matrices of a model are given, by plain forward hooks on the model as transformers loads it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Seen = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def _watching(model: nn.Module, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    def note(name: str, inputs: Tensor, gates: Tensor | None = None) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).clone()
        seen.setdefault(name, []).append((rows, torch.ones(len(rows)) if gates is None else gates))

    def linear(path: str) -> Any:
        return lambda module, args: note(f"{path}.weight", args[0])

    def step(path: str) -> Any:
        width = model.get_submodule(path).in_features
        return lambda module, args, output: note(f"{path}.weight", output[..., :width])

    def experts(path: str, normalised: bool) -> Any:
        """Routes tokens anew from the router's scores, and runs each expert on what it is sent."""
        router = model.get_submodule(path.removesuffix("experts") + "gate")

        def hook(bank: Any, args: tuple[Tensor, ...]) -> None:
            scores = functional.linear(args[0], router.weight).softmax(dim=-1)
            gates, chosen = scores.topk(2, dim=-1)
            gates = gates / gates.sum(dim=-1, keepdim=True) if normalised else gates
            for expert in range(len(bank.gate_up_proj)):
                token, choice = (chosen == expert).nonzero(as_tuple=True)
                if len(token):
                    given = args[0][token]
                    gate, up = functional.linear(given, bank.gate_up_proj[expert]).chunk(2, dim=-1)
                    note(f"{path}.gate_up_proj[{expert}]", given, gates[token, choice])
                    note(f"{path}.down_proj[{expert}]", functional.silu(gate) * up, gates[token, choice])

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(linear(path)))
            if path.endswith(
                "mixer.x_proj"
            ):  # Mamba multiplies with the next matrix's weight and never runs its module
                handles.append(module.register_forward_hook(step(path.removesuffix("x_proj") + "dt_proj")))
        elif path.endswith(".experts"):
            normalised = getattr(model.config, "norm_topk_prob", True)
            handles.append(module.register_forward_pre_hook(experts(path, normalised)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs(model: nn.Module, sequences: Sequence[Tensor]) -> Seen:
    """{matrix: ((t, d) what it is given, (t,) the gates of those tokens)}, sequence by sequence, none padded."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with _watching(model, seen):
        for ids in sequences:
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts])) for name, parts in seen.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a fraction of the largest entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def sums(inputs: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """What methods are told of them, in float64 and at once."""
    x = inputs.double()
    return {
        "squares": x.square().sum(dim=0),
        "gated": (x * gates.double().unsqueeze(1)).square().sum(dim=0),
        "mean": x.mean(dim=0),
        "variance": x.var(dim=0, unbiased=False),
        "gram": x.T @ x,
    }

"""The list of matrices against what really happens: every product that a forward pass makes with a parameter is caught."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur
import tiny
from secateur.network.examine import anatomy
from secateur.network.matrices import MatrixRef, matrices, put, view
from secateur.network.source import open_model

SHARED = {**tiny._BASE, "num_hidden_layers": 2, "num_key_value_heads": 2}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
# hidden size and width of the experts are equal in the first two, so that shapes say nothing
OTHERS: dict[str, Callable[[], Any]] = {
    "gpt_oss": tiny._config("GptOss", **{**SHARED, **FOUR, "intermediate_size": tiny.HIDDEN, "head_dim": 16}),
    "mixtral_square": tiny._config("Mixtral", **{**SHARED, **FOUR, "intermediate_size": tiny.HIDDEN}),
    "llama4_text": tiny._config("Llama4Text", **SHARED, **FOUR, head_dim=16, intermediate_size_mlp=160),
    "granitemoeshared": tiny._config("GraniteMoeShared", **SHARED, **FOUR, shared_intermediate_size=96),
    "nemotron_h": tiny._config(
        "NemotronH",
        **(SHARED | {"num_hidden_layers": 3}),
        layers_block_type=["mamba", "moe", "attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=tiny.HIDDEN,
        moe_shared_expert_intermediate_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        head_dim=16,
    ),
    "jamba": tiny._config(
        "Jamba",
        **SHARED,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}
EVERY = [*tiny.ARCHITECTURES, *OTHERS]
FIRST = {"llama", "gpt2", "phi3", "falcon", "mixtral", "qwen2_moe", "qwen3_moe_mixed", "mamba", *OTHERS}
NAMES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.every) for name in EVERY]
# what scores experts, and the gate of a shared one: not to be listed, though tokens are multiplied by it
SCORES = ("mlp.gate.weight", "router.weight", "router.layer.weight", "mixer.gate.weight", "shared_expert_gate.weight")


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if name in OTHERS:
        monkeypatch.setitem(tiny.ARCHITECTURES, name, OTHERS[name])
    model = tiny.make(name)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # expert by expert, so that each product can be seen
    return model


class Products(TorchDispatchMode):
    """Notes every product with a part of a parameter: parameter, where the part begins, and the stride of its input."""

    # of the operands of each kind of product, those that may be a weight, and their dimension that is summed over
    SUMMED = {
        "mm": ((1, -2), (0, -1)),
        "addmm": ((2, -2), (1, -1)),
        "bmm": ((1, -2), (0, -1)),
        "baddbmm": ((2, -2), (1, -1)),
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = model.named_parameters(remove_duplicate=False)
        self.names = {parameter.untyped_storage().data_ptr(): name for name, parameter in named}
        self.seen: set[tuple[str, int, int, int]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operand, dim in self.SUMMED.get(function.overloadpacket.__name__, ()):
            weight = args[operand]
            name = self.names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                matrices_in_it = weight.shape[0] if weight.ndim == 3 else 1
                for index in range(matrices_in_it):
                    start = weight.storage_offset() + (index * weight.stride(0) if weight.ndim == 3 else 0)
                    self.seen.add((name, start, weight.stride(dim), weight.shape[dim]))
        return function(*args, **(kwargs or {}))


def listed(model: nn.Module) -> list[MatrixRef]:
    return [ref for refs in matrices(model, anatomy(model)) for ref in refs]


@pytest.mark.parametrize("name", NAMES)
def test_exactly_what_tokens_are_multiplied_by(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, monkeypatch)
    refs = listed(model)
    inside = {parameter for block in anatomy(model).blocks for parameter in block.parameters}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), Products(model) as products:
        model(torch.randint(tiny.VOCABULARY, (2, 96), generator=generator), use_cache=False)
    seen = {each for each in products.seen if each[0] in inside and not each[0].endswith(SCORES)}
    expected = set()
    for ref in refs:
        matrix = view(ref, model.get_parameter(ref.parameter))
        assert tuple(matrix.shape) == (ref.rows, ref.columns)
        expected.add((ref.parameter, matrix.storage_offset(), matrix.stride(1), ref.columns))
    assert seen == expected
    assert len(refs) == len({ref.name for ref in refs}) == len(expected), "and each once"


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", [{"attention": 4, "feed_forward": 3}] * 3),
        ("gpt2", [{"attention": 2, "feed_forward": 2}] * 3),
        ("mixtral", [{"attention": 4, "expert": 8}] * 3),
        ("qwen2_moe", [{"attention": 4, "expert": 8, "feed_forward": 3}] * 3),
        ("qwen3_moe_mixed", [{"attention": 4, "expert": 8}, {"attention": 4, "feed_forward": 3}]),
        ("mamba", [{"mixer": 3, "mixer_step": 1}] * 3),
        ("jamba", [{"mixer": 3, "mixer_step": 1, "feed_forward": 3}, {"attention": 4, "expert": 8}]),
        ("nemotron_h", [{"mixer": 2}, {"expert": 8, "feed_forward": 2}, {"attention": 4}]),
    ],
)
def test_roles(name: str, roles: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, monkeypatch)
    for index, (refs, expected) in enumerate(zip(matrices(model, anatomy(model)), roles, strict=False)):
        assert {role: sum(ref.role == role for ref in refs) for role in {ref.role for ref in refs}} == expected
        assert {ref.block for ref in refs} == {index}


def test_the_sizes_sum_to_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, attention = tiny.HIDDEN, 2 * tiny.HIDDEN**2 + 2 * tiny.HIDDEN * tiny.HIDDEN // 2
    expected = {
        "llama": 3 * (attention + 3 * hidden * 160),
        "phi3": 3 * (attention + 3 * hidden * 160),
        "mixtral": 3 * (attention + 4 * 3 * hidden * 160),
        "qwen2_moe": 3 * (attention + 4 * 3 * hidden * 96 + 3 * hidden * 128),
        "qwen3_moe_mixed": 3 * attention + 2 * 4 * 3 * hidden * 96 + 3 * hidden * 160,
        # in, out, x (step of rank 4, two states of 8), step
        "mamba": 3 * (hidden * 256 + 128 * hidden + 128 * (4 + 16) + 4 * 128),
    }
    found = {name: sum(ref.rows * ref.columns for ref in listed(make(name, monkeypatch))) for name in expected}
    assert found == expected


def test_the_step_of_mamba_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [ref for ref in listed(make("mamba", monkeypatch)) if ref.block == 1]
    assert {ref.parameter.split(".")[-2]: ref.role for ref in refs} == {
        "in_proj": "mixer", "x_proj": "mixer", "dt_proj": "mixer_step", "out_proj": "mixer"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe_mixed", "mamba", "gpt2"])
def test_no_weight_is_needed(name: str, model: Callable) -> None:
    source = open_model(model(name))
    assert matrices(source.skeleton, source.anatomy) == matrices(tiny.make(name), source.anatomy)


def test_names_and_slices_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt_oss", monkeypatch)
    refs = {ref.name: ref for ref in listed(model)}
    ref = refs["model.layers.0.mlp.experts.gate_up_proj[3]"]
    assert (ref.expert, ref.transposed, ref.rows, ref.columns) == (3, True, 2 * tiny.HIDDEN, tiny.HIDDEN)
    stored = model.get_parameter(ref.parameter)
    assert torch.equal(view(ref, stored), stored[3].T)
    assert not refs["model.layers.0.self_attn.q_proj.weight"].transposed
    assert refs["model.layers.0.self_attn.q_proj.weight"].expert is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_put_writes_what_view_shows_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, monkeypatch)
    for ref in (listed(model)[0], listed(model)[-1]):
        stored = model.get_parameter(ref.parameter).detach().to(torch.bfloat16)
        before, matrix = stored.clone(), torch.randn(ref.rows, ref.columns)
        put(ref, stored, matrix)
        assert torch.equal(view(ref, stored), matrix.to(torch.bfloat16))
        assert int((stored != before).sum()) <= ref.rows * ref.columns
        others = [index for index in range(len(stored)) if index != ref.expert] if stored.ndim == 3 else []
        assert torch.equal(stored[others], before[others])


class Crossed(nn.Module):
    """A bank that adds up what one expert says from either side, so that no side is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.randn(4, 64, 64)) for _ in range(2))

    def forward(self, states: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return states @ self.one[0] @ self.other[0] + states @ self.one[0].T @ self.other[0].T


def test_a_bank_that_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral", monkeypatch)
    model.model.layers[2].mlp.experts = Crossed()
    with pytest.raises(secateur.RequestError, match=r"experts model.layers.2.mlp.experts .*what one does is not clear"):
        matrices(model, anatomy(model))

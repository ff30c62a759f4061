"""Anatomy: parts are found by structure, roles by what matrices do, and what cannot be confirmed is refused."""

import json
import resource
import time
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, OPTConfig

import tiny
from odd import Cell, Flat, Language, Lies, LowRank, Mixing, Odd, Running, UpFirst, Wrapped, language
from secateur.errors import RequestError
from secateur.network.anatomy import Anatomy, to_dict
from secateur.network.examine import anatomy
from secateur.network.surgery import cut_module
from secateur.network.views import Cut

SWIGLU = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "post_attention_layernorm")
GEMMA = (*SWIGLU[:4], "pre_feedforward_layernorm")
NEOX = (None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act", "post_attention_layernorm")
# architecture: (gate, up, down, activation, norm), attention kind, parallel; from reading each architecture's code
KNOWN: dict[str, tuple[tuple[str | None, str, str, str, str], str, bool]] = {
    "llama": (SWIGLU, "GQA", False),
    "llama_mha": (SWIGLU, "MHA", False),
    "llama_mqa": (SWIGLU, "MQA", False),
    "llama_tied": (SWIGLU, "GQA", False),
    "mistral": (SWIGLU, "GQA", False),
    "qwen2": (SWIGLU, "GQA", False),
    "qwen3": (SWIGLU, "GQA", False),
    "gemma": (SWIGLU, "GQA", False),
    "gemma2": (GEMMA, "GQA", False),
    "gemma3": (GEMMA, "GQA", False),
    "phi3": (("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", SWIGLU[4]), "GQA", False),
    "opt": ((None, "fc1", "fc2", "activation_fn", "final_layer_norm"), "MHA", False),
    "gpt2": ((None, "mlp.c_fc", "mlp.c_proj", "mlp.act", "ln_2"), "MHA", False),
    "gpt_neox": (NEOX, "MHA", True),
    "gpt_neox_sequential": (NEOX, "MHA", False),
    "gptj": ((None, "mlp.fc_in", "mlp.fc_out", "mlp.act", "ln_1"), "MHA", True),
    "falcon": ((*NEOX[:4], "input_layernorm"), "MQA", True),
    "falcon_new": ((*NEOX[:4], "ln_mlp"), "GQA", True),
    "phi": ((None, "mlp.fc1", "mlp.fc2", "mlp.activation_fn", "input_layernorm"), "MHA", True),
    "bloom": ((*NEOX[:3], "mlp.gelu_impl", "post_attention_layernorm"), "MHA", False),
}
FUSED = {"phi3", "gpt2", "gpt_neox", "gpt_neox_sequential", "falcon", "falcon_new", "bloom"}
EXPERTS = {"mixtral": tiny.UNITS, "qwen2_moe": 96, "qwen3_moe": 96, "qwen3_moe_mixed": 96, "olmoe": tiny.UNITS}
HEADS = {4: "MHA", 2: "GQA", 1: "MQA"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def live() -> dict[str, Any]:
    return {}


def opened(live: dict[str, Any], name: str) -> tuple[Any, Anatomy]:
    """The tiny model and its anatomy, made once for all tests of this file; they do not change it."""
    if name not in live:
        model = tiny.make(name)
        live[name] = model, anatomy(model)
    return live[name]


def skeleton(config: Any) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


def check_cut(model: nn.Module, parts: Anatomy, tokens: Tensor) -> None:
    """Cutting units equals zeroing their columns of the output matrix, and both differ from the whole model."""

    def logits() -> Tensor:
        with torch.no_grad():
            output = model(tokens)
        return output if isinstance(output, Tensor) else output.logits

    whole = logits()
    layers = [block.feed_forward for block in parts.blocks if block.feed_forward]
    gone = torch.tensor([0, 3, 4, 31, parts.hidden // 2, -1])
    for layer in layers:
        units = gone % layer.units
        with torch.no_grad():
            model.get_parameter(layer.down.parameter).index_fill_(layer.down.dim, units, 0.0)
    zeroed = logits()
    cuts = {}
    for block in parts.blocks:
        if block.feed_forward:
            kept = torch.ones(block.feed_forward.units, dtype=torch.bool)
            kept[gone % block.feed_forward.units] = False
            cuts[block.index, "neurons"] = Cut(kept.nonzero().flatten())
    cut_module(model, parts, cuts)
    assert (logits() - zeroed).abs().max() <= 1e-5
    assert (zeroed - whole).abs().max() > 1e-2


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures(name: str, live: dict[str, Any]) -> None:
    model, found = opened(live, name)
    (gate, up, down, activation, norm), kind, parallel = KNOWN[name]
    units = 4 * tiny.HIDDEN if name == "bloom" else tiny.UNITS
    assert len(found.blocks) == tiny.BLOCKS
    assert (found.hidden, found.vocabulary) == (tiny.HIDDEN, tiny.VOCABULARY)
    for index, block in enumerate(found.blocks):
        assert block.index == index and block.kind == "transformer" and block.note == ""
        assert block.parallel is parallel
        layer = block.feed_forward
        assert layer is not None and (layer.units, layer.hidden) == (units, tiny.HIDDEN)
        assert (layer.gate and layer.gate.parameter) == (gate and f"{block.path}.{gate}.weight")
        assert layer.up.parameter == f"{block.path}.{up}.weight"
        assert layer.down.parameter == f"{block.path}.{down}.weight"
        assert layer.activation == f"{block.path}.{activation}"
        assert layer.norm_module == f"{block.path}.{norm}" and layer.norm == f"{block.path}.{norm}.weight"
        biased = f"{block.path}.{down}.bias" in block.parameters
        assert (layer.down_bias is not None) == biased == (layer.up_bias is not None)
        assert (layer.gate_bias is not None) == (biased and gate is not None)
        if name == "phi3":
            assert layer.gate is not None and (layer.gate.offset, layer.up.offset) == (0, units)
        for part in layer.group.slices:
            length = model.get_parameter(part.parameter).shape[part.dim]
            assert length == (2 * units if part.parameter.endswith("gate_up_proj.weight") else units)
        attention = block.attention
        assert attention is not None and attention.kind == kind and attention.fused == (name in FUSED)
        assert (attention.heads, attention.head_dim) == (tiny.HEADS, tiny.HIDDEN // tiny.HEADS)
        assert HEADS[attention.kv_heads] == kind
        if name not in FUSED:
            named = [(q, letter) for letter in "qkv" for q in getattr(attention, letter)]
            assert [p.rpartition(".")[0][-6] for p, _ in named] == list("qkv"), "q_proj, k_proj, v_proj in that order"
        assert set(block.parameters) == {f"{block.path}.{n}" for n, _ in blocks_of(model, block.path)}
        assert {layer.norm, *(p for p in block.parameters if "norm" in p or "ln_" in p)} == set(block.norms)


def blocks_of(model: nn.Module, path: str) -> list[tuple[str, nn.Parameter]]:
    return list(model.get_submodule(path).named_parameters())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_outside_of_blocks(name: str, live: dict[str, Any]) -> None:
    model, found = opened(live, name)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    inside = [name for block in found.blocks for name in block.parameters]
    assert sorted([*inside, *found.outside]) == sorted(names)
    assert found.embeddings[0] == next(
        n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight
    )
    assert found.head is not None and model.get_parameter(found.head) is model.get_output_embeddings().weight
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    if model.config.tie_word_embeddings:
        assert [set(group) for group in found.tied] == [{found.embeddings[0], found.head}]
    else:
        assert found.tied == ()
    rest = set(found.outside) - {*found.embeddings, *found.norms, found.head}
    assert rest <= {"lm_head.bias"}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_skeleton_equals_live_model(name: str, live: dict[str, Any]) -> None:
    empty = skeleton(tiny.ARCHITECTURES[name]())
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert anatomy(empty) == opened(live, name)[1]
    with torch.device("meta"):  # buffers on meta too
        bare = AutoModelForCausalLM.from_config(tiny.ARCHITECTURES[name]())
    assert anatomy(bare) == opened(live, name)[1]


def test_low_precision_skeleton_equals_live_model(live: dict[str, Any]) -> None:
    empty = skeleton(tiny.ARCHITECTURES["gemma2"]()).to(torch.bfloat16)
    assert anatomy(empty) == opened(live, "gemma2")[1]


@pytest.mark.parametrize("name", [*KNOWN, "qwen3_moe_mixed"])
def test_cutting_equals_zeroing(name: str) -> None:
    model = tiny.make(name, seed=1)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    check_cut(model, anatomy(model), tokens)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_described(name: str, live: dict[str, Any]) -> None:
    _, found = opened(live, name)
    for block in found.blocks:
        assert block.attention is not None and block.parallel is False
        if name == "qwen3_moe_mixed" and block.index == 1:
            assert block.kind == "transformer" and block.feed_forward is not None and block.experts is None
            assert block.feed_forward.norm == f"{block.path}.post_attention_layernorm.weight"
            continue
        assert block.kind == "moe" and block.experts is not None and block.experts.neurons is not None
        shared = block.feed_forward and (block.feed_forward.units, block.feed_forward.norm)
        assert shared == ((128, f"{block.path}.post_attention_layernorm.weight") if name == "qwen2_moe" else None)
        assert (block.experts.count, block.experts.width) == (4, EXPERTS[name])
        assert block.experts.module == f"{block.path}.mlp.experts"
        assert block.experts.router == f"{block.path}.mlp.gate.weight"
        assert f"mixture of 4 experts of width {EXPERTS[name]}" in block.note
        assert ("beside a shared one of width 128" in block.note) == (name == "qwen2_moe")


def test_mamba_is_described(live: dict[str, Any]) -> None:
    _, found = opened(live, "mamba")
    for block in found.blocks:
        assert (block.kind, block.feed_forward, block.attention, block.experts) == ("mamba", None, None, None)
        assert "recurrent state" in block.note and "no feed-forward layer" in block.note


def test_anatomy_leaves_the_model_alone() -> None:
    model = tiny.make("opt").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    anatomy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_anatomy_under_inference_mode(live: dict[str, Any]) -> None:
    with torch.inference_mode():
        assert anatomy(opened(live, "gpt_neox")[0]) == live["gpt_neox"][1]


def test_json(live: dict[str, Any]) -> None:
    found = json.loads(json.dumps(to_dict(opened(live, "phi3")[1])))
    block = found["blocks"][2]
    assert block["feed_forward"]["up"] == {
        "parameter": "model.layers.2.mlp.gate_up_proj.weight",
        "dim": 0,
        "offset": 160,
        "width": 1,
    }
    assert block["attention"]["kind"] == "GQA"


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        OPTConfig(
            hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
        ),
    ],
    ids=["llama-2-7b", "opt-6.7b"],
)
def test_large_skeleton_is_cheap(config: Any) -> None:
    model = skeleton(config)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = anatomy(model)
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500 * 1024
    assert len(found.blocks) == 32 and all(block.feed_forward and block.attention for block in found.blocks)


@pytest.mark.parametrize("function", [nn.SiLU(), nn.ReLU(), nn.GELU()], ids=["silu", "relu", "gelu"])
@pytest.mark.parametrize("units", [160, 64], ids=["wide", "square"])
@pytest.mark.parametrize("roles", ["alpha beta gamma", "gamma alpha beta", "beta gamma alpha", "gamma beta alpha"])
def test_roles_do_not_come_from_names(roles: str, units: int, function: nn.Module) -> None:
    torch.manual_seed(0)
    model = language(*(Odd(64, units, roles, function) for _ in range(2)))
    found = anatomy(model)
    assert (found.vocabulary, found.head, found.embeddings) == (101, "answer.weight", ("table.weight",))
    for block in found.blocks:
        layer = block.feed_forward
        assert layer is not None and layer.gate is not None and block.note == ""
        parts = [layer.gate.parameter, layer.up.parameter, layer.down.parameter]
        assert parts == [f"{block.path}.inner.{role}.weight" for role in roles.split()]
        assert layer.activation == f"{block.path}.inner.bend"
        assert (layer.norm, layer.norm_module) == (None, f"{block.path}.two"), "a norm without scale"
        attention = block.attention
        assert attention is not None and (attention.kind, attention.fused) == ("MHA", False)
        names = (attention.q, attention.k, attention.v, attention.o)
        assert names == tuple((f"{block.path}.mix.{n}.weight",) for n in ("v_proj", "q_proj", "k_proj", "o_in"))
    check_cut(model, found, torch.arange(16)[None])


@pytest.mark.parametrize("inner", [Lies, UpFirst, Wrapped])
def test_unusual_layers_are_read_by_what_they_do(inner: Any) -> None:
    torch.manual_seed(0)
    model = language(inner(64, 160), inner(64, 160))
    found = anatomy(model)
    layer = found.blocks[1].feed_forward
    assert layer is not None and layer.units == 160
    if inner is Lies:
        assert layer.gate and layer.gate.parameter.endswith("up_proj.weight")
        assert layer.up.parameter.endswith("gate_proj.weight") and layer.activation.endswith("act_fn")
    elif inner is UpFirst:
        assert layer.gate and (layer.gate.offset, layer.up.offset, layer.activation) == (160, 0, "")
    else:
        assert layer.gate is None and [part.parameter for part in layer.others] == ["stack.1.inner.strength"]
        assert layer.activation == "", "the scale stands between activation and output matrix"
    check_cut(model, found, torch.arange(16)[None])


def test_matrices_side_by_side_on_the_block() -> None:
    torch.manual_seed(0)
    model = Language(Flat(64), Flat(64)).eval()
    found = anatomy(model)
    block = found.blocks[0]
    layer, attention = block.feed_forward, block.attention
    assert layer is not None and layer.gate is not None and attention is not None, block.note
    assert [layer.gate.parameter, layer.up.parameter, layer.down.parameter] == [f"stack.0.{n}.weight" for n in "gae"]
    assert (attention.q, attention.k, attention.v, attention.o) == tuple((f"stack.0.{n}.weight",) for n in "fdbc")
    check_cut(model, found, torch.arange(16)[None])


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_comes_from_dataflow(parallel: bool) -> None:
    found = anatomy(language(Lies(64, 160), Lies(64, 160), parallel=parallel))
    assert [block.parallel for block in found.blocks] == [parallel] * 2


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("inner width", "mixes its units"),
        ("softmax", "mixes its units"),
        ("tokens", "it mixes tokens"),
        ("layer norm", "mixes its units"),
        ("fixed width", "could not be run"),
        ("both bent", "gate and up cannot be told apart"),
    ],
)
def test_what_cannot_be_confirmed_is_refused(how: str, why: str) -> None:
    found = anatomy(language(Mixing(64, 160, how), Lies(64, 160)))
    refused, fine = found.blocks
    assert refused.feed_forward is None and refused.attention is not None and fine.feed_forward is not None
    assert why in refused.note and "inner.gate_proj (64 to 160)" in refused.note and refused.note.endswith(".")
    assert fine.note == ""


def test_a_matrix_of_low_rank_is_no_feed_forward() -> None:
    block = anatomy(language(LowRank(64, 16))).blocks[0]
    assert block.feed_forward is None and "nothing nonlinear stands between them" in block.note


def test_blocks_that_differ_in_a_setting_alone_are_examined_apart() -> None:
    blocks = anatomy(language(*(Mixing(64, 160, how) for how in ("nothing", "nothing", "inner width")))).blocks
    assert [block.feed_forward is not None for block in blocks] == [True, True, False]


def test_gated_convolution_is_no_attention() -> None:
    """LFM2's short convolutions have the shapes of fused attention: three times hidden in, hidden out."""
    special: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    kinds = ["conv", "full_attention"]
    blocks = anatomy(skeleton(Lfm2Config(**special, **sizes, num_hidden_layers=2, layer_types=kinds))).blocks
    assert blocks[0].attention is None and "conv is not confirmed as attention" in blocks[0].note
    assert blocks[1].attention is not None and blocks[1].attention.kind == "GQA"
    assert all(block.feed_forward and block.feed_forward.gate for block in blocks)


def test_running_sum_is_no_attention() -> None:
    cell = Cell(64, Lies(64, 160), False)
    cell.mix = Running(64)
    block = anatomy(Language(cell)).blocks[0]
    assert block.attention is None and "mix is not confirmed as attention: it does not average" in block.note
    assert block.feed_forward is not None


def test_attention_of_one_head_is_no_feed_forward() -> None:
    """v and o of a single head can be cut together like the matrices of a feed-forward layer."""
    block = anatomy(Language(Cell(64, Mixing(64, 160, "softmax"), False, heads=1), heads=1)).blocks[0]
    assert block.feed_forward is None and block.attention is not None and block.attention.head_dim == 64
    assert "inner.gate_proj" in block.note


def test_without_config_attention_is_left_open() -> None:
    block = anatomy(language(Lies(64, 160), heads=None)).blocks[0]
    assert block.attention is None and block.parallel is None and "how many attention heads" in block.note
    assert block.feed_forward is not None and block.kind == "transformer"


def test_a_model_that_cannot_be_traced() -> None:
    class Picky(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            if int(tokens.sum()) > 3:  # looks at values, which fake tensors do not have
                return super().forward(tokens)
            raise ValueError("too few")

    block = anatomy(Picky(Cell(64, Lies(64, 160), False))).blocks[0]
    assert block.feed_forward is not None, "the layer itself can be tried without the model"
    assert block.parallel is None and block.feed_forward.norm_module is None
    assert "could not be seen" in block.note


def test_no_blocks() -> None:
    with pytest.raises(RequestError, match="No blocks were found in Sequential"):
        anatomy(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))

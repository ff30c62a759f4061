"""Checkpoints whose tensors transformers merges or splits as it loads them: experts stored one by one, above all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import core_model_loading as transformers_loading
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, Split, Transpose

import secateur
import tiny
from secateur.network import checkpoint
from secateur.network.parts import Misfit, Unsupported, Value, assemble, follow, take_apart
from secateur.network.source import open_model
from secateur.network.store import copy_companions, shard_name, write_config, write_index
from secateur.network.stream import pieces, streamed_logits
from secateur.network.verify import prompt, stored

Make = Callable[..., Path]
IDS = torch.tensor([prompt(tiny.VOCABULARY), list(range(40, 72))])
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "olmoe")
SHARED = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
# what each of them is for: experts in the other orientation; a fused file under other names; a learned buffer; stored
# tensors that hold several parameters; a model that looks at a weight before it runs its module
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", {**FOUR, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "granitemoe": ("GraniteMoe", FOUR),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        },
    ),
    "hrm_text": ("HrmText", {}),
    "llama4_text": (
        "Llama4Text", {**FOUR, "head_dim": 16, "intermediate_size_mlp": 160, "interleave_moe_layer_step": 2}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of an architecture that is only tested here, with learned buffers that are not zero."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind, settings = OTHERS[name]
            if "layer_types" in settings:
                settings = {**settings, "layer_types": settings["layer_types"][: SHARED["num_hidden_layers"]]}
            made[name] = tmp_path_factory.mktemp("others") / name
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny.ARCHITECTURES, name, tiny._config(kind, **{**SHARED, **settings}))
                model = tiny.make(name)
            generator = torch.Generator().manual_seed(1)
            learned = set(model.state_dict()) - {each for each, _ in model.named_parameters()}
            for each, buffer in model.named_buffers():
                if each in learned:
                    buffer.copy_(torch.randn(buffer.shape, generator=generator))
            model.save_pretrained(made[name])
        return made[name]

    return get


def loaded(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_parameters_are_those_that_transformers_makes(name: str, model: Make, other: Make) -> None:
    source = open_model(model(name) if name in MIXTURES else other(name))
    expected = dict(loaded(source.directory).named_parameters(remove_duplicate=False))
    assert set(source.parts) == set(expected)
    files = source.read(source.tensors)
    for name, tensor in source.read_parameters(expected).items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(source.parameter(name), tensor)
        apart = source.take_apart(name, tensor)
        assert set(apart) == set(source.stored_keys(name))
        assert all(torch.equal(each, files[key]) for key, each in apart.items()), name


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", *OTHERS])  # the others of MIXTURES: tests/test_stream.py
def test_streamed_logits_are_those_of_the_whole_model(name: str, model: Make, other: Make) -> None:
    source = open_model(model(name) if name in MIXTURES else other(name))
    expected = logits(loaded(source.directory))
    found = streamed_logits(source.skeleton, source.anatomy, stored(source), IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())


def test_experts_are_stored_apart_and_one_parameter_in_the_model(model: Make) -> None:
    source = open_model(model("mixtral"))
    keys = source.stored_keys("model.layers.1.mlp.experts.gate_up_proj")
    assert set(keys) == {
        f"model.layers.1.block_sparse_moe.experts.{expert}.{which}.weight"
        for expert in range(4)
        for which in ("w1", "w3")
    }
    assert source.stored_keys("model.norm.weight") == ("model.norm.weight",)
    fused = source.parameter("model.layers.1.mlp.experts.gate_up_proj")
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(fused[2, tiny.UNITS :], source.read([key])[key])
    apart = source.take_apart("model.layers.1.mlp.experts.gate_up_proj", fused)
    assert {tensor.untyped_storage().data_ptr() for tensor in apart.values()} == {fused.untyped_storage().data_ptr()}


def test_experts_go_by_number_not_by_letter(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        settings = {**SHARED, "moe_intermediate_size": 32, "num_experts": 12, "num_experts_per_tok": 2}
        patch.setitem(tiny.ARCHITECTURES, "twelve", tiny._config("Qwen3Moe", **settings))
        tiny.save("twelve", tmp_path)
    source = open_model(tmp_path)
    fused = source.parameter("model.layers.0.mlp.experts.down_proj")
    for expert in (2, 10):
        key = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(fused[expert], source.read([key])[key])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed"])
def test_a_live_module_is_merged_already(name: str) -> None:
    module = tiny.make(name)
    source = open_model(module)
    for parameter, tensor in module.named_parameters():
        assert source.stored_keys(parameter) == (parameter,)
        assert source.parameter(parameter).data_ptr() == tensor.data_ptr(), "and nothing is copied"


@pytest.mark.parametrize(("name", "inside"), [("mixtral", [19] * 3), ("qwen3_moe_mixed", [21, 11, 21])])
def test_pieces_hold_every_stored_tensor_of_a_block(name: str, inside: list[int], model: Make) -> None:
    source = open_model(model(name))
    found = pieces(source, 1)
    assert [len(piece.keys) for piece in found] == [3, *inside]
    assert sorted(key for piece in found for key in piece.keys) == sorted(source.tensors)
    for piece in found[1:]:
        assert all(key.startswith(f"model.layers.{piece.blocks[0]}.") for key in piece.keys)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_changed_expert_is_written_where_it_belongs(name: str, model: Make, other: Make, tmp_path: Path) -> None:
    source = open_model(model(name) if name in MIXTURES else other(name))
    changed = "model.layers.1.mlp.experts.down_proj"
    tensor = source.parameter(changed).clone()
    tensor[2, 5, 7] += 3
    parts = pieces(source, 1)
    sizes = {}
    for piece in parts:
        tensors = source.read(piece.keys)
        if 1 in piece.blocks:
            tensors.update(source.take_apart(changed, tensor, tensors))
        # copied, because safetensors writes no two tensors of one memory
        save_file({key: each.clone() for key, each in tensors.items()}, tmp_path / shard_name(piece.index, len(parts)))
        sizes[shard_name(piece.index, len(parts))] = {key: each.nbytes for key, each in tensors.items()}
    write_index(tmp_path, sizes)
    write_config(tmp_path, source.config.to_dict(), None)
    copy_companions(source, tmp_path)
    before = loaded(source.directory)
    with torch.no_grad():
        before.get_parameter(changed)[2, 5, 7] += 3
    assert torch.equal(logits(loaded(tmp_path)), logits(before))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_mixed"])
def test_width_methods_say_that_they_found_experts(name: str, model: Make, tmp_path: Path) -> None:
    with pytest.raises(
        secateur.RequestError, match="prunenet cuts no neurons inside experts, and .* is a mixture of 4"
    ):
        secateur.compress(model(name), "prunenet", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is wrong with a checkpoint.


def damaged(source: Path, directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


BANK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop(f"{BANK}.2.up_proj.weight"),
            f"holds no tensor {BANK}.2.up_proj.weight, expert 2 of {BANK}.gate_up_proj: the checkpoint is incomplete",
        ),
        (
            lambda tensors: [tensors.pop(f"{BANK}.3.{each}_proj.weight") for each in ("gate", "up")],
            f"holds no tensor {BANK}.3.gate_proj.weight, expert 3 of {BANK}.gate_up_proj: the checkpoint is incomplete",
        ),
        (
            lambda tensors: [tensors.pop(f"{BANK}.{expert}.up_proj.weight") for expert in range(4)],
            f"holds no tensor mlp.experts.*.up_proj.weight for {BANK}.gate_up_proj: the checkpoint is incomplete",
        ),
        (
            lambda tensors: [tensors.pop(f"{BANK}.{expert}.down_proj.weight") for expert in range(4)],
            f"holds no tensor for {BANK}.down_proj of Qwen3MoeForCausalLM",
        ),
        (
            lambda tensors: tensors.update({f"{BANK}.1.down_proj.weight": torch.zeros(64, 95)}),
            f"tensor {BANK}.1.down_proj.weight of {{spec}} has shape [64, 95], but the others of {BANK}.down_proj have "
            "[64, 96]",
        ),
        (
            lambda tensors: tensors.update({f"{BANK}.{e}.down_proj.weight": torch.zeros(64, 95) for e in range(4)}),
            f"tensor {BANK}.0.down_proj.weight of {{spec}} has shape [64, 95]; it and 3 more cannot make "
            f"{BANK}.down_proj, for which its config asks for [4, 64, 96]",
        ),
        (
            lambda tensors: tensors.update({f"{BANK}.4.down_proj.weight": torch.zeros(64, 96)}),
            f"{BANK}.down_proj, for which its config asks for [4, 64, 96]",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Callable, said: str, model: Make, tmp_path: Path) -> None:
    source = open_model(damaged(model("qwen3_moe"), tmp_path, change))
    with pytest.raises(secateur.RequestError) as refusal:
        _ = source.parts
    assert said.format(spec=tmp_path) in str(refusal.value)


def test_a_conversion_that_is_not_understood_is_refused(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = checkpoint.get_model_conversion_mapping

    def with_another(module: torch.nn.Module) -> list:
        transforms = usual(module)
        for each in transforms:
            if isinstance(each, transformers_loading.WeightConverter):
                each.operations.append(Interleave(dim=1))
        return transforms

    monkeypatch.setattr(checkpoint, "get_model_conversion_mapping", with_another)
    with pytest.raises(secateur.RequestError, match=r"in a layout that is not supported: .* by Interleave\(dim=1\)"):
        _ = open_model(model("qwen3_moe")).parts


# Following the operations on shapes alone.


def numbered(count: int, *shape: int) -> list[Tensor]:
    size = torch.Size(shape).numel()
    return [torch.arange(index * size, (index + 1) * size).view(shape) for index in range(count)]


MERGES = (
    ([MergeModulelist(dim=0)], {"a": numbered(3, 2, 4)}, 1),
    ([MergeModulelist(dim=1)], {"a": numbered(3, 2, 4)}, 1),
    ([MergeModulelist(dim=0), Concatenate(dim=1)], {"a": numbered(3, 2, 4), "b": numbered(3, 2, 4)}, 1),
    ([MergeModulelist(dim=0), Concatenate(dim=0)], {"a": numbered(3, 2, 4), "b": numbered(2, 2, 4)}, 1),
    ([Concatenate(dim=0)], {"a": numbered(1, 2, 4), "b": numbered(1, 3, 4), "c": numbered(1, 1, 4)}, 1),
    ([Concatenate(dim=1)], {"a": numbered(1, 2, 4), "b": numbered(1, 2, 3)}, 1),
    ([Transpose(1, 2)], {"a": numbered(1, 3, 2, 4)}, 1),
    ([Chunk(dim=0)], {"a": numbered(1, 6, 4)}, 3),
    ([Chunk(dim=1)], {"a": numbered(1, 2, 7)}, 2),
)


@pytest.mark.parametrize(("operations", "collected", "targets"), MERGES)
def test_the_same_numbers_as_the_operations_themselves(operations: list, collected: dict, targets: int) -> None:
    names = [f"target{index}" for index in range(targets)]
    values: Any = {pattern: list(tensors) for pattern, tensors in collected.items()}
    for operation in operations:
        values = operation.convert(values, source_patterns=list(collected), target_patterns=names)
    keyed = {f"{pattern}{index}": each for pattern, tensors in collected.items() for index, each in enumerate(tensors)}
    shapes = {
        pattern: [Value.stored(f"{pattern}{index}", tuple(each.shape)) for index, each in enumerate(tensors)]
        for pattern, tensors in collected.items()
    }
    made = follow(operations, shapes, list(collected), names, lambda target: ())
    assert set(made) == set(values) == set(names)
    so_far = {key: torch.zeros_like(tensor) for key, tensor in keyed.items()}
    for target, value in made.items():
        assert value.shape == values[target].shape
        parameter = assemble(value.compact, keyed)
        assert torch.equal(parameter, values[target])
        so_far.update(take_apart(target, value.compact, parameter, so_far))
    assert all(torch.equal(so_far[key], keyed[key]) for key in keyed), "and back, whatever lies beside it"


def test_a_split_goes_by_the_shapes_of_the_parameters() -> None:
    value = Value.stored("qkv", (8, 3))
    shapes = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
    made = follow([Split(dim=0)], {"qkv": [value]}, ["qkv"], list(shapes), shapes.__getitem__)
    tensor = numbered(1, 8, 3)[0]
    assert torch.equal(assemble(made["k"].compact, {"qkv": tensor}), tensor[4:6])
    with pytest.raises(Misfit):
        follow([Split(dim=0)], {"qkv": [value]}, ["qkv"], list(shapes), lambda target: (3, 3))


def test_a_checked_transpose_leaves_what_fits() -> None:
    value = Value.stored("a", (4, 2, 3))
    for wanted, shape in (((4, 2, 3), (4, 2, 3)), ((4, 3, 2), (4, 3, 2))):
        made = follow([Transpose(1, 2, check_dims=True)], {"a": [value]}, ["a"], ["b"], lambda target, w=wanted: w)
        assert made["b"].shape == shape
    with pytest.raises(Unsupported):
        follow([Interleave(dim=1)], {"a": [value]}, ["a"], ["b"], lambda target: ())


def test_a_merged_parameter_becomes_no_larger() -> None:
    value = Value.stored("a", (4, 2))
    made = follow([MergeModulelist(dim=0)], {"a": [value, Value.stored("b", (4, 2))]}, ["a"], ["t"], lambda target: ())
    narrower = take_apart("t", made["t"].compact, torch.zeros(2, 3, 2), {})
    assert {key: tuple(tensor.shape) for key, tensor in narrower.items()} == {"a": (3, 2), "b": (3, 2)}
    with pytest.raises(secateur.RunError, match=r"t was to become \[3, 4, 2\] from \[2, 4, 2\]"):
        take_apart("t", made["t"].compact, torch.zeros(3, 4, 2), {})

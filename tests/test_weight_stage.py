"""A step that prunes single weights: what is written, what is promised of it, what is told about it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gguf_file
import outcomes
import secateur
import tiny
import watched
from secateur import read_masks
from secateur.network.examine import anatomy
from secateur.network.masks import PackedMask, pack, read_mask_file, unpack, write_masks
from secateur.network.matrices import MatrixRef, matrices, view
from secateur.network.verify import CleanProcess
from secateur.registry import methods
from secateur.tensor.expressions import Expression
from secateur.tensor.patterns import Budget, Pattern

Make = Callable[..., Path]
WEIGHTS = [method.name for method in methods().values() if method.scope == "weight"]


def marked(*names: str) -> list[Any]:
    """Cases for the rest of the matrix."""
    return [pytest.param(name, marks=pytest.mark.every) for name in names]


def draw(count: int, length: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, tiny.VOCABULARY, (count, length), generator=generator))


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., secateur.Recipe]:
    """A recipe of one method, or of several steps, that calibrates on the first of these sequences."""

    def make(step: Any, sequences: Sequence[Tensor] = (), samples: int = 6, **settings: Any) -> secateur.Recipe:
        data = [each.tolist() for each in sequences or draw(8)]
        path = tmp_path / f"ids-{len(list(tmp_path.glob('ids-*')))}.json"
        path.write_text(json.dumps(data))
        said = {"data": str(path), "samples": samples, "length": 16, "order": "first", "held_out": 2, **settings}
        steps = step if isinstance(step, list) else [step]
        return secateur.Recipe.parse({"steps": steps, "calibration": said})

    return make


@pytest.fixture
def run(clean: CleanProcess, tmp_path: Path) -> Callable[..., Path]:
    def compress(source: Any, plan: secateur.Recipe, name: str = "out", **options: Any) -> Path:
        output = tmp_path / name
        secateur.compress(source, recipe=plan, output=output, evaluate=False, clean=clean, **options)
        return output

    return compress


def receipt(output: Path) -> dict[str, Any]:
    return json.loads((output / "secateur.json").read_text())


def entries(said: Any) -> dict[str, dict[str, Any]]:
    """What a receipt, or the result of a live module, says of each matrix."""
    found = said.receipt if isinstance(said, secateur.Result) else receipt(said)
    return found["decisions"][0]["matrices"]


def refs_of(model: nn.Module) -> dict[str, MatrixRef]:
    return {ref.name: ref for block in matrices(model, anatomy(model)) for ref in block}


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


# What is removed.


@pytest.mark.parametrize("pattern", ["0.37", *marked("2:4", "0.37/4x8", "1:8")])
@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_removes_exactly_its_budget(method: str, pattern: str, recipe: Callable) -> None:
    if method == "dsnot" and "/" in pattern:
        pytest.skip("it refuses tiles")
    result = secateur.compress(tiny.make("llama"), recipe=recipe({method: {"pattern": pattern}}))
    for name, ref in refs_of(result.model).items():
        budget = Budget.uniform(Pattern.parse(pattern), (ref.rows, ref.columns))
        zeros = int((view(ref, result.model.get_parameter(ref.parameter)) == 0).sum())
        assert entries(result)[name]["removed"] == zeros == budget.weights, name


@pytest.mark.parametrize("name", ["gpt2", "mixtral", *marked("llama", "phi3", "mamba", "qwen2_moe", "falcon")])
@pytest.mark.parametrize("method", ["wanda", *marked("sparsegpt", "magnitude")])
def test_masks_are_the_zeros_of_the_result(
    method: str, name: str, model: Make, recipe: Callable, run: Callable
) -> None:
    output = run(model(name), recipe({method: {"pattern": 0.45}}))
    result, masks = loaded(output), read_masks(output)
    found = {key: ref for key, ref in refs_of(result).items() if ref.role != "mixer_step"}
    assert set(masks) == set(found)
    for key, ref in found.items():
        assert tuple(masks[key].shape) == (ref.rows, ref.columns), "whatever the module stores"
        assert torch.equal(view(ref, result.get_parameter(ref.parameter)) != 0, masks[key]), key
    sparsity = json.loads((output / "secateur" / "sparsity.json").read_text())
    assert sparsity["removed"] == sum(int((~mask).sum()) for mask in masks.values())
    assert sparsity["of"] == sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9), (1, 17), (5, 0)])
def test_masks_are_packed_and_unpacked(shape: tuple[int, int], tmp_path: Path) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert len(pack(mask)) == -(-mask.numel() // 8)
    assert torch.equal(unpack(pack(mask), shape), mask)
    assert torch.equal(unpack(pack(mask.T), (shape[1], shape[0])), mask.T)
    write_masks(tmp_path / "masks.safetensors", {"a": PackedMask.of(mask), "b[3]": PackedMask.of(~mask)})
    again = read_mask_file(tmp_path / "masks.safetensors")
    assert torch.equal(again["a"].kept(), mask) and torch.equal(again["b[3]"].kept(), ~mask)


def test_the_first_entry_is_the_highest_bit() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[2, 3] = True
    assert pack(mask).tolist() == [0b10000000, 0b00010000]


def test_masks_of_a_model_without_any(model: Make, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match="holds no masks"):
        read_masks(model("llama"))


def test_masks_of_several_steps(model: Make, recipe: Callable, run: Callable) -> None:
    """Each step keeps its own; the last one's are those of the result."""
    plan = recipe([{"wanda": {"pattern": 0.3}}, {"magnitude": {"pattern": 0.5}}])
    output = run(model("llama"), plan)
    result, masks = loaded(output), read_masks(output)
    for name, ref in refs_of(result).items():
        assert torch.equal(view(ref, result.get_parameter(ref.parameter)) != 0, masks[name])
    packed = read_mask_file(output / "secateur" / "step-0" / "masks" / "1.safetensors")
    first = {name: mask.kept() for name, mask in packed.items()}
    assert all(int((~mask).sum()) == round(0.3 * mask.numel()) for mask in first.values())
    assert all(not bool((masks[name] & ~mask).any()) for name, mask in first.items()), "zeros go first"


def test_masks_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        kept = torch.full((2, 2), step == 10)
        write_masks(tmp_path / "secateur" / f"step-{step}" / "masks" / "0.safetensors", {"w": PackedMask.of(kept)})
    assert bool(read_masks(tmp_path)["w"].all())


def test_blocks_that_are_left_alone(model: Make, recipe: Callable, run: Callable) -> None:
    """The first, the last, and one in the middle, with and without statistics."""
    dense = dict(loaded(model("llama")).named_parameters())
    for method in ("magnitude", "wanda"):
        output = run(model("llama"), recipe({method: {"targets": ["*layers.1.*proj*"]}}), method, shard_bytes=1)
        assert {name.split(".")[2] for name in read_masks(output)} == {"1"}
        for name, parameter in loaded(output).named_parameters():
            assert torch.equal(parameter, dense[name]) != ("layers.1." in name and "proj" in name), name


# Held-out tokens and errors.


@pytest.mark.parametrize("method", ["sparsegpt", *marked("wanda")])
def test_held_out_tokens_change_no_weight(method: str, model: Make, recipe: Callable, run: Callable) -> None:
    same = draw(6)
    others = [[*draw(2, seed=seed), *draw(2, length=9, seed=seed)] for seed in (1, 2)]  # two batches
    outputs = [
        run(model("llama"), recipe(method, [*same, *held_out], held_out=4), f"out-{number}")
        for number, held_out in enumerate(others)
    ]
    assert outcomes.promised(outputs[0]) == outcomes.promised(outputs[1])
    one, other = map(entries, outputs)
    for name in one:
        assert one[name]["calibration_error"] == other[name]["calibration_error"]
        assert one[name]["held_out_error"] != other[name]["held_out_error"]
    none = run(model("llama"), recipe(method, same, held_out=0), "none")
    assert outcomes.promised(none) == outcomes.promised(outputs[0])
    assert all("held_out_error" not in entry for entry in entries(none).values())


@pytest.mark.parametrize("name", ["mixtral", *marked("llama", "gpt2", "mamba")])
@pytest.mark.parametrize("method", ["sparsegpt", *marked("wanda")])
def test_errors_are_those_of_a_direct_computation(method: str, name: str, recipe: Callable) -> None:
    """‖X (W − Ŵ)ᵀ‖² / ‖X Wᵀ‖² on all calibration tokens, and on all that were held out."""
    model, sequences = tiny.make(name), draw(8)
    result = secateur.compress(model, recipe=recipe(method, sequences, inputs="dense"))
    said, refs = entries(result), refs_of(model)
    notes = result.receipt["decisions"][0]
    for error, part in (("calibration_error", sequences[:6]), ("held_out_error", sequences[6:])):
        seen = watched.inputs(model, part)
        for key, entry in said.items():
            ref = refs[key]
            if key not in seen:
                assert error not in entry
                continue
            inputs = seen[key][0].double()
            before, after = (view(ref, each.get_parameter(ref.parameter)).double() for each in (model, result.model))
            direct = (inputs @ (before - after).T).square().sum() / (inputs @ before.T).square().sum()
            assert entry[error] == pytest.approx(direct.item(), rel=1e-4), (key, error)
        told = [entry[error] for entry in said.values() if error in entry]
        assert notes[f"mean {error.replace('_', ' ')}"] == pytest.approx(sum(told) / len(told))


def test_an_expert_that_no_token_reaches(model: Make, recipe: Callable, run: Callable) -> None:
    """It is pruned by magnitude, and that is told; nobody computes with statistics of nothing."""
    sequences = [*draw(1, length=2), *draw(2, seed=1)]
    output = run(model("mixtral"), recipe("sparsegpt", sequences, samples=1))
    dense, result = loaded(model("mixtral")), loaded(output)
    unseen = {name for name, entry in entries(output).items() if entry.get("unseen")}
    first = [name for name in unseen if "layers.0." in name]
    assert first and len(first) == 2 * len({name.partition("[")[2] for name in first}), "both matrices of an expert"
    seen = watched.inputs(dense, sequences[:1])
    assert set(first) == {name for name in entries(output) if "layers.0." in name} - set(seen)
    refs = refs_of(result)
    for name in unseen:
        ref = refs[name]
        before, after = (view(ref, each.get_parameter(ref.parameter)) for each in (dense, result))
        kept = Budget.uniform(Pattern.parse(0.5), (ref.rows, ref.columns)).mask(before.abs(), "row")
        assert torch.equal(after, before * kept), name
        assert "calibration_error" not in entries(output)[name]
    [told] = [each for each in receipt(output)["decisions"][0]["warnings"] if "no calibration token" in each]
    assert told.startswith(f"{len(unseen)} of {len(entries(output))} matrices")
    assert told in (output / "README.md").read_text()


def test_an_input_that_is_always_zero(recipe: Callable) -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[[3, 70]] = 0  # then these two inputs of down_proj are
    result = secateur.compress(model, recipe=recipe("sparsegpt"))
    dead = {name: entry["dead_inputs"] for name, entry in entries(result).items() if "dead_inputs" in entry}
    assert dead == {"model.layers.1.mlp.down_proj.weight": 2}
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())


def test_the_receipt_says_what_was_calibrated_on(model: Make, recipe: Callable, run: Callable) -> None:
    sequences = draw(8)
    output = run(model("llama"), recipe("wanda", sequences))
    told = receipt(output)["decisions"][0]["notes"]["calibration"]
    assert (told["sequences"], told["tokens"], told["held_out_tokens"]) == (6, 96, 32)
    other = run(model("llama"), recipe("wanda", sequences[::-1]), "other")
    assert receipt(other)["decisions"][0]["notes"]["calibration"]["sha256"] != told["sha256"]
    assert str(output.parent) not in (output / "README.md").read_text(), "where files lie is nobody's business"


# What does not matter.


def test_shards_do_not_matter(model: Make, recipe: Callable, run: Callable) -> None:
    plan = recipe("sparsegpt")
    one, several = (run(model("llama"), plan, f"{size}", shard_bytes=size) for size in (1, 10**9))
    assert len(list(one.glob("*.safetensors"))) > len(list(several.glob("*.safetensors"))) == 2
    for (name, first), (_, second) in zip(
        loaded(one).named_parameters(), loaded(several).named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name
    assert entries(one) == entries(several)


@pytest.mark.parametrize("name", ["llama_tied", *marked("gpt2", "mixtral")])
def test_a_live_module_gets_what_its_directory_gets(name: str, model: Make, recipe: Callable, run: Callable) -> None:
    plan = recipe("sparsegpt")
    written = loaded(run(model(name), plan))
    live = secateur.compress(tiny.make(name), recipe=plan).model
    for (key, first), (_, second) in zip(live.named_parameters(), written.named_parameters(), strict=True):
        assert torch.equal(first, second), key


# Dtypes.


def stored(output: Path) -> dict[str, Tensor]:
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_stored(output: Path, dtype: torch.dtype) -> None:
    tensors = stored(output)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert json.loads((output / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, mask in read_masks(output).items():
        assert torch.equal(tensors[name] != 0, mask), name


@pytest.mark.parametrize("passes", ["float32", *marked("bfloat16")])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_source_in_bfloat16_stays_so(method: str, passes: str, model: Make, recipe: Callable, run: Callable) -> None:
    source = model("llama", dtype=torch.bfloat16)
    output = run(source, recipe(method, dtype=passes))
    check_stored(output, torch.bfloat16)
    before, after, masks = stored(source), stored(output), read_masks(output)
    for name, tensor in before.items():
        if name not in masks:
            assert torch.equal(after[name], tensor)
        elif method == "wanda":
            assert torch.equal(after[name], tensor * masks[name]), name
        else:
            assert not torch.equal(after[name], tensor * masks[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", *marked("float16", "float32")])
def test_another_dtype_is_written(dtype: str, model: Make, recipe: Callable, run: Callable) -> None:
    output = run(model("llama"), recipe("sparsegpt"), dtype=dtype)
    check_stored(output, getattr(torch, dtype))
    for name, tensor in stored(model("llama")).items():
        if name not in read_masks(output):
            assert torch.equal(stored(output)[name], tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize("method", ["wanda", *marked("magnitude", "sparsegpt")])
def test_a_gguf_file(method: str, recipe: Callable, run: Callable, tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "small.gguf")
    output = run(tmp_path / "small.gguf", recipe(method))
    check_stored(output, torch.bfloat16)
    assert len(read_masks(output)) == 7 * tiny.BLOCKS


def test_a_value_too_large_for_the_dtype_names_its_matrix(
    model: Make, recipe: Callable, run: Callable, tmp_path: Path
) -> None:
    source = changed(model, tmp_path, "model.layers.1.self_attn.k_proj.weight", 1e6)
    with pytest.raises(secateur.RunError, match=r"layers\.1\.self_attn\.k_proj\.weight holds values too large"):
        run(source, recipe("magnitude"), dtype="float16")


# What diverges.


def changed(model: Make, tmp_path: Path, name: str, value: float) -> Path:
    """The tiny llama with one value of one tensor changed."""
    source = tmp_path / "changed"
    shutil.copytree(model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("inputs", ["compressed", *marked("dense")])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"the inputs of model\.layers\.1\.mlp\.down_proj\.weight are not finite"),
        ("model.layers.1.input_layernorm.weight", r"the inputs of model\.layers\.1\.self_attn\.q_proj\.weight are not"),
    ],
)
def test_activations_that_are_not_finite_name_the_layer(
    name: str, told: str, inputs: str, model: Make, recipe: Callable, run: Callable, tmp_path: Path
) -> None:
    source = changed(model, tmp_path, name, 3e38)
    before = outcomes.promised(source)
    with pytest.raises(secateur.RunError, match="block 1" if inputs == "dense" else told):
        run(source, recipe("sparsegpt", inputs=inputs))
    assert not (tmp_path / "out" / "secateur.json").exists() and (tmp_path / "out" / ".secateur").exists()
    assert outcomes.promised(source) == before


def test_a_network_that_diverges_where_no_matrix_looks(
    model: Make, recipe: Callable, run: Callable, tmp_path: Path
) -> None:
    """What the last matrix of a block gives is seen when it is passed on."""
    source = changed(model, tmp_path, "model.layers.0.mlp.down_proj.weight", 3e38)
    with pytest.raises(secateur.RunError, match=r"block 0 gives non-finite hidden states"):
        run(source, recipe({"wanda": {"targets": "*q_proj*"}}))


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ({"sparsegpt": {"group": 8}}, "^sparsegpt: group says how bits are rounded to, .* give bits too"),
        ({"sparsegpt": {"symmetric": True}}, "^sparsegpt: symmetric says"),
        ({"apt": {"mask": {"sparsegpt": {"group": 8}}}}, "^sparsegpt: group says"),
        ({"pruner_zero": {"expression": "TREE"}}, "^pruner_zero: .*tree.json holds no expression .*knows no 'sin'"),
        ({"dsnot": {"mask": {"pruner_zero": {"expression": "TREE"}}}}, "^pruner_zero: .*knows no 'sin'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    step: Any, what: str, recipe: Callable, model: Make, tmp_path: Path
) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text('{"data": "sin", "left": {"data": "W"}}')
    plan = recipe(json.loads(json.dumps(step).replace("TREE", str(tree))))
    with pytest.raises(secateur.RequestError, match=what):
        secateur.compress(model("llama"), recipe=plan, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_group_with_bits_is_taken(recipe: Callable) -> None:
    given = {"bits": 3, "group": 16, "symmetric": True, "pattern": 0.5}
    assert secateur.compress(tiny.make("llama"), recipe=recipe({"sparsegpt": given})).model is not None


def test_an_expression_is_read_once(recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tree.json"
    path.write_text('{"data": "mul", "left": {"data": "W"}, "right": {"data": "X"}}')
    reads: list[str] = []
    parse = Expression.from_json
    monkeypatch.setattr(Expression, "from_json", lambda text: reads.append(text) or parse(text))
    secateur.compress(tiny.make("llama"), recipe=recipe({"pruner_zero": {"expression": str(path)}}))
    assert len(reads) == 1, "not for each of 21 matrices"


@pytest.mark.parametrize(
    ("name", "targets", "told"),
    [
        ("llama", None, True),
        pytest.param("mixtral", ["attention"], True, marks=pytest.mark.every),
        pytest.param("mixtral", None, False, marks=pytest.mark.every),
    ],
)
def test_gates_that_count_nowhere_are_told(
    name: str, targets: Any, told: bool, recipe: Callable, run: Callable, model: Make
) -> None:
    """Who prunes a dense model by MoE-Pruner has Wanda, and should know."""
    output = run(model(name), recipe({"moe_pruner": {"targets": targets}}))
    said = "none of the pruned matrices belongs to an expert"
    receipt = json.loads((output / "secateur.json").read_text())
    assert sum(said in sentence for sentence in receipt["decisions"][0]["warnings"]) == told
    assert (said in (output / "README.md").read_text()) == told

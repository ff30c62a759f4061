"""Opening a model wherever it is, and what a result keeps of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_file
import outcomes
import secateur
import tiny
from secateur.network import source as source_module
from secateur.network.locate import locate
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess
from secateur.report import model_card

Make = Callable[..., Path]
TEXT = "there is some text, read there and back"


@pytest.fixture
def cut(clean: CleanProcess, tmp_path: Path) -> Callable[..., Path]:
    """Compresses by random_units; returns the directory."""

    def run(source: object, name: str = "out", **options: object) -> Path:
        secateur.compress(
            source, "random_units", output=tmp_path / name, **({"evaluate": False, "clean": clean} | options)
        )
        return tmp_path / name

    return run


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_opening_reads_no_weights(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model("llama", shard_size="300KB")
    opened = []

    class Headers:
        """A safetensors file that gives its header and nothing else."""

        def __init__(self, path: Path, **options: str) -> None:
            self.file = safe_open(path, **options)

        def __enter__(self) -> "Headers":
            opened.append(self)
            return self

        def __exit__(self, *_: object) -> None:
            opened.pop()

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> object:
            piece = self.file.get_slice(name)
            return type("Shape", (), {"get_dtype": piece.get_dtype, "get_shape": piece.get_shape})()

    monkeypatch.setattr("secateur.network.checkpoint.safe_open", Headers)
    monkeypatch.setattr("secateur.network.source.safe_open", None)
    found = open_model(source)
    assert len(found.anatomy.blocks) == tiny.BLOCKS and len(found.parts) == len(found.tensors)
    assert len(found.files) > 1 and not opened, "no file is left open"
    assert all(parameter.is_meta for parameter in found.skeleton.parameters())


@pytest.mark.parametrize("shard_size", [None, "300KB"])
def test_reading_gives_what_torch_stores(model: Make, shard_size: str | None) -> None:
    source = open_model(model("llama", shard_size=shard_size) if shard_size else model("llama"))
    expected = tiny.make("llama").state_dict()
    assert set(source.tensors) == set(expected)
    for name, tensor in source.read(expected).items():
        assert torch.equal(tensor, expected[name])
    assert torch.equal(source.parameter("model.norm.weight"), expected["model.norm.weight"])


def test_shards_do_not_show_in_the_result(model: Make, cut: Callable) -> None:
    one, many = cut(model("llama"), "one"), cut(model("llama", shard_size="300KB"), "many")
    assert outcomes.promised(one) == outcomes.promised(many)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(model: Make, cut: Callable, dtype: torch.dtype) -> None:
    result = cut(model("llama", dtype=dtype))
    assert {tensor.dtype for tensor in stored(result).values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(result).dtype == dtype


def test_angles_are_computed_in_float32_whatever_the_weights_are(model: Make) -> None:
    """GPT-J's constructor computes them in the dtype of the weights, a plain load in float32 does not."""
    half, whole = (open_model(model("gptj", dtype=dtype)).skeleton for dtype in (torch.bfloat16, torch.float32))
    buffers = dict(half.named_buffers())
    assert buffers and all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_dtype_is_honoured(model: Make, cut: Callable, dtype: str) -> None:
    source = model("llama", dtype=torch.float16)
    result = cut(source, dtype=dtype)
    assert {str(tensor.dtype) for tensor in stored(result).values()} == {f"torch.{dtype}"}
    assert json.loads((result / "config.json").read_text())["dtype"] == dtype
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(stored(result)[embeddings], stored(source)[embeddings].to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bin_file(model: Make, cut: Callable, tmp_path: Path, dtype: torch.dtype) -> None:
    straight = model("llama", dtype=dtype)
    old = tmp_path / "old"
    shutil.copytree(straight, old, ignore=shutil.ignore_patterns("*.safetensors"))
    (old / "LICENSE").write_text("as it came")
    torch.save(tiny.make("llama").to(dtype).state_dict(), old / "pytorch_model.bin")
    before = outcomes.promised(old)
    result = cut(old)
    expected = outcomes.promised(cut(straight, "straight"))
    found = outcomes.promised(result)
    assert found.pop("LICENSE")
    assert found == expected
    assert outcomes.promised(old) == before


def test_a_checkpoint_of_the_bare_model(model: Make, cut: Callable, tmp_path: Path) -> None:
    """Tensors without the prefix of the model with a head, as base models are saved; the head is tied."""
    straight, bare = model("llama_tied"), tmp_path / "bare"
    shutil.copytree(straight, bare)
    tensors = {name.removeprefix("model."): tensor for name, tensor in stored(straight).items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    result, expected = stored(cut(bare)), stored(cut(straight, "straight"))
    assert set(result) == {name.removeprefix("model.") for name in expected}
    assert all(torch.equal(result[name.removeprefix("model.")], tensor) for name, tensor in expected.items())


def test_tied_embeddings_are_stored_once(model: Make, cut: Callable) -> None:
    result = cut(model("llama_tied"), shard_bytes=1)
    assert "lm_head.weight" not in stored(result)
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_tensors_that_nobody_knows_pass_through(model: Make, cut: Callable, tmp_path: Path) -> None:
    source = tmp_path / "more"
    shutil.copytree(model("llama"), source)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8), "value_head.steps": torch.tensor([3])}
    save_file(stored(source) | more, source / "model.safetensors", {"format": "pt"})
    result = stored(cut(source, dtype="bfloat16"))
    assert torch.equal(result["value_head.steps"], more["value_head.steps"]), "whole numbers keep their dtype"
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in result


def test_a_second_copy_in_another_layout_is_not_read(model: Make, cut: Callable, tmp_path: Path) -> None:
    source = tmp_path / "twice"
    shutil.copytree(model("llama"), source)
    save_file({"layers.0.w1": torch.zeros(3)}, source / "consolidated.safetensors")
    result = cut(source)
    assert "layers.0.w1" not in stored(result)
    assert not (result / "consolidated.safetensors").exists()


def test_what_belongs_to_a_model_goes_with_it(model: Make, cut: Callable, tmp_path: Path) -> None:
    source = tmp_path / "rich"
    shutil.copytree(model("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"our_own_entry": {"deep": [1, 2]}, "rope_theta": 5e5}))
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Rich\n")
    (source / "LICENSE").write_text("the whole text")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_own.py").write_text("")
    (source / "pytorch_model.bin").write_bytes(b"an old copy")
    result = cut(source)

    said = json.loads((result / "config.json").read_text())
    assert said["our_own_entry"] == {"deep": [1, 2]} and said["rope_theta"] == 5e5
    assert {key for key in said if said[key] != config.get(key)} == {"intermediate_size", "our_own_entry", "rope_theta"}
    assert json.loads((result / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    assert (result / "LICENSE").read_text() == "the whole text"
    assert (result / "chat_template.jinja").exists()
    assert not (result / "modeling_own.py").exists() and not (result / "pytorch_model.bin").exists()
    front = yaml.safe_load((result / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "apache-2.0" and "base_model" not in front, "a directory is nothing the hub can link"
    assert "# rich, compressed" in (result / "README.md").read_text()
    assert front["library_name"] == "transformers" and "random_units" in front["tags"]
    assert AutoTokenizer.from_pretrained(result)(TEXT) == tiny.tokenizer()(TEXT)
    assert (cut(source, "trusted", trust_remote_code=True) / "modeling_own.py").exists()


def test_what_is_no_companion_stays_behind(model: Make, cut: Callable, tmp_path: Path) -> None:
    source = tmp_path / "cluttered"
    shutil.copytree(model("llama"), source)
    clutter = ["rust_model.ot", "model.tflite", "last.ckpt", "a.npz", "a.npy", "a.pkl", "a.zip", "a.tar", "a.tar.gz"]
    for name in [*clutter, "adapter_config.json", "notes.txt"]:
        (source / name).write_text("{}")
    with (source / "large.txt").open("wb") as file:
        file.truncate(64 * 10**6 + 1)
    result = {path.name for path in cut(source).iterdir()}
    assert "notes.txt" in result
    assert not result & {*clutter, "adapter_config.json", "large.txt"}


def test_a_readme_says_nothing_of_this_machine(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    source, text = model("llama"), tmp_path / "text.txt"
    secateur.compress(source, "prunenet", {"episodes": 1}, output=tmp_path / "trained", evaluate=False, clean=clean)
    text.write_text("there and back again, and there once more. " * 40)
    steps = [{"prunenet": {"policy": str(tmp_path / "trained" / "secateur" / "policy.safetensors")}}]
    recipe = secateur.Recipe.parse({"steps": steps, "evaluate": {"text": str(text), "window": 64, "windows": 1}})
    secateur.compress(source, recipe=recipe, output=tmp_path / "out", clean=clean)
    said = (tmp_path / "out" / "README.md").read_text()
    assert "## Measured" in said and "policy: policy.safetensors" in said and "text: text.txt" in said
    assert str(tmp_path) not in said and str(source.parent) not in said and source.parent.name not in said


@pytest.mark.parametrize(
    ("named", "base", "linked"),
    [
        ("owner/name", "owner/name", True),
        ("models/name", "name", False),
        ("/models/name", "name", False),
        ("name", "name", False),
        ("package:name", "package:name", False),
        ("LlamaForCausalLM", None, False),
    ],
)
def test_a_base_model_is_linked_where_the_hub_has_it(named: str, base: str | None, linked: bool) -> None:
    receipt = {
        "source": {"model": named, "base_model": base, "licence": None},
        "recipe": {"steps": []},
        "decisions": [],
        "reload_check": {"how": "h"},
    }
    said = model_card(receipt)
    front = yaml.safe_load(said.split("---\n")[1])
    assert front.get("base_model") == (named if linked else None)
    assert f"(base: {base or named})" in said


def test_a_package_as_the_index_spells_it(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model("llama"), tmp_path / "secateur_test_spelled")
    (tmp_path / "secateur_test_spelled" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:secateur-test-spelled").directory == tmp_path / "secateur_test_spelled"
    with pytest.raises(secateur.RequestError, match="pip install --no-deps secateur-test-missing"):
        locate("package:secateur-test-missing")


def test_a_model_inside_a_package(model: Make, cut: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "secateur_test_shipped"
    shutil.copytree(model("llama"), package / "weights" / "small")
    (package / "__init__.py").write_text("raise RuntimeError('a package is looked into, not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    result = cut("package:secateur_test_shipped")
    assert outcomes.promised(result) == outcomes.promised(cut(model("llama"), "straight"))
    assert json.loads((result / "secateur.json").read_text())["source"]["base_model"] == "package:secateur_test_shipped"


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
def test_a_gguf_file(cut: Callable, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "small.gguf"
    gguf_file.write(file, kind)
    result = cut(file)
    loaded = AutoModelForCausalLM.from_pretrained(result)
    assert loaded.dtype == torch.bfloat16 and loaded.config.intermediate_size == 128
    assert "quantization_config" not in json.loads((result / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(result)(TEXT)["input_ids"] == tiny.tokenizer()(TEXT)["input_ids"]
    front = yaml.safe_load((result / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "mit" and "base_model" not in front
    assert "(base: small)" in (result / "README.md").read_text()
    original = tiny.make("llama").model.layers[1].self_attn.k_proj.weight
    difference = (loaded.model.layers[1].self_attn.k_proj.weight - original).abs().max() / original.abs().max()
    assert difference < (0.005 if kind == gguf.GGMLQuantizationType.F32 else 0.02), "de-quantized, and put right"
    assert sorted(path.name for path in file.parent.iterdir()) == ["small.gguf"]
    exact = cut(file, "exact", dtype="float32")
    assert {tensor.dtype for tensor in stored(exact).values()} == {torch.float32}


def test_a_gguf_file_inside_a_package(cut: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "secateur_test_ggufs"
    package.mkdir()
    (package / "__init__.py").touch()
    gguf_file.write(package / "small.gguf", licence=None)
    monkeypatch.syspath_prepend(tmp_path)
    result = cut("package:secateur_test_ggufs", seed=4)
    front = yaml.safe_load((result / "README.md").read_text().split("---\n")[1])
    assert "license" not in front and "base_model" not in front
    assert "# package:secateur_test_ggufs, compressed" in (result / "README.md").read_text()


def test_opening_what_must_be_converted_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_file.write(tmp_path / "small.gguf")
    monkeypatch.setattr(source_module, "_whole", None)
    source = open_model(tmp_path / "small.gguf")
    assert not source.tensors and source.anatomy.blocks[0].feed_forward.units == tiny.UNITS


def test_a_source_that_vanishes_while_it_is_read(model: Make, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    source = open_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(secateur.RunError, match=r"model\.safetensors"):
        source.parameter("model.norm.weight")


def test_transformers_is_the_version_that_this_is_written_for() -> None:
    assert transformers.__version__.startswith("5."), "the dtype entry and the renamings of keys are those of 5"

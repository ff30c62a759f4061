"""Every wrong request: exit code 2, one sentence that names the thing, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from command import Told, compress, secateur, snapshot
from secateur.errors import RequestError
from secateur.network.heterogeneous import BlockShape
from secateur.registry import methods
from test_heterogeneous import write

Make = Callable[..., Path]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs `secateur compress MODEL` into tmp_path/out/deep; returns the sentence that it must be refused with."""

    def run(model: object, *arguments: object, output: Path | None = None, method: str | None = "random_units") -> str:
        before = snapshot(tmp_path)
        told = compress(model, output or tmp_path / "out" / "deep", *arguments, method=method)
        assert snapshot(tmp_path) == before, "nothing is written, and nothing is changed"
        return sentence(told)

    return run


def sentence(told: Told, code: int = 2) -> str:
    """The one sentence on the standard error."""
    assert told.code == code, told.err
    assert told.err.startswith("error: "), told.err
    assert told.err.count("\n") == 1 and "Traceback" not in told.err
    assert len(told.err) < 600
    return told.err.removeprefix("error: ").strip()


@pytest.fixture
def copy(model: Make, tmp_path: Path) -> Make:
    """A tiny llama of one's own, in four shards unless told otherwise."""

    def make(name: str = "llama", shard_size: str | None = "300KB") -> Path:
        shutil.copytree(model(name, **({"shard_size": shard_size} if shard_size else {})), tmp_path / "model")
        return tmp_path / "model"

    return make


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shards(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.safetensors"))
    assert len(found) > 1
    return found


# The model.


def test_a_path_that_does_not_exist(refused: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")


def test_a_directory_without_config(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


def test_a_config_without_weights(refused: Callable[..., str], copy: Make) -> None:
    source = copy(shard_size=None)
    (source / "model.safetensors").unlink()
    assert "no weights" in refused(source)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "unheard_of"}'])
def test_a_config_that_says_nothing(refused: Callable[..., str], copy: Make, content: str) -> None:
    source = copy()
    (source / "config.json").write_text(content)
    assert "config" in refused(source)


def test_a_missing_shard(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    shards(source)[1].unlink()
    said = refused(source)
    assert "model-00002-of" in said and "missing" in said


@pytest.mark.parametrize("left", [0, 100, -10])
def test_a_truncated_shard(refused: Callable[..., str], copy: Make, left: int) -> None:
    source = copy()
    shard = shards(source)[1]
    shard.write_bytes(shard.read_bytes()[:left])
    said = refused(source)
    assert shard.name in said and "cut short" in said


def test_a_single_file_that_is_truncated(refused: Callable[..., str], copy: Make) -> None:
    file = copy(shard_size=None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors" in refused(file.parent)


def test_an_index_that_does_not_fit_its_shards(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    index = source / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    edit_json(index, weight_map=where | {name: shards(source)[0].name})
    assert name in refused(source)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_index_that_is_none(refused: Callable[..., str], copy: Make, content: str) -> None:
    source = copy()
    (source / "model.safetensors.index.json").write_text(content)
    assert "index" in refused(source)


def test_a_tensor_that_is_missing_in_index_and_shard(refused: Callable[..., str], copy: Make) -> None:
    source = copy(shard_size=None)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(source)


def test_a_tensor_of_another_shape_than_the_config_says(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    edit_json(source / "config.json", intermediate_size=192)
    said = refused(source)
    assert "mlp" in said and "192" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights(refused: Callable[..., str], copy: Make, value: float, dtype: torch.dtype) -> None:
    source = copy()
    shard = shards(source)[-1]
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, shard, {"format": "pt"})
    said = refused(source)
    assert name in said and "non-finite" in said


@pytest.mark.parametrize(
    ("name", "method", "what"), [("mamba", "random_units", "mamba"), ("mixtral", "prunenet", "experts")]
)
def test_a_block_that_cannot_be_cut(
    refused: Callable[..., str], model: Make, name: str, method: str, what: str
) -> None:
    said = refused(model(name), method=method)
    assert what in said and "layers.0" in said


def test_a_width_that_no_config_entry_says(refused: Callable[..., str], model: Make) -> None:
    assert "no entry that sets its feed-forward width" in refused(model("bloom"))


def test_a_model_without_a_head(refused: Callable[..., str], tmp_path: Path) -> None:
    bare = tiny.make("llama").model
    bare.config.architectures = None
    bare.save_pretrained(tmp_path / "bare")
    assert "no head" in refused(tmp_path / "bare")


def test_a_quantized_source(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refused(source)


def test_code_of_the_models_own(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    edit_json(source / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (source / "modeling_mine.py").write_text("raise SystemExit('it ran')\n")
    assert "--trust-remote-code" in refused(source)


def test_a_hub_id_that_cannot_be_had(refused: Callable[..., str]) -> None:
    assert "nobody/has-this-model" in refused("nobody/has-this-model")


def test_a_file_that_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"1")
    assert "not a .gguf file" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not gguf at all" * 9])
def test_a_corrupt_gguf_file(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in refused(tmp_path / "model.gguf")


def test_a_corrupt_bin_file(refused: Callable[..., str], copy: Make) -> None:
    source = copy(shard_size=None)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"neither zip nor pickle")
    assert str(source) in refused(source)


def test_packages(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install secateur_has_no_such" in refused("package:secateur_has_no_such")
    (tmp_path / "secateur_test_empty").mkdir()
    (tmp_path / "secateur_test_empty" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "ships no model" in refused("package:secateur_test_empty")


def test_no_model_at_all() -> None:
    told = secateur("compress", "--method", "random_units", "--output", "never")
    assert "no model was named" in sentence(told)
    assert not Path("never").exists()


# Method, recipe, parameters.


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1", ".nan", ".inf"])
def test_a_ratio_outside_its_range(refused: Callable[..., str], model: Make, ratio: str) -> None:
    assert "ratio" in refused(model("llama"), "--set", f"ratio={ratio}")


def test_a_ratio_that_leaves_no_neuron(refused: Callable[..., str], model: Make) -> None:
    said = refused(model("llama"), "--set", "ratio=0.999")
    assert "0.999" in said and "160" in said


def test_an_unknown_method(refused: Callable[..., str], model: Make) -> None:
    assert "Did you mean 'random_units'?" in refused(model("llama"), method="random_unit")


def test_an_unknown_parameter(refused: Callable[..., str], model: Make) -> None:
    assert "Did you mean 'ratio'?" in refused(model("llama"), "--set", "ration=0.3")


@pytest.mark.parametrize("setting", ["ratio=much", "ratio=[1]", "multiple_of=2.5", "multiple_of=0"])
def test_a_parameter_of_the_wrong_type(refused: Callable[..., str], model: Make, setting: str) -> None:
    assert setting.partition("=")[0] in refused(model("llama"), "--set", setting)


@pytest.mark.parametrize("setting", ["ratio", "ratio=[", "other.ratio=0.3", "7.ratio=0.3", "=0.3"])
def test_a_setting_that_is_malformed(refused: Callable[..., str], model: Make, setting: str) -> None:
    refused(model("llama"), "--set", setting)


@pytest.mark.parametrize(
    "content",
    [
        "steps: [",
        "- random_units",
        "steps: []",
        "steps: random_units",
        "steps: [random_units: {ratio: 2}]",
        "steps: [{random_units: 3}]",
        "steps: [{random_units: {}, magnitude_units: {}}]",
        "step: [random_units]",
        "steps: [random_units]\nseed: many",
        "steps: [random_units]\ndtype: int4",
        "steps: [random_units]\n1: 2",
        "steps: [random_units: {1: 2}]",
        "recipe: nothing",
        "steps: [random_units]\nevaluate: {text: /no/such/text}",
        "\x00",
    ],
)
def test_a_recipe_that_is_wrong(refused: Callable[..., str], model: Make, tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    refused(model("llama"), "--recipe", path, method=None)


def test_a_recipe_file_that_is_missing(refused: Callable[..., str], model: Make, tmp_path: Path) -> None:
    assert "none.yaml" in refused(model("llama"), "--recipe", tmp_path / "none.yaml", method=None)


def test_a_recipe_with_an_unknown_entry(refused: Callable[..., str], model: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("sede: 3\nsteps: [random_units]\n")
    said = refused(model("llama"), "--recipe", tmp_path / "recipe.yaml", method=None)
    assert "Did you mean 'seed'?" in said


def test_a_later_step_is_looked_at_before_the_first_runs(
    refused: Callable[..., str], model: Make, tmp_path: Path
) -> None:
    """The second step alone could be done; after the first it leaves no neuron."""
    (tmp_path / "recipe.yaml").write_text("steps: [random_units: {ratio: 0.9}, random_units: {ratio: 0.97}]")
    assert "0.97" in refused(model("llama"), "--recipe", tmp_path / "recipe.yaml", method=None)


@pytest.mark.parametrize("later", ["layer_drop: {metric: reverse, remove: 1}", "vocabulary: {by: script}"])
def test_blocks_and_tokens_go_before_blocks_are_made_to_differ(
    later: str, refused: Callable[..., str], model: Make, tmp_path: Path
) -> None:
    first = "wanda_units: {ratio: 0.3, multiple_of: 1, allocation: flap_search}"
    calibration = "calibration: {data: self, samples: 2, length: 8}"
    (tmp_path / "recipe.yaml").write_text(f"steps: [{first}, {later}]\n{calibration}")
    name = later.partition(":")[0]
    assert f"put {name} first" in refused(model("llama"), "--recipe", tmp_path / "recipe.yaml", method=None)
    write(model("llama"), tmp_path / "cut", {0: BlockShape(units=96)})
    (tmp_path / "recipe.yaml").write_text(f"steps: [{later}]")
    assert f"{name} " in refused(tmp_path / "cut", "--recipe", tmp_path / "recipe.yaml", method=None)


def test_what_earlier_steps_made_is_kept_when_a_later_one_is_refused(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: [random_units: {ratio: 0.3}, magnitude: {pattern: 0.5}]")

    def refuse(*_: object) -> None:
        raise RequestError("that cannot be done.")

    monkeypatch.setattr("secateur.weight_stage.WeightStage._prepare", refuse, raising=False)
    told = secateur("compress", model("llama"), "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    kept = tmp_path / "out" / ".secateur" / "model-0"
    assert told.code == 1 and "step 1 (magnitude)" in told.err and "model-0" in told.err
    assert (kept / "config.json").is_file() and list(kept.glob("*.safetensors"))


def test_other_options(refused: Callable[..., str], model: Make, tmp_path: Path) -> None:
    source = model("llama")
    assert "int3" in refused(source, "--dtype", "int3")
    assert "lots" in refused(source, "--max-memory", "lots")
    assert "-3GB" in refused(source, "--max-memory", "-3GB")
    assert "no text" in refused(source, "--evaluate", "--text", tmp_path / "none.txt")
    assert "either" in refused(source, method=None)
    assert "--log-level" in refused(source, "--log-level", "loud")
    assert "--output" in sentence(secateur("compress", source, "--method", "random_units"))


def test_the_policy_of_another_model(refused: Callable[..., str], model: Make, tmp_path: Path) -> None:
    policy = tmp_path / "policy.safetensors"
    save_file({"v": torch.zeros(48), "c": torch.zeros(1), "standardised": torch.tensor([1])}, policy)
    said = refused(model("llama"), "--set", f"policy={policy}", method="prunenet")
    assert "48" in said and "64" in said
    save_file({"w": torch.zeros(48)}, policy)
    assert "policy.safetensors" in refused(model("llama"), "--set", f"policy={policy}", method="prunenet")
    assert "none.st" in refused(model("llama"), "--set", f"policy={tmp_path / 'none.st'}", method="prunenet")


@pytest.mark.parametrize(("name", "ratios"), [("llama", "[0.2, 0.2]"), ("bloom", "[0.2, 0.4, 0.2]")])
def test_ratios_that_cannot_be_had(refused: Callable[..., str], model: Make, name: str, ratios: str) -> None:
    """Too few of them; and widths that a block of bloom cannot be built with."""
    refused(model(name), "--set", f"ratios={ratios}", method="prunenet")


# The output.


def test_an_output_that_is_the_source_or_inside_it_or_around_it(refused: Callable[..., str], copy: Make) -> None:
    source = copy()
    assert "source" in refused(source, output=source)
    assert "source" in refused(source, "--restart", output=source)
    assert "source" in refused(source, output=source / "inside" / "deeper")
    assert "source" in refused(source, output=source.parent)
    (source.parent / "link").symlink_to(source)
    assert "source" in refused(source, output=source.parent / "link" / "inside")


@pytest.mark.parametrize("restart", [(), ("--restart",)])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "precious"},
        {".secateur/notes.txt": "precious"},
        {"thesis.tex": "precious", ".secateur/notes.txt": ""},
        {"thesis.tex": "precious", "secateur.json": "{}"},
        {"thesis.tex": "precious", "secateur.json": "[3"},
        {"thesis.tex": "precious", ".secateur/run.json": "[]"},
    ],
)
def test_an_output_that_is_somebody_elses(
    refused: Callable[..., str], model: Make, tmp_path: Path, files: dict[str, str], restart: tuple[str, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / "foreign" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "foreign" / name).write_text(content)
    said = refused(model("llama"), *restart, output=tmp_path / "foreign")
    assert str(tmp_path / "foreign") in said


def test_an_output_that_is_a_file(refused: Callable[..., str], model: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refused(model("llama"), output=tmp_path / "file")
    assert str(tmp_path / "file") in refused(model("llama"), output=tmp_path / "file" / "below")


def test_an_output_that_may_not_be_made(
    refused: Callable[..., str], model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because tests may run as root, who may write anywhere."""

    def mkdir(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    source = model("llama")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "Permission denied" in refused(source)


def test_a_source_that_may_not_be_read(
    refused: Callable[..., str], copy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy()
    read = Path.read_text

    def denied(self: Path, *arguments: str, **options: str) -> str:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    assert "Permission denied" in refused(source)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from secateur import RequestError

    with pytest.raises(RequestError):
        compress(tmp_path / "nowhere", tmp_path / "out", "--debug")


def test_other_commands_refuse_alike(tmp_path: Path) -> None:
    assert "nowhere" in sentence(secateur("inspect", tmp_path / "nowhere"))
    assert "nowhere" in sentence(secateur("evaluate", tmp_path / "nowhere", "--quiet"))
    assert "Did you mean 'prunenet'?" in sentence(secateur("methods", "prunnet"))
    assert "prunenet" in methods()

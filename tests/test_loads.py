"""What loads a model: each loader in a process of its own, and what its logits are."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gguf_file
import tiny
from command import secateur
from secateur.export import clean_run
from secateur.export.check import difference, score_difference, try_loader
from secateur.loads import Row, loads
from secateur.network.heterogeneous import BlockShape
from secateur.network.verify import prompt
from test_heterogeneous import write

Make = Callable[..., Path]


def rows(model: Path) -> dict[str, Row]:
    return {row.loader: row for row in loads(model, tokens=2)}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def few_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the loaders of other formats, which tests/test_export.py tries one by one."""
    monkeypatch.setattr("secateur.loads._exported", lambda *_: iter(()))


@pytest.mark.every
def test_an_ordinary_model(model: Make) -> None:
    told = secateur("loads", model("llama"), "--json", "--tokens", 2, "--quiet")
    assert told.code == 0
    found = {row["loader"]: row for row in json.loads(told.out)}
    assert found["transformers"]["loads"] and found["transformers"]["speed"] > 0
    assert found["transformers"]["equal"] is None and "compared" in found["transformers"]["note"]
    assert found["secateur"]["equal"] and found["secateur"]["difference"] < 1e-5
    assert found["safetensors"]["loads"] and found["safetensors"]["note"] == "30 tensors"
    for loader, package in (("llama.cpp", "xllamacpp"), ("onnxruntime", "onnxruntime"), ("vllm", "vllm")):
        if installed(package):
            assert found[loader]["loads"] is (None if loader == "vllm" else True)
        else:
            assert found[loader]["loads"] is None and found[loader]["note"] == "not installed"


@pytest.mark.every
def test_blocks_that_differ_load_with_their_code_alone(model: Make, tmp_path: Path, few_loaders: None) -> None:
    write(model("llama"), tmp_path / "cut", {0: BlockShape(units=96)})
    found = rows(tmp_path / "cut")
    assert found["transformers"].loads is False and found["transformers"].note
    assert found["transformers, trust_remote_code"].loads and found["transformers, trust_remote_code"].equal is None
    assert found["secateur"].equal
    # a line more, and nobody has said that it may run
    with (tmp_path / "cut" / "modeling_heterogeneous.py").open("a") as file:
        file.write("\n# changed\n")
    told = secateur("loads", tmp_path / "cut")
    assert told.code == 2 and "--trust-remote-code" in told.err


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "m.gguf")
    found = rows(tmp_path / "m.gguf")
    assert found["transformers"].loads and found["gguf"].note == "30 tensors"
    if installed("xllamacpp"):
        assert found["llama.cpp"].equal and found["llama.cpp"].difference < 6e-2
    else:
        assert found["llama.cpp"].note == "not installed"


def test_a_model_that_does_not_load_says_why(model: Make, tmp_path: Path, few_loaders: None) -> None:
    (tmp_path / "m").mkdir()
    for path in model("llama").iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4}))
    # open_model reads headers only when asked for a parameter
    tried = try_loader("transformers", tmp_path / "m", [1, 2])
    assert "missing keys" in tried.error


def test_nothing_is_there(tmp_path: Path) -> None:
    told = secateur("loads", tmp_path / "none")
    assert told.code == 2 and "does not exist" in told.err


def test_a_crash_and_a_hang_are_answers(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = try_loader("transformers", model("llama"), [1], seconds=0.01)
    assert "no answer within" in tried.error
    program = tmp_path / "clean_run.py"
    program.write_text("import os, sys; sys.stderr.write('GGML_ASSERT(false) failed\\n'); os.abort()")
    monkeypatch.setattr("secateur.export.check.__file__", str(tmp_path / "check.py"))
    tried = try_loader("transformers", model("llama"), [1])
    assert "ended with -6" in tried.error and "GGML_ASSERT" in tried.error


def test_loaders_cannot_lean_on_secateur() -> None:
    with pytest.raises(ModuleNotFoundError):
        clean_run._NoSecateur().find_spec("secateur.files")
    assert clean_run._NoSecateur().find_spec("json") is None


def test_differences() -> None:
    ours = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    assert difference(ours, ours + 0.3) == pytest.approx(0.1)
    scores = ours.log_softmax(-1)
    # logits are equal up to a number for each step, scores of a shorter vocabulary and those not told count for nothing
    assert score_difference(ours + 7, scores) < 1e-6
    told = scores[:, :2].clone()
    told[0, 1] = float("nan")
    assert score_difference(ours, told) < 1e-6
    told[1, 0] += 0.6
    assert score_difference(ours, told) == pytest.approx(0.2)


def test_ids_are_those_of_the_whole_vocabulary() -> None:
    assert max(prompt(tiny.VOCABULARY)) > tiny.VOCABULARY // 2

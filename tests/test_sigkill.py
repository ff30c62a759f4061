"""A real SIGKILL in every path of the engine that learns from tokens: the same command goes on and writes the same bytes.

Kills that are simulated, at every rename, stand in test_resume, test_weight_resume and beside the methods.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import outcomes
import secateur
from secateur.network.verify import CleanProcess
from test_calibration import draw

TEXT = "there and back again, and there once more, with others and their sisters in the rain. " * 40


@dataclass(frozen=True)
class Strike:
    """One run and where it ends.

    Args:
        place: module, and class behind a colon, whose `function` is replaced by the end of everything at its n-th call.
        left: a file that lies in the state by then, as a pattern: the strike is where its name says.
        missing: one that does not lie there yet.
    """

    step: Any
    place: str
    function: str
    number: int
    left: str
    missing: str = "secateur.json"
    data: str = "ids.json"
    model: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)


BONSAI = {"submodels": 6, "sequences": 1, "prior_sequences": 2, "per_round": 0.2}
TRIALS = {
    "divergent_tokens": {"apply": "magnitude", "levels": [0.4, 0.6], "prompts": 6, "prompt": 4, "continuation": 6}
}
STRIKES = {
    # single weights
    "hidden states": Strike("sparsegpt", "secateur.calibration.propagation", "_raw", 7, "*.states"),
    "statistics": Strike("sparsegpt", "secateur.calibration.statistics", "_add_gram", 9, "*.states"),
    "solving": Strike("sparsegpt", "secateur.methods.weights.sparsegpt", "sweep", 11, "journal-0.jsonl"),
    "a shard": Strike("sparsegpt", "secateur.files", "save_file", 6, "journal-0.jsonl"),
    "masks": Strike("sparsegpt", "secateur.network.masks", "write_tensors", 2, "journal-0.jsonl"),
    "the journal": Strike("sparsegpt", "secateur.workspace", "append_line", 3, "journal-0.jsonl"),
    "what lies beside the model": Strike("sparsegpt", "secateur.weight_stage", "write_json", 1, "journal-0.jsonl"),
    "samples": Strike(
        "sparsegpt", "secateur.calibration.samples", "write_json", 1, "samples.safetensors", missing="samples.json"
    ),
    "samples of its own": Strike(
        "wanda", "secateur.evaluation.text", "step", 5, "run.json", missing="samples.safetensors", data="self",
        settings={"length": 8},
    ),
    "gradients": Strike(
        "pruner_zero", "secateur.calibration.gradients", "write_tensors", 5, "gradients/0.safetensors",
        missing="gradients/complete",
    ),
    "divergence trials": Strike(
        TRIALS, "secateur.calibration.divergence_trials", "compare_forced", 5, "samples.json", missing="*.states"
    ),
    # whole blocks
    "flow": Strike("block_influence", "secateur.calibration.flow", "write_json", 2, "flow/0-*", missing="flow/1-*"),
    "loss without blocks": Strike(
        {"layer_drop": {"metric": "perplexity"}}, "secateur.calibration.flow:FlowPass", "_end", 1, "flow/2-*"
    ),
    "gradients of blocks": Strike(
        {"layer_drop": {"metric": "taylor"}}, "secateur.calibration.gradients", "write_json", 1, "samples.json",
        missing="gradients.json",
    ),
    "copying blocks": Strike("block_influence", "secateur.layer_stage", "write_tensors", 2, "journal-0.jsonl"),
    # tokens
    "checking a tokenizer": Strike(
        "vocabulary", "secateur.vocabulary_stage", "misnumbered", 1, "tokenizer/config.json", missing="journal-0.jsonl",
        data="text.txt",
    ),
    "cutting a vocabulary": Strike(
        "vocabulary", "secateur.vocabulary_stage", "write_tensors", 2, "journal-0.jsonl", data="text.txt"
    ),
    # units, planned for the whole network at once
    "evaluator": Strike({"bonsai": BONSAI}, "secateur.calibration.evaluator:Evaluator", "loss", 4, "samples.json"),
    "activations": Strike("minitron", "secateur.calibration.dense_pass", "write_tensors", 2, "*.states"),
    "directions of the stream": Strike(
        {"slicegpt": {"rotation": "one"}}, "secateur.calibration.dense_pass", "write_tensors", 2, "*.states"
    ),
    "directions in front of each norm": Strike(
        "slicegpt", "secateur.calibration.sliced_stream", "write_tensors", 3, "*.states"
    ),
    "routing": Strike(
        "reap", "secateur.calibration.flow", "write_json", 2, "flow/0-*", missing="flow/1-*", model="mixtral"
    ),
    "flow with silent units": Strike(
        {"adapt_pruner": {"overall": 0.2, "steps": 2, "multiple_of": 8}},
        "secateur.calibration.silenced_flow:SilencedFlow", "measure", 2, "samples.json",
    ),
    "cutting by a plan": Strike("minitron", "secateur.plan_stage", "write_tensors", 2, "journal-0.jsonl"),
    # units, block by block
    "gradients of units": Strike(
        {"llm_pruner": {"multiple_of": 8}}, "secateur.calibration.unit_gradients", "write_tensors", 2, "samples.json"
    ),
    "scores of all units": Strike(
        {"flap": {"allocation": "flap_search"}}, "secateur.unit_scores", "write_tensors", 2, "samples.json"
    ),
    "units of a block": Strike("wanda_units", "secateur.files", "save_file", 6, "journal-0.jsonl"),
}  # fmt: skip


@pytest.fixture
def asked(model: Callable[..., Path], tmp_path: Path) -> Callable[[Strike], tuple[Path, dict[str, Any]]]:
    """The model and the recipe of a strike, the recipe as it is written down."""
    (tmp_path / "ids.json").write_text(json.dumps([each.tolist() for each in draw([16] * 5 + [7] * 3)]))
    (tmp_path / "text.txt").write_text(TEXT)

    def given(strike: Strike) -> tuple[Path, dict[str, Any]]:
        data = strike.data if strike.data == "self" else str(tmp_path / strike.data)
        settings = {"data": data, "samples": 4, "length": 16, "held_out": 2, **strike.settings}
        return model(strike.model), {"steps": [strike.step], "calibration": settings}

    return given


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=() if name == "hidden states" else pytest.mark.every) for name in STRIKES]
)
def test_sigkill(where: str, asked: Callable[..., Any], clean: CleanProcess, tmp_path: Path) -> None:
    strike = STRIKES[where]
    source, raw = asked(strike)
    module, _, owner = strike.place.partition(":")
    program = f"""
import itertools, json, os, signal, torch, secateur, {module} as place
secateur.list_methods()
torch.set_num_threads(1)
place = getattr(place, {owner!r}) if {owner!r} else place
number, function = itertools.count(1), place.{strike.function}

def strike(*arguments, **options):
    if next(number) == {strike.number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

place.{strike.function} = strike
recipe = secateur.Recipe.parse(json.loads({json.dumps(raw)!r}))
secateur.compress({str(source)!r}, recipe=recipe, output={str(tmp_path / "out")!r}, evaluate=False, shard_bytes=1)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=600)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "out" / "secateur.json").exists()
    state = tmp_path / "out" / ".secateur"
    assert list(state.rglob(strike.left)), sorted(str(path) for path in state.rglob("*"))
    assert not list(state.rglob(strike.missing)), "it strikes before that is written"
    for name in ("out", "undisturbed"):
        recipe = secateur.Recipe.parse(raw)
        secateur.compress(source, recipe=recipe, output=tmp_path / name, evaluate=False, shard_bytes=1, clean=clean)
    assert outcomes.promised(tmp_path / "out") == outcomes.promised(tmp_path / "undisturbed")
    assert not state.exists()

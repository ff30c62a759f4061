"""Every registered method over every tiny architecture that it can cut. A method joins by being registered."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import outcome
import secateur
import tiny
from secateur.network.verify import CleanProcess, prompt
from secateur.registry import methods

# `make test` runs two architectures, .ci/run all of them.
FIRST = ("llama", "gpt2")
# No feed-forward of its own, or a width that its configuration cannot say: every width method must refuse these.
REFUSED = ("bloom", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "olmoe", "mamba")
# Small enough for seconds, large enough that a kill finds a method half way.
QUICK = {"prunenet": {"episodes": 3}}
WIDTH = 128  # of 160, at ratio 0.2, a multiple of 32


def _cases() -> list:
    return [
        pytest.param(method, name, id=f"{method}-{name}", marks=() if name in FIRST else pytest.mark.every)
        for method in methods()
        for name in tiny.ARCHITECTURES
        if name not in REFUSED
    ]


def _run(method: str, source: Path, output: Path, clean: CleanProcess) -> None:
    secateur.compress(
        source,
        method,
        {"ratio": 0.2, **QUICK.get(method, {})},
        output=output,
        evaluate=False,
        shard_bytes=1,
        clean=clean,
    )


@pytest.mark.parametrize(("method", "name"), _cases())
def test_every_method_on_every_architecture(
    method: str,
    name: str,
    model: Callable[..., Path],
    clean: CleanProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, first, second, killed = model(name), tmp_path / "first", tmp_path / "second", tmp_path / "killed"
    before = outcome.promised(source)

    _run(method, source, first, clean)
    dense = AutoModelForCausalLM.from_pretrained(source)
    result = AutoModelForCausalLM.from_pretrained(first)
    blocks = len(secateur.network.source.open_model(source).anatomy.blocks)
    per_neuron = (outcome.parameters(dense) - outcome.parameters(result)) / (tiny.UNITS - WIDTH) / blocks
    assert per_neuron == int(per_neuron) >= 2 * tiny.HIDDEN, "whole neurons are gone, and nothing else"

    ids = [prompt(tiny.VOCABULARY)]
    with torch.no_grad():
        here = result.eval()(torch.tensor(ids)).logits
    torch.testing.assert_close(clean.logits(first, ids), here, atol=1e-5, rtol=1e-5)
    tokens = result.generate(torch.tensor(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > len(ids[0]), "the result generates"

    _run(method, source, second, clean)
    assert outcome.promised(first) == outcome.promised(second), "one seed, one result"

    with monkeypatch.context() as patch:
        counter = outcome.kill_at_rename(patch, 4)
        with pytest.raises(outcome.Killed):
            _run(method, source, killed, clean)
    assert counter["renames"] == 5
    _run(method, source, killed, clean)
    assert outcome.promised(first) == outcome.promised(killed), "a kill leaves no trace"
    assert outcome.promised(source) == before, "the source is never written"
    assert not (killed / ".secateur").exists()
    assert json.loads((first / "secateur.json").read_text())["recipe"]["steps"][0][method]["ratio"] == 0.2


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mamba" else pytest.mark.every) for n in REFUSED])
@pytest.mark.parametrize("method", ["random_units", "prunenet"])
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    method: str, name: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError) as refusal:
        secateur.compress(model(name), method, output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1
    assert not (tmp_path / "out").exists()

"""Models whose blocks differ and whose checkpoints name tensors otherwise than the model, or hold every expert apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

import outcomes
import secateur
import tiny
from secateur.network.modelling_file import is_ours
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess

WORDS = torch.tensor([[5, 9, 200, 31, 7, 77, 150, 2]])
NEURONS = ("prunenet", {"ratios": [0.1, 0.6, 0.3], "multiple_of": 1, "episodes": 1})
ATTENTION = ("layer_drop", {"part": "attention", "metric": "random", "remove": 1})
EXPERTS = ("layer_drop", {"part": "feed_forward", "metric": "random", "remove": 1})
# How a checkpoint names what the model calls otherwise, and the step after which its blocks differ.
CASES = {
    "gpt_neox": ("embed_out.weight", NEURONS),
    "gpt_neox_sequential": ("embed_out.weight", ATTENTION),
    "mixtral": (".block_sparse_moe.experts.3.w1.weight", ATTENTION),
    "qwen2_moe": (".mlp.experts.3.up_proj.weight", EXPERTS),
    "qwen3_moe_mixed": (".mlp.experts.3.up_proj.weight", ATTENTION),
    "olmoe": (".mlp.experts.3.up_proj.weight", ATTENTION),
}
FIRST = ("gpt_neox", "mixtral")
each = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.every) for n in CASES])
Make = Callable[..., Path]


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded(directory: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """A model of which nothing is missing."""
    model, said = kind.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not said["missing_keys"] and not said["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(WORDS).logits


@pytest.fixture(scope="module")
def uneven(model: Make, clean: CleanProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A result whose blocks differ, made once in several shards. Tests must not change it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("uneven") / name
            method, parameters = CASES[name][1]
            secateur.compress(
                model(name), method, parameters, output=made[name], evaluate=False, shard_bytes=1, clean=clean
            )
        return made[name]

    return get


@each
def test_a_result_is_stored_as_its_source(name: str, model: Make, uneven: Callable, clean: CleanProcess) -> None:
    before, after = stored(model(name)), stored(uneven(name))
    assert set(after) <= set(before) and any(key.endswith(CASES[name][0]) for key in after)
    result = loaded(uneven(name))
    assert type(result).__name__.startswith("Heterogeneous")
    there = clean.logits(uneven(name), WORDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(result), atol=1e-5, rtol=1e-5)


@each
def test_transformers_converts_as_for_its_own_class(name: str, uneven: Callable) -> None:
    result = loaded(uneven(name))
    for module in (result, result.base_model):
        own = getattr(transformers, type(module).__name__.removeprefix("Heterogeneous"))
        theirs, ours = (
            [
                (each.source_patterns, each.target_patterns, each.scope_prefix)
                for each in get_model_conversion_mapping(m)
            ]
            for m in (own(tiny.ARCHITECTURES[name]()), module)
        )
        assert ours == theirs


@each
def test_a_saved_copy_holds_the_same_tensors(name: str, uneven: Callable, tmp_path: Path) -> None:
    first = loaded(uneven(name))
    first.save_pretrained(tmp_path / "copy")
    old, new = stored(uneven(name)), stored(tmp_path / "copy")
    assert set(old) == set(new) and all(torch.equal(new[key], old[key]) for key in old)
    assert is_ours(tmp_path / "copy")
    assert torch.equal(logits(loaded(tmp_path / "copy")), logits(first))


@each
def test_the_body_loads_alone(name: str, uneven: Callable) -> None:
    with torch.no_grad():
        body = loaded(uneven(name), AutoModel)(WORDS)[0]
        torch.testing.assert_close(body, loaded(uneven(name)).base_model(WORDS)[0], atol=1e-6, rtol=1e-6)


@each
def test_a_second_step_reads_what_the_first_wrote(
    name: str, uneven: Callable, clean: CleanProcess, tmp_path: Path
) -> None:
    source = open_model(uneven(name))
    dense = loaded(uneven(name))
    for parameter, tensor in dense.named_parameters():
        assert torch.equal(source.parameter(parameter), tensor)
    secateur.compress(uneven(name), "magnitude", {"pattern": 0.5}, output=tmp_path / "out", evaluate=False, clean=clean)
    before, after = stored(uneven(name)), stored(tmp_path / "out")
    assert set(after) == set(before)
    zeros = {key for key in after if not torch.equal(after[key], before[key])}
    assert zeros and all(torch.equal(after[key], before[key] * (after[key] != 0)) for key in zeros)
    loaded(tmp_path / "out")


@each
def test_two_steps_in_one_recipe(name: str, model: Make, uneven: Callable, clean: CleanProcess, tmp_path: Path) -> None:
    method, parameters = CASES[name][1]
    recipe = secateur.Recipe.parse({"steps": [{method: parameters}, {"magnitude": {"pattern": 0.5}}]})
    secateur.compress(model(name), recipe=recipe, output=tmp_path / "both", evaluate=False, clean=clean)
    assert set(stored(tmp_path / "both")) == set(stored(uneven(name)))
    loaded(tmp_path / "both")


@each
def test_a_live_model_is_cut_and_saved(name: str, uneven: Callable, clean: CleanProcess, tmp_path: Path) -> None:
    method, parameters = CASES[name][1]
    live = secateur.compress(tiny.make(name), method, parameters).model
    names = {parameter for parameter, _ in live.named_parameters()}
    assert names == {parameter for parameter, _ in loaded(uneven(name)).named_parameters()}
    secateur.compress(tiny.make(name), method, parameters, output=tmp_path / "out", evaluate=False, clean=clean)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(live.eval()), atol=1e-5, rtol=1e-5)


@each
def test_without_its_code_it_fails_loudly(name: str, uneven: Callable) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(uneven(name))


@each
def test_a_kill_leaves_no_trace(
    name: str, model: Make, uneven: Callable, clean: CleanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, parameters = CASES[name][1]

    def run() -> None:
        secateur.compress(
            model(name), method, parameters, output=tmp_path / "out", evaluate=False, shard_bytes=1, clean=clean
        )

    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, 4)
        with pytest.raises(outcomes.Killed):
            run()
    run()
    assert outcomes.promised(tmp_path / "out") == outcomes.promised(uneven(name))

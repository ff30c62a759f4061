"""Live modules from Python: cut or pruned in memory, or written."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import gguf_file
import outcomes
import secateur
import tiny
from secateur.calibration.samples import collect_samples
from secateur.network.source import load, open_model
from secateur.network.verify import CleanProcess

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 150, 2]])
RATIOS = [0.1, 0.6, 0.3]


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


def masked(module: nn.Module, kept: list[torch.Tensor]) -> torch.Tensor:
    """Logits when the neurons that are not kept say nothing."""

    def silence(neurons: torch.Tensor) -> Callable:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            mask = torch.zeros(inputs[0].shape[-1])
            mask[neurons] = 1
            return (inputs[0] * mask,)

        return hook

    blocks = open_model(module).anatomy.blocks
    downs = [module.get_submodule(b.feed_forward.down.parameter.removesuffix(".weight")) for b in blocks]
    handles = [down.register_forward_pre_hook(silence(each)) for down, each in zip(downs, kept, strict=True)]
    try:
        return logits(module)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "llama_tied"])
def test_each_layer_has_its_ratio(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kept = tiny.make(name), []
    from secateur import cut_stage

    cut_module = cut_stage.cut_module
    monkeypatch.setattr(
        cut_stage,
        "cut_module",
        lambda m, a, cuts, heads: (kept.extend(c.kept for c in cuts.values()), cut_module(m, a, cuts, heads)),
    )
    before, pointers = logits(module), [p.data_ptr() for p in module.parameters()]
    result = secateur.compress(module, "prunenet", {"ratios": RATIOS, "multiple_of": 1, "episodes": 1})

    assert result.output is None
    assert (
        list(result.receipt["decisions"][0]["kept"]["neurons"].values())
        == [len(each) for each in kept]
        == [144, 64, 112]
    )
    torch.testing.assert_close(logits(result.model), masked(module, kept), atol=1e-5, rtol=1e-5)
    assert (logits(result.model) - before).abs().max() > 1e-3, "and something was cut"
    assert torch.equal(logits(module), before)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert outcomes.parameters(result.model) < outcomes.parameters(module)


def test_widths_that_no_config_can_say_are_not_written(model: Callable[..., Path], tmp_path: Path) -> None:
    for source in (tiny.make("bloom"), model("bloom")):
        with pytest.raises(secateur.RequestError, match="differing widths") as refusal:
            secateur.compress(source, "prunenet", {"ratios": RATIOS}, output=tmp_path / "out")
        assert "the same widths for every block" in str(refusal.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_live_module_is_written_like_its_directory(
    name: str, model: Callable[..., Path], clean: CleanProcess, tmp_path: Path
) -> None:
    module = tiny.make(name)
    options = {"evaluate": False, "clean": clean}
    secateur.compress(module, "random_units", output=tmp_path / "live", **options)
    secateur.compress(model(name), "random_units", output=tmp_path / "saved", **options)
    live, saved = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("live", "saved"))
    for (key, one), (other_key, other) in zip(live.named_parameters(), saved.named_parameters(), strict=True):
        assert key == other_key and torch.equal(one, other)
    before = outcomes.promised(tmp_path / "live")
    secateur.compress(module, "random_units", output=tmp_path / "live", **options)
    assert outcomes.promised(tmp_path / "live") == before
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1
    with pytest.raises(secateur.RequestError, match="source"):
        secateur.compress(module, "random_units", output=tmp_path / "live", **options)


def test_a_module_that_was_cut_can_be_cut_and_saved_again(tmp_path: Path) -> None:
    recipe = secateur.Recipe.parse({"steps": [{"random_units": {"ratio": 0.2}}, {"magnitude_units": {"ratio": 0.25}}]})
    module = tiny.make("llama")
    twice = secateur.compress(module, recipe=recipe).model
    assert twice.model.layers[2].mlp.up_proj.out_features == twice.config.intermediate_size == 96
    assert module.config.intermediate_size == 160
    once = secateur.compress(module, "random_units", {"ratio": 0.2}).model
    torch.testing.assert_close(logits(secateur.compress(once, "magnitude_units", {"ratio": 0.25}).model), logits(twice))
    twice.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(twice))


def test_a_module_whose_layers_differ_can_be_cut_again() -> None:
    uneven = secateur.compress(
        tiny.make("llama"), "prunenet", {"ratios": RATIOS, "multiple_of": 1, "episodes": 1}
    ).model
    again = secateur.compress(uneven, "magnitude_units", {"ratio": 0.5, "multiple_of": 1}).model
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [72, 32, 56]
    assert torch.isfinite(logits(again)).all()


def test_what_cannot_be_cut_is_refused_in_memory_too() -> None:
    with pytest.raises(secateur.RequestError, match="mamba"):
        secateur.compress(tiny.make("mamba"), "random_units")
    with pytest.raises(secateur.RequestError, match="no transformers config"):
        secateur.compress(nn.Sequential(nn.Linear(3, 3)), "random_units")
    with pytest.raises(secateur.RequestError, match="leaves none"):
        secateur.compress(tiny.make("llama"), "random_units", {"ratio": 0.999})


# Single weights.


@pytest.fixture
def learned(tmp_path: Path) -> Callable[..., secateur.Recipe]:
    """A recipe that calibrates on drawn token ids."""
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    data = {"data": str(tmp_path / "ids.json"), "samples": 5, "length": 16}
    return lambda *steps: secateur.Recipe.parse({"steps": list(steps), "calibration": data})


def zeros(module: nn.Module) -> int:
    return sum(int((parameter == 0).sum()) for parameter in module.parameters())


@pytest.mark.parametrize("step", ["wanda", "sparsegpt", "pruner_zero", {"erk": {"apply": "magnitude"}}])
def test_a_copy_is_pruned(step: Any, learned: Callable) -> None:
    module = tiny.make("llama_tied")
    module.train()
    before, pointers = deepcopy(module), [(p.data_ptr(), p.requires_grad) for p in module.parameters()]
    result = secateur.compress(module, recipe=learned(step))
    assert result.output is None and result.model is not module
    entries = result.receipt["decisions"][0]["matrices"]
    assert zeros(result.model) == sum(entry["removed"] for entry in entries.values()) == 64512
    assert result.model.training and result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert torch.isfinite(logits(result.model)).all()
    for (name, now), then in zip(module.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and now.grad is None, name
    assert [(p.data_ptr(), p.requires_grad) for p in module.parameters()] == pointers
    assert zeros(module) == 0 and module.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_of_any_dtype_is_pruned_and_written(
    dtype: torch.dtype, learned: Callable, clean: CleanProcess, tmp_path: Path
) -> None:
    module = tiny.make("llama_tied").to(dtype)
    for step in ("wanda", "sparsegpt"):
        live = secateur.compress(module, recipe=learned(step)).model
        secateur.compress(module, recipe=learned(step), output=tmp_path / step, evaluate=False, clean=clean)
        written = AutoModelForCausalLM.from_pretrained(tmp_path / step)
        assert written.lm_head.weight is written.model.embed_tokens.weight, "still tied"
        masks = secateur.read_masks(tmp_path / step)
        for (name, one), (_, other) in zip(live.named_parameters(), written.named_parameters(), strict=True):
            assert one.dtype == other.dtype == dtype and torch.equal(one, other), name
            assert name not in masks or torch.equal(one != 0, masks[name])
        stored = [key for file in (tmp_path / step).glob("*.safetensors") for key in load_file(file)]
        assert "lm_head.weight" not in stored and len(stored) == len(set(stored))


def test_a_module_that_is_cut_and_then_pruned(learned: Callable) -> None:
    result = secateur.compress(tiny.make("llama"), recipe=learned({"random_units": {"ratio": 0.4}}, "wanda"))
    assert result.model.config.intermediate_size == 96
    assert zeros(result.model) == (12 * 64 * 64 - 2 * 3 * 32 * 64 + 3 * 3 * 96 * 64) // 2
    assert [each["method"] for each in result.receipt["decisions"]] == ["random_units", "wanda"]


def test_a_module_writes_its_own_calibration_tokens(tmp_path: Path) -> None:
    """Ids need no tokenizer: what a directory without one writes is the same."""
    module = tiny.make("llama").train()
    recipe = secateur.Recipe.parse({"steps": ["wanda"], "calibration": {"samples": 3, "length": 8}, "seed": 2})
    result = secateur.compress(module, recipe=recipe)
    told = result.receipt["decisions"][0]["calibration"]
    assert told["sequences"] == 3 and told["tokens"] == 24 and "written by the model itself" in told["data"]
    assert zeros(result.model) > 0 and module.training
    module.save_pretrained(tmp_path)
    stored, other = (
        collect_samples(open_model(tmp_path), recipe.calibration, torch.Generator(), seed).sha256 for seed in (2, 3)
    )
    assert stored == told["sha256"] and other != stored


@pytest.mark.parametrize(
    "step",
    [
        {"pruner_zero": {"pattern": 0.5}},
        {"llm_pruner": {"ratio": 0.2, "multiple_of": 1}},
        {"adapt_pruner": {"overall": 0.2, "steps": 2, "multiple_of": 1}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_what_transformers_read_from_a_gguf_file(step: dict[str, Any], tmp_path: Path) -> None:
    """Such a model calls itself quantized and refuses `.float()`, although its weights are ordinary."""
    gguf_file.write(tmp_path / "small.gguf")
    module, _ = load(tmp_path / "small.gguf")
    assert module.is_quantized
    ids = torch.randint(3, 256, (9, 32), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    calibration = {"data": str(tmp_path / "ids.json"), "samples": 8, "length": 32}
    recipe = secateur.Recipe.parse({"steps": [step], "calibration": calibration})
    live = secateur.compress(module, recipe=recipe).model
    secateur.compress(tmp_path / "small.gguf", recipe=recipe, output=tmp_path / "out", evaluate=False, dtype="float32")
    trust = {"trust_remote_code": True} if "adapt_pruner" in step else {}
    assert torch.allclose(
        logits(live), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", **trust)), atol=1e-4
    )

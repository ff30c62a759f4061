"""Live modules from Python: cut in memory, or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import outcome
import secateur
import tiny
from secateur.network.source import open_model
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
    from secateur import unit_stage

    cut_module = unit_stage.cut_module
    monkeypatch.setattr(
        unit_stage,
        "cut_module",
        lambda m, a, cuts: (kept.extend(c.kept for c in cuts.values()), cut_module(m, a, cuts)),
    )
    before, pointers = logits(module), [p.data_ptr() for p in module.parameters()]
    result = secateur.compress(module, "prunenet", {"ratios": RATIOS, "multiple_of": 1, "episodes": 1})

    assert result.output is None
    assert list(result.receipt["decisions"][0]["kept"].values()) == [len(each) for each in kept] == [144, 64, 112]
    torch.testing.assert_close(logits(result.model), masked(module, kept), atol=1e-5, rtol=1e-5)
    assert (logits(result.model) - before).abs().max() > 1e-3, "and something was cut"
    assert torch.equal(logits(module), before)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert outcome.parameters(result.model) < outcome.parameters(module)


def test_widths_that_no_config_can_say_are_not_written(model: Callable[..., Path], tmp_path: Path) -> None:
    for source in (tiny.make("llama"), model("llama")):
        with pytest.raises(secateur.RequestError, match="differ between its layers") as refusal:
            secateur.compress(source, "prunenet", {"ratios": RATIOS}, output=tmp_path / "out")
        assert "one ratio for every layer" in str(refusal.value)
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
    before = outcome.promised(tmp_path / "live")
    secateur.compress(module, "random_units", output=tmp_path / "live", **options)
    assert outcome.promised(tmp_path / "live") == before
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

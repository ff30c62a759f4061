"""Channels of the residual stream: where they lie, what a cut network computes, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import command
import outcomes
import secateur
import tiny
from secateur.cuts import Cuts
from secateur.files import read_tensors
from secateur.forecast import dry_run
from secateur.network.channels import (
    channels_config,
    embedding_factor,
    find_channels,
    nearest_channels,
    norms_over,
    stored_channels,
)
from secateur.network.source import open_model
from secateur.network.store import raw_config
from secateur.network.verify import CleanProcess
from secateur.report import summary

KEPT = 48
WORDS = torch.tensor([[5, 9, 200, 31, 7, 8, 77, 140]])


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path, **given: Any) -> secateur.Recipe:
    step = {"minitron": {"axis": ["channels"], "ratio": 0.25, "multiple_of": 16, **given}}
    return secateur.Recipe.parse({"steps": [step], "calibration": {"data": str(ids), "samples": 6, "length": 16}})


def kept_of(output: Path) -> torch.Tensor:
    return read_tensors(output / "secateur/kept.safetensors")[0]["channels"]


def test_they_are_found_though_matrices_are_square() -> None:
    channels = find_channels(open_model(tiny.make("llama")))
    layer = {name.removeprefix("model.layers.1."): dims for name, dims in channels.dims.items() if ".1." in name}
    assert layer == {
        "self_attn.q_proj.weight": (1,), "self_attn.k_proj.weight": (1,), "self_attn.v_proj.weight": (1,),
        "self_attn.o_proj.weight": (0,), "mlp.gate_proj.weight": (1,), "mlp.up_proj.weight": (1,),
        "mlp.down_proj.weight": (0,), "input_layernorm.weight": (0,), "post_attention_layernorm.weight": (0,),
    }  # fmt: skip
    assert channels.dims["model.embed_tokens.weight"] == channels.dims["lm_head.weight"] == (1,)
    assert "model.norm" in channels.norms and len(channels.norms) == 2 * tiny.BLOCKS + 1


@pytest.mark.parametrize(("name", "untouched"), [("qwen3", "q_norm"), ("phi3", ""), ("mixtral", "")])
def test_norms_of_single_heads_are_no_channels(name: str, untouched: str) -> None:
    source = open_model(tiny.make(name))
    channels = find_channels(source)
    assert not untouched or not any(untouched in each for each in channels.dims)
    # whatever the layout, what has no channels is the norms of heads, and biases of units
    assert set(dict(source.skeleton.named_parameters())) - set(channels.dims) == {
        each for each in dict(source.skeleton.named_parameters()) if "q_norm" in each or "k_norm" in each
    }


def test_experts_that_are_stored_apart_lose_channels_too(model: Callable[..., Path]) -> None:
    source = open_model(model("mixtral"))
    dims = stored_channels(source, find_channels(source))
    assert {key.split(".")[-2]: found for key, found in dims.items() if "experts.2." in key} == {
        "w1": (1,), "w2": (0,), "w3": (1,)
    }  # fmt: skip


def test_the_cut_network_is_the_whole_one_with_silent_channels(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """By weights alone, another way than the reload check: a stream stretched by c = √(h/k) has a mean square over all h
    channels that is that of the k channels, epsilon and all; scales divided by c undo it.
    """
    secateur.compress(model("llama_mqa"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)
    kept = kept_of(tmp_path / "out")
    silent, c = tiny.make("llama_mqa"), (tiny.HIDDEN / KEPT) ** 0.5
    gone = [channel for channel in range(tiny.HIDDEN) if channel not in kept]
    with torch.no_grad():
        for name, parameter in silent.named_parameters():
            if "embed_tokens" in name:
                parameter[:, gone] = 0
                parameter.mul_(c)
            elif "o_proj" in name or "down_proj" in name:
                parameter[gone] = 0
                parameter.mul_(c)
            elif "norm" in name:
                parameter.div_(c)
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(result(WORDS).logits, silent(WORDS).logits, atol=1e-5, rtol=1e-4)
        assert (result(WORDS).logits - tiny.make("llama_mqa")(WORDS).logits).abs().max() > 0.1, "and not the whole one"


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])
def test_norms_over_some_channels_are_norms_of_these(name: str) -> None:
    model = tiny.make(name)
    source = open_model(model)
    channels, kept = find_channels(source), torch.arange(0, tiny.HIDDEN, 3)
    norm = model.get_submodule(channels.norms[-1])
    x = 3 + torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    silent = torch.zeros_like(x).index_copy(1, kept, x[:, kept])
    with torch.no_grad():
        if name == "phi":
            wanted = functional.layer_norm(x[:, kept], (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps)
        else:
            weight = 1 + norm.weight if name == "gemma2" else norm.weight
            eps = norm.eps if name == "gemma2" else norm.variance_epsilon
            wanted = functional.rms_norm(x[:, kept], (len(kept),), weight[kept], eps)
        with norms_over(model, channels, kept):
            torch.testing.assert_close(norm(silent)[:, kept], wanted)
        assert (norm(silent)[:, kept] - wanted).abs().max() > 0.1, "which it does not compute by itself"


def test_embeddings_that_are_scaled_by_the_number_of_channels() -> None:
    for name, wanted in (("gemma", (KEPT / tiny.HIDDEN) ** 0.5), ("llama", 1.0)):
        source = open_model(tiny.make(name))
        channels = find_channels(source)
        assert embedding_factor(source, channels, channels.narrowed(raw_config(source), KEPT)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["llama_tied", *(pytest.param(n, marks=pytest.mark.every) for n in ("gemma", "phi"))])
def test_a_live_module(name: str, ids: Path, tmp_path: Path) -> None:
    """It computes what its directory would become, with and without a cache, saved and loaded again."""
    live = tiny.make(name)
    tiny.save(name, tmp_path / "model")
    result = secateur.compress(live, recipe=recipe(ids)).model
    assert result is not None and result.config.hidden_size == KEPT and live.config.hidden_size == tiny.HIDDEN
    secateur.compress(tmp_path / "model", recipe=recipe(ids), output=tmp_path / "out", evaluate=False)
    result.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(WORDS).logits
        torch.testing.assert_close(result(WORDS).logits, wanted)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(WORDS).logits, wanted)
        first = result(WORDS[:, :4], use_cache=True)
        second = result(WORDS[:, 4:], use_cache=True, past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, wanted[:, 4:], atol=1e-4, rtol=1e-4)
    if name == "llama_tied":
        assert result.lm_head.weight is result.model.embed_tokens.weight


def test_other_precisions_and_all_axes_at_once(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    source = model("qwen3", dtype=torch.bfloat16)
    said = recipe(ids, axis=["channels", "heads", "neurons"], ratio=0.5)
    result = secateur.compress(source, recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    config = found.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim) == (
        32,
        80,
        2,
        16,
    )
    assert result.receipt["decisions"][0]["channels"] == {"kept": 32, "of": 64}
    assert any("channels 32 of 64" in line for line in summary(result.receipt))


def test_what_cannot_be_said_is_refused_before_anything_is_written(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    for name, given, what in (
        ("gpt2", {}, "cannot say fewer channels"),
        ("opt", {}, "cannot say fewer channels"),
        ("mamba", {}, "every block is understood"),
    ):
        with pytest.raises(secateur.RequestError, match=what) as refusal:
            secateur.compress(model(name), recipe=recipe(ids, **given), output=tmp_path / "out")
        assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "ratio", "multiple_of", "kept"),
    [
        ("llama", 0.2, 1, 52),  # 51 is not what four heads divide
        ("llama", 0.23, 1, 48),  # nor is 49, and 48 is nearer than 52
        ("llama", 0.22, 1, 48),  # int(49.92), as without heads
        ("llama", 0.2, 10, 60),  # of the multiples around 51.2, 50 cannot be said
        ("llama", 0.2, 25, 52),  # neither 50 nor 75 can be: 48 and 52 are as near to 50
        ("llama", 0.2, 16, 48),
        ("llama", 0.01, 1, 60),  # something goes where something was to go
        ("llama", 0.0, 7, 64),
        ("qwen3", 0.2, 1, 51),  # heads have a size of their own, so that any number can be said
    ],
)
def test_the_nearest_number_that_the_configuration_can_say(
    name: str, ratio: float, multiple_of: int, kept: int
) -> None:
    source = open_model(tiny.make(name))
    raw, channels = raw_config(source), find_channels(source)
    assert nearest_channels(source, channels, raw, ratio, multiple_of) == kept
    assert kept == tiny.HIDDEN or channels_config(source, channels, raw, kept)["hidden_size"] == kept


def test_an_exact_number_that_cannot_be_said_is_refused() -> None:
    source = open_model(tiny.make("llama"))
    with pytest.raises(secateur.RequestError, match="cannot say 51 of 64 channels .* could say 52"):
        channels_config(source, find_channels(source), raw_config(source), 51)


@pytest.mark.parametrize(
    "step",
    [
        {"minitron": {"axis": ["channels", "heads"], "ratio": 0.2, "ratios": {"heads": 0.5}, "multiple_of": 1}},
        pytest.param(
            {"magnitude_units": {"axis": "channels", "ratio": 0.2, "multiple_of": 1}}, marks=pytest.mark.every
        ),
        pytest.param({"slicegpt": {"ratio": 0.2, "multiple_of": 1}}, marks=pytest.mark.every),
    ],
)
def test_a_number_that_cannot_be_said_is_replaced_by_the_nearest(
    step: dict[str, Any], model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """The dry run, the run and its receipt agree on it, and say what was asked for."""
    said = secateur.Recipe.parse({"steps": [step], "calibration": {"data": str(ids), "samples": 6, "length": 16}})
    told = dry_run(model("llama"), recipe=said, output=tmp_path / "out")
    done = secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean).receipt
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert told["channels"] == {"kept": 52, "of": 64} and config["hidden_size"] == 52
    assert done["decisions"][0]["channels"] == {"kept": 52, "of": 64, "asked": 51}
    assert any("52 of 64, 18.8% removed (asked for 51" in line for line in summary(done))


def test_a_mistake_in_cutting_is_found_by_the_reload_check(
    model: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: CleanProcess
) -> None:
    """One scale that loses other channels than the rest."""
    right = Cuts.apply

    def wrong(self: Cuts, blocks: Any, tensors: dict[str, torch.Tensor]) -> None:
        whole = dict(tensors)
        right(self, blocks, tensors)
        for key in [key for key in tensors if "layers.1.input_layernorm" in key]:
            tensors[key] = whole[key][:KEPT].clone()

    monkeypatch.setattr(Cuts, "apply", wrong)
    with pytest.raises(secateur.RunError, match="its logits differ"):
        secateur.compress(model("llama"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_a_dry_run_tells_the_parameters_that_are_left(
    name: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    axes = ["channels", "heads", *(["neurons"] if name == "llama_tied" else [])]
    said = recipe(ids, axis=axes, ratio=0.5)
    told = dry_run(model(name), recipe=said, output=tmp_path / "out")
    secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert told["parameters_after"] == outcomes.parameters(result)
    assert told["channels"] == {"kept": 32, "of": 64}


def test_the_command_line_tells_of_channels(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(ids).plain()))
    told = command.secateur("compress", model("llama"), "--recipe", path, "--output", tmp_path / "out", "--dry-run")
    assert told.code == 0 and "channels 64 → 48" in told.out


def test_a_budget_behind_a_cut_of_channels_is_counted_there(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """Of the uncut stream each unit counts more, so that what can be reached and what cannot would be told wrongly."""
    secateur.compress(model("llama"), recipe=recipe(ids), output=tmp_path / "one", evaluate=False, clean=clean)
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "one").parameters())
    both = {
        "steps": [
            {"minitron": {"axis": ["channels"], "ratio": 0.25, "multiple_of": 16}},
            {"magnitude_units": {"target": count - 2000, "multiple_of": 1}},
        ],
        "calibration": {"data": str(ids), "samples": 6, "length": 16},
    }
    told = dry_run(model("llama"), recipe=secateur.Recipe.parse(both), output=tmp_path / "dry")
    assert told["units"] == {} and told["budgets"][-1]["asked"]["target"] == count - 2000
    parsed = secateur.Recipe.parse(both)
    secateur.compress(model("llama"), recipe=parsed, output=tmp_path / "two", evaluate=False, clean=clean)
    reached = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "two").parameters())
    assert abs(reached - (count - 2000)) <= 3 * 3 * KEPT, "a neuron of every block"


@pytest.mark.parametrize("norm", ["first", "all"])
def test_channels_of_small_numbers_go(norm: str) -> None:
    """By the embeddings alone, or by these times everything that lies behind them."""
    model = tiny.make("llama")
    embedded, behind = model.model.embed_tokens.weight.detach(), torch.zeros(tiny.HIDDEN)
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            writes = name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight"))
            rows = parameter.detach() if writes else parameter.detach().T
            behind += rows.reshape(tiny.HIDDEN, -1).square().sum(1)
    scores = embedded.norm(dim=0) * (behind.sqrt() if norm == "all" else 1)
    given = {"axis": "channels", "ratio": 0.25, "multiple_of": 16, "norm": norm}
    result = secateur.compress(model, "magnitude_units", given).model
    kept = scores.argsort(descending=True)[:KEPT].sort().values
    assert torch.equal(result.model.embed_tokens.weight, embedded[:, kept])


def test_drawn_channels_are_those_that_are_cut(model: Callable[..., Path], tmp_path: Path, clean: CleanProcess) -> None:
    """The reload check inside compares with the network whose other channels are silent."""
    given = {"axis": ["heads", "channels"], "ratio": 0.25, "multiple_of": 16}
    kept = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        said = secateur.compress(
            model("qwen3"), "random_units", given, output=output, evaluate=False, seed=seed, clean=clean
        ).receipt
        kept.append(kept_of(output).tolist())
        assert said["decisions"][0]["channels"] == {"kept": KEPT, "of": tiny.HIDDEN}
        assert json.loads((output / "config.json").read_text())["hidden_size"] == KEPT
    assert kept[0] != kept[1] and len(kept[0]) == KEPT


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("random_units", {"ratios": [0.1, 0.1, 0.1]}, "ratios does not go with them"),
        ("magnitude_units", {"of": "parameters"}, "lie across all other units"),
        ("wanda_units", {}, "only, not channels"),
    ],
)
def test_what_does_not_go_with_channels_is_refused(
    method: str, given: dict[str, Any], said: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=said):
        secateur.compress(model("llama"), method, {"axis": "channels", **given}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()

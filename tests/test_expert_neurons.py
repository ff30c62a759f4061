"""Neurons inside the experts of a mixture: each expert loses as many, and its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.forecast import dry_run
from secateur.network import expert_probe
from secateur.network.examine import anatomy
from secateur.network.parts import Part, resized
from secateur.network.recognise import ExpertsProposal
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess, prompt
from test_experts import OTHERS, SHARED

Make = Callable[..., Path]
WORDS = torch.tensor([prompt(tiny.VOCABULARY)])


def cut(
    model: Any, output: Path | None, clean: CleanProcess | None, method: str = "random_units", **parameters: Any
) -> secateur.run.Result:
    return secateur.compress(model, method, {"ratio": 0.4, **parameters}, output=output, evaluate=False, clean=clean)


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def kept(output: Path) -> dict[str, Tensor]:
    return load_file(output / "secateur/kept.safetensors")


@torch.no_grad()
def silence(model: Any, units: dict[str, Tensor]) -> None:
    """Zeroes, in a whole model, the columns that read what is gone; written here for the modules of these models."""
    for name, stays in units.items():
        part = model.model.layers[int(name.split()[1].rstrip(","))].mlp
        if name.endswith("expert_neurons"):
            for expert, own in enumerate(stays):
                gone = torch.ones(part.experts.down_proj.shape[2], dtype=torch.bool)
                gone[own] = False
                part.experts.down_proj[expert][:, gone] = 0
        else:
            layer = getattr(part, "shared_expert", part)
            gone = torch.ones(layer.down_proj.in_features, dtype=torch.bool)
            gone[stays] = False
            layer.down_proj.weight[:, gone] = 0


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(WORDS).logits


WIDTHS = {
    "mixtral": {"intermediate_size": 96},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size": 160},
    "qwen3_moe": {"moe_intermediate_size": 64, "intermediate_size": 160},
    "qwen3_moe_mixed": {"moe_intermediate_size": 64, "intermediate_size": 96},
    "olmoe": {"intermediate_size": 96},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("mixtral", "qwen2_moe") else pytest.mark.every) for n in WIDTHS]
)
def test_it_computes_what_the_whole_one_does_with_them_silent(
    name: str, model: Make, clean: CleanProcess, tmp_path: Path
) -> None:
    said = cut(model(name), tmp_path / "cut", clean).receipt
    units, dense, result = kept(tmp_path / "cut"), loaded(model(name)), loaded(tmp_path / "cut")
    own = [stays for name, stays in units.items() if name.endswith("expert_neurons")]
    assert own and not any(torch.equal(stays[0], stays[1]) for stays in own), "each expert loses its own"
    silence(dense, units)
    torch.testing.assert_close(logits(result), logits(dense), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clean.logits(tmp_path / "cut", WORDS.tolist()), logits(result), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.generate(WORDS, **options), result.generate(WORDS, use_cache=False, **options))
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert {key: config[key] for key in WIDTHS[name]} == WIDTHS[name] and "per_layer_config" not in config
    reached = said["decisions"][0]["budget"]["reached"]["parameters"]["after"]
    assert reached == sum(parameter.numel() for parameter in result.parameters())
    if name == "mixtral":
        _check_apart(model(name), tmp_path / "cut")


def _check_apart(whole: Path, output: Path) -> None:
    """Experts that are stored one by one are cut one by one."""
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (whole, output)
    )
    for name, units in kept(output).items():
        for expert, stays in enumerate(units):
            place = f"model.layers.{name.split()[1].rstrip(',')}.block_sparse_moe.experts.{expert}"
            for matrix, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
                key = f"{place}.{matrix}.weight"
                assert torch.equal(after[key], before[key].index_select(dim, stays)), key
    assert set(before) == set(after)


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(n, marks=pytest.mark.every) for n in ("deepseek_v3", "llama4_text"))]
)
def test_other_layouts(name: str, clean: CleanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up one by one in turn, with biases; shared experts as wide as the entry of the others says; transposed."""
    kind, settings = OTHERS[name]
    if "layer_types" in settings:
        settings = {**settings, "layer_types": settings["layer_types"][: tiny.BLOCKS]}
    monkeypatch.setitem(tiny.ARCHITECTURES, name, tiny._config(kind, **{**SHARED, **settings}))
    model = tiny.make(name)
    model.save_pretrained(tmp_path / "whole")
    # the check inside the run compares with the uncut network; nothing is asked of this test but to get through it
    said = cut(tmp_path / "whole", tmp_path / "cut", clean).receipt
    assert said["reload_check"]["largest_difference"] <= 1e-5 and not said.get("code")
    widths = said["decisions"][0]["units"]
    assert {entry["kept"] for entry in widths["expert_neurons"].values()} == {64 if name == "deepseek_v3" else 96}
    live = cut(model, None, None).model
    torch.testing.assert_close(logits(live), logits(loaded(tmp_path / "cut")), atol=1e-5, rtol=1e-5)


def test_where_they_lie_is_seen_by_trying() -> None:
    def parts(name: str, settings: dict[str, Any] | None = None) -> list[tuple[str, int, int, int]]:
        kind, own = OTHERS.get(name, ("", {}))
        config = tiny._config(kind, **{**SHARED, **own, **(settings or {})}) if kind else tiny.ARCHITECTURES[name]
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config())
        block = next(block for block in anatomy(whole).blocks if block.experts)
        assert block.experts and block.experts.neurons
        slices = block.experts.neurons.slices
        return [(part.parameter.rpartition(".")[2], part.dim, part.offset, part.width) for part in slices]

    halves = [("gate_up_proj", 1, 0, 1), ("gate_up_proj", 1, 96, 1), ("down_proj", 2, 0, 1)]
    assert parts("qwen3_moe") == halves
    layers = {"layer_types": ["full_attention"] * 3}
    assert parts("gpt_oss", layers) == [
        ("gate_up_proj", 2, 0, 2), ("gate_up_proj_bias", 1, 0, 2), ("down_proj", 1, 0, 1)
    ]  # fmt: skip
    # a matrix with as many outputs as inputs could be meant either way round
    square = [("gate_up_proj", 2, 0, 1), ("gate_up_proj", 2, 32, 1), ("down_proj", 1, 0, 1)]
    assert parts("llama4_text", {"intermediate_size": tiny.HIDDEN // 2}) == square


class _Bank(nn.Module):
    """Experts whose neurons are mixed, or not."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(4, 24, 16)), nn.Parameter(torch.zeros(4, 16, 24))
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("td,md->tm", x, self.first[0])).square()
        inner = inner / inner.sum(-1, keepdim=True) if self.mixed else inner
        return inner @ self.second[0].T


def test_neurons_that_are_mixed_are_none() -> None:
    found, call = ExpertsProposal("", 4, 24, None), ((torch.zeros(12, 16),), {})
    plain = expert_probe.try_bank(_Bank(False), found, 16, call)
    assert isinstance(plain, expert_probe.BankLayout) and [part.name for part in plain.inputs] == ["first"]
    assert expert_probe.try_bank(_Bank(True), found, 16, call) == "cutting a neuron changes what the other neurons give"


def test_shares_of_stored_tensors_stay_equal() -> None:
    gate, up = (Part(key, (0, slice(at, at + 6), slice(0, 4))) for key, at in (("gate", 0), ("up", 6)))
    assert [part.region[1] for part in resized([gate, up], (1, 8, 4))] == [slice(0, 4), slice(4, 8)]
    uneven = [gate, Part("up", (0, slice(6, 8), slice(0, 4)))]
    assert resized(uneven, (1, 4, 4)) == uneven


def test_each_expert_is_judged_by_its_own_tokens(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    """Wanda's scores against a loop over experts with plain matrices, on what their bank is given in the whole model."""
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    wishes = {"data": str(tmp_path / "ids.json"), "samples": 6, "length": 16, "held_out": 0, "inputs": "dense"}
    recipe = secateur.Recipe.parse({"steps": [{"wanda_units": {"ratio": 0.4}}], "calibration": wishes})
    secateur.compress(model("mixtral"), recipe=recipe, output=tmp_path / "cut", evaluate=False, clean=clean)
    dense, given = loaded(model("mixtral")), []
    bank = dense.model.layers[1].mlp.experts
    bank.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        dense(drawn)
    [(hidden, chosen, _)] = given
    for expert, stays in enumerate(kept(tmp_path / "cut")["block 1, expert_neurons"]):
        tokens = hidden[(chosen == expert).any(1)]
        first, second = (tokens @ bank.gate_up_proj[expert].T).chunk(2, dim=1)
        inner = (bank.act_fn(first) * second).detach()
        scores = inner.square().mean(0) * bank.down_proj[expert].detach().square().sum(0)
        assert torch.equal(stays, scores.argsort(descending=True)[:96].sort().values)


def test_an_expert_that_no_token_reached_is_judged_by_weights(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([[5, 5]]))
    wishes = {"data": str(tmp_path / "ids.json"), "samples": 1, "length": 2, "skip": 0, "held_out": 0}
    recipe = secateur.Recipe.parse({"steps": [{"liar": {"ratio": 0.4}}], "calibration": wishes})
    said = secateur.compress(
        model("mixtral"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean
    ).receipt
    assert any("reached by no calibration token" in each for each in said["decisions"][0]["warnings"])
    told = said["decisions"][0]["units"]["expert_neurons"]["0"]["by_expert"]
    unseen = [int(expert) for expert, entry in told.items() if entry.get("unseen")]
    assert len(unseen) == 2, "a token goes to two experts of four, and both are the same one"
    bank, result = (loaded(folder).model.layers[0].mlp.experts for folder in (model("mixtral"), tmp_path / "out"))
    for expert in unseen:
        gate, up = bank.gate_up_proj[expert].chunk(2)
        norms = gate.norm(dim=1) * up.norm(dim=1) * bank.down_proj[expert].norm(dim=0)
        stays = norms.argsort(descending=True)[:96].sort().values
        assert torch.equal(result.down_proj[expert], bank.down_proj[expert][:, stays])


def test_widths_that_differ_between_blocks(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    said = cut(model("qwen3_moe_mixed"), tmp_path / "cut", clean, ratios=[0.4, 0.2, 0.0]).receipt
    assert said["code"] == ["modeling_heterogeneous.py"]
    result, dense = loaded(tmp_path / "cut"), loaded(model("qwen3_moe_mixed"))
    assert [result.model.layers[i].mlp.experts.down_proj.shape[2] for i in (0, 2)] == [64, 96]
    silence(dense, kept(tmp_path / "cut"))
    torch.testing.assert_close(logits(result), logits(dense), atol=1e-5, rtol=1e-5)
    there = clean.logits(tmp_path / "cut", WORDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(result), atol=1e-5, rtol=1e-5)
    # and once more, from blocks that differ to such that do not
    again = cut(tmp_path / "cut", tmp_path / "again", clean, axis="expert_neurons", ratios=[0.0, 0.35]).receipt
    assert {entry["kept"] for entry in again["decisions"][0]["units"]["expert_neurons"].values()} == {64}


@pytest.mark.parametrize(
    ("name", "method", "parameters", "said"),
    [
        ("mixtral", "prunenet", {}, "cuts no neurons inside experts"),
        ("qwen2_moe", "bonsai", {}, "cuts no neurons inside experts"),
        ("mixtral", "liar", {"by": "llm_pruner"}, "cuts no neurons inside experts"),
        ("mixtral", "random_units", {"axis": ["neurons", "experts"]}, "make two of it"),
        ("llama", "random_units", {"axis": "expert_neurons"}, "no block of .* holds a mixture"),
        ("mixtral", "random_units", {"ratio": 0.97}, "multiples of 8"),
        ("mixtral", "wanda_units", {"allocation": "equal_error"}, "not known of neurons inside experts"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, method: str, parameters: dict, said: str, model: Make, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=said):
        cut(model(name), tmp_path / "out", None, method, **parameters)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_them_and_what_it_tells_is_met(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    recipe = secateur.Recipe.parse({"steps": [{"magnitude_units": {"ratio": 0.3, "of": "parameters"}}]})
    said = dry_run(model("qwen2_moe"), recipe=recipe, output=tmp_path / "out")
    assert set(said["units"]) == {"neurons", "expert_neurons"}
    network = open_model(model("qwen2_moe")).anatomy
    assert said["parameters_after"] == pytest.approx(0.7 * network.parameters, rel=0.05)
    found = secateur.compress(
        model("qwen2_moe"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean
    ).receipt
    assert found["decisions"][0]["budget"]["reached"]["parameters"]["after"] == said["parameters_after"]


@pytest.mark.every
@pytest.mark.parametrize("allocation", ["flap_search", "alphapruning"])
def test_a_budget_is_divided_among_blocks(allocation: str, model: Make, tmp_path: Path) -> None:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    parameters = {"ratio": 0.3, "multiple_of": 8, "allocation": allocation}
    wishes = {"data": str(tmp_path / "ids.json"), "samples": 6, "length": 16, "held_out": 0}
    recipe = secateur.Recipe.parse({"steps": [{"wanda_units": parameters}], "calibration": wishes})
    said = secateur.compress(model("mixtral"), recipe=recipe, output=tmp_path / "out", evaluate=False).receipt
    widths = [entry["kept"] for entry in said["decisions"][0]["units"]["expert_neurons"].values()]
    assert sum(widths) == 3 * 112 and all(width % 8 == 0 for width in widths)

"""Experts that go with their router rows, and what they are chosen by."""

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
from secateur.calibration.routing import ExpertSums, RoutingPass, routed_sums
from secateur.calibration.samples import Samples
from secateur.methods.structure.reap import saliency
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess, prompt
from test_experts import OTHERS, SHARED

Make = Callable[..., Path]
WORDS = torch.tensor([prompt(tiny.VOCABULARY)])


def cut(model: Any, output: Path | None, method: str = "random_units", **parameters: Any) -> secateur.run.Result:
    parameters = {"axis": "experts", "ratio": 0.25, **parameters} if method != "reap" else parameters
    return secateur.compress(model, method, parameters, output=output, evaluate=False)


def kept(output: Path) -> dict[int, Tensor]:
    found = load_file(output / "secateur/kept.safetensors")
    return {int(name.split()[1].rstrip(",")): units for name, units in found.items() if name.endswith("experts")}


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def route_around(model: Any, keep: dict[int, Tensor]) -> None:
    """Replaces the routers of a dense model by others, written here, that only know the experts kept."""

    def router(gate: nn.Module, normalise: bool, units: Tensor) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> Any:
            logits = hidden.reshape(-1, tiny.HIDDEN) @ gate.weight[units].T
            gates, places = logits.softmax(dim=-1).topk(gate.top_k)
            return logits, gates / gates.sum(dim=-1, keepdim=True) if normalise else gates, units[places]

        return forward

    for index, units in keep.items():
        gate = model.model.layers[index].mlp.gate
        gate.forward = router(gate, getattr(gate, "norm_topk_prob", True), units)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(WORDS).logits


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe_mixed", marks=pytest.mark.every), "olmoe"])
def test_it_computes_what_a_router_without_them_does(
    name: str, model: Make, clean: CleanProcess, tmp_path: Path
) -> None:
    cut(model(name), tmp_path / "cut")
    dense, result = loaded(model(name)), loaded(tmp_path / "cut")
    route_around(dense, kept(tmp_path / "cut"))
    torch.testing.assert_close(logits(result), logits(dense), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clean.logits(tmp_path / "cut", WORDS.tolist()), logits(result), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.generate(WORDS, **options), result.generate(WORDS, use_cache=False, **options))
    assert result.config.num_experts_per_tok == 2 and result.config.num_local_experts == 3


def test_those_stored_apart_take_the_names_of_the_first(model: Make, tmp_path: Path) -> None:
    cut(model("mixtral"), tmp_path / "cut")
    before, after = stored(model("mixtral")), stored(tmp_path / "cut")
    units = kept(tmp_path / "cut")
    assert any(units[index].tolist() != [0, 1, 2] for index in units), "the numbers do move"
    place = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    for index, which in units.items():
        for new, old in enumerate(which.tolist()):
            for matrix in ("w1", "w2", "w3"):
                assert torch.equal(after[place.format(index, new, matrix)], before[place.format(index, old, matrix)])
        router = f"model.layers.{index}.block_sparse_moe.gate.weight"
        assert torch.equal(after[router], before[router][which])
    assert len(before) - len(after) == 3 * len(units), "the names of the last are gone"


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4_text"])
def test_biases_and_learned_buffers_go_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = OTHERS[name]
    if "layer_types" in settings:
        settings = {**settings, "layer_types": settings["layer_types"][: tiny.BLOCKS]}
    monkeypatch.setitem(tiny.ARCHITECTURES, name, tiny._config(kind, **{**SHARED, **settings}))
    model = tiny.make(name)
    learned = [n for n, _ in model.named_buffers() if n.endswith("correction_bias")]
    for buffer in learned:  # positive, so that an expert with a score of nothing would be chosen by it
        model.get_buffer(buffer).copy_(torch.rand(4) + 1)
    model.save_pretrained(tmp_path / "whole")
    # the check inside the run compares with the uncut network; nothing is asked of this test but to get through it
    said = cut(tmp_path / "whole", tmp_path / "cut").receipt
    assert said["reload_check"]["largest_difference"] <= 1e-5
    assert bool(learned) == (name == "deepseek_v3")
    for buffer in learned:
        units = kept(tmp_path / "cut")[int(buffer.split(".")[2])]
        assert torch.equal(loaded(tmp_path / "cut").get_buffer(buffer), model.get_buffer(buffer)[units])
    live = cut(model, None).model
    torch.testing.assert_close(logits(live), logits(loaded(tmp_path / "cut")), atol=1e-5, rtol=1e-5)


def test_the_reload_check_needs_the_routers_to_be_told(model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("secateur.network.routing._LOWEST", 0.0)
    with pytest.raises(secateur.RunError, match="logits differ"):
        cut(model("mixtral"), tmp_path / "cut")


@pytest.mark.every
def test_numbers_that_differ_between_blocks(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    said = cut(model("mixtral"), tmp_path / "cut", ratios=[0.25, 0.5, 0.0]).receipt
    assert said["code"] == ["modeling_heterogeneous.py"]
    result, dense = loaded(tmp_path / "cut"), loaded(model("mixtral"))
    assert [len(layer.mlp.gate.weight) for layer in result.model.layers] == [3, 2, 4]
    route_around(dense, kept(tmp_path / "cut"))
    torch.testing.assert_close(logits(result), logits(dense), atol=1e-5, rtol=1e-5)
    there = clean.logits(tmp_path / "cut", WORDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(result), atol=1e-5, rtol=1e-5)
    # and once more, from blocks that differ to such that do not
    again = cut(tmp_path / "cut", tmp_path / "again", ratios=[0.3, 0.0, 0.5]).receipt
    assert {entry["kept"] for entry in again["decisions"][0]["units"]["experts"].values()} == {2}


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("mixtral", {"ratio": 0.6}, "each token goes to 2 of them"),
        ("llama", {}, "no block of .* holds a mixture"),
        ("mixtral", {"ratios": [0.25]}, "ratios has 1 values"),
    ],
)
def test_what_cannot_be_is_refused(name: str, parameters: dict, said: str, model: Make, tmp_path: Path) -> None:
    for method in ("random_units", "reap"):
        with pytest.raises(secateur.RequestError, match=said):
            cut(model(name), tmp_path / "out", method, **parameters)
    assert not (tmp_path / "out").exists()


def test_methods_that_solve_for_columns_take_no_experts(model: Make, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match="only, not experts"):
        cut(model("mixtral"), tmp_path / "out", "wanda_units")


@pytest.mark.parametrize("norm", ["first", "all"])
def test_the_smallest_expert_goes(norm: str) -> None:
    model = tiny.make("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 0.01
    found = cut(model, None, "magnitude_units", norm=norm).model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(found, model.model.layers[1].mlp.experts.down_proj[[0, 1, 3]])


def test_sums_of_what_is_routed() -> None:
    chosen, gates = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    sums = ExpertSums(*torch.tensor(routed_sums(chosen, gates, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), 4)).view(4, 4))
    assert sums.tokens.tolist() == [1, 1, 2, 0]
    assert sums.gates.tolist() == [0.75, 0.5, 0.75, 0]
    assert sums.norms.tolist() == [1, 8, 6, 0]
    assert sums.gated_norms.tolist() == [0.75, 4, 2.5, 0]
    assert saliency(sums, "reap").tolist() == [0.75, 4, 1.25, 0]
    assert saliency(sums, "ean_mean").tolist() == [1, 8, 3, 0]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", pytest.param("qwen3_moe_mixed", marks=pytest.mark.every)])
def test_routing_is_what_experts_compute_one_by_one(name: str, model: Make, tmp_path: Path) -> None:
    """Against a loop over experts with plain matrices, on what their bank is given in the whole model."""
    drawn = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, tiny.VOCABULARY, (12,), generator=drawn) for _ in range(3)]
    source = open_model(model(name))
    tokens = RoutingPass(source, Samples(ids, [], "drawn"), tmp_path, torch.float32)
    tokens.run()
    found, dense = tokens.routing().blocks, loaded(model(name))
    assert set(found) == {block.index for block in source.anatomy.blocks if block.experts}
    for index, sums in found.items():
        bank = dense.model.layers[index].mlp.experts
        given: list[Any] = []
        handle = bank.register_forward_pre_hook(lambda _, args, given=given: given.append(args))
        with torch.no_grad():
            for each in ids:
                dense(each[None])
        handle.remove()
        wanted = torch.zeros(4, 4, dtype=torch.float64)
        for hidden, chosen, gates in given:
            for token, choice in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
                expert, gate = int(chosen[token, choice]), float(gates[token, choice].detach())
                first, second = (bank.gate_up_proj[expert] @ hidden[token]).chunk(2)
                norm = float((bank.down_proj[expert] @ (bank.act_fn(first) * second)).norm().detach())
                wanted[:, expert] += torch.tensor([1, gate, norm, gate * norm])
        torch.testing.assert_close(
            torch.stack([sums.tokens, sums.gates, sums.norms, sums.gated_norms]), wanted, atol=1e-4, rtol=1e-4
        )


def test_an_expert_that_gives_nothing_goes_first(tmp_path: Path) -> None:
    model = tiny.make("mixtral")
    with torch.no_grad():
        for index, silent in enumerate((3, 0, 2)):
            model.model.layers[index].mlp.experts.down_proj[silent] = 0
    (tmp_path / "ids.json").write_text(json.dumps([[*range(3, 19)], [*range(100, 116)]]))
    steps = {"steps": [{"reap": {}}], "calibration": {"data": str(tmp_path / "ids.json"), "samples": 2, "length": 16}}
    result = secateur.compress(model, recipe=secateur.Recipe.parse(steps))
    for index, silent in enumerate((3, 0, 2)):
        others = [expert for expert in range(4) if expert != silent]
        here, there = (each.model.layers[index].mlp for each in (result.model, model))
        assert torch.equal(here.gate.weight, there.gate.weight[others])


def test_experts_that_no_token_reached_are_told(model: Make, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6]]))
    steps = {"steps": [{"reap": {}}], "calibration": {"data": str(tmp_path / "ids.json"), "samples": 1, "length": 2}}
    said = secateur.compress(
        model("mixtral"), recipe=secateur.Recipe.parse(steps), output=tmp_path / "out", evaluate=False
    ).receipt
    assert "reached by no calibration token" in said["decisions"][0]["warnings"][0]

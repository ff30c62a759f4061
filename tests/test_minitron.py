"""Minitron: its scores by hand, what is kept, residuals of heads, shapes within a budget."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import outcomes
import secateur
import tiny
from secateur.calibration.activations import ActivationPass, Activations, aggregated
from secateur.calibration.samples import Samples
from secateur.checks import check_steps
from secateur.files import read_tensors
from secateur.methods.structure.minitron import candidates, kept_share
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess
from secateur.network.views import Network
from secateur.report import asked_line
from secateur.tensor.head_residuals import residual_partners
from secateur.unit_budgets import asked_for

COUNT, LENGTH, SKIP = 6, 16, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path, **given: Any) -> secateur.Recipe:
    calibration = {"data": str(ids), "samples": COUNT, "length": LENGTH, "order": "first"}
    return secateur.Recipe.parse({"steps": [{"minitron": {"multiple_of": 16, **given}}], "calibration": calibration})


def kept(output: Path) -> dict[str, list[int]]:
    return {name: tensor.tolist() for name, tensor in read_tensors(output / "secateur/kept.safetensors")[0].items()}


def collected(name: str, ids: Path, folder: Path) -> Activations:
    sequences = list(torch.tensor(json.loads(ids.read_text())))
    tokens = ActivationPass(
        open_model(tiny.make(name)), Samples(sequences, [], "ids"), folder, torch.float32, skip=SKIP
    )
    tokens.run()
    return tokens.activations()


def caught(model: torch.nn.Module, path: str, ids: Path, given: bool) -> Tensor:
    """(sequences, tokens, columns) what a module is given, or gives, without the first tokens."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, args, output: found.append(args[0] if given else output)
    )
    with torch.no_grad():
        model(torch.tensor(json.loads(ids.read_text())), use_cache=False)
    hook.remove()
    return found[0].reshape(COUNT, LENGTH, -1)[:, SKIP:]


def loop(values: Tensor, sequence: str, batch: str) -> list[float]:
    """Aggregated unit by unit, sequence by sequence."""
    scores = []
    for unit in range(values.shape[-1]):
        each = []
        for row in values[..., unit].abs().tolist():
            each.append(sum(row) / len(row) if sequence == "mean" else sum(x * x for x in row) ** 0.5)
        scores.append(sum(each) / len(each) if batch == "mean" else sum(x * x for x in each) ** 0.5)
    return scores


@pytest.mark.parametrize(("sequence", "batch"), list(product(["mean", "l2"], ["mean", "l2"])))
def test_scores_are_those_of_a_loop(sequence: Any, batch: Any, ids: Path, tmp_path: Path) -> None:
    seen, model = collected("llama", ids, tmp_path), tiny.make("llama")
    layer = "model.layers.1."
    given = caught(model, layer + "mlp.down_proj", ids, given=True)
    made = caught(model, layer + "mlp.gate_proj", ids, given=False)
    heads = caught(model, layer + "self_attn.o_proj", ids, given=True)
    norms = heads.unflatten(-1, (tiny.HEADS, -1)).norm(dim=-1)
    group = norms.unflatten(-1, (tiny.KV_HEADS, -1)).sum(dim=-1)
    normed = sum(
        caught(model, layer + norm, ids, given=False).abs() for norm in ("input_layernorm", "post_attention_layernorm")
    )
    wanted = {"neurons": given, "products": made, "heads": group, "channels": normed}
    for response, values in wanted.items():
        found = seen.of(1, response, sequence, batch)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(loop(values, sequence, batch), rel=1e-5), response


@pytest.mark.parametrize("name", ["phi3", "opt", "gpt2"])
def test_whatever_the_layout(name: str, ids: Path, tmp_path: Path) -> None:
    """Fused, transposed, or given all tokens in one row."""
    seen, model = collected(name, ids, tmp_path), tiny.make(name)
    path, width = {
        "phi3": ("model.layers.0.mlp.gate_up_proj", tiny.UNITS),
        "opt": ("model.decoder.layers.0.fc1", tiny.UNITS),
        "gpt2": ("transformer.h.0.mlp.c_fc", tiny.UNITS),
    }[name]
    made = caught(model, path, ids, given=False)[..., :width]
    assert seen.of(0, "products").tolist() == pytest.approx(loop(made, "mean", "l2"), rel=1e-5)


def test_aggregates_of_known_numbers() -> None:
    found = aggregated(torch.tensor([[[3.0], [-4.0]], [[0.0], [2.0]]]))
    assert found["mean"].tolist() == [[3.5 + 1], [3.5**2 + 1]]
    assert found["l2"].tolist() == [[5 + 2], [25 + 4]]


def test_the_best_by_the_scores_stay(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    seen = collected("llama_mha", ids, tmp_path)
    given = {"axis": ["neurons", "heads", "channels"], "ratio": 0.5, "ratios": {"neurons": 0.2}}
    said = recipe(ids, **given)
    secateur.compress(model("llama_mha"), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    found = kept(tmp_path / "out")

    def best(scores: Tensor, count: int) -> list[int]:
        return sorted(sorted(range(len(scores)), key=lambda place: (-float(scores[place]), place))[:count])

    for block in range(tiny.BLOCKS):
        assert found[f"block {block}, neurons"] == best(seen.of(block, "neurons"), 128)
        assert found[f"block {block}, heads"] == best(seen.of(block, "heads"), 2)
    total = sum(seen.of(block, "channels") for block in range(tiny.BLOCKS))
    assert isinstance(total, Tensor)
    assert found["channels"] == best(total, 32) != list(range(32))


def test_permuting_neurons_and_trimming_commute(ids: Path) -> None:
    whole, permuted = tiny.make("llama"), tiny.make("llama")
    order = torch.randperm(tiny.UNITS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in permuted.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight[order].clone())
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
        words = torch.tensor([[5, 9, 200, 31, 7]])
        one, other = (secateur.compress(each, recipe=recipe(ids, ratio=0.5)).model for each in (whole, permuted))
        assert one is not None and other is not None
        torch.testing.assert_close(one(words).logits, other(words).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("count", "keep"), [(4, 3), (6, 3), (5, 4), (6, 2), (3, 3)])
def test_partners_are_those_of_the_paper(count: int, keep: int) -> None:
    """head_i takes over from head_{2K−i+1}, numbered from 1 in the order of the scores, where that is one that goes."""
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count))
    order = scores.argsort(descending=True).tolist()
    stays, partners = residual_partners(scores, keep)
    wanted = {order[i - 1]: order[i - 1] for i in range(1, keep + 1)}
    for i in range(1, keep + 1):
        if keep < 2 * keep - i + 1 <= count:
            wanted[order[i - 1]] = order[2 * keep - i]
    assert dict(zip(stays.tolist(), partners.tolist(), strict=True)) == wanted
    assert sum(a != b for a, b in wanted.items()) == min(count - keep, keep)


@pytest.mark.parametrize("name", ["llama_mha", "qwen2", "phi3"])
def test_residuals_of_heads_are_added(
    name: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """To queries, keys and values; where heads share keys and values, to queries alone. The reload check has passed."""
    said = recipe(ids, axis="heads", ratio=0.5, residuals=True)
    secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    before, after = tiny.make(name), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    seen = collected(name, ids, tmp_path / "again")
    group = open_model(before).anatomy.blocks[1].group("heads")
    assert group is not None
    stays, partners = residual_partners(seen.of(1, "heads"), group.count // 2)
    # by hand, for each matrix: (rows of one unit, whether it takes over residuals)
    size, layer = tiny.HIDDEN // tiny.HEADS, "model.layers.1.self_attn."
    queries = size if name == "llama_mha" else 2 * size
    if name == "phi3":
        parts = [("qkv_proj", 0, queries, True), ("qkv_proj", 64, size, False), ("qkv_proj", 96, size, False)]
    else:
        shared = name == "llama_mha"
        parts = [("q_proj", 0, queries, True), ("k_proj", 0, size, shared), ("v_proj", 0, size, shared)]
    rows: dict[str, list[Tensor]] = {}
    for part, offset, width, mixed in parts:
        for kind in ("weight", "bias") if name == "qwen2" else ("weight",):
            old = before.get_parameter(f"{layer}{part}.{kind}").detach()[offset:]
            for unit, partner in zip(stays.tolist(), partners.tolist(), strict=True):
                own, other = (old[n * width : (n + 1) * width] for n in (unit, partner))
                assert unit != partner
                rows.setdefault(f"{layer}{part}.{kind}", []).append(own + (own - other) if mixed else own)
    for each, found in rows.items():
        torch.testing.assert_close(after.get_parameter(each).detach(), torch.cat(found))


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "phi3", "gpt2"])
def test_parameters_of_other_shapes_are_counted(name: str) -> None:
    source = open_model(tiny.make(name))
    whole = Network(source, axes=["heads", "neurons"]).counter(name != "gpt2")
    assert whole.count({}) == source.anatomy.parameters
    config = tiny.ARCHITECTURES[name]()
    if name == "gpt2":
        widths, config.n_inner = {"neurons": 96}, 96
    else:
        widths = {"neurons": 96, "heads": 1, "channels": 48}
        config.update({"intermediate_size": 96, "hidden_size": 48, "head_dim": 16})
        config.update({"num_attention_heads": 2, "num_key_value_heads": 1})
    assert whole.count(widths) == outcomes.parameters(AutoModelForCausalLM.from_config(config))  # type: ignore[arg-type]


def test_a_shape_within_the_budget_is_chosen(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    dense = outcomes.parameters(tiny.make("llama"))
    said = recipe(ids, axis=["neurons", "channels"], target=0.7)
    result = secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    found = outcomes.parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert 0.95 * 0.7 * dense <= found <= 0.7 * dense
    shapes = result.receipt["decisions"][0]["notes"]["shapes"]
    assert found in [each["parameters"] for each in shapes["candidates"]] and len(shapes["candidates"]) > 1
    best = max((e for e in shapes["candidates"] if e["parameters"] <= 0.7 * dense), key=lambda e: e["scores kept"])
    assert found == best["parameters"]
    same = recipe(ids, axis=["neurons", "channels"], target=int(0.7 * dense))
    again = secateur.compress(tiny.make("llama"), recipe=same).receipt["decisions"][0]["kept"]
    assert again["channels"] == shapes["chosen"]["channels"], "a number is another way to say the fraction"


def test_a_budget_that_no_shape_has(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match="no shape with half of the neurons or more has about") as refusal:
        secateur.compress(model("llama"), recipe=recipe(ids, target=0.1), output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


def test_candidates_and_what_they_keep() -> None:
    shapes = candidates({"heads": 4, "neurons": 96}, 32)
    assert {(s["heads"], s["neurons"]) for s in shapes} == set(product([2, 3, 4], [64, 96]))
    scores = {"heads": [torch.tensor([1.0, 3.0])], "neurons": [torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0])]}
    assert kept_share(scores, {"heads": 1, "neurons": 1}) == pytest.approx(0.75 * (0.5 + 1) / 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"axis": []}, {"axis": "layers"}, {"ratios": {"blocks": 0.1}}, {"target": 0}])
def test_wrong_wishes(given: dict[str, Any]) -> None:
    with pytest.raises(secateur.RequestError):
        secateur.Recipe.parse({"steps": [{"minitron": given}]})


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"residuals": True}, "residuals are those of heads"),
        ({"ratios": {"channels": 0.5}}, "which `axis` does not"),
        ({"ratios": {"neurons": 0.5}, "target": 0.8}, "either ratios or a target"),
    ],
)
def test_what_contradicts_is_refused_before_anything_is_read(given: dict, what: str, model: Any) -> None:
    recipe = secateur.Recipe.parse({"steps": [{"minitron": given}]})
    with pytest.raises(secateur.RequestError, match=what):
        check_steps(open_model(model("llama")), recipe.steps)


def test_targets_are_shares_or_counts_as_people_write_them() -> None:
    def read(target: Any) -> tuple[float, str]:
        step = secateur.Recipe.parse({"steps": [{"minitron": {"target": target}}]}).steps[0]
        return step.parameters["target"], asked_line(asked_for(step))

    assert read(0.6) == (0.6, "asked for 0.6 of the parameters")
    assert read("150k")[0] == read(150_000)[0] == 150_000
    for wrong in ("many", -1, 0, 0.0):
        with pytest.raises(secateur.RequestError, match="target"):
            read(wrong)

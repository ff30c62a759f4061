"""Methods that choose units on calibration tokens: scores by hand, what is counted, what a live module becomes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
import tiny
from secateur.network.examine import anatomy
from secateur.network.source import open_model
from secateur.network.widths import round_width

LENGTH, SKIP = 16, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(
    method: str, ids: Path, axis: str, calibration: dict[str, Any] | None = None, **given: Any
) -> secateur.Recipe:
    said = {"data": str(ids), "samples": 6, "length": LENGTH, "order": "first", "held_out": 0, **(calibration or {})}
    step = {method: {"ratio": 0.5, "axis": axis, "multiple_of": 1, **given}}
    return secateur.Recipe.parse({"steps": [step], "calibration": said})


def inputs_of(model: nn.Module, name: str, ids: Path, skip: int = SKIP) -> Tensor:
    """(t, d) what a matrix is given, without the first tokens of each sequence."""
    caught: list[Tensor] = []
    tokens = torch.tensor(json.loads(ids.read_text()))
    module = model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, given: caught.append(given[0].detach()))
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    return caught[0].reshape(*tokens.shape, -1)[:, skip:].flatten(0, 1)


def kept(result: secateur.Result, output: Path, axis: str, block: int) -> list[int]:
    from secateur.files import read_tensors

    assert result.output is not None
    return read_tensors(output / "secateur" / "kept.safetensors")[0][f"block {block}, {axis}"].tolist()


def scores(method: str, axis: str, inputs: Tensor, output: Tensor, head_dim: int, width: int) -> Tensor:
    """By the formulas of the cards, unit by unit."""
    found = []
    for unit in range(inputs.shape[1] // width):
        mine = slice(unit * width, (unit + 1) * width)
        x, w = inputs[:, mine], output[:, mine]
        if method == "wanda_units":
            found.append((w.square().sum(0) * x.square().mean(0)).sum())
        elif method == "flap":
            found.append((w.square().sum(0) * x.var(0, unbiased=False)).sum())
        elif axis == "neurons":
            found.append(x.square().sum().sqrt())
        else:
            sizes = x.square().sum(0).sqrt().view(-1, head_dim)
            found.append((sizes.mean(1) + 10 / head_dim * sizes.amax(1)).mean())
    return torch.stack(found)


@pytest.mark.parametrize("axis", ["neurons", pytest.param("heads", marks=pytest.mark.every)])
@pytest.mark.parametrize("method", ["wanda_units", "flap", "transact"])
def test_the_best_by_hand_are_kept(
    method: str, axis: str, model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    """In the first block inputs are those of the dense network, the first tokens of a sequence left out."""
    name = "llama" if axis == "neurons" else "llama_mha"
    result = secateur.compress(model(name), recipe=recipe(method, ids, axis), output=tmp_path / "out", evaluate=False)
    live = tiny.make(name)
    block = anatomy(live).blocks[0]
    group = block.group(axis)  # type: ignore[arg-type]
    assert group is not None and block.attention is not None
    name, width = group.output.parameter, group.output.width
    inputs = inputs_of(live, name, ids)
    by_hand = scores(method, axis, inputs, live.get_parameter(name).detach(), block.attention.head_dim, width)
    wanted = by_hand.argsort(descending=True, stable=True)[: group.count // 2].sort().values.tolist()
    assert kept(result, tmp_path / "out", axis, 0) == wanted
    notes = result.receipt["decisions"][0]["units"][axis]["0"].get("notes", {})
    assert ("removed mean" in notes) == (method == "flap"), "which no bias of Llama's takes over"
    assert wanted != list(range(len(wanted))), "which a method that keeps the first would not find"


@pytest.mark.parametrize(("count", "target"), [(160, 112), (1536, 1000), (9, 4), (11008, 3072)])
def test_the_shots_of_transact_are_ratios_of_steps(count: int, target: int) -> None:
    now = count
    for remaining in range(8, 0, -1):
        after = now - (now - target) // remaining
        assert round_width(now, 1 - after / now, 1) == after
        now = after
    assert now == target


def test_tokens_at_the_beginning_count_when_asked_for(model: Callable[..., Path], ids: Path) -> None:
    found = {}
    for skip in (None, 0, 4):
        said = recipe("unit_surgeon", ids, "neurons", {"skip": skip})
        result = secateur.compress(tiny.make("llama"), recipe=said)
        found[skip] = result.model.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    assert torch.equal(found[None], found[4]) and not torch.equal(found[0], found[4])


def test_later_blocks_see_what_earlier_ones_have_become(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    """The error that the receipt tells of the last block is that on inputs which come through the cut blocks."""
    source, output = model("opt"), tmp_path / "out"  # whose feed-forward is given all tokens in one row
    result = secateur.compress(source, recipe=recipe("flap", ids, "neurons"), output=output, evaluate=False)
    cut, _ = secateur.network.source.load(output)
    last = result.receipt["decisions"][0]["units"]["neurons"]["2"]
    told = last["calibration_error"]
    assert "notes" not in last, "the bias takes the mean"
    whole = tiny.make("opt")
    block = anatomy(whole).blocks[2]
    assert block.feed_forward is not None
    name = block.feed_forward.down.parameter.removesuffix(".weight")
    for place in range(2):  # the whole model with its first blocks as they have become
        path = block.path.rpartition(".")[0]
        whole.get_submodule(path)[place] = cut.get_submodule(path)[place]
    inputs = inputs_of(whole, name, ids)
    stays = kept(result, output, "neurons", 2)
    before, after = whole.get_submodule(name), cut.get_submodule(name)
    with torch.no_grad():
        wanted, found = before(inputs), after(inputs[:, stays])
        assert told == pytest.approx(
            float((found - wanted).square().sum() / (wanted - before.bias).square().sum()), rel=1e-3
        )
    assert not torch.equal(before.bias, after.bias), "the mean of what went is in the bias"


def test_refitting_loses_less_than_plain_removal(model: Callable[..., Path], ids: Path) -> None:
    """With hardly any ridge, so that tokens fewer than units do not decide."""
    errors = {}
    for method in ("wanda_units", "liar", "unit_surgeon"):
        given = {} if method == "wanda_units" else {"ridge": 1e-3}
        result = secateur.compress(tiny.make("llama"), recipe=recipe(method, ids, "neurons", **given))
        errors[method] = result.receipt["decisions"][0]["mean calibration error"]
    assert errors["unit_surgeon"] < errors["wanda_units"] and errors["liar"] < errors["wanda_units"]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.every)])
def test_the_ridge_is_chosen_on_held_out_tokens(
    name: str, model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    """48 tokens say little of 80 neurons, so what is chosen beats hardly any ridge on the tokens held out."""
    wishes = {"samples": 4, "held_out": 2}
    said = recipe("liar", ids, "neurons", wishes)
    result = secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False)
    entries = result.receipt["decisions"][0]["units"]["neurons"].values()
    for entry in entries:
        tried = entry["notes"]["held-out errors"]
        assert tried[str(entry["notes"]["ridge"])] == min(tried.values()) < tried["0.003"] and len(tried) == 7
        assert entry["held_out_error"] == pytest.approx(min(tried.values()), rel=1e-3)
        assert ("output bias" in entry["notes"]) == (name == "llama")
    weak = secateur.compress(tiny.make(name), recipe=recipe("liar", ids, "neurons", wishes, ridge=0.003))
    chosen = sum(entry["held_out_error"] for entry in entries) / len(entries)
    assert chosen < weak.receipt["decisions"][0]["mean held out error"]


def test_without_held_out_tokens_the_ridge_is_fixed_and_that_is_said(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    said = recipe("liar", ids, "neurons")
    result = secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False)
    decision = result.receipt["decisions"][0]
    assert any("to choose the ridge by, so it is 0.1" in sentence for sentence in decision["warnings"])
    assert decision["units"]["neurons"]["1"]["notes"]["ridge"] == 0.1
    plain = secateur.compress(tiny.make("llama"), recipe=recipe("liar", ids, "neurons", ridge=0.1))
    errors = [notes["mean calibration error"] for notes in (plain.receipt["decisions"][0], decision["notes"])]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_mha", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt"])
def test_heads_of_a_live_module(name: str, ids: Path, tmp_path: Path) -> None:
    """What is cut computes what it computes with those heads silent, cache and saved copy too, or it is refused."""
    live = tiny.make(name)
    blocks = anatomy(live).blocks
    words = torch.tensor([[5, 9, 200, 31, 7, 8, 77]])
    said = recipe("wanda_units", ids, "heads")
    if name in ("gpt2", "opt"):
        with pytest.raises(secateur.RequestError, match="axis=neurons"):
            secateur.compress(live, recipe=said)
        return
    result = secateur.compress(live, recipe=said)
    assert result.model is not None
    for block in blocks:  # which heads stay is seen from the queries that are left
        assert block.attention is not None and block.attention.group is not None
        group = block.attention.group
        part = group.inputs[0]
        before, after = live.get_parameter(part.parameter), result.model.get_parameter(part.parameter)
        rows = [before[part.offset + unit * part.width] for unit in range(group.count)]
        stays = [any(torch.equal(row, other) for other in after) for row in rows]
        assert sum(stays) == group.count // 2
        gone = torch.tensor([unit for unit in range(group.count) if not stays[unit]])
        with torch.no_grad():
            live.get_parameter(group.output.parameter)[:, group.output.indices(gone)] = 0
    result.model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = live(words, use_cache=False).logits
        torch.testing.assert_close(result.model(words, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
        first = result.model(words[:, :4], use_cache=True)
        second = result.model(words[:, 4:], use_cache=True, past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, wanted[:, 4:], atol=1e-4, rtol=1e-4)
        again = type(live).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(words).logits, wanted, atol=1e-4, rtol=1e-4)


def test_heads_that_a_configuration_cannot_say_are_told(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match="cannot say 3 of 4 heads, only 1, 2") as refusal:
        said = recipe("unit_surgeon", ids, "heads", ratio=0.2)
        secateur.compress(model("llama_mha"), recipe=said, output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "given", "what"),
    [
        ("zipf_surgeon", {"axis": "heads"}, "cuts neurons only"),
        ("wanda_units", {"axis": "layers"}, "axis"),
        ("wanda_units", {"axis": []}, "axis"),
        ("liar", {"by": "wanda"}, "must name a method that chooses units"),
        ("liar", {"by": {"flap": {"ratio": 0.1}}}, "takes no ratio for flap"),
        ("liar", {"by": None}, "cannot be null"),
        ("liar", {"ridge": "heldout"}, "ridge='heldout' was refused: must be a number of at least 0, or held_out"),
        ("liar", {"ridge": -0.1}, "must be a number of at least 0"),
        ("liar", {"by": "zipf_surgeon", "axis": "heads"}, "cuts no heads"),
    ],
)
def test_wrong_wishes(method: str, given: dict[str, Any], what: str) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        secateur.Recipe.parse({"steps": [{method: given}]})


def test_groups_are_found_by_what_heads_do(model: Callable[..., Path]) -> None:
    """Fused, interleaved, shared: where the heads lie is seen from what changes, not from names."""
    for name, wanted in {
        "llama": (2, [(0, 32), (0, 16), (0, 16)]),
        "phi3": (2, [(0, 32), (64, 16), (96, 16)]),
        "gpt_neox": (4, [(0, 48), (0, 48)]),
        "falcon_new": (2, [(0, 64)]),
        "gpt2": (4, [(0, 16), (0, 16), (64, 16), (64, 16), (128, 16), (128, 16)]),
    }.items():
        group = open_model(model(name)).anatomy.blocks[1].group("heads")
        assert group is not None
        assert (group.count, [(part.offset, part.width) for part in group.inputs]) == wanted, name


def test_sequences_no_longer_than_what_is_skipped_are_refused(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    for length, skip in ((4, None), (8, 8)):
        said = recipe("wanda_units", ids, "neurons", {"length": length, "skip": skip})
        with pytest.raises(secateur.RequestError, match="leaves nothing of a sequence"):
            secateur.compress(model("llama"), recipe=said, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.every
def test_masks_of_matrices_that_a_later_step_cuts_are_not_kept(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    steps = [{"magnitude": {"pattern": "2:4"}}, {"magnitude_units": {"ratio": 0.5}}]
    result = secateur.compress(
        model("llama"), recipe=secateur.Recipe.parse({"steps": steps}), output=tmp_path / "out", evaluate=False
    )
    assert any("masks of this step were not kept" in said for said in result.receipt["decisions"][0]["warnings"])
    with pytest.raises(secateur.RequestError, match="holds no masks"):
        secateur.read_masks(tmp_path / "out")


def test_refitted_weights_are_rounded_once(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    source = model("llama", dtype=torch.bfloat16)
    said = recipe("unit_surgeon", ids, "neurons").plain() | {"dtype": "float32"}
    secateur.compress(source, recipe=secateur.Recipe.parse(said), output=tmp_path / "out", evaluate=False)
    found, _ = secateur.network.source.load(tmp_path / "out")
    weight = found.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())

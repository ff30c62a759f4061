"""Budgets of units in parameters and multiply-adds: counted by hand, reached as nearly as can be, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import command
import outcomes
import secateur
import tiny
from secateur.checks import check_steps
from secateur.contract import count_of
from secateur.evaluation.arithmetic import multiply_adds
from secateur.network.source import open_model
from secateur.recipe import Recipe
from secateur.report import summary
from secateur.unit_budgets import counted, reached, tokens_counted, unit_cost
from secateur.units import planned_sizes

pytestmark = pytest.mark.usefixtures("shared_clean")
Make = Callable[..., Path]
LLAMA, CONTEXT = 2 * 320 * 64 + 3 * (3 * 64 * 160 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64) + 64, tiny.CONTEXT


def compressed(source: Path, output: Path, **given: Any) -> dict:
    return secateur.compress(source, "magnitude_units", given, output=output, evaluate=False).receipt["decisions"][0]


def planned(source: Path, **given: Any) -> dict:
    found = planned_sizes(open_model(source), Recipe.parse({"steps": [{"random_units": given}]}).steps[0])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("value", "count"),
    [("100M", 10**8), (100e6, 10**8), ("1.5B", 15 * 10**8), ("2k", 2000), ("3_000", 3000), ("1e6", 10**6), (7, 7)],
)
def test_numbers_as_people_write_them(value: Any, count: int) -> None:
    assert count_of(value) == count


@pytest.mark.parametrize("value", ["many", "-5", 0, "0.1", "5 MB", True, [3]])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(secateur.RequestError, match="target"):
        Recipe.parse({"steps": [{"magnitude_units": {"target": value}}]})


def test_what_a_unit_of_a_llama_counts_by_hand(model: Make) -> None:
    source = open_model(model("llama"))
    tokens = tokens_counted(source)
    assert tokens == CONTEXT, "its positions are fewer than the card reads"
    assert unit_cost(source, 0, "neurons", "parameters") == 3 * 64
    assert unit_cost(source, 0, "neurons", "multiply_adds") == tokens * 3 * 64
    # two queries of 16 channels with a key and a value: 32 + 16 + 16 rows and 32 columns
    assert unit_cost(source, 0, "heads", "parameters") == 96 * 64
    pairs = tokens * (tokens + 1) // 2
    assert unit_cost(source, 0, "heads", "multiply_adds") == tokens * 96 * 64 + 2 * 32 * pairs
    assert counted(source, "parameters") == LLAMA
    assert counted(source, "parameters", {"neurons": {1: 100}}) == LLAMA - 60 * 192
    assert counted(source, "parameters", {}, 2) == LLAMA - (3 * 64 * 160 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "phi"])
@pytest.mark.parametrize("of", ["parameters", "multiply_adds"])
def test_what_is_reached_is_what_is_written(of: str, name: str, model: Make, tmp_path: Path) -> None:
    said = compressed(model(name), tmp_path / "out", ratio=0.15, of=of, multiple_of=1)["budget"]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(model(name))
    told = said["reached"]
    tokens = told["multiply_adds"]["tokens"]
    for when, found in (("before", dense), ("after", result)):
        assert told["parameters"][when] == outcomes.parameters(found)
        assert told["multiply_adds"][when] == multiply_adds(found, tokens)
    # one neuron more or less in every block is all that can be missing
    one = sum(unit_cost(open_model(model(name)), b, "neurons", of) for b in range(tiny.BLOCKS))  # type: ignore[arg-type]
    assert abs(told[of]["after"] - 0.85 * told[of]["before"]) <= one / 2
    assert said["asked"] == {"ratio": 0.15, "of": of}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_heads_count_with_their_attention(name: str, model: Make, tmp_path: Path) -> None:
    given = {"ratio": 0.25, "of": "multiply_adds", "axis": ["heads", "neurons"], "multiple_of": 1}
    said = compressed(model(name), tmp_path / "out", **given)["budget"]["reached"]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert said["multiply_adds"]["after"] == multiply_adds(result, said["multiply_adds"]["tokens"])
    assert said["parameters"]["after"] == outcomes.parameters(result)
    assert said["multiply_adds"]["after"] == pytest.approx(0.75 * said["multiply_adds"]["before"], rel=0.01)


def test_widths_by_hand(model: Make) -> None:
    source = model("llama")
    # a neuron of three blocks is 576 parameters
    assert planned(source, target=LLAMA - 40 * 576, multiple_of=1)["neurons"] == dict.fromkeys(range(3), 120)
    assert planned(source, target=LLAMA - 40 * 576 + 287, multiple_of=1)["neurons"][0] == 120
    assert planned(source, target=LLAMA - 40 * 576 + 289, multiple_of=1)["neurons"][0] == 121
    assert planned(source, target=LLAMA)["neurons"][0] == 160, "nothing is to go"
    # multiples of 32: 128 and 96 are at hand
    assert planned(source, target=LLAMA - 47 * 576)["neurons"][0] == 128
    assert planned(source, target=LLAMA - 49 * 576)["neurons"][0] == 96
    # the ratio of the whole, all of which neurons must pay for
    assert planned(source, ratio=0.1, of="parameters", multiple_of=1)["neurons"][0] == 160 - round(0.1 * LLAMA / 576)
    tokens = CONTEXT
    given = multiply_adds(tiny.make("llama"), tokens)
    asked = planned(source, target=given - 33 * 576 * tokens, of="multiply_adds", multiple_of=1)
    assert asked["neurons"][0] == 127
    # of units and without a target nothing is counted
    assert planned(source, ratio=0.5)["neurons"][0] == 96, "80, halfway between two multiples"


def test_neurons_make_up_for_heads_that_are_rounded(model: Make) -> None:
    source = model("llama")
    for ratio in (0.1, 0.2, 0.3, 0.4):
        sizes = planned(source, ratio=ratio, of="parameters", axis=["heads", "neurons"], multiple_of=1)
        found = counted(open_model(source), "parameters", sizes)
        assert abs(found - (1 - ratio) * LLAMA) <= 288, "half a neuron in every block"
    # more than the neurons alone can give: heads go though their nearest number is all of them
    alone = counted(open_model(source), "parameters", {"neurons": dict.fromkeys(range(3), 1)})
    sizes = planned(source, target=alone - 3 * 96 * 64, axis=["heads", "neurons"], multiple_of=1)
    assert sizes == {"heads": dict.fromkeys(range(3), 1), "neurons": dict.fromkeys(range(3), 1)}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"target": 41_000}, "the fewest that a block can have"),
        ({"target": "1B"}, "more than the"),
        ({"ratio": 0.9, "of": "parameters"}, "cannot be reached"),
        ({"ratios": [0.1] * 3, "of": "parameters"}, "leave out of and target"),
        ({"ratios": [0.1] * 3, "allocation": "alphapruning"}, "either ratios or an allocation"),
    ],
)
def test_what_cannot_be_reached_is_refused(given: dict, what: str, model: Make, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match=what) as refusal:
        compressed(model("llama"), tmp_path / "out", **given)
    assert str(refusal.value).count(". ") == 0 and not (tmp_path / "out").exists()
    if "reached" in what:
        least = counted(open_model(model("llama")), "parameters", {"neurons": dict.fromkeys(range(3), 1)})
        assert f"{least:,}" in str(refusal.value), "the smallest that can be is named"


def test_blocks_without_experts_count_too(model: Make) -> None:
    """Of three blocks the second holds no mixture; all of the network is counted."""
    source = open_model(model("qwen3_moe_mixed"))
    expert = unit_cost(source, 0, "experts", "parameters")
    sizes = planned(model("qwen3_moe_mixed"), axis="experts", target=source.anatomy.parameters - 4 * expert)
    assert sizes == {"experts": {0: 2, 2: 2}}


def test_fewer_experts_save_no_multiply_adds(model: Make, tmp_path: Path) -> None:
    told = compressed(model("mixtral"), tmp_path / "out", axis="experts", ratio=0.25)["budget"]["reached"]
    work = multiply_adds(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens_counted(open_model(model("mixtral")))
    )
    assert told["multiply_adds"]["before"] == told["multiply_adds"]["after"] == work
    with pytest.raises(secateur.RequestError, match="no multiply-adds"):
        planned(model("mixtral"), axis="experts", ratio=0.1, of="multiply_adds")


def test_a_set_of_queries_keeps_one(model: Make) -> None:
    source = model("llama")
    least = counted(open_model(source), "parameters", {"queries": dict.fromkeys(range(3), 2)})
    assert planned(source, axis="queries", target=least) == {"queries": dict.fromkeys(range(3), 2)}
    with pytest.raises(secateur.RequestError, match=f"{least:,} are left"):
        planned(source, axis="queries", target=least - 1)


def test_multiply_adds_are_not_foretold_where_channels_go(model: Make, tmp_path: Path) -> None:
    """Widths of units do not tell them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n- minitron: {axis: [channels], ratio: 0.25, multiple_of: 16}\n- random_units: {}\n")
    told = command.compress(model("llama"), tmp_path / "out", "--dry-run", "--recipe", recipe, method=None)
    assert told.code == 0 and "channels 64 → 48" in told.out and "multiply-adds" not in told.out


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (
            [
                {"magnitude_units": {"allocation": "flap_search"}},
                {"minitron": {"axis": "channels", "ratio": 0.25, "multiple_of": 16}},
            ],
            "channels first",
        ),
        ([{"magnitude_units": {"ratios": [0.2, 0.4, 0.4]}}, {"slicegpt": {"ratio": 0.25}}], "channels first"),
        (
            [
                {"block_influence": {"part": "attention", "remove": 1}},
                {"random_units": {"axis": "heads", "ratio": 0.5}},
            ],
            "heads first",
        ),
        ([{"block_influence": {"part": "feed_forward", "remove": 1}}, {"minitron": {}}], "neurons first"),
    ],
)
def test_what_an_earlier_step_makes_impossible_is_refused_first(steps: list, what: str, model: Make) -> None:
    source = open_model(model("llama"))
    with pytest.raises(secateur.RequestError, match=what):
        check_steps(source, Recipe.parse({"steps": steps}).steps)
    check_steps(source, Recipe.parse({"steps": steps[::-1]}).steps)  # the other way round it can be done


def test_a_second_cut_of_channels_counts_from_the_first(model: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = [f"- minitron: {{axis: [channels], ratio: {ratio}, multiple_of: 16}}\n" for ratio in (0.25, 0.33)]
    recipe.write_text("steps:\n" + "".join(steps))
    told = command.compress(model("llama"), tmp_path / "out", "--dry-run", "--recipe", recipe, method=None)
    assert told.code == 0 and "channels 64 → 32" in told.out


def test_mixtures_keep_as_many_experts_each(model: Make) -> None:
    with pytest.raises(secateur.RequestError, match="must keep as many experts"):
        planned(model("mixtral"), axis="experts", ratio=0.25, allocation="flap_search")


def test_a_later_step_counts_what_earlier_ones_leave(model: Make, tmp_path: Path) -> None:
    steps = [{"block_influence": {"remove": 1}}, {"magnitude_units": {"target": 120_000, "multiple_of": 1}}]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()))
    recipe = Recipe.parse({"steps": steps, "calibration": {"data": str(ids), "length": 16, "samples": 4}})
    result = secateur.compress(model("llama"), recipe=recipe, output=tmp_path / "out", evaluate=False)
    found = outcomes.parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert abs(found - 120_000) <= 192
    told = result.receipt["decisions"][1]["budget"]
    assert told["asked"] == {"target": 120_000, "of": "parameters"} and told["reached"]["parameters"]["after"] == found


def test_a_dry_run_foretells_what_is_reached(model: Make, tmp_path: Path) -> None:
    given = ("--set", "target=150k", "--set", "multiple_of=1")
    told = command.compress(model("llama"), tmp_path / "out", "--dry-run", *given, method="magnitude_units").out
    assert "asked for 150,000 parameters" in told and "multiply-adds of 256 tokens" in told
    said = secateur.compress(
        model("llama"), "magnitude_units", {"target": "150k", "multiple_of": 1}, output=tmp_path / "out", evaluate=False
    ).receipt["decisions"][0]["budget"]["reached"]
    assert f"→ {said['parameters']['after']:,}" in told and f"→ {said['multiply_adds']['after']:,}" in told
    assert abs(said["parameters"]["after"] - 150_000) <= 288
    card = (tmp_path / "out" / "README.md").read_text()
    assert "asked for 150,000 parameters, reached parameters" in card


def test_a_live_module_is_told_what_it_has_become() -> None:
    live = tiny.make("llama")
    result = secateur.compress(live, "magnitude_units", {"target": 150_000, "multiple_of": 1})
    assert result.model is not None
    told = result.receipt["decisions"][0]["budget"]
    assert told["reached"]["parameters"]["after"] == outcomes.parameters(result.model)
    assert told["reached"]["parameters"]["before"] == LLAMA == outcomes.parameters(live)


def test_percentages_are_of_all_blocks_and_of_those_that_were_cut(model: Callable[..., Path]) -> None:
    source = open_model(model("llama"))
    told = reached(source, {"neurons": {0: 88, 2: 40}})
    assert told["units"]["neurons"] == {"before": 480, "after": 288, "blocks": 3}
    units = {"neurons": {"0": {"kept": 88, "of": 160}, "2": {"kept": 40, "of": 160}}}
    decision = {"method": "adapt_pruner", "units": units, "budget": {"asked": None, "reached": told}}
    line = summary({"decisions": [decision]})[0]
    assert "differing widths (40 to 88 in 2 of 3 blocks), 40.0% removed (60.0% of those in these blocks)" in line
    decision["units"] = {"neurons": {str(block): {"kept": 80, "of": 160} for block in range(3)}}
    decision["budget"] = {"asked": None, "reached": reached(source, {"neurons": {0: 80, 1: 80, 2: 80}})}
    assert "80 of 160 in each of 3 blocks, 50.0% removed" in summary({"decisions": [decision]})[0]

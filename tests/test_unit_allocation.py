"""Budgets of units that are divided among blocks: sums and bounds, uniform where blocks are alike, scores by hand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import command
import outcomes
import secateur
import tiny
from secateur import registry
from secateur.methods.allocation.equal_error import equal_error
from secateur.methods.allocation.flap_search import flap_search
from secateur.network.examine import anatomy
from secateur.network.scores import ErrorCurves, ScoredUnits, UnitScores
from secateur.network.verify import CleanProcess
from secateur.recipe import Recipe
from secateur.registry import find, methods
from secateur.tensor.thresholds import cheapest_counts, removal_squares, rounded_widths

Make = Callable[..., Path]
LENGTH, SKIP = 16, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(method: str, ids: Path, **given: Any) -> Recipe:
    said = {"data": str(ids), "samples": 6, "length": LENGTH, "order": "first", "held_out": 0}
    return Recipe.parse({"steps": [{method: {"multiple_of": 1, "ratio": 0.4, **given}}], "calibration": said})


def live(name: str, said: Recipe) -> dict:
    return dict(secateur.compress(tiny.make(name), recipe=said).receipt["decisions"][0])


def scored(*scores: list[float], cost: int = 1, ratio: float = 0.5, axis: Any = "neurons") -> UnitScores:
    units = [
        ScoredUnits(f"block {i}, {axis}", i, axis, torch.tensor(each), cost, len(each) - int(ratio * len(each)))
        for i, each in enumerate(scores)
    ]
    return UnitScores(units, sum((each.count - each.keep) * each.cost for each in units))


def test_the_cheapest_of_all_go() -> None:
    prices = [torch.tensor([1.0, 4, 5, 9]), torch.tensor([2.0, 3, 6, 7])]
    assert cheapest_counts(prices, [1, 1], 4) == [2, 2]
    assert cheapest_counts(prices, [1, 1], 3) == [1, 2]
    assert cheapest_counts(prices, [1, 1], 0) == [0, 0]
    assert cheapest_counts([torch.zeros(4), torch.ones(4)], [1, 1], 4) == [3, 1], "one unit stays always"
    assert cheapest_counts([torch.zeros(10), torch.ones(10)], [1, 1], 8, 0.5) == [5, 3], "and what a limit leaves"
    # units of 5 and of 1: 7 is 5 + 1 + 1; 4 is nearer to 5 than to 0, and 2 is nearer to 0
    assert cheapest_counts([torch.tensor([0.0, 9]), torch.tensor([1.0, 2, 3])], [5, 1], 7) == [1, 2]
    assert cheapest_counts([torch.tensor([0.0, 9]), torch.tensor([1.0, 2, 3])], [5, 1], 4) == [1, 0]
    assert cheapest_counts([torch.tensor([0.0, 9]), torch.tensor([1.0, 2, 3])], [5, 1], 2) == [0, 0]
    with pytest.raises(ValueError, match="8 are to go, but the units that may go count 6"):
        cheapest_counts(prices, [1, 1], 8)


def test_equal_prices_go_side_by_side() -> None:
    assert cheapest_counts([torch.zeros(10)] * 4, [3] * 4, 60) == [5] * 4
    assert cheapest_counts([torch.zeros(10), torch.zeros(20)], [1, 1], 15) == [5, 10], "the same share of each"


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_widths_keep_their_sum(multiple: int) -> None:
    drawn = torch.rand(7, generator=torch.Generator().manual_seed(multiple)) * 159 + 1
    wanted, counts = dict(enumerate(drawn.tolist())), dict.fromkeys(range(7), 160)
    found = rounded_widths(wanted, counts, multiple)
    assert all(width % multiple == 0 and 0 < width <= 160 for width in found.values())
    assert abs(sum(found.values()) - sum(wanted.values())) <= multiple / 2
    assert sum(abs(found[i] - wanted[i]) > multiple for i in wanted) <= (1 if multiple < 32 else 3)
    order = sorted(wanted, key=wanted.__getitem__)
    assert [found[i] for i in order] == sorted(found.values()), "wider stays wider"


def test_widths_at_the_ends() -> None:
    assert rounded_widths({0: 100.0, 1: 64.0}, {0: 100, 1: 100}, 32) == {0: 100, 1: 64}, "whole stays whole"
    assert rounded_widths({0: 5.4, 1: 5.6}, {0: 20, 1: 20}, 32) == {0: 5, 1: 6}, "narrower than the multiple"
    assert rounded_widths({0: 6.2, 1: 6.1}, {0: 9, 1: 8}, {0: 3, 1: 2}) == {0: 6, 1: 6}, "each its own multiple"
    assert rounded_widths({0: 1.0, 1: 63.0}, {0: 64, 1: 64}, 32) == {0: 32, 1: 32}


def test_what_removal_costs_is_what_the_output_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, output = torch.randn(50, 12, generator=generator), torch.randn(5, 12, generator=generator)
    order = torch.randperm(4, generator=generator)
    found = removal_squares(inputs.T @ inputs / 50, output, order, width=3)
    for count in range(1, 5):
        gone = (order[:count, None] * 3 + torch.arange(3)).flatten()
        wanted = (inputs[:, gone] @ output[:, gone].T).square().sum(1).mean()
        assert float(found[count - 1]) == pytest.approx(float(wanted), rel=1e-4)


def test_flap_search_by_hand() -> None:
    scores = [[1.0, 2, 3, 10], [100.0, 400, 500, 600], [0.1, 0.2, 0.3, 0.4]]
    found = flap_search(scored(*scores)).remove
    each = [(torch.tensor(row) - torch.tensor(row).mean()) / torch.tensor(row).std() for row in scores]
    threshold = torch.cat(each).sort().values[6]
    assert list(found.values()) == [int((row < threshold).sum()) for row in each] == [3, 1, 2]
    moved = [[7 * value + 5 for value in row] for row in scores]
    assert flap_search(scored(*moved)).remove == found, "scale and origin of a block's scores say nothing"


@pytest.mark.parametrize("joint", [True, False])
def test_blocks_that_are_alike_lose_alike(joint: bool) -> None:
    alike = [[3.0, 1, 4, 1, 5, 9, 2, 6]] * 5
    for scores in (alike, [[2.0] * 8] * 5):
        network = scored(*scores, cost=7)
        assert set(flap_search(network, joint=joint).remove.values()) == {4}
        curves = ErrorCurves({each.name: each.scores.sort().values.cumsum(0) for each in network})

        class Notes:
            def note(self, name: str, value: Any) -> None: ...

        assert set(equal_error(network, curves, Notes(), joint=joint).remove.values()) == {4}  # type: ignore[arg-type]


def test_kinds_of_units_apart_or_together() -> None:
    heads = [ScoredUnits(f"block {i}, heads", i, "heads", torch.tensor([3.0, 1, 4, 2]), 10, 2) for i in range(2)]
    neurons = [ScoredUnits(f"block {i}, neurons", i, "neurons", torch.arange(20.0).pow(4), 1, 10) for i in range(2)]
    network = UnitScores([*heads, *neurons], 60)
    apart, together = flap_search(network, joint=False).remove, flap_search(network, joint=True).remove
    assert [apart[each.name] for each in network] == [2, 2, 10, 10], "each kind pays its own part"
    cost = sum(together[each.name] * each.cost for each in network)
    assert abs(cost - 60) <= 5 and together != apart


def inputs_and_stream(name: str, ids: Path) -> list[tuple[Tensor, Tensor, float]]:
    """Of each dense block: (t, d) inputs of its output matrix, that matrix, mean |stream|² before the norm."""
    model, tokens = tiny.make(name), torch.tensor(json.loads(ids.read_text()))
    found = []
    for block in anatomy(model).blocks:
        layer = block.feed_forward
        caught: dict[str, Tensor] = {}
        assert layer is not None and layer.norm_module is not None
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, given, key=key, caught=caught: caught.__setitem__(key, given[0].detach())
            )
            for key, path in (("in", layer.down.parameter.removesuffix(".weight")), ("stream", layer.norm_module))
        ]
        with torch.no_grad():
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        inputs, stream = (caught[k].reshape(*tokens.shape, -1)[:, SKIP:].flatten(0, 1) for k in ("in", "stream"))
        weight = model.get_parameter(layer.down.parameter).detach()
        found.append((inputs, weight, float(stream.square().sum(1).mean())))
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_equal_errors_are_those_of_the_dense_network(name: str, ids: Path) -> None:
    """What the allocation says each block loses, measured by hand on its widths and criterion; and hardly any difference."""
    said = live(name, recipe("wanda_units", ids, allocation="equal_error"))
    widths = said["kept"]["neurons"]
    assert sum(widths.values()) == 3 * 96 and len(set(widths.values())) > 1
    told = said["error beside the stream"]
    for block, (inputs, weight, stream) in enumerate(inputs_and_stream(name, ids)):
        scores = (weight.norm(dim=0) * inputs.square().mean(0).sqrt()).square()
        gone = scores.argsort(descending=True, stable=True)[widths[str(block)] :]
        lost = (inputs[:, gone] @ weight[:, gone].T).square().sum(1).mean()
        assert told[f"block {block}, neurons"] == pytest.approx(float(lost / stream) ** 0.5, rel=1e-3)
    errors = list(told.values())
    assert max(errors) < 1.1 * min(errors), "a neuron is the finest step"


def test_flap_search_sees_the_dense_network(ids: Path) -> None:
    """Its widths are those that scores of the dense network give, though later blocks are scored again behind cut ones."""
    said = live("llama", recipe("wanda_units", ids, allocation="flap_search"))
    by_hand = []
    for inputs, weight, _ in inputs_and_stream("llama", ids):
        by_hand.append(((weight.norm(dim=0) * inputs.square().mean(0).sqrt()).square()).tolist())
    found = flap_search(scored(*by_hand, ratio=0.4)).remove
    assert list(said["kept"]["neurons"].values()) == [160 - count for count in found.values()]
    assert said["ratios"]["neurons"]["0"] == round(1 - said["kept"]["neurons"]["0"] / 160, 4)


@pytest.mark.parametrize("divider", ["alphapruning", "pq_index", "erk", "global_threshold"])
def test_weights_alone_divide_too(divider: str) -> None:
    for name in ("llama", "gpt2"):  # the second stores its matrices the other way round
        said = live(
            name,
            Recipe.parse({"steps": [{"magnitude_units": {"allocation": divider, "ratio": 0.4, "multiple_of": 1}}]}),
        )
        assert sum(said["kept"]["neurons"].values()) == 3 * 96
        assert said["budget"]["reached"]["units"]["neurons"] == {"before": 480, "after": 288, "blocks": 3}


def test_alphapruning_sees_every_matrix_of_the_units() -> None:
    """A block of heavy tails loses less; blocks that are equal lose the same."""
    steps = {"steps": [{"magnitude_units": {"allocation": "alphapruning", "multiple_of": 1, "ratio": 0.4}}]}
    for heavy in (False, True):
        model = tiny.make("llama")
        for block in range(1, 3):
            for name in ("gate_proj", "up_proj", "down_proj"):
                path = f"model.layers.{{}}.mlp.{name}.weight"
                with torch.no_grad():
                    model.get_parameter(path.format(block)).copy_(model.get_parameter(path.format(0)))
        if heavy:
            with torch.no_grad():
                for name in ("gate_proj", "up_proj", "down_proj"):
                    weight = model.get_parameter(f"model.layers.1.mlp.{name}.weight")
                    u, s, v = torch.linalg.svd(weight, full_matrices=False)
                    weight.copy_(u @ torch.diag((torch.arange(len(s)) + 1.0) ** -1.0) @ v)
        kept = secateur.compress(model, recipe=Recipe.parse(steps)).receipt["decisions"][0]["kept"]["neurons"]
        assert abs(kept["0"] - kept["2"]) <= 1 and sum(kept.values()) == 288
        assert kept["1"] > kept["0"] + 9 if heavy else kept["1"] == kept["0"] == 96


def test_criterion_refit_and_allocation_in_one_step(
    model: Make, ids: Path, clean: CleanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, checked, opened with the code that it brings; a kill between the two walks leaves no trace."""
    given = {"by": "flap", "allocation": "equal_error", "target": "145k", "multiple_of": 8}
    said, source = recipe("liar", ids, **given), model("llama")

    def run(output: Path) -> dict:
        return secateur.compress(source, recipe=said, output=output, evaluate=False, clean=clean, shard_bytes=1).receipt

    receipt = run(tmp_path / "first")
    told = receipt["decisions"][0]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert told["budget"]["asked"] == {"target": 145_000, "of": "parameters"}
    found = outcomes.parameters(result)
    assert told["budget"]["reached"]["parameters"]["after"] == found
    assert abs(found - 145_000) <= 192 * 4 + 96, "half a multiple in one block, not in each"
    widths = {unit["kept"] for unit in told["units"]["neurons"].values()}
    assert len(widths) > 1 and all(width % 8 == 0 for width in widths)
    assert "code" in receipt and told["notes"]["calibration"]["sequences"] == 6
    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, 6)
        with pytest.raises(outcomes.Killed):
            run(tmp_path / "killed")
    run(tmp_path / "killed")
    assert outcomes.promised(tmp_path / "first") == outcomes.promised(tmp_path / "killed")


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ({"unit_surgeon": {"allocation": "flap_search"}}, "states no scores of units"),
        ({"fold": {"allocation": "equal_error"}}, "states no scores of units"),
        ({"liar": {"by": "zipf_surgeon", "allocation": "flap_search"}}, "states no scores of units"),
        ({"wanda_units": {"allocation": {"flap_search": {"limit": 0.3}}}}, "limit=0.3"),
    ],
)
def test_what_cannot_be_divided_is_refused(step: dict, what: str, model: Make, ids: Path, tmp_path: Path) -> None:
    [(method, given)] = step.items()
    with pytest.raises(secateur.RequestError, match=what):
        secateur.compress(model("llama"), recipe=recipe(method, ids, **given), output=tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method", [each.name for each in methods().values() if each.scope == "units" and not each.others]
)
def test_who_states_scores_is_said_by_the_decorator(method: str, model: Make, ids: Path) -> None:
    """Otherwise an allocation that compares them would find out in the middle of a run."""
    said: list[bool] = []
    given = find(method).function

    def seen(units: Any, *others: Any, **parameters: Any) -> Any:
        found = given(units, *others, **parameters)
        said.append(units.scores is not None)
        return found

    changed = dataclasses.replace(find(method), function=seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._registry, method, changed)
        live = AutoModelForCausalLM.from_pretrained(model("llama"))
        step = {"steps": [{method: {"ratio": 0.5, "multiple_of": 1}}]}
        calibrated = Recipe.parse(step).calibrated
        secateur.compress(live, recipe=recipe(method, ids) if calibrated else Recipe.parse(step))
    assert said and all(each == find(method).scores for each in said)


def test_recipes_of_allocations() -> None:
    step = Recipe.parse({"steps": [{"flap_search": {"apply": "liar", "ratio": 0.3, "joint": False}}]}).steps[0]
    assert step.method == "liar" and step.parameters["ratio"] == 0.3
    assert step.parameters["allocation"] == {"flap_search": {"joint": False, "limit": 0.99}}
    uniform = Recipe.parse({"steps": [{"wanda_units": {"allocation": "uniform"}}]}).steps[0]
    assert uniform.parameters["allocation"] is None
    plain = Recipe.parse({"steps": [{"magnitude_units": {"allocation": "flap_search"}}]})
    errors = Recipe.parse({"steps": [{"magnitude_units": {"allocation": "equal_error"}}]})
    assert errors.calibrated and not plain.calibrated
    for wrong, what in (("wanda", "must name an allocation"), ({"flap_search": {"ratio": 0.1}}, "takes no ratio")):
        with pytest.raises(secateur.RequestError, match=what):
            Recipe.parse({"steps": [{"wanda_units": {"allocation": wrong}}]})


def test_a_dry_run_says_that_widths_follow(model: Make, ids: Path, tmp_path: Path) -> None:
    given = ("--set", "allocation=equal_error", "--calibration", str(ids), "--dry-run")
    told = command.compress(model("llama"), tmp_path / "out", *given, method="wanda_units").out
    assert "equal_error divides this among the blocks: their widths follow from weights or data" in told
    assert not (tmp_path / "out").exists()

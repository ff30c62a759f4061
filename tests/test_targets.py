"""Which matrices a step prunes, how many weights they lose, and every way of asking for it wrongly."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from command import Told, compress, secateur, snapshot
from secateur import Recipe, RequestError, read_masks, registry
from secateur.checks import check_steps
from secateur.network.source import open_model
from secateur.registry import Allocation, Context, Matrices
from secateur.run import compress as run
from secateur.solving import Solver
from secateur.targets import budgets, chosen, uniform
from secateur.tensor.patterns import Pattern

Make = Callable[..., Path]


def names(model: Any, targets: list[str] | None) -> list[str]:
    return [ref.name for refs in chosen(open_model(model), targets).values() for ref in refs]


# Choosing.


def test_all_matrices_in_the_blocks_and_nothing_else() -> None:
    every = names(tiny.make("llama_tied"), None)
    assert len(every) == 7 * tiny.BLOCKS and all(".layers." in name for name in every)
    assert every == sorted(every, key=lambda name: int(name.split(".")[2])), "block by block"


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["attention"], 12),
        (["expert"], 24),
        (["attention", "expert"], 36),
        (["attention", "*q_proj*"], 12),
        (["*layers.1.*"], 12),
        (["*experts.down_proj*"], 12),
        (["*experts.*[2]"], 6),
        (["model.layers.0.mlp.experts.down_proj[2]"], 1),
        (["*"], 36),
    ],
)
def test_by_role_and_by_name(targets: list[str], count: int) -> None:
    found = names(tiny.make("mixtral"), targets)
    assert len(found) == len(set(found)) == count
    assert set(found) <= set(names(tiny.make("mixtral"), None))


def test_brackets_are_no_choice_of_letters() -> None:
    assert names(tiny.make("mixtral"), ["*.0.*proj[2]"]) == [
        "model.layers.0.mlp.experts.gate_up_proj[2]",
        "model.layers.0.mlp.experts.down_proj[2]",
    ]
    with pytest.raises(RequestError, match=r"gate_up_proj\[23\]' fits no matrix"):
        names(tiny.make("mixtral"), ["*gate_up_proj[23]"])


def test_the_step_of_mamba_only_when_asked_for() -> None:
    model = tiny.make("mamba")
    assert not [name for name in names(model, None) if "dt_proj" in name]
    assert names(model, ["mixer_step"]) == [f"backbone.layers.{block}.mixer.dt_proj.weight" for block in range(3)]


def test_blocks_of_an_unknown_kind_are_refused_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoe keeps its experts in modules of its own: what is listed is a small part of what there is."""
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2}
    experts = {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny.ARCHITECTURES, "jetmoe", tiny._config("JetMoe", **settings, **experts))
    model = tiny.make("jetmoe")
    with pytest.raises(RequestError, match=r"layers\.0 of .* unknown kind .*`targets`"):
        run(model, "magnitude")
    assert names(model, ["*kv_proj*"]) == [f"model.layers.{block}.self_attention.kv_proj.weight" for block in range(2)]


# Budgets.


@pytest.fixture
def allocation() -> Iterator[dict[str, Any]]:
    """An allocation that gives what the test says: of each matrix by its place, and how often it was asked."""
    state: dict[str, Any] = {"give": None, "asked": 0}

    @registry.method(
        "given", kind="allocation", paper="", claim="none", when="after training", speedup="specific",
        criterion="random", schedule="one-shot",
    )  # fmt: skip
    def given(network: Matrices, context: Context) -> Allocation:
        """Gives what it is told."""
        state["asked"] += 1
        state["network"] = network
        context.note("asked", state["asked"])
        return Allocation(state["give"](network))

    yield state
    del registry._registry["given"]


def _budgets(model: Any, tmp_path: Path, **parameters: Any) -> Any:
    [step] = Recipe.parse({"steps": [{"magnitude": {"allocation": "given", **parameters}}]}).steps
    source, context = open_model(model), Context()
    found = budgets(source, step, chosen(source, step.parameters["targets"]), context, tmp_path)
    return found, context


@pytest.mark.parametrize("pattern", ["0.3", "0.37/4x8"])
def test_an_allocation_divides_exactly_what_the_pattern_removes(
    pattern: str, allocation: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever it divides it by; tiles are counted in tiles."""
    model = tiny.make("llama")
    alike = uniform(chosen(open_model(model), ["attention"]), Pattern.parse(pattern))

    def give(network: Matrices) -> dict[str, int]:
        assert network.remove == sum(budget.remove for budget in alike.values())
        assert network.sizes == [budget.units for budget in alike.values()]
        counts = {name: budget.remove for name, budget in alike.items()}
        counts[network[0].name] -= 9
        counts[network[1].name] += 9
        return counts

    allocation["give"] = give
    found, context = _budgets(model, tmp_path, pattern=pattern, targets=["attention"])
    difference = [budget.remove - alike[name].remove for name, budget in found.items()]
    assert list(found) == list(alike) and difference == [-9, 9] + [0] * 10
    assert sum(budget.weights for budget in found.values()) == sum(budget.weights for budget in alike.values())
    again, told = _budgets(model, tmp_path, pattern=pattern, targets=["attention"])
    assert again == found and allocation["asked"] == 1, "decided once"
    assert told.notes == context.notes == {"asked": 1}, "and told either way"


def test_matrices_are_read_for_an_allocation_as_methods_see_them(allocation: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.make("gpt2")
    stored = dict(model.named_parameters())

    def give(network: Matrices) -> dict[str, int]:
        for weight in network:
            assert torch.equal(weight.matrix, stored[weight.name].T)
            assert (weight.rows, weight.columns) == tuple(weight.matrix.shape)
        return {weight.name: size // 2 for weight, size in zip(network, network.sizes, strict=True)}

    allocation["give"] = give
    _budgets(model, tmp_path, pattern=0.5)
    assert allocation["asked"] == 1


@pytest.mark.parametrize("wrong", ["more", "fewer", "another", "negative", "too many"])
def test_an_allocation_that_is_wrong_is_not_used(wrong: str, allocation: dict[str, Any], tmp_path: Path) -> None:
    def give(network: Matrices) -> dict[str, int]:
        counts = {weight.name: size // 2 for weight, size in zip(network, network.sizes, strict=True)}
        first, second = list(counts)[:2]
        if wrong == "another":
            counts["x"] = counts.pop(first)
        elif wrong in ("negative", "too many"):
            move = network.sizes[0] if wrong == "negative" else -network.sizes[0]
            counts[first] -= move
            counts[second] += move
        else:
            counts[first] += 1 if wrong == "more" else -1
        return counts

    allocation["give"] = give
    with pytest.raises(RequestError, match="given divides"):
        _budgets(tiny.make("llama"), tmp_path, pattern=0.5)
    assert not (tmp_path / "budgets.json").exists()


# Asked for wrongly, on the command line.


@pytest.fixture
def refused(model: Make, tmp_path: Path) -> Callable[..., str]:
    """Runs a method with these settings; returns the sentence that it must be refused with."""

    def check(method: str, *settings: str, source: str = "llama") -> str:
        before = snapshot(tmp_path)
        arguments = [part for setting in settings for part in ("--set", setting)]
        told: Told = compress(model(source), tmp_path / "out" / "deep", *arguments, method=method)
        assert told.code == 2, told.err
        assert told.err.startswith("error: ") and told.err.count("\n") == 1 and len(told.err) < 600
        assert snapshot(tmp_path) == before, "nothing is written"
        return told.err

    return check


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("1.0", "1.0 removes a fraction outside [0, 1)"),
        ("-0.1", "outside [0, 1)"),
        (".nan", "outside [0, 1)"),
        ("3:2", "3:2 keeps 3 of 2; N:M keeps"),
        ("0:4", "0:4 keeps 0 of 4"),
        ("many", "many is neither a fraction (0.5), N:M (2:4) nor"),
        ("0.5/16", "names no tile"),
        ("[0.5]", "neither a fraction"),
        ("3:7", "layers.0.self_attn.q_proj.weight: 3:7 needs a number of inputs that 7 divides, found 64"),
        ("3:32/2", "neither"),
        ("0.5/16x7", "layers.0.self_attn.q_proj.weight: tiles of 16x7 do not divide a matrix of 64x64"),
    ],
)
def test_a_pattern_that_cannot_be_had(pattern: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused("magnitude", f"pattern={pattern}")


def test_a_pattern_that_fits_all_but_one_matrix(refused: Callable[..., str]) -> None:
    """128 inputs everywhere but 160 in one."""
    assert "down_proj.weight: 2:64" in refused("wanda", "pattern=2:64")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("atention", "Did you mean 'attention'?"),
        ("expert", "'expert' fits no matrix"),
        ("[attention, nothing]", "'nothing' fits no matrix"),
        ("[]", "targets names no matrix"),
        ("*conv*", "'*conv*' fits no matrix"),
        ("3", "targets=3"),
        ("[3]", "targets.0=3"),
    ],
)
def test_targets_that_are_not_there(targets: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused("magnitude", f"targets={targets}")


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("wanda", ["pattern=2:4", "allocation=erk"], "an allocation has nothing to divide"),
        ("alphapruning", ["pattern=2:4"], "an allocation has nothing to divide"),
        ("wanda", ["allocation=magnitude"], "must name an allocation; magnitude is of kind weights"),
        ("wanda", ["allocation=prunenet"], "must name an allocation; prunenet is of kind structure"),
        ("wanda", ["allocation=alphaprunin"], "Did you mean 'alphapruning'?"),
        ("wanda", ["allocation={alphapruning: {epsilonn: 0.2}}"], "Did you mean 'epsilon'?"),
        ("wanda", ["allocation={alphapruning: {pattern: 0.2}}"], "takes no pattern for alphapruning"),
        ("alphapruning", ["epsilonn=0.2"], "alphapruning has no parameter 'epsilonn'. Did you mean 'epsilon'?"),
        ("alphapruning", ["apply=prunenet"], "must name a method that zeroes single weights; prunenet is of kind"),
        ("sparsegpt", ["mask=wand"], "Did you mean 'wanda'?"),
        ("sparsegpt", ["mask=random_units"], "must name a method that zeroes single weights; random_units is"),
        ("sparsegpt", ["mask=erk"], "must name a method that zeroes single weights; erk is of kind allocation"),
        ("sparsegpt", ["mask={wanda: {per: nobody}}"], "wanda: per='nobody'"),
        ("sparsegpt", ["mask={wanda: {pattern: 0.3}}"], "takes no pattern for wanda"),
        ("sparsegpt", ["mask=[wanda]"], "must be the name of a method"),
        ("sparsegpt", ["mask={wanda: {}, magnitude: {}}"], "must be the name of a method"),
        ("sparsegpt", ["mask={sparsegpt: {mask: wand}}"], "Did you mean 'wanda'?"),
    ],
)
def test_other_methods_that_are_named_wrongly(
    method: str, settings: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused(method, *settings)


# Asked for rightly, on the command line.


@pytest.mark.usefixtures("shared_clean")
def test_patterns_and_names_are_no_numbers_and_no_yaml(model: Make, tmp_path: Path) -> None:
    """YAML takes 2:4 for a number in base 60, and * for a reference."""
    said = ("--set", "pattern=2:4", "--set", "targets=*q_proj*")
    assert compress(model("llama"), tmp_path / "one", *said, method="magnitude").code == 0
    (tmp_path / "recipe.yaml").write_text("steps: [magnitude: {pattern: 2:4, targets: ['*q_proj*']}]")
    assert compress(model("llama"), tmp_path / "two", "--recipe", tmp_path / "recipe.yaml", method=None).code == 0
    for output in (tmp_path / "one", tmp_path / "two"):
        masks = read_masks(output)
        assert len(masks) == tiny.BLOCKS
        assert all(bool((mask.view(64, -1, 4).sum(dim=2) == 2).all()) for mask in masks.values())
        step = json.loads((output / "secateur.json").read_text())["recipe"]["steps"][0]
        assert step["magnitude"]["pattern"] == "2:4"
    again = compress(model("llama"), tmp_path / "three", "--recipe", tmp_path / "one" / "secateur.json", method=None)
    assert again.code == 0, again.err
    assert "1,024 of 4,096" not in again.out and "6,144 of 12,288 weights (50.00%)" in again.out


def test_an_allocation_is_set_like_any_method() -> None:
    """By its own name, or as part of the step that it has become."""
    settings = ["pattern=0.6", "epsilon=0.2", "apply={wanda: {per: layer}}", "targets=attention"]
    [step] = Recipe.of("alphapruning", settings).steps
    assert step.method == "wanda"
    assert step.parameters["per"] == "layer" and step.parameters["targets"] == ["attention"]
    assert step.parameters["pattern"] == "0.6" and step.parameters["allocation"]["alphapruning"]["epsilon"] == 0.2
    [prefixed] = Recipe.of("alphapruning", [f"alphapruning.{each}" for each in settings]).steps
    assert prefixed == step
    with pytest.raises(RequestError, match="no step 'other'"):
        Recipe.of("alphapruning", ["other.epsilon=0.2"])

    recipe = Recipe.parse({"steps": ["random_units", "alphapruning"]})
    changed = recipe.override(["1.epsilon=0.1", "1.limit=0.8", "alphapruning.pattern=0.7", "magnitude.per=row"])
    assert changed.steps[0] == recipe.steps[0]
    assert changed.steps[1].method == "magnitude"
    assert changed.steps[1].parameters["allocation"]["alphapruning"]["epsilon"] == 0.1
    assert changed.steps[1].parameters["allocation"]["alphapruning"]["limit"] == 0.8
    assert (changed.steps[1].parameters["pattern"], changed.steps[1].parameters["per"]) == ("0.7", "row")
    assert changed.override(["1.apply=wanda"]).steps[1].method == "wanda"
    assert (
        changed.override(["1.apply=wanda"]).steps[1].parameters["allocation"]
        == changed.steps[1].parameters["allocation"]
    )
    with pytest.raises(RequestError, match="magnitude has no parameter 'nothing'"):
        recipe.override(["1.nothing=1"])
    assert "wanda" in secateur("methods").out


CONTRADICTIONS = {
    "apt: mask_rule=M compares the patterns": ("apt", {"mask_rule": "M", "pattern": 0.5}),
    "12870 patterns": ("apt", {"mask_rule": "M", "pattern": "8:16"}),
    "admm: the mask grows for 15 iterations": ("admm", {"iterations": 10}),
    "breaks tiles": ("dsnot", {"mask": "wanda", "pattern": "0.5/4x4"}),
    "global_threshold: it counts single weights": (
        "magnitude", {"allocation": "global_threshold", "pattern": "0.5/4x4"}
    ),
    "pq_index: it needs p < q": ("wanda", {"allocation": {"pq_index": {"p": 1.0}}}),
    "liar: fold merges units": ("liar", {"by": "fold"}),
    "vocabulary: keep and minimum count a text": ("vocabulary", {"by": "script", "keep": 100}),
    "and by=script reads none": ("vocabulary", {"by": "script", "minimum": 3}),
    "vocabulary: by=text keeps what the text uses": ("vocabulary", {"scripts": ["GREEK"]}),
    "give either keep or minimum": ("vocabulary", {"keep": 100, "minimum": 3}),
    "metric=reverse does not read p;": ("layer_drop", {"p": 2}),
    "metric=influence does not read vectors;": ("layer_drop", {"metric": "influence", "vectors": True}),
    "metric=taylor does not read influence;": ("layer_drop", {"metric": "taylor", "influence": "flat"}),
    "transact: peak is for": ("transact", {"peak": 1.0}),
    "a neuron has one; leave it out": ("liar", {"by": {"transact": {"peak": 1.0}}}),
    "fold: cluster=ward": ("fold", {"cluster": "ward", "starts": 3}),
    "wanda_units: over=mean": ("wanda_units", {"over": "mean", "axis": ["neurons"]}),
    "grows for 30 iterations": ("dense_refit", {"mask": {"admm": {"ramp": 30}}}),
}  # fmt: skip


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_parameters_that_contradict_each_other_are_refused_before_anything_is_read(
    said: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    method, parameters = CONTRADICTIONS[said]
    source = open_model(model("llama"))
    steps = Recipe.parse({"steps": [{method: parameters}]}).steps
    with pytest.raises(RequestError, match=re.escape(said)):
        check_steps(source, steps)
    [fine] = Recipe.parse({"steps": [{"apt": {"mask_rule": "M", "pattern": "2:4"}}]}).steps
    check_steps(source, [fine])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("vocabulary", {"by": "script", "scripts": ["latin", "CYRILLIC", "Cjk"]}),
        ("vocabulary", {"by": "text", "keep": 100}),
        ("layer_drop", {"metric": "magnitude", "p": 2, "vectors": True}),
        ("layer_drop", {"metric": "taylor", "vectors": True}),
        ("layer_drop", {"metric": "influence", "influence": "flat"}),
        ("transact", {"peak": 1.0, "axis": ["heads", "neurons"]}),
        ("liar", {"by": {"transact": {"peak": 1.0}}, "axis": ["heads"]}),
        ("fold", {"cluster": "kmeans", "starts": 3}),
        ("wanda_units", {"over": "mean", "axis": ["heads"]}),
    ],
)
def test_what_is_read_may_be_said(method: str, parameters: dict[str, Any]) -> None:
    for step in Recipe.parse({"steps": [{method: parameters}]}).steps:
        Solver.of(step.registered, step.parameters).check(step.parameters)

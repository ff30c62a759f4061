"""The surveys' axes: every method stands on each, filters find it, and a claim of speed is compared with the result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test_matrix
from command import secateur
from secateur import registry
from secateur.network.verify import CleanProcess
from secateur.recipe import Recipe
from secateur.registry import Budget, Cut, InputNorms, Mask, Network, Plan, Units, Weight
from secateur.taxonomy import AXES, matching
from test_registry import CARD, _as_before  # noqa: F401 (a fixture)

METHODS = registry.methods()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stands_on_every_axis(name: str) -> None:
    method = METHODS[name]
    assert list(method.taxonomy) == list(AXES)
    for axis, values in method.taxonomy.items():
        assert values and set(values) <= set(AXES[axis].values), axis
    assert method.card()["taxonomy"] == json.loads(json.dumps(method.card()))["taxonomy"]
    calibrated = Recipe.parse({"steps": [name]}).calibrated
    assert ("text" if calibrated else "none") in method.taxonomy["data"], "as a run with the defaults reads it"


def test_what_follows_from_the_signature() -> None:
    def known(name: str, axis: str) -> tuple[str, ...]:
        return METHODS[name].taxonomy[axis]

    assert known("zipf_surgeon", "data") == ("none",) and known("zipf_surgeon", "granularity") == ("neurons",)
    assert known("layer_drop", "data") == ("none", "text") and known("layer_drop", "gradients") == ("no", "yes")
    assert known("llm_pruner", "gradients") == ("yes",) and known("llm_pruner", "supervision") == ("next token",)
    assert known("bonsai", "gradients") == ("no",) and known("bonsai", "supervision") == ("next token",)
    assert known("wanda", "supervision") == ("none",) and known("wanda", "artefact") == ("sparse",)
    assert known("flap_search", "data") == ("none", "text"), "as the criterion that it is used with"
    assert known("prunenet", "decides") == ("learned",) and known("random_units", "decides") == ("criterion",)
    assert known("vocabulary", "task") == ("specific",) and known("vocabulary", "granularity") == ("tokens",)
    assert known("adapt_pruner", "runtime") == known("equal_error", "runtime") == ("code",)


def cuts(units: Units) -> Cut:
    """Keeps the first."""
    raise NotImplementedError


def plans(network: Network) -> Plan:
    """Keeps the first."""
    raise NotImplementedError


def reads_under_one_parameter(weight: Weight, norms: InputNorms | None, budget: Budget, *, by: str = "text") -> Mask:
    """Removes.

    Args:
        by: what.
    """
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "changed", "what"),
    [
        (cuts, {"criterion": "beauty"}, "criterion='beauty' is none of random"),
        (cuts, {"schedule": "twice"}, "schedule='twice'"),
        (cuts, {"when": "afterwards"}, "when='afterwards'"),
        (cuts, {"speedup": "immense"}, "speedup='immense'"),
        (cuts, {"criterion": ()}, "`criterion` is not said"),
        (cuts, {"comparison": "global"}, "`comparison` follows from its kind and signature"),
        (cuts, {"family": "pruning"}, "`family` follows"),
        (cuts, {"kind": "recovery"}, "`family` is not said"),
        (plans, {}, "`comparison` is not said; it takes layer, global"),
        (cuts, {"fuses": ("magic",)}, "fuses='magic'"),
    ],
)
def test_a_card_that_is_incomplete_or_says_what_is_derived(
    function: Callable, changed: dict[str, Any], what: str
) -> None:
    with pytest.raises(TypeError, match=what):
        registry.method("broken", **{**CARD, **changed})(function)
    assert "broken" not in registry.methods()


@pytest.mark.parametrize("missing", ["criterion", "schedule", "when", "speedup"])
def test_what_cannot_be_derived_must_be_said(missing: str) -> None:
    card = {key: value for key, value in CARD.items() if key != missing}
    with pytest.raises(TypeError, match=missing):
        registry.method("broken", **card)


def test_what_is_asked_for_under_one_parameter_is_both() -> None:
    only = {"norms": {"by": "text"}}
    registry.method("sometimes", **{**CARD, "kind": "weights"}, only=only)(reads_under_one_parameter)
    assert registry.find("sometimes").taxonomy["data"] == ("none", "text")


def test_filters_combine() -> None:
    def found(*arguments: str) -> list[str]:
        told = secateur("methods", "--json", *arguments)
        assert told.code == 0, told.err
        return [card["name"] for card in json.loads(told.out)]

    assert found("--kind", "structure", "--data", "none", "--speedup", "universal", "--granularity", "heads") == [
        name
        for name, method in METHODS.items()
        if method.kind == "structure"
        and "none" in method.taxonomy["data"]
        and method.speedup == "universal"
        and "heads" in method.axes
        and method.scope in ("units", "network")
    ]
    assert "fold" in found("--kind", "structure", "--data", "none") and "wanda" not in found("--data", "none")
    either = found("--kind", "weights", "--kind", "allocation")
    assert set(either) == set(found("--kind", "weights")) | set(found("--kind", "allocation"))
    assert found("--when", "After-Training") == list(METHODS) and found("--when", "at inference") == []
    assert set(found()) == set(METHODS)
    shown = secateur("methods", "--schedule", "iterative").out
    assert "bonsai" in shown and "wanda" not in shown
    assert "no method" in secateur("methods", "--when", "at inference").out


def test_every_axis_is_an_option_and_every_value_of_every_method_finds_it() -> None:
    help_text = secateur("methods", "--help").out
    for axis in AXES:
        assert f"--{axis}" in help_text
        for name, method in METHODS.items():
            for value in method.taxonomy[axis]:
                assert name in [each.name for each in matching(METHODS.values(), {axis: [value]})]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--data", "nine"), "Did you mean 'none'? It takes: none, text."),
        (("--kind", "structures"), "Did you mean 'structure'?"),
        (("--speedup", "fast", "--kind", "structure"), "It takes: universal, specific, none."),
        (("prunenet", "--kind", "structure"), "give a method's name or --kind, not both"),
    ],
)
def test_a_filter_that_no_method_can_meet(arguments: tuple[str, ...], what: str) -> None:
    told = secateur("methods", *arguments)
    assert told.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert what in told.err


def _zeros(weight: Weight, budget: Budget) -> Mask:
    """Zeroes the first weights of every row, and calls that fast."""
    order = torch.arange(weight.matrix.shape[1], dtype=torch.float32)
    return Mask(budget.mask(order.expand(weight.matrix.shape)))


def _keeps_first(units: Units) -> Cut:
    """Keeps the first units, and calls that slow."""
    return units.best(-torch.arange(units.count, dtype=torch.float32))


@pytest.mark.parametrize(
    ("function", "kind", "speedup", "what"),
    [
        (_zeros, "weights", "universal", "claims a universal speedup, but the dense matrices are as large as before"),
        (_keeps_first, "structure", "specific", "claims no universal speedup, but dense matrices have other shapes"),
    ],
)
def test_a_claim_that_the_shapes_do_not_bear_out_fails_the_matrix(
    function: Callable,
    kind: str,
    speedup: str,
    what: str,
    model: Callable[..., Path],
    clean: CleanProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.method("boaster", **{**CARD, "kind": kind, "speedup": speedup})(function)
    with pytest.raises(AssertionError, match=what):
        test_matrix.test_every_method_on_every_architecture(
            "boaster", "llama", model, clean, tmp_path / "no ids", tmp_path, monkeypatch
        )

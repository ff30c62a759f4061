"""The registry: a signature is the whole contract, and one that breaks it is told at import."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import Field

from secateur import RequestError, registry
from secateur.registry import Context, Cut, Network, Plan, Ratio, SyntheticGram, Units

CARD: dict[str, Any] = {
    "kind": "structure", "paper": "", "claim": "none", "when": "after training", "speedup": "universal",
    "criterion": "position", "schedule": "one-shot",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    registry.methods()
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)


def good(units: Units, context: Context, *, share: Ratio = 0.2, names: list[str] | None = None) -> Cut:
    """Keeps the first.

    Args:
        share: fraction of the neurons removed,
            told in two lines.
        names: whatever.
    """
    raise NotImplementedError


def test_a_card_is_read_from_the_signature() -> None:
    registry.method("good", **CARD)(good)
    card = registry.find("good").card()
    assert card["scope"] == "units" and set(card["needs"]) == {"units", "context"}
    assert card["summary"] == "Keeps the first."
    assert card["parameters"]["share"] == {
        "default": 0.2,
        "help": "fraction of the neurons removed, told in two lines.",
    }
    assert json.loads(json.dumps(card)) == card
    assert "good" in registry.methods()


def test_every_registered_method_has_a_card_that_json_holds() -> None:
    for name, method in registry.methods().items():
        card = method.card()
        assert json.loads(json.dumps(card))["name"] == name
        assert method.summary.endswith(".") and len(method.summary) < 200
        assert method.validate({}) == method.validate(method.validate({})), "the defaults are valid"


def no_default(units: Units, *, share: Ratio) -> Cut:
    """K.

    Args:
        share: r.
    """
    raise NotImplementedError


def not_told(units: Units, *, share: Ratio = 0.2) -> Cut:
    """K."""
    raise NotImplementedError


def wrong_default(units: Units, *, share: Ratio = 2.0) -> Cut:
    """K.

    Args:
        share: r.
    """
    raise NotImplementedError


def untyped(units, *, share: Ratio = 0.2) -> Cut:  # type: ignore[no-untyped-def]
    """K.

    Args:
        share: r.
    """
    raise NotImplementedError


def untyped_parameter(units: Units, *, share=0.2) -> Cut:  # type: ignore[no-untyped-def]
    """K.

    Args:
        share: r.
    """
    raise NotImplementedError


def unknown_need(units: Units, weather: str) -> Cut:
    """K."""
    raise NotImplementedError


def two_scopes(units: Units, network: Network) -> Cut:
    """K."""
    raise NotImplementedError


def no_scope(context: Context) -> Cut:
    """K."""
    raise NotImplementedError


def wrong_return(units: Units) -> Plan:
    """K."""
    raise NotImplementedError


def no_return(network: Network):  # type: ignore[no-untyped-def]
    """K."""
    raise NotImplementedError


def gram_of_nothing(network: Network, gram: SyntheticGram) -> Plan:
    """K."""
    raise NotImplementedError


def several(*units: Units) -> Cut:
    """K."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (no_default, "'share' needs a type and a default"),
        (not_told, r"docstring says nothing of \['share'\]"),
        (wrong_default, "contradicts its own type"),
        (untyped, "'units' asks for None"),
        (untyped_parameter, "'share' needs a type"),
        (unknown_need, "'weather' asks for"),
        (two_scopes, "one scope"),
        (no_scope, "one scope"),
        (wrong_return, "return what that scope returns"),
        (no_return, "return what that scope returns"),
        (gram_of_nothing, "'gram' asks for SyntheticGram, which is given only beside Units"),
        (several, "'units' asks for"),
    ],
)
def test_a_contract_that_is_broken(function: Callable, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        registry.method("broken", **CARD)(function)
    assert "broken" not in registry.methods()


@pytest.mark.parametrize("name", ["Upper", "with-dash", "", "1st", "random_units"])
def test_a_name_that_is_wrong_or_taken(name: str) -> None:
    with pytest.raises(TypeError, match="lower case or already taken"):
        registry.method(name, **CARD)(good)


def test_parameters_are_checked_against_the_signature() -> None:
    registry.method("good", **CARD)(good)
    method = registry.find("good")
    assert {"share": 0.5, "names": None}.items() <= method.validate({"share": "0.5"}).items()
    for given, what in (
        ({"share": 1}, "less than 1"),
        ({"share": float("nan")}, "share"),
        ({"shares": 0.3}, "Did you mean 'share'"),
        ({"names": "all"}, "names='all'"),
        ({3: 4}, "no parameter '3'"),
    ):
        with pytest.raises(RequestError, match=what):
            method.validate(given)


def test_a_bound_of_ones_own_is_kept() -> None:
    from typing import Annotated

    def bounded(units: Units, *, count: Annotated[int, Field(ge=1)] = 3) -> Cut:
        """K.

        Args:
            count: how many.
        """
        raise NotImplementedError

    registry.method("bounded", **CARD)(bounded)
    with pytest.raises(RequestError, match="greater than or equal to 1"):
        registry.find("bounded").validate({"count": 0})

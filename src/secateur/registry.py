"""The registry: every method with its card, found by name.

A method is one function. What it needs from the engine it asks for by the annotated types of its positional parameters;
what a person may set are its keyword-only parameters. The recipe's schema, the command line's help and the docs page are
read from that signature and its docstring; nothing is declared twice.

Three parameter names are a convention. The engine reads `ratio`, `ratios` (one for each layer) and `multiple_of` of a method
that cuts units, to foretell the widths it will leave: for a dry run, and to refuse an impossible width before anything is
read. A method that cuts by other rules gives its parameters other names.
"""

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from secateur.calibration.synthetic import SyntheticGram
from secateur.context import Context
from secateur.errors import RequestError, suggest
from secateur.network.views import Cut, Network, Plan, Units

__all__ = [
    "Context",
    "Cut",
    "Method",
    "Network",
    "Plan",
    "Ratio",
    "SyntheticGram",
    "Units",
    "find",
    "method",
    "methods",
]

Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of the units removed, 0 ≤ ratio < 1."""

Kind = Literal[
    "structure", "weights", "factors", "quantization", "allocation", "training", "recovery", "inference", "communication",
    "data", "analysis",
]  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What asking for a type means: how often the method is called, and what it must return.

    beside: another type without which it may not be asked for; it says of what this one is.
    """

    scope: Literal["network", "units", "any"]
    returns: type | None
    what: str
    data: str = ""
    beside: type | None = None


# The vocabulary of the contract. A new statistic or scope is one line here and its provider in an engine.
NEEDS: dict[type, Need] = {
    Network: Need("network", Plan, "the whole network's matrices, read lazily"),
    Units: Need("units", Cut, "the feed-forward neurons of one block"),
    SyntheticGram: Need(
        "any",
        None,
        "second moment of the layer's neurons on tokens drawn by Zipf's law over the vocabulary's order",
        "drawn tokens (Zipf's law over the vocabulary), no text",
        beside=Units,
    ),
    Context: Need("any", None, "random streams, resumable state, artifacts, sharing of work"),
}


@dataclass(frozen=True)
class Method:
    """A registered method and its card."""

    name: str
    kind: str
    paper: str
    claim: str
    when: str
    speedup: str
    learned: bool
    function: Callable[..., Any]
    needs: dict[str, type]
    schema: type[pydantic.BaseModel]
    help: dict[str, str] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """Called once for the whole network, or once for the units of each block."""
        scopes = {NEEDS[need].scope for need in self.needs.values()} - {"any"}
        return scopes.pop()

    @property
    def data(self) -> str:
        return ", ".join(NEEDS[need].data for need in self.needs.values() if NEEDS[need].data) or "none: weights only"

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    def validate(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Checks parameters against the signature and fills in the defaults. Raises RequestError naming the parameter."""
        known = self.schema.model_fields
        for name in parameters:
            if name not in known:
                raise RequestError(
                    f"{self.name} has no parameter '{name}'.{suggest(str(name), known)} It takes: {', '.join(known)}."
                )
        try:
            return dict(self.schema(**parameters))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise RequestError(
                f"{self.name}: {name}={first['input']!r} was refused: {first['msg'].lower()}."
                + (f" ({name}: {self.help[name]})" if name in self.help else "")
            ) from error

    def card(self) -> dict[str, Any]:
        """The card as plain data, for --json and the docs."""
        properties = self.schema.model_json_schema()["properties"]
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "paper": self.paper,
            "claim": self.claim,
            "when": self.when,
            "speedup": self.speedup,
            "decides": "learned" if self.learned else "criterion",
            "data": self.data,
            "scope": self.scope,
            "needs": {name: NEEDS[need].what for name, need in self.needs.items()},
            "parameters": {
                name: {"default": properties[name].get("default"), "help": self.help.get(name, "")}
                for name in properties
            },
        }


_registry: dict[str, Method] = {}


def method(
    name: str,
    *,
    kind: Kind,
    paper: str,
    claim: str,
    when: Literal["before training", "during training", "after training", "at inference"],
    speedup: Literal["universal", "specific", "none"],
    learned: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a method. A signature that breaks the contract is a TypeError at import.

    Args:
        name: what people script: lower case, unique.
        paper: where it is published, such as "arXiv:2501.15296"; "" with `claim` saying whose it is for our own.
        claim: one sentence: what the source claims.
        speedup: universal (dense, smaller matrices), specific (needs hardware or kernels), none.
        learned: units are chosen by something trained, not by a fixed criterion.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or (
            name in _registry and _registry[name].function is not function
        ):
            raise TypeError(f"method name '{name}' is not lower case or already taken")
        hints = typing.get_type_hints(function, include_extras=True)
        needs: dict[str, type] = {}
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            hint = hints.get(parameter.name)
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.default is inspect.Parameter.empty or hint is None:
                    raise TypeError(
                        f"{name}: parameter '{parameter.name}' needs a type and a default; a recipe must run without it"
                    )
                fields[parameter.name] = (hint, parameter.default)
            elif hint in NEEDS and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                needs[parameter.name] = hint
            else:
                raise TypeError(f"{name}: '{parameter.name}' asks for {hint}, which no engine provides")
        scopes = {NEEDS[need].scope: NEEDS[need].returns for need in needs.values() if NEEDS[need].scope != "any"}
        if len(scopes) != 1 or hints.get("return") is not next(iter(scopes.values())):
            raise TypeError(f"{name}: must ask for one scope and return what that scope returns, found {scopes}")
        for parameter_name, need in needs.items():
            beside = NEEDS[need].beside
            if beside is not None and beside not in needs.values():
                raise TypeError(
                    f"{name}: '{parameter_name}' asks for {need.__name__}, which is given only beside {beside.__name__}"
                )
        schema = pydantic.create_model(
            name, __config__=pydantic.ConfigDict(extra="forbid", validate_default=False), **fields
        )
        try:
            schema(**{key: default for key, (_, default) in fields.items()})
        except pydantic.ValidationError as error:
            raise TypeError(f"{name}: a default contradicts its own type: {error}") from error
        help_texts = _parameter_help(inspect.getdoc(function) or "")
        if missing := set(fields) - set(help_texts):
            raise TypeError(f"{name}: the docstring says nothing of {sorted(missing)}")
        _registry[name] = Method(
            name, kind, paper, claim, when, speedup, learned, function, needs, schema,
            {key: help_texts[key] for key in fields},
        )  # fmt: skip
        return function

    return register


def _parameter_help(docstring: str) -> dict[str, str]:
    """{parameter: text} from the "Args:" section of a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if not section:
        return {}
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _load() -> None:
    """Imports every module below secateur.methods once: that is how methods join."""
    package = importlib.import_module("secateur.methods")
    for module in pkgutil.walk_packages(package.__path__, "secateur.methods."):
        importlib.import_module(module.name)


def methods() -> dict[str, Method]:
    """Every registered method by name, in alphabetical order."""
    _load()
    return dict(sorted(_registry.items()))


def find(name: str) -> Method:
    """The method of that name. Raises RequestError with the nearest name when there is none."""
    known = methods()
    if name not in known:
        raise RequestError(f"there is no method '{name}'.{suggest(name, known)} `secateur methods` lists all.")
    return known[name]

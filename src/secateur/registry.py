"""The registry: every method with its card, found by name.

A method is one function. What it needs from the engine it asks for by the annotated types of its positional parameters;
what a person may set are its keyword-only parameters. The recipe's schema, the command line's help and the docs page are
read from that signature and its docstring; nothing is declared twice.

What all methods of a scope take is the engine's (`COMMON`). A method that plans a whole network takes `ratio`, `ratios` and
`multiple_of` itself, in the same sense: from them the engine foretells widths for a dry run, and refuses an impossible one
before anything is read. One that cuts by other rules gives its parameters other names.
"""

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from secateur.calibration.flow import Flow, LossWithout
from secateur.calibration.gradients import BlockGradients
from secateur.calibration.statistics import (
    INPUT_STATISTICS,
    CrossGram,
    GatedNorms,
    Gradients,
    Gram,
    InputNorms,
    Moments,
)
from secateur.calibration.synthetic import SyntheticGram
from secateur.calibration.token_counts import TokenCounts
from secateur.context import Context
from secateur.errors import RequestError, suggest
from secateur.network.anatomy import AXES, Axis
from secateur.network.blocks import Blocks, Kept
from secateur.network.views import Allocation, Cut, Mask, Matrices, Network, Plan, Units, Update, Weight
from secateur.network.vocabulary import KeptTokens, Vocabulary
from secateur.tensor.patterns import Budget, Pattern

__all__ = [
    "Allocation",
    "BlockGradients",
    "Blocks",
    "Budget",
    "Context",
    "CrossGram",
    "Cut",
    "Flow",
    "GatedNorms",
    "Gradients",
    "Gram",
    "InputNorms",
    "Kept",
    "KeptTokens",
    "LossWithout",
    "Mask",
    "MaskFrom",
    "Matrices",
    "Method",
    "Moments",
    "Network",
    "Plan",
    "Ratio",
    "SyntheticGram",
    "TokenCounts",
    "Units",
    "UnitsFrom",
    "Update",
    "Vocabulary",
    "Weight",
    "find",
    "method",
    "methods",
]

Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of the units removed, 0 ≤ ratio < 1."""


def _other(scope: str) -> Callable[[Any], Any]:
    """Validates the name of another method of that scope, alone or with parameters: {name: {parameter: value}}."""

    def validate(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value.values())) or {}, dict):
            raise ValueError("must be the name of a method, or {name: {parameter: value}}")
        [(name, parameters)] = value.items()
        found = find(str(name))
        if found.scope != scope:
            wanted = {"matrices": "an allocation", "units": "a method that chooses units block by block"}.get(
                scope, "a method that zeroes single weights"
            )
            raise ValueError(f"must name {wanted}; {name} is of kind {found.kind}")
        # what the engine decides is decided once, by the step itself
        common = COMMON.get(scope, {})
        if taken := [key for key in parameters or {} if key in common]:
            raise ValueError(f"takes no {taken[0]} for {name}: what the step itself says counts for both")
        return {name: {key: entry for key, entry in found.validate(parameters or {}).items() if key not in common}}

    return validate


MaskFrom = Annotated[Any, "mask", BeforeValidator(_other("weight"))]
"""Another method whose mask is used: the engine runs it on the same matrix first and hands in the (r, d) mask, or None."""

UnitsFrom = Annotated[Any, "units", BeforeValidator(_other("units"))]
"""Another method whose choice of units is used: the engine asks it first and hands in the (k,) indices kept, or None."""

_PatternText = Annotated[str, BeforeValidator(lambda value: str(Pattern.parse(value)))]
_Targets = Annotated[list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
_Axes = Annotated[
    list[Axis], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]

# Parameters that the engine adds to every method of a scope, and decides by: {scope: {name: (type, default, help)}}.
COMMON: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "units": {
        "ratio": (Ratio, 0.2, "fraction of the units removed in every block, 0 ≤ ratio < 1"),
        "axis": (
            _Axes,
            ["neurons"],
            "which units: neurons of the feed-forward layer, or heads of attention (those that share keys and values go "
            "together), or a list of both",
        ),
        "ratios": (list[Ratio] | None, None, "one ratio for each block, instead of `ratio`"),
        "multiple_of": (
            Annotated[int, Field(ge=1)],
            32,
            "the neurons kept are rounded to the nearest multiple of this where the ratio allows it; 1 for none",
        ),
    },
    "weight": {
        "pattern": (
            _PatternText,
            "0.5",
            "what each matrix loses: a fraction (0.5), N kept of M (2:4), or a fraction in whole tiles (0.5/16x16)",
        ),
        "targets": (
            _Targets,
            None,
            "matrices to prune: names with * in them, or attention, feed_forward, expert, mixer; default all in the blocks",
        ),
        "allocation": (
            Annotated[Any, BeforeValidator(_other("matrices"))],
            None,
            "a method that divides the budget among the matrices, such as alphapruning; default the same fraction for each",
        ),
    },
}
COMMON["matrices"] = {
    **{name: COMMON["weight"][name] for name in ("pattern", "targets")},
    "apply": (MaskFrom, "magnitude", "the method that prunes with this allocation"),
}

COMMON["blocks"] = {
    "ratio": (Ratio, 0.2, "fraction of the blocks removed, rounded half up to a whole number; one at least stays"),
    "remove": (Annotated[int, Field(ge=0)] | None, None, "how many blocks are removed; counts before ratio"),
    "protect": (list[int] | None, None, "indices of blocks that stay whatever their score, from 0; default none"),
}

Kind = Literal[
    "structure", "weights", "factors", "quantization", "allocation", "training", "recovery", "inference", "communication",
    "data", "analysis",
]  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What asking for a type means: how often the method is called, and what it must return one of.

    beside: other types, without one of which it may not be asked for; that one says of what this one is.
    """

    scope: Literal["network", "units", "weight", "matrices", "blocks", "vocabulary", "any"]
    returns: tuple[type, ...]
    what: str
    data: str = ""
    beside: tuple[type, ...] = ()


# The vocabulary of the contract. A new statistic or scope is one line here and its provider in an engine.
_TEXT = "calibration text"
_READERS = (Weight, Units)  # what reads inputs: a matrix, or the matrix behind units
NEEDS: dict[type, Need] = {
    Network: Need("network", (Plan,), "the whole network's matrices, read lazily"),
    Units: Need("units", (Cut,), "the units of one kind in one block"),
    Weight: Need("weight", (Mask, Update), "one matrix"),
    Matrices: Need("matrices", (Allocation,), "every matrix that is to be pruned, read lazily"),
    Blocks: Need("blocks", (Kept,), "the blocks in order, each read lazily, and how many of them are to go"),
    Flow: Need("any", (), "how much each block changes the hidden states", _TEXT, beside=(Blocks,)),
    LossWithout: Need("any", (), "the loss without each block", _TEXT, beside=(Blocks,)),
    BlockGradients: Need(
        "any",
        (),
        "how much the loss reacts to each block's weights (the whole model in memory)",
        f"{_TEXT}, gradients",
        beside=(Blocks,),
    ),
    Vocabulary: Need("vocabulary", (KeptTokens,), "the tokens of the model, and what each of them writes"),
    TokenCounts: Need("any", (), "how often each token occurs in the whole text", _TEXT, beside=(Vocabulary,)),
    Budget: Need("any", (), "how many weights the matrix loses, in which pattern", beside=(Weight,)),
    InputNorms: Need("any", (), "mean square of each input of the matrix", _TEXT, beside=_READERS),
    GatedNorms: Need("any", (), "the same, each token counted by its expert's gate", _TEXT, beside=(Weight,)),
    Moments: Need("any", (), "mean and variance of each input of the matrix", _TEXT, beside=_READERS),
    Gram: Need("any", (), "second moment of the inputs of the matrix", _TEXT, beside=_READERS),
    CrossGram: Need(
        "any", (), "inputs in the dense network against those behind compressed layers", _TEXT, beside=_READERS
    ),
    Gradients: Need(
        "any", (), "squared gradients of the loss (the whole model in memory)", f"{_TEXT}, gradients", beside=(Weight,)
    ),
    SyntheticGram: Need(
        "any",
        (),
        "second moment of the layer's neurons on tokens drawn by Zipf's law over the vocabulary's order",
        "drawn tokens (Zipf's law over the vocabulary), no text",
        beside=(Units,),
    ),
    Context: Need("any", (), "random streams, resumable state, artifacts, sharing of work"),
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
    axes: tuple[Axis, ...]
    function: Callable[..., Any]
    needs: dict[str, type]
    schema: type[pydantic.BaseModel]
    help: dict[str, str] = field(default_factory=dict)
    only: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """Called once for the network, all matrices, blocks or tokens, or for the units of each block or each matrix."""
        scopes = {NEEDS[need].scope for need in self.needs.values()} - {"any"}
        return scopes.pop()

    @property
    def data(self) -> str:
        said: dict[str, list[str]] = {}
        for name, need in self.needs.items():
            if NEEDS[need].data:
                said.setdefault(NEEDS[need].data, []).append(self._condition(name))
        asked = [f"{data} ({' or '.join(when)})" if all(when) else data for data, when in said.items()]
        if said and all(all(when) for when in said.values()):
            return "; ".join(["none: weights only", *asked])
        return ", ".join(asked) or "none: weights only"

    def _condition(self, name: str) -> str:
        """Under which parameters something is asked for; "" where always."""
        return " and ".join(f"{key}={value}" for key, value in self.only.get(name, {}).items())

    def asked(self, parameters: Mapping[str, Any]) -> dict[str, type]:
        """What it asks for with these parameters; anything else is given as None."""
        return {
            name: need
            for name, need in self.needs.items()
            if all(parameters[key] == value for key, value in self.only.get(name, {}).items())
        }

    @property
    def statistics(self) -> set[type]:
        """What it asks for of a matrix's inputs."""
        return {need for need in self.needs.values() if need in INPUT_STATISTICS}

    @property
    def own(self) -> set[str]:
        """Its parameters without those that the engine adds."""
        return set(self.schema.model_fields) - set(COMMON.get(self.scope, {}))

    @property
    def others(self) -> list[str]:
        """Its parameters that name another method."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        return [name for name, hint in hints.items() if hint in (MaskFrom, UnitsFrom)]

    @property
    def caution(self) -> str:
        """What a person must know before a run and after it; "" where there is nothing."""
        if self.scope not in ("weight", "matrices"):
            return ""
        return (
            f"{self.name} only writes zeros: neither files nor speed change by themselves. What gains from them is storage "
            "that compresses zeros, and kernels for 2:4 on devices that have them."
        )

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
        # the name of another method is looked up when all are known, so its default is validated here
        lazy = {
            name: known[name].default for name in known if _is_other(known[name]) and known[name].default is not None
        }
        try:
            read = dict(self.schema(**{**lazy, **parameters}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise RequestError(
                f"{self.name}: {name}={first['input']!r} was refused: {message(first)}."
                + (f" ({name}: {self.help[name]})" if name in self.help else "")
            ) from error
        for name in lazy:
            if read[name] is None:
                raise RequestError(
                    f"{self.name}: {name} names a method and cannot be null; leave it out for its default."
                )
        for name in self.others if self.scope == "units" else ():
            [other] = read[name] or [self.name]
            if missing := [axis for axis in read["axis"] if axis not in find(other).axes]:
                raise RequestError(
                    f"{self.name}: {name}={other} cuts no {missing[0]}; name another method, or another axis."
                )
        for axis in read["axis"] if self.scope == "units" else ():
            if axis not in self.axes:
                raise RequestError(f"{self.name} cuts {' and '.join(self.axes)} only, not {axis}; leave `axis` out.")
        return read

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
            "caution": self.caution,
            "decides": "learned" if self.learned else "criterion",
            "data": self.data,
            "scope": self.scope,
            "cuts": ", ".join(self.axes) if self.scope in ("units", "network") else "",
            "needs": {
                name: NEEDS[need].what + (f" ({when})" if (when := self._condition(name)) else "")
                for name, need in self.needs.items()
            },
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
    axes: tuple[Axis, ...] = AXES,
    only: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a method. A signature that breaks the contract is a TypeError at import.

    Args:
        name: what people script: lower case, unique.
        paper: where it is published, such as "arXiv:2501.15296"; "" with `claim` saying whose it is for our own.
        claim: one sentence: what the source claims.
        speedup: universal (dense, smaller matrices), specific (needs hardware or kernels), none.
        learned: units are chosen by something trained, not by a fixed criterion.
        axes: the units that it can cut, for a method that cuts some.
        only: what is asked for under some parameters alone, {asked for: {parameter: value}}; it is None otherwise, and its
            type says so.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or (
            name in _registry and _registry[name].function is not function
        ):
            raise TypeError(f"method name '{name}' is not lower case or already taken")
        hints = typing.get_type_hints(function, include_extras=True)
        needs: dict[str, type] = {}
        fields: dict[str, Any] = {}
        conditions = only or {}
        for parameter in inspect.signature(function).parameters.values():
            hint = hints.get(parameter.name)
            if parameter.name in conditions and isinstance(hint, types.UnionType):
                hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
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
        if unknown := set(conditions) - set(needs) | {key for when in conditions.values() for key in when} - set(
            fields
        ):
            raise TypeError(f"{name}: only={conditions} names {sorted(unknown)}, which the signature does not hold")
        scopes = {NEEDS[need].scope: NEEDS[need].returns for need in needs.values() if NEEDS[need].scope != "any"}
        if len(scopes) != 1 or hints.get("return") not in next(iter(scopes.values())):
            raise TypeError(f"{name}: must ask for one scope and return what that scope returns, found {scopes}")
        common = COMMON.get(next(iter(scopes)), {})
        if taken := set(fields) & set(common):
            raise TypeError(f"{name}: {sorted(taken)} are the engine's; the method gets what follows from them")
        own = set(fields)
        fields |= {key: (hint, default) for key, (hint, default, _) in common.items()}
        for parameter_name, need in needs.items():
            beside = NEEDS[need].beside
            if beside and not set(beside) & set(needs.values()):
                given = " or ".join(other.__name__ for other in beside)
                raise TypeError(
                    f"{name}: '{parameter_name}' asks for {need.__name__}, which is given only beside {given}"
                )
        schema = pydantic.create_model(
            name, __config__=pydantic.ConfigDict(extra="forbid", validate_default=False), **fields
        )
        try:
            schema(**{key: fields[key][1] for key in own if not _is_other(schema.model_fields[key])})
        except pydantic.ValidationError as error:
            raise TypeError(f"{name}: a default contradicts its own type: {error}") from error
        help_texts = _parameter_help(inspect.getdoc(function) or "")
        if missing := own - set(help_texts):
            raise TypeError(f"{name}: the docstring says nothing of {sorted(missing)}")
        _registry[name] = Method(
            name, kind, paper, claim, when, speedup, learned, axes, function, needs, schema,
            {key: common[key][2] if key in common else help_texts[key] for key in fields}, conditions,
        )  # fmt: skip
        return function

    return register


def message(error: Mapping[str, Any]) -> str:
    """What pydantic says of a value that it refused, as the end of a sentence."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return str(error["msg"]).lower()


def _is_other(field: pydantic.fields.FieldInfo) -> bool:
    return any(
        isinstance(entry, BeforeValidator) and entry.func.__qualname__.startswith("_other") for entry in field.metadata
    )


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

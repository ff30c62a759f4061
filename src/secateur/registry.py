"""The registry: every method with its card, found by name.

A method is one function. What it needs from the engine it asks for by the annotated types of its positional parameters;
what a person may set are its keyword-only parameters. The recipe's schema, the command line's help and the docs page are
read from that signature and its docstring; nothing is declared twice.

What may be asked for, and what the engine adds, stands in `secateur.contract`; methods import all of it from here.
"""

import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

from secateur.calibration.activations import Activations
from secateur.calibration.divergence_trials import DivergenceTrials
from secateur.calibration.evaluator import Evaluator
from secateur.calibration.flow import Flow, LossWithout
from secateur.calibration.gradients import BlockGradients
from secateur.calibration.routing import Routing
from secateur.calibration.silenced_flow import SilencedFlow
from secateur.calibration.sliced_stream import SlicedStream
from secateur.calibration.statistics import (
    INPUT_STATISTICS,
    CrossGram,
    GatedNorms,
    Gradients,
    Gram,
    HeldOutInputs,
    InputNorms,
    Moments,
)
from secateur.calibration.stream_moment import StreamMoment
from secateur.calibration.synthetic import SyntheticGram
from secateur.calibration.token_counts import TokenCounts
from secateur.calibration.unit_gradients import UnitGradients
from secateur.context import Context
from secateur.contract import COMMON, NEEDS, Axes, Kind, MaskFrom, Ratio, UnitsFrom
from secateur.errors import RequestError, suggest
from secateur.network.anatomy import COLUMN_AXES, CutAxis
from secateur.network.blocks import Blocks, Kept
from secateur.network.scores import ErrorCurves, UnitScores
from secateur.network.views import Allocation, Cut, Mask, Matrices, Network, Neurons, Plan, Units, Update, Weight
from secateur.network.vocabulary import KeptTokens, Vocabulary
from secateur.signatures import either, is_other, parameter_help
from secateur.taxonomy import Comparison, Criterion, Family, Said, Schedule, Speedup, Tuning, When, classify
from secateur.tensor.patterns import Budget

__all__ = [
    "Activations",
    "Allocation",
    "Axes",
    "BlockGradients",
    "Blocks",
    "Budget",
    "Context",
    "CrossGram",
    "Cut",
    "DivergenceTrials",
    "ErrorCurves",
    "Evaluator",
    "Flow",
    "GatedNorms",
    "Gradients",
    "Gram",
    "HeldOutInputs",
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
    "Neurons",
    "Plan",
    "Ratio",
    "Routing",
    "SilencedFlow",
    "SlicedStream",
    "StreamMoment",
    "SyntheticGram",
    "TokenCounts",
    "UnitGradients",
    "UnitScores",
    "Units",
    "UnitsFrom",
    "Update",
    "Vocabulary",
    "Weight",
    "find",
    "method",
    "methods",
]


@dataclass(frozen=True)
class Method:
    """A registered method and its card."""

    name: str
    kind: str
    paper: str
    claim: str
    when: str
    speedup: str
    taxonomy: Mapping[str, tuple[str, ...]]
    axes: tuple[CutAxis, ...]
    function: Callable[..., Any]
    needs: dict[str, type]
    schema: type[pydantic.BaseModel]
    help: dict[str, str] = field(default_factory=dict)
    only: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    scores: bool = True

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
                when = "" if name in self.either else self._condition(name)
                said.setdefault(NEEDS[need].data, []).append(when)
        asked = [f"{data} ({' or '.join(when)})" if all(when) else data for data, when in said.items()]
        if said and all(all(when) for when in said.values()):
            return "; ".join(["none: weights only", *asked])
        return ", ".join(asked) or "none: weights only"

    @property
    def either(self) -> set[str]:
        """What is asked for under one value of a parameter each, so that something like it is always asked for."""
        return either(
            self.needs, self.only, {name: field.annotation for name, field in self.schema.model_fields.items()}
        )

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
            name: known[name].default for name in known if is_other(known[name]) and known[name].default is not None
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
        for axis in read.get("axis", ()):
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
            "decides": ", ".join(self.taxonomy["decides"]),
            "data": self.data,
            "scope": self.scope,
            "cuts": ", ".join(self.axes) if self.scope in ("units", "network") else "",
            "taxonomy": {axis: list(values) for axis, values in self.taxonomy.items()},
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
    when: When,
    speedup: Speedup,
    criterion: Criterion | tuple[Criterion, ...],
    schedule: Schedule,
    comparison: Comparison | tuple[Comparison, ...] = (),
    fuses: tuple[Family, ...] = (),
    family: Family | None = None,
    tuning: Tuning | None = None,
    uneven: bool = False,
    axes: tuple[CutAxis, ...] = COLUMN_AXES,
    only: Mapping[str, Mapping[str, Any]] | None = None,
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda _: None,
    scores: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a method. A signature that breaks the contract is a TypeError at import.

    Args:
        name: what people script: lower case, unique.
        paper: where it is published, such as "arXiv:2501.15296"; "" with `claim` saying whose it is for our own.
        claim: one sentence: what the source claims.
        speedup: universal (dense, smaller matrices), specific (needs hardware or kernels), none. The test matrix compares
            the shapes of every result with what is claimed.
        criterion: what it looks at to decide, one or several; "another method's" where it names one.
        schedule: iterative where what is left is measured again before more goes.
        comparison: for methods that plan a whole network, who a unit competes with; it follows from the signature of others.
        fuses: other families of compression that it can apply in the same step.
        family, tuning: for kinds that do not say it (training, recovery, ...): see `secateur.taxonomy`.
        uneven: by default blocks come out with different widths, and the result needs the code beside it.
        axes: the units that it can cut, for a method that cuts some.
        only: what is asked for under some parameters alone, {asked for: {parameter: value}}; it is None otherwise, and its
            type says so.
        refuses: the sentence that says why parameters, the engine's included, contradict each other; None where they do not.
            Asked before anything is read.
        scores: whether a method that chooses units states a score of each, by which an allocation can compare blocks.
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
            hint = Network if typing.get_origin(hint) is Network else hint  # Network[Neurons]
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
            schema(**{key: fields[key][1] for key in own if not is_other(schema.model_fields[key])})
        except pydantic.ValidationError as error:
            raise TypeError(f"{name}: a default contradicts its own type: {error}") from error
        help_texts = parameter_help(inspect.getdoc(function) or "")
        if missing := own - set(help_texts):
            raise TypeError(f"{name}: the docstring says nothing of {sorted(missing)}")
        said = Said(when, speedup, criterion, schedule, comparison, fuses, family, tuning, uneven)
        sometimes = set(conditions) - either(needs, conditions, {key: hint for key, (hint, _) in fields.items()})
        taxonomy = classify(name, kind, next(iter(scopes)), axes, needs, sometimes, said)
        _registry[name] = Method(
            name, kind, paper, claim, when, speedup, taxonomy, axes, function, needs, schema,
            {key: common[key][2] if key in common else help_texts[key] for key in fields}, conditions,
            refuses, scores,
        )  # fmt: skip
        return function

    return register


def message(error: Mapping[str, Any]) -> str:
    """What pydantic says of a value that it refused, as the end of a sentence."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return str(error["msg"]).lower()


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

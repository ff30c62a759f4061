"""The commands that advice shows: the run again, with all of its settings but what is to change."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.contract import COMMON
from secateur.errors import RequestError
from secateur.registry import Method, find
from secateur.telling import Told

_BEFORE_RATIO = ("target", "remove", "ratios")
"""Settings that decide how much goes, whatever `ratio` says."""
_SHARED = {name for common in COMMON.values() for name in common}
"""Settings that mean the same in every method that has them."""


def ratios(told: Told) -> dict[int, float]:
    """The ratio of each step in which it is a fraction of the units or blocks, and nothing else decides how much goes."""
    found = {}
    for index, step in enumerate(told.steps):
        had = step.parameters
        ratio = had.get("ratio")
        decided = any(had.get(name) is not None for name in _BEFORE_RATIO) or had.get("of", "units") != "units"
        if isinstance(ratio, float) and not decided:
            found[index] = ratio
    return found


def changed(told: Told, wanted: Mapping[int, float]) -> str:
    """The run with other ratios, by step. Of several steps, from its receipt."""
    model = shlex.quote(str(told.at("source", "model")))
    if len(told.steps) > 1:
        settings = [f"--set {index}.ratio={ratio}" for index, ratio in wanted.items()]
        return " ".join(["secateur compress", model, "--recipe DIR/secateur.json", *settings, "--output NEW"])
    [step], [ratio] = told.steps, wanted.values()
    settings = _settings({**_beside_defaults(step.registered, step.parameters), "ratio": ratio})
    text = ["--calibration FILE"] if told.read_text(0) else []
    return " ".join(["secateur compress", model, f"--method {step.method}", *settings, *text, "--output NEW"])


def exchanged(told: Told, index: int, others: Sequence[Method]) -> str:
    """The end of a sentence that says how to let another method, which reads text, do what a step did: the first of them
    that takes its settings. "" where none does.
    """
    if index >= len(told.steps):
        return ""
    step = told.steps[index]
    kept = {
        name: value for name, value in _beside_defaults(step.registered, step.parameters).items() if name in _SHARED
    }
    for other in others:
        settings = _taken(kept | _amount(step.parameters, other), other)
        if settings is None:
            continue
        if len(told.steps) > 1:
            return f", as in step {index} of DIR/secateur.json's recipe `{json.dumps({other.name: settings})}`"
        model = shlex.quote(str(told.at("source", "model")))
        parts = ["secateur compress", model, f"--method {other.name}", *_settings(settings)]
        return f", as in `{' '.join([*parts, '--calibration FILE', '--output NEW'])}`"
    return ""


def _amount(had: Mapping[str, Any], other: Method) -> dict[str, Any]:
    """How much goes, which is said even where it is the default: that of another method may differ."""
    if any(had.get(name) is not None for name in _BEFORE_RATIO):
        return {}
    return {name: had[name] for name in ("ratio", "pattern") if name in had and name in other.schema.model_fields}


def _taken(settings: Mapping[str, Any], other: Method) -> dict[str, Any] | None:
    """The settings, if the other method takes them all."""
    try:
        other.validate(settings)
    except RequestError:
        return None
    return dict(settings)


def _beside_defaults(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the method's own defaults; those of a method inside them too."""
    usual = method.validate({})
    found = {name: value for name, value in parameters.items() if name in usual and value != usual[name]}
    for name in (*method.others, "allocation"):
        if isinstance(value := found.get(name), dict):
            [(inner, given)] = value.items()
            less = _beside_defaults(find(inner), {**given})
            found[name] = {inner: less} if less else inner
    return found


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """As a shell takes them."""
    return ["--set " + shlex.quote(f"{name}={_value(value)}") for name, value in settings.items()]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)

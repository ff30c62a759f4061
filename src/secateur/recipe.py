"""What to do: an ordered list of steps, each one method with its parameters. YAML in and out."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from secateur.calibration.samples import SELF, Calibration, read_entries
from secateur.contract import COMMON, NEEDS
from secateur.errors import RequestError, suggest
from secateur.evaluation.facts import read_facts
from secateur.evaluation.tasks import check_limit, check_tasks
from secateur.files import sha256
from secateur.registry import Method, find, message
from secateur.solving import Solver


class Step(BaseModel):
    """One method and its parameters, complete with defaults."""

    model_config = ConfigDict(frozen=True)

    method: str
    parameters: dict[str, Any]

    @property
    def registered(self) -> Method:
        return find(self.method)

    @property
    def calibrated(self) -> bool:
        """Whether it learns from text, itself or through a method that it names."""
        if self.registered.scope in ("network", "blocks", "vocabulary"):
            return any(NEEDS[need].data for need in self.registered.asked(self.parameters).values())
        if self.registered.scope not in ("weight", "units"):
            return False
        return Solver.of(self.registered, self.parameters).calibrated or self._divides_by_text

    @property
    def _divides_by_text(self) -> bool:
        """Whether its allocation reads text, whatever its method does."""
        divider = next(iter(self.parameters.get("allocation") or ()), None)
        needs = [NEEDS[need] for need in find(divider).needs.values()] if divider else []
        return any(need.scope == "any" and need.data for need in needs)

    def plain(self) -> dict[str, Any]:
        """As it is written in a recipe: {method: {parameter: value}}, in plain data."""
        return {self.method: {name: _plain(value) for name, value in self.parameters.items()}}


class Evaluate(BaseModel):
    """What the result card measures after the run, as in `evaluate`. divergent: divergent tokens too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path | None = None
    window: int | None = None
    windows: int | None = None
    divergent: bool = False
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    kick: bool = False
    facts: Path | None = None

    def check(self, trust_remote_code: bool) -> None:
        """Raises RequestError where what is to be measured at the end of a run could not be, or is not said."""
        check_limit(self.limit, bool(self.tasks or self.kick or self.facts))
        check_tasks(self.tasks, self.limit, trust_remote_code)
        if self.kick or self.facts is not None:
            read_facts(self.facts, self.limit)


class Recipe(BaseModel):
    """What to do with a model.

    Args:
        model: MODEL as the command line takes it; the command line wins.
        seed: every random stream of the run is addressed from it.
        dtype: dtype of the written weights; None keeps the source's (bfloat16 for GGUF).
        steps: in order.
        calibration: what methods that learn from text learn from.
        evaluate: what to measure on the result; False for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    seed: int = 0
    dtype: str | None = None
    steps: tuple[Step, ...]
    calibration: Calibration = Calibration()
    evaluate: Evaluate | bool = True

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value not in (None, "float32", "bfloat16", "float16"):
            raise ValueError("must be float32, bfloat16 or float16")
        return value

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Recipe":
        """Checks a recipe as read from YAML. Raises RequestError naming the entry."""
        _check_entries("a recipe", raw, cls)
        for part, model in (("calibration", Calibration), ("evaluate", Evaluate)):
            if isinstance(entries := raw.get(part), Mapping):
                _check_entries(part, entries, model)
        steps = raw.get("steps")
        if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
            raise RequestError(
                "a recipe needs `steps`: a list with one method each, such as `- prunenet: {ratio: 0.2}`."
            )
        try:
            return cls(**{**raw, "steps": tuple(_step(entry) for entry in steps)})
        except ValidationError as error:
            first = error.errors()[0]
            # what may be one of two types is named by its type too, which no recipe holds
            name = ".".join(str(part) for part in first["loc"] if part not in (Evaluate.__name__, "bool"))
            raise RequestError(f"recipe: {name}={first['input']!r} was refused: {message(first)}.") from error

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Reads a recipe (YAML), or the recipe inside a receipt (secateur.json)."""
        if not path.is_file():
            raise RequestError(f"there is no recipe at {path}.")
        try:
            raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise RequestError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
        if isinstance(raw, dict) and "recipe" in raw and "steps" not in raw:
            raw = raw["recipe"]
        if not isinstance(raw, dict):
            raise RequestError(f"{path} does not hold a recipe: a mapping with `steps` is wanted.")
        return cls.parse(raw)

    @classmethod
    def of(cls, method: str, settings: Sequence[str]) -> "Recipe":
        """One step, with `key=value` settings."""
        parameters: dict[str, Any] = {}
        rest = []
        for setting in settings:
            where, name, value = _setting(setting)
            if where in ("", method, "0"):
                parameters[name] = value
            else:
                rest.append(setting)
        return cls.parse({"steps": [{method: parameters}]}).override(rest)

    def override(self, settings: Sequence[str]) -> "Recipe":
        """This recipe with `key=value` or `STEP.key=value` settings; STEP is a method's name or its position from 0, or
        `calibration`.

        A step that an allocation divides the budget of takes the allocation's settings too, under either name.
        """
        steps = [(step.method, dict(step.parameters)) for step in self.steps]
        wishes: dict[str, Any] = {}
        for setting in settings:
            where, name, value = _setting(setting)
            if where == "calibration":
                wishes[name] = value
                continue
            matching = [
                i
                for i, (method, parameters) in enumerate(steps)
                if not where or where in (method, str(i), *(parameters.get("allocation") or ()))
            ]
            if not matching:
                raise RequestError(f"--set {setting}: the recipe has no step '{where}'.")
            if len(matching) > 1:
                raise RequestError(
                    f"--set {setting}: several steps could be meant; write STEP.{name}=… with its position."
                )
            steps[matching[0]] = _changed(*steps[matching[0]], where, name, value)
        changed = Recipe.parse(self.plain() | {"steps": [{method: parameters} for method, parameters in steps]})
        return changed.with_calibration(wishes)

    def with_calibration(self, settings: Mapping[str, Any]) -> "Recipe":
        """This recipe with other calibration settings. Raises RequestError when one is wrong or nothing would use them."""
        if not settings:
            return self
        if not self.calibrated:
            methods = ", ".join(step.method for step in self.steps)
            raise RequestError(
                f"{methods} learns from no text, so it takes no calibration; leave {', '.join(settings)} out."
            )
        return Recipe.parse(self.plain() | {"calibration": {**self.calibration.model_dump(), **settings}})

    @property
    def calibrated(self) -> bool:
        """Whether a step learns from text."""
        return any(step.calibrated for step in self.steps)

    def check_files(self) -> None:
        """Raises RequestError naming the first file that the recipe needs and that is not there."""
        text = self.evaluate.text if isinstance(self.evaluate, Evaluate) else None
        if text is not None and not text.is_file():
            raise RequestError(f"there is no text at {text}.")
        if self.calibrated:
            self.calibration.check()
        counting = [step.method for step in self.steps if step.registered.scope == "vocabulary" and step.calibrated]
        if counting and self.calibration.data == SELF:
            raise RequestError(f"{counting[0]} counts the tokens of a text; name one with --calibration.")
        for index, step in enumerate(self.steps):
            later = [other.method for other in self.steps[index + 1 :] if other.calibrated]
            if step.registered.scope == "vocabulary" and later and _holds_ids(self.calibration.data):
                raise RequestError(
                    f"{self.calibration.data} holds token ids, which mean other tokens behind {step.method}, where "
                    f"{later[0]} reads them; give text instead."
                )
        for where, path in self._files():
            if not path.exists():
                raise RequestError(f"{where.replace('.', ': ', 1)}={path} does not exist.")

    def plain(self) -> dict[str, Any]:
        """The recipe in plain data, as YAML or JSON hold it."""
        return self.model_dump(mode="json") | {"steps": [step.plain() for step in self.steps]}

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result: steps, seed, dtype, and the content of files that parameters name."""
        files = {where: sha256(path) if path.is_file() else None for where, path in self._files()}
        plain = self.plain()
        decides = {"seed": plain["seed"], "dtype": plain["dtype"], "steps": plain["steps"], "files": files}
        return decides | ({"calibration": self.calibration.identity()} if self.calibrated else {})

    def _files(self) -> list[tuple[str, Path]]:
        """Files that parameters name, those of methods inside methods too."""

        def inside(where: str, value: Any) -> list[tuple[str, Path]]:
            if isinstance(value, Path):
                return [(where, value)]
            if isinstance(value, dict):
                return [found for key, entry in value.items() for found in inside(f"{where}.{key}", entry)]
            return []

        return [found for step in self.steps for found in inside(step.method, step.parameters)]


def _check_entries(what: str, raw: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Raises RequestError naming the first entry that `model` does not have."""
    known = model.model_fields
    for name in raw:
        if name not in known:
            raise RequestError(f"{what} has no entry '{name}'.{suggest(str(name), known)} It has: {', '.join(known)}.")


def _holds_ids(data: str) -> bool:
    return Path(data).suffix in (".json", ".jsonl") and any(isinstance(entry, list) for entry in read_entries(data))


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is text. YAML 1.1 takes it for a number in base 60, 124."""


_IN_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$"))
_Loader.yaml_implicit_resolvers = {
    first: [_IN_BASE_60, *resolvers] if first in "0123456789" else resolvers
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _setting(text: str) -> tuple[str, str, Any]:
    """STEP ("" where none is named), name and value of a setting."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text} is not of the form key=value.")
    where, _, name = key.rpartition(".")
    if value.startswith("*"):  # a pattern of names; YAML has no other use for it here
        return where, name, value
    try:
        return where, name, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise RequestError(f"--set {text}: the value is not valid YAML; put it in quotes.") from error


def each_setting(text: str) -> list[str]:
    """The settings that `key=value,value,…` stands for, one for each value: ["key=value", …]. Raises RequestError."""
    key, equals, listed = text.partition("=")
    try:
        values = yaml.load(f"[{listed}]", _Loader)
    except yaml.YAMLError as error:
        raise RequestError(f"--grid {text}: the values are not valid YAML, with commas between them.") from error
    if not equals or not values:
        raise RequestError(f"--grid {text} is not of the form key=value,value, such as ratio=0.1,0.2.")
    return [f"{key}={value if isinstance(value, int | float | str) else json.dumps(value)}" for value in values]


def _changed(method: str, parameters: dict[str, Any], where: str, name: str, value: Any) -> tuple[str, dict[str, Any]]:
    """A step with one more setting, of its method or of its allocation."""
    if parameters.get("allocation"):
        [(divider, own)] = parameters["allocation"].items()
        if name == "apply":
            common = {key: parameters[key] for key in COMMON[find(divider).scope] if key in parameters}
            return divider, {**own, **common, "apply": value}
        if name in find(divider).own and (where == divider or name not in find(method).own):
            return method, {**parameters, "allocation": {divider: {**own, name: value}}}
    return method, {**parameters, name: value}


def _step(entry: Any) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise RequestError(
            f"a step is one method with its parameters, such as `- prunenet: {{ratio: 0.2}}`, not {entry!r}."
        )
    [(name, parameters)] = entry.items()
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"the parameters of step '{name}' must be a mapping, not {parameters!r}.")
    method = find(str(name))
    read = method.validate(parameters or {})
    if method.scope in ("matrices", "widths"):
        # an allocation prunes nothing by itself: it is written as a setting of the method that does
        own = {key: value for key, value in read.items() if key not in COMMON[method.scope]}
        [(name, given)] = read["apply"].items()
        common = COMMON["weight" if method.scope == "matrices" else "units"]
        settings = {key: read[key] for key in common if key in read} | {"allocation": {method.name: own}}
        return Step(method=name, parameters=find(name).validate({**given, **settings}))
    return Step(method=method.name, parameters=read)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))

"""What is compared: recipes with names, from files, from methods, and from every combination of a grid's values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from secateur.errors import RequestError
from secateur.recipe import Evaluate, Recipe, each_setting


@dataclass(frozen=True)
class Entry:
    """A recipe and what its row is called."""

    name: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """What its result is called among others."""
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", self.name).strip("-.") or "run"


def entries(
    files: Sequence[Path] = (),
    methods: Sequence[str] = (),
    settings: Sequence[str] = (),
    grid: Sequence[str] = (),
    calibration: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """The rows that a command line asks for.

    Args:
        files: YAML recipes or receipts; a row is called as its file.
        methods: names of methods, one recipe of one step each.
        settings: `key=value` for every recipe, `STEP.key=value` for those that have the step.
        grid: `key=value,value`, once more for each value; several are combined each with each.
        calibration: settings for every recipe that learns from text.

    Raises RequestError where a name is unknown, a setting fits none, or two rows are called alike.
    """
    if not files and not methods:
        raise RequestError("name what to compare: --recipe FILE or --method NAME, each as often as you like.")
    plain = [(Path(file).stem, Recipe.read(Path(file))) for file in files]
    plain += [(method, Recipe.of(method, [])) for method in methods]
    for setting in [*settings, *grid]:
        if not any(_meant(setting, recipe) for _, recipe in plain):
            raise RequestError(
                f"{setting}: no recipe has a step '{_where(setting)}', or learns from text; leave it out."
            )
    found = []
    for name, recipe in plain:
        own = [setting for setting in settings if _meant(setting, recipe)]
        for chosen in product(*(each_setting(each) for each in grid if _meant(each, recipe))):
            told = recipe.override([*own, *chosen])
            if calibration and told.calibrated:
                told = told.with_calibration(calibration)
            found.append(Entry(" ".join([name, *chosen]), told))
    if calibration and not any(entry.recipe.calibrated for entry in found):
        raise RequestError(
            f"none of the recipes learns from text, so they take no calibration; leave {', '.join(calibration)} out."
        )
    return checked(found)


def checked(found: Sequence[Entry]) -> list[Entry]:
    """The entries, if each can have a folder of its own. Raises RequestError."""
    if not found:
        raise RequestError("name at least one recipe to compare.")
    seen: dict[str, str] = {}
    for entry in found:
        folder = entry.folder.lower()  # some file systems do not tell capitals apart
        if folder in seen:
            alike = f"'{entry.name}'" if seen[folder] == entry.name else f"'{seen[folder]}' and '{entry.name}'"
            raise RequestError(f"two recipes are called {alike}, so they could not be told apart; rename one.")
        seen[folder] = entry.name
    return list(found)


def measured_alike(found: Sequence[Entry], asked: Mapping[str, Any]) -> list[Entry]:
    """The entries with one protocol for all: what is `asked` on top of what the recipes say.

    Raises RequestError where recipes then still want different things measured.
    """
    alike = []
    for entry in found:
        wanted = entry.recipe.evaluate
        own = wanted.model_dump(mode="json") if isinstance(wanted, Evaluate) else {}
        if own or asked:
            plain = entry.recipe.plain() | {"evaluate": {**own, **asked}}
            entry = Entry(entry.name, Recipe.parse(plain))
        alike.append(entry)
    if len({str(entry.recipe.plain()["evaluate"]) for entry in alike}) > 1:
        each_wants = [entry.recipe.evaluate for entry in alike]
        told = [each if isinstance(each, Evaluate) else Evaluate() for each in each_wants]
        differ = [name for name in Evaluate.model_fields if len({str(getattr(each, name)) for each in told}) > 1]
        remedy = f"say {', '.join(f'--{name}' for name in differ)} for all, or write" if differ else "write"
        raise RequestError(
            f"the recipes want different things measured, which would not compare ({', '.join(differ) or 'some nothing'}); "
            f"{remedy} the same `evaluate` in every recipe."
        )
    return alike


def _where(setting: str) -> str:
    return setting.partition("=")[0].rpartition(".")[0]


def _meant(setting: str, recipe: Recipe) -> bool:
    """Whether a setting speaks of a step that this recipe has, or of all recipes."""
    where = _where(setting)
    if where == "calibration":
        return recipe.calibrated
    names = {name for step in recipe.steps for name in (step.method, *(step.parameters.get("allocation") or ()))}
    return where in ("", *names, *map(str, range(len(recipe.steps))))

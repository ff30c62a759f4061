"""Reads the directories that a page is made of: finished runs, and comparisons of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import RequestError
from secateur.figures import COMPARISON, read_plain, read_receipt
from secateur.workspace import RECEIPT


@dataclass(frozen=True)
class Run:
    """A finished run. path: its directory. name: what the page calls it. anchor: where on the page it is told."""

    path: Path
    name: str
    receipt: Mapping[str, Any]
    anchor: str


@dataclass(frozen=True)
class Comparison:
    """What `secateur compare` wrote. runs: by the place of their row, those whose result can still be read."""

    name: str
    told: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    runs: Mapping[int, Run]


def gather(directories: Sequence[str | Path]) -> tuple[list[Comparison], list[Run]]:
    """The comparisons, and all runs: those of comparisons first, each once. Raises RequestError."""
    if not directories:
        raise RequestError("name at least one directory that `secateur compress` or `secateur compare` has written.")
    comparisons: list[Comparison] = []
    runs: dict[Path, Run] = {}

    def add(path: Path, name: str, card: Any = None) -> Run:
        where = path.resolve()
        if where not in runs:
            taken = {run.name for run in runs.values()}
            free = next(each for each in _names(name, where) if each not in taken)
            # speeds of a comparison are measured at its end, after the receipts
            receipt = read_receipt(where) | ({"card": card} if card else {})
            runs[where] = Run(where, free, receipt, f"run-{len(runs) + 1}")
        return runs[where]

    for directory in map(Path, directories):
        if directory.is_dir() and (directory / COMPARISON).is_file():
            comparisons.append(_comparison(directory, add))
    for directory in map(Path, directories):
        if not (directory.is_dir() and (directory / COMPARISON).is_file()):
            home = directory.parent if directory.name == RECEIPT else directory
            if not home.is_dir():
                raise RequestError(f"there is no directory {directory}.")
            add(home, home.resolve().name)
    return comparisons, list(runs.values())


def _names(name: str, path: Path) -> Any:
    """The name, then with the folder it lies in, then with a number."""
    yield name
    yield f"{path.parent.name}/{path.name}"
    number = 2
    while True:
        yield f"{name} ({number})"
        number += 1


def _comparison(directory: Path, add: Any) -> Comparison:
    told = read_plain(directory / COMPARISON)
    rows = told.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("name") for row in rows):
        raise RequestError(f"{directory / COMPARISON} is not a comparison: it holds no rows with names.")
    runs = {}
    for place, row in enumerate(rows):
        # the weights of a run may not have been kept, and its receipt have been
        home = row.get("result") or str(Path(str(row.get("receipt") or "")).parent)
        result = directory / str(home)
        inside = directory.resolve() in result.resolve().parents  # nothing beside the comparison is read
        if inside and (result / RECEIPT).is_file():
            runs[place] = add(result, str(row["name"]), row.get("card"))
    return Comparison(directory.resolve().name, told, rows, runs)

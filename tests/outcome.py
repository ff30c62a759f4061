"""Comparing results of runs, for many tests."""

import hashlib
from pathlib import Path
from typing import Any

# Measurements and times live here alone; everything else is promised bit for bit.
MEASURED = {"secateur.json", "README.md"}


def promised(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a result that is promised bit for bit, by its path inside."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in MEASURED)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Killed(BaseException):
    """Stands for a kill: no handler in the library catches it."""


def kill_at_rename(monkeypatch: Any, number: int) -> dict[str, int]:
    """Makes the `number`-th rename from now (counted from 0) a kill; the counter that is returned counts on."""
    counter = {"renames": 0}
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if counter["renames"] == number:
            counter["renames"] += 1
            raise Killed(f"killed before {target.name} appeared")
        counter["renames"] += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return counter

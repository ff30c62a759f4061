"""The command line, run in this process."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from secateur.cli import app


@dataclass(frozen=True)
class Told:
    """What a command ended with and said."""

    code: int
    out: str
    err: str


def secateur(*arguments: object) -> Told:
    """Runs `secateur ARGUMENTS`. An exception that the command line lets through fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Told(result.exit_code, result.stdout, result.stderr)


def compress(model: object, output: object, *arguments: object, method: str | None = "random_units") -> Told:
    """Runs `secateur compress` without the measuring afterwards and without progress."""
    chosen = ["--method", method] if method else []
    return secateur("compress", model, "--output", output, "--no-evaluate", "--quiet", *chosen, *arguments)


def snapshot(directory: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file below, and every folder: equal when nothing was touched."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
    }

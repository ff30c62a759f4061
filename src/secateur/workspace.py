"""The output directory while a run is under way: whose it is, what is finished, what it needs."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.context import barrier, processes
from secateur.errors import RequestError
from secateur.files import write_json

RECEIPT = "secateur.json"
STATE = ".secateur"


class Workspace:
    """An output directory that belongs to one run.

    While the run is under way its state lies in a hidden folder inside; the receipt appears last and the folder goes.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.state = output / STATE
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def check(self, restart: bool) -> str:
        """What the directory is to this run: "fresh", "begun" or "finished". Writes nothing.

        Raises RequestError when it is somebody else's, or another run's and `restart` is not said.
        """
        if self.output.exists() and not self.output.is_dir():
            raise RequestError(f"the output {self.output} is a file; name a directory.")
        if not self.output.exists() or not any(self.output.iterdir()):
            return "fresh"
        for path, what, key in (
            (self.output / RECEIPT, "finished", "identity"),
            (self.state / "run.json", "begun", None),
        ):
            if path.exists():
                try:
                    found = json.loads(path.read_text())
                except ValueError:
                    raise RequestError(f"{path} cannot be read; name another output directory.") from None
                if restart:
                    return "fresh"
                self._compare(found.get(key, {}) if key else found, what)
                return what
        if restart and self.state.is_dir():
            return "fresh"
        if [path.name for path in self.output.iterdir()] == [STATE] and not any(self.state.iterdir()):
            return "fresh"  # killed between making the folder and saying whose it is
        raise RequestError(
            f"the output {self.output} is not empty and holds nothing that Secateur began; name another directory."
        )

    def _compare(self, found: Mapping[str, Any], what: str) -> None:
        differs = [key for key in self.identity if found.get(key) != self.identity[key]]
        if differs:
            details = ", ".join(
                f"{key} ({_short(found.get(key))} there, {_short(self.identity[key])} now)" for key in differs
            )
            raise RequestError(
                f"the output {self.output} holds a run, {what}, that differs in {details}; repeat that one exactly, name "
                "another directory, or start over with --restart."
            )

    def begin(self, restart: bool) -> None:
        """Takes the directory for this run; `restart` first removes what another run of ours left."""
        if processes()[0] == 0:
            if restart and self.output.is_dir():
                for path in self.output.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.state.mkdir(parents=True, exist_ok=True)
            if not (self.state / "run.json").exists():
                write_json(self.state / "run.json", self.identity)
        barrier()

    def finish(self, receipt: Mapping[str, Any]) -> None:
        """Writes the receipt, then removes the state: from here on the directory is a plain model."""
        write_json(self.output / RECEIPT, {**receipt, "identity": self.identity})
        shutil.rmtree(self.state)

    def abandon(self) -> None:
        """Removes a directory in which nothing but an unfinished start lies."""
        shutil.rmtree(self.state, ignore_errors=True)
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Journal:
    """What is finished, one JSON line each, flushed to the disk; every process keeps its own file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"journal-{processes()[0]}.jsonl"

    def entries(self) -> Iterator[dict[str, Any]]:
        """Everything any process has finished; a line cut short by a kill does not count."""
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def add(self, entry: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._own.open("ab") as file:
            # the line break comes first, so that a line cut short earlier does not swallow this one
            file.write(b"\n" + json.dumps(entry).encode())
            file.flush()
            os.fsync(file.fileno())

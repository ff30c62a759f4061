"""The output directory while a run is under way: whose it is, what is finished, what it needs."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.context import barrier, processes
from secateur.errors import RequestError
from secateur.files import append_line, write_json

RECEIPT = "secateur.json"
STATE = ".secateur"
COMPANIONS = "companions.json"
_RESTARTING = "restarting"
_PREVIOUS = "previous"
# What a run writes under names of its own; tokenizer and other companions are listed in the receipt.
_OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json|README\.md|secateur(\.json)?|.*\.partial"
)


class Workspace:
    """An output directory that belongs to one run.

    While the run is under way its state lies in a hidden folder inside; the receipt appears last and the folder goes.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.state = output / STATE
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._missing = [path for path in (output, *output.parents) if not path.exists()]

    def check(self, restart: bool) -> str:
        """What the directory is to this run: "fresh", "begun" or "finished". Writes nothing.

        Raises RequestError when it is somebody else's, or another run's and `restart` is not said.
        """
        if self.output.exists() and not self.output.is_dir():
            raise RequestError(f"the output {self.output} is a file; name a directory.")
        if not self.output.exists() or not any(self.output.iterdir()):
            return "fresh"
        receipt, begun = _plain(self.output / RECEIPT), _plain(self.state / "run.json")
        if begun is not None and _RESTARTING in begun:
            found, what = begun, "begun"  # whatever else is there was to be cleared away
        elif receipt is not None and "recipe" in receipt and "identity" in receipt:
            found, what = receipt["identity"], "finished"
        elif begun is not None and "steps" in begun:
            found, what = begun, "begun"
        elif [path.name for path in self.output.iterdir()] == [STATE] and not _begun(self.state):
            return "fresh"  # killed between making the folder and saying whose it is
        else:
            raise RequestError(
                f"the output {self.output} is not empty and holds nothing that Secateur began; name another directory."
            )
        if restart:
            return "fresh"
        self._compare(found, what)
        return "fresh" if _RESTARTING in found else what

    def _compare(self, found: Mapping[str, Any], what: str) -> None:
        differs = [key for key, value in self.identity.items() if found.get(key) != value]
        if differs:
            details = ", ".join(
                f"{key} ({_short(found.get(key))} there, {_short(self.identity[key])} now)" for key in differs
            )
            raise RequestError(
                f"the output {self.output} holds a run, {what}, that differs in {details}; repeat that one exactly, name "
                "another directory, or start over with --restart."
            )

    def begin(self, restart: bool) -> None:
        """Takes the directory for this run; `restart` first sets aside what another run of ours left."""
        if processes()[0] == 0:
            record = self.state / "run.json"
            if restart or _RESTARTING in (_plain(record) or {}):
                self._set_aside(record)
            try:
                self.state.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(
                    f"the output {self.output} cannot be made ({error.strerror}); name a directory that may be written."
                ) from error
            if _RESTARTING in (_plain(record) or {_RESTARTING: True}):
                write_json(record, self.identity)
        barrier()

    def _set_aside(self, record: Path) -> None:
        """Moves what an earlier run wrote, and nothing that a person added since, out of the way until this one is done.

        Killed half way, the directory still says that it is ours and what was being done.
        """
        if not self.output.is_dir() or not any(self.output.iterdir()):
            return
        found = _plain(record)
        aside = self.state / _PREVIOUS
        if found is None or _RESTARTING not in found:
            shutil.rmtree(aside, ignore_errors=True)
            if found is not None:
                write_json(aside / STATE / record.name, found)
            write_json(record, {**self.identity, _RESTARTING: True})
        (aside / STATE).mkdir(parents=True, exist_ok=True)
        ours = self._ours()
        # the receipt goes last of these, because it says which files were ours
        for path in sorted(ours, key=lambda path: path.name == RECEIPT):
            path.replace(aside / path.name)
        for path in self.state.iterdir():
            if path not in (record, aside):
                path.replace(aside / STATE / path.name)

    def _ours(self) -> list[Path]:
        """What a run has written into the output, besides its state."""
        listed = set((_plain(self.output / RECEIPT) or {}).get("files", ()))
        for path in self.state.glob(f"*/{COMPANIONS}"):
            listed |= set((_plain(path) or {}).get("files", ()))
        return [path for path in self.output.iterdir() if path.name in listed or _OURS.fullmatch(path.name)]

    def finish(self, receipt: Mapping[str, Any]) -> None:
        """Writes the receipt, then removes the state: from here on the directory is a plain model."""
        files = sorted({path.name for path in self.output.iterdir()} - {STATE, RECEIPT})
        write_json(self.output / RECEIPT, {**receipt, "files": files, "identity": self.identity})
        shutil.rmtree(self.state)

    def abandon(self) -> None:
        """Leaves things as `check` found them, for a request that turned out wrong only after the start."""
        aside = self.state / _PREVIOUS
        for path in [*self._ours(), *(path for path in self.state.iterdir() if path != aside)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if aside.is_dir():
            for folder, home in ((aside / STATE, self.state), (aside, self.output)):
                for path in folder.iterdir():
                    if path.name != STATE:
                        path.replace(home / path.name)
            shutil.rmtree(aside)
        for path in (self.state, *self._missing):
            if not any(path.iterdir()):
                path.rmdir()


def _plain(path: Path) -> dict[str, Any] | None:
    """A file's JSON mapping, or None when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _begun(state: Path) -> bool:
    """Whether a run has left more than the unfinished note of whose it is."""
    return any(path.name != "run.json.partial" for path in state.iterdir())


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
        append_line(self._own, json.dumps(entry))

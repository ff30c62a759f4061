"""The directory of a comparison: whose it is, and what is known of each run before the table is written."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.errors import RequestError
from secateur.evaluation.task_files import Asked, read_definition
from secateur.files import read_json, write_json
from secateur.workspace import STATE

TABLE = "compare.json"
RUNS = "runs"
_IDENTITY = "comparison.json"


class State:
    """A directory that belongs to one comparison.

    `runs/` holds the results, each as `compress` writes it. While the comparison is under way what is known of each run lies
    in a hidden folder, and so does what runs share; the table appears last, and the folder goes.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.folder = output / STATE
        self.shared = self.folder / "shared"
        self._missing = [path for path in (output, *output.parents) if not path.exists()]

    def check(self) -> str:
        """What the directory is to this comparison: "fresh", "begun" or "finished". Writes nothing.

        Raises RequestError when it is somebody else's, or another comparison's.
        """
        if self.output.exists() and not self.output.is_dir():
            raise RequestError(f"the output {self.output} is a file; name a directory.")
        if not self.output.exists() or not any(self.output.iterdir()):
            return "fresh"
        begun, table = self.folder / _IDENTITY, self.output / TABLE
        for path, what in ((begun, "begun"), (table, "finished")):
            if path.is_file():
                found = read_json(path)
                self._same(found if path is begun else found.get("identity", {}))
                return what
        left = [path.name for path in self.output.iterdir()]
        if left == [STATE] and {path.name for path in self.folder.iterdir()} <= {f"{_IDENTITY}.partial"}:
            return "fresh"  # killed between making the folder and saying whose it is
        raise RequestError(f"the output {self.output} is not empty and holds no comparison; name another directory.")

    def _same(self, found: Mapping[str, Any]) -> None:
        differs = [key for key, value in self.identity.items() if found.get(key) != value]
        if differs:
            raise RequestError(
                f"the output {self.output} holds another comparison, which differs in {', '.join(differs)}; repeat that one "
                "exactly, or name another directory."
            )

    def begin(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the directory. known: of runs that an earlier command finished."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"the output {self.output} cannot be made ({error.strerror}); name a directory that may be written."
            ) from error
        for run, told in known.items():
            self.write(run, told)
        write_json(self.folder / _IDENTITY, self.identity)

    def read(self, run: str) -> dict[str, Any] | None:
        """What is known of a run; None where nothing is."""
        path = self._path(run)
        return dict(read_json(path)) if path.exists() else None

    def write(self, run: str, told: Mapping[str, Any]) -> None:
        """Keeps what is known of a run."""
        write_json(self._path(run), told)

    def _path(self, run: str) -> Path:
        return self.folder / "known" / f"{run}.json"

    def finish(self, summary: Mapping[str, Any], let_go: Iterable[str]) -> None:
        """Writes the table, lets the results of some runs go but for their receipts, and removes what was kept meanwhile."""
        self.let_go(summary, let_go)
        shutil.rmtree(self.folder)

    def let_go(self, summary: Mapping[str, Any], runs: Iterable[str]) -> None:
        """Writes the table, and removes all of these runs but their receipts."""
        write_json(self.output / TABLE, {**summary, "identity": self.identity})
        for run in runs:
            for path in (self.output / RUNS / run).glob("*"):
                if path.name != "secateur.json":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def abandon(self) -> None:
        """Leaves things as they were before `begin` took an empty directory."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def task_data(specs: Sequence[str], trust_remote_code: bool) -> dict[str, Any]:
    """Hashes of what the definitions of tasks say, and of their data; lm-eval's own are known by its version."""
    told: dict[str, Any] = {"lm-eval": version("lm-eval")}
    for spec in specs:
        asked = Asked.parse(spec)
        if asked.file is not None:
            _, source = read_definition(asked, trust_remote_code)
            told[spec] = source.model_dump(mode="json")
    return told

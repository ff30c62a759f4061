"""What all exports share: where they may write, and that what they write appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import RequestError, RunError
from secateur.files import disk_full, human
from secateur.network.source import Source
from secateur.network.store import check_output


@dataclass(frozen=True)
class Exported:
    """What was written and how it was checked.

    Args:
        format: gguf, onnx or padded.
        architecture: what the format calls the network.
        bytes: of all files; source_bytes: of the model's stored tensors.
        checks: a sentence for each check that was made.
        notes: what whoever uses the result must know.
        measured: "difference" of logits and "speed" in tokens a second, where the result was run.
    """

    format: str
    output: str
    architecture: str
    dtype: str
    bytes: int
    source_bytes: int
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The card, line by line."""
        written = f"{self.format}: {self.architecture}, {self.dtype}, {human(self.bytes)} in {self.output}"
        return [
            written,
            f"  the model itself is stored in {human(self.source_bytes)}",
            *(f"  checked: {line}" for line in self.checks),
            *(f"  note: {line}" for line in self.notes),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_place(output: Path, source: Source) -> None:
    """Raises RequestError where nothing may be written at `output`."""
    if output.exists() or output.is_symlink():
        raise RequestError(f"{output} exists already; an export never overwrites: name another, or remove it.")
    check_output(output, source)
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise RequestError(f"{output} cannot be written, because {nearest} is a file; name another place.")


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `output` by one rename; on an error nothing is left of it."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Exception) and disk_full(error):
            raise RunError(
                f"the disk is full: {output} could not be written; free some space and try again."
            ) from error
        raise


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())

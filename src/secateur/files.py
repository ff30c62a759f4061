"""Files that appear whole or not at all.

Everything Secateur writes goes through `atomic`: written beside its place, flushed to the disk, renamed. A run killed
at any moment leaves either the old file, the new one, or a `*.partial` that the next run overwrites.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.errors import RunError


@contextmanager
def atomic(path: Path, lasting: bool = True) -> Iterator[Path]:
    """Yields a path to write to; on leaving, what was written there becomes `path` by one rename.

    lasting: flushed to the disk, so that it survives even a power cut; what is soon removed need only survive a kill.

    Raises RunError when the disk is full: nothing of `path` has changed then, and the run can go on later.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if lasting:
            _flush(partial)
        # some writers make their files private; the result is to be as readable as any file made here
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        if lasting:
            _flush(path.parent)
    except Exception as error:
        partial.unlink(missing_ok=True)
        _explain(error, path)
        raise


def append_line(path: Path, text: str) -> None:
    """Adds a line to a file and flushes it to the disk. Raises RunError when the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            # the line break comes first, so that a line cut short earlier does not swallow this one
            file.write(b"\n" + text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _explain(error, path)
        raise


def _explain(error: Exception, path: Path) -> None:
    """Raises the RunError that says what stopped the writing of `path`, where that is known."""
    if disk_full(error):
        raise RunError(
            f"the disk is full: {path.name} could not be written to {path.parent}; what was finished is kept. "
            "Free some space and start the same command again: it goes on from there."
        ) from error
    if isinstance(error, OSError | SafetensorError):
        raise RunError(
            f"{path.name} could not be written to {path.parent} ({error}); what was finished is kept. "
            "Remove the cause and start the same command again: it goes on from there."
        ) from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of a library that writes, means that no space is left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors wraps the operating system's error in its own, with the number in its text
    return "os error 28" in str(error) or "No space left" in str(error)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file; `metadata` goes into its header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as partial:
        # safetensors writes a broken header for no tensors with empty metadata
        save_file(contiguous, partial, metadata=dict(metadata) if metadata else None)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads one safetensors file whole: its tensors and the metadata of its header."""
    with safe_open(path, framework="pt") as file:
        # cloned, so that nothing keeps the file mapped
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})


def sha256(path: Path, *, seen: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; `seen` is told of each piece's size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            seen(len(piece))
    return digest.hexdigest()


def human(size: float) -> str:
    """A number of bytes as a person reads it: 1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_size(text: str) -> int:
    """'3GB', '512 MB', '2GiB' or a plain number -> bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) *(?:([kmgt])(i?))?b?", text.strip().lower())
    if not found:
        raise ValueError(f"{text!r} is not a size")
    number, unit, binary = found.groups()
    factor = (1024 if binary else 1000) ** ("kmgt".index(unit) + 1) if unit else 1
    return int(float(number) * factor)

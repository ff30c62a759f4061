"""Opens the original that a receipt names, where it can be opened without fetching anything."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import RequestError, SecateurError
from secateur.figures import at
from secateur.network.source import Source, open_model


class AbsentError(Exception):
    """Why something that a page would show is not there: the end of a sentence."""


@dataclass(frozen=True)
class Original:
    """spec: what opens it, as MODEL. source: its structure and tensors; `.bin` and GGUF files are converted for that."""

    spec: str
    source: Source


def open_original(receipt: Mapping[str, Any], work: Path, trust_remote_code: bool = False) -> Original:
    """The model that a run read. work: an empty folder for what must be converted first. Raises AbsentError with the reason.

    A model of the hub is opened only if it lies on this machine: a report is no reason to download one.
    """
    named, known = str(at(receipt, ("source", "model"))), at(receipt, ("identity", "source")) or []
    if at(receipt, ("recipe", "model")) is None and not Path(named).exists():
        raise AbsentError("the original was a module in memory")
    try:
        source = open_model(_here(named), trust_remote_code=trust_remote_code)
        read = {entry[0]: entry[1] for entry in known if isinstance(entry, list) and len(entry) == 3}
        now = {entry[0]: entry[1] for entry in source.quick_print()}
        weights = [name for name in read if name.endswith((".safetensors", ".bin", ".gguf"))]
        if changed := [name for name in weights if now.get(name) != read[name]]:
            raise AbsentError(f"{changed[0]} of the original {named} is no longer the file that the run read")
        if not source.tensors:
            source = open_model(_here(named), work=work, trust_remote_code=trust_remote_code)
    except SecateurError as error:
        raise AbsentError(f"the original cannot be opened: {str(error).rstrip('.')}") from error
    converted = work / "source"
    return Original(str(converted) if converted.is_dir() else _here(named), source)


def _here(spec: str) -> str:
    """The folder of a model of the hub that was downloaded before; anything else as it is. Raises RequestError."""
    if spec.startswith("package:") or Path(spec).expanduser().exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        return spec
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(spec, local_files_only=True))
    except Exception as error:  # the hub's client raises a family of errors for "not here"
        raise RequestError(f"{spec} is not on this machine.") from error

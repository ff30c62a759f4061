"""Which tasks are asked for: their YAML in lm-eval's format, and the data they read. Nothing here imports lm-eval."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from secateur.errors import RequestError, suggest
from secateur.files import sha256

SHIPPED = Path(__file__).with_name("definitions")
"""Definitions for data that the user has as files."""
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""What the datasets library reads them with."""
# Those that run no code of the file's; `pandas`, for one, would unpickle it.
_SAFE = {*BUILDERS.values(), "text", "arrow"}
_UNPICKLE = {"pandas", "pickle", "webdataset"}
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
_SUFFIXES = (".yaml", ".yml")
_INSTALL = "tasks need the lm-eval library: pip install 'secateur[tasks]'."


class TaskSource(BaseModel):
    """Where a score comes from, so that it can be compared.

    definition: name of the YAML file, or lm-eval's name of a task of its own. sha256: of what the definition says, without
    where its data lies. data: hash of every data file by its name; empty where the data came from the hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    definition: str
    sha256: str | None = None
    data: dict[str, str] = {}


@dataclass(frozen=True)
class Asked:
    """One task as it was asked for: `FILE.yaml[=DATA]`, `NAME=DATA` for a shipped definition, or NAME for lm-eval's own.

    file: its definition, None for lm-eval's own. data: a file or folder that replaces what the definition names.
    """

    spec: str
    name: str
    file: Path | None
    data: Path | None

    @classmethod
    def parse(cls, spec: str) -> "Asked":
        """Raises RequestError where there is no such definition, or no such data."""
        head, equals, data = spec.partition("=")
        if not head or (equals and not data):
            raise RequestError(
                f"--tasks {spec} names no task; write FILE.yaml, NAME=DATA or, for one of lm-eval's own, NAME."
            )
        place = Path(data).expanduser() if data else None
        if head.endswith(_SUFFIXES):
            file = Path(head).expanduser()
            if not file.is_file():
                raise RequestError(f"there is no task at {file}.")
        elif place:
            file = SHIPPED / f"{head}.yaml"
            if not file.is_file():
                raise RequestError(
                    f"no definition of the task '{head}' is shipped.{suggest(head, shipped())} Those that are: "
                    f"{', '.join(shipped())}; for another, name a YAML file (FILE.yaml={data})."
                )
        else:
            file = None
        if place and not place.exists():
            raise RequestError(f"there is no data for the task {head} at {place}.")
        return cls(spec, Path(head).stem if file else head, file, place)


def shipped() -> list[str]:
    """Names of the definitions that come with Secateur."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def without_folders(spec: str) -> str:
    """A task as it was asked for, with the bare names of files: for what is made to be published."""
    head, equals, data = spec.partition("=")
    head = Path(head).name if head.endswith(_SUFFIXES) else head
    return head + equals + (Path(data).name if data else "")


def check_installed() -> None:
    """Raises RequestError where lm-eval is not there."""
    if find_spec("lm_eval") is None:
        raise RequestError(_INSTALL)


def read_definition(asked: Asked, trust_remote_code: bool = False) -> tuple[dict[str, Any], TaskSource]:
    """What a definition says, its data files absolute and there, and where the score will come from.

    Raises RequestError where it is not a task, its data is missing, or it would run code that was not trusted.
    """
    assert asked.file is not None
    config = _load(asked.file, trust_remote_code, ())
    if "task" not in config or not isinstance(config["task"], str):
        raise RequestError(
            f"{asked.file} does not define a task: `task: NAME` is wanted"
            + (" (of a group, name the tasks one by one)." if "group" in config else ".")
        )
    if not trust_remote_code:
        _check_harmless(config, asked.file)
    printed = {key: value for key, value in config.items() if key not in ("dataset_kwargs", "dataset_path")}
    digest = hashlib.sha256(json.dumps(printed, sort_keys=True, default=_name_of).encode()).hexdigest()
    _place_data(config, asked)
    files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    data = {Path(path).name: sha256(Path(path)) for paths in files.values() for path in paths}
    return config, TaskSource(definition=asked.file.name, sha256=digest, data=data)


def _name_of(value: Any) -> str:
    """What stands for a function in a hash: its address would change with each run."""
    return str(getattr(value, "__qualname__", value))


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether all that a definition reads lies on this machine."""
    return config.get("dataset_path") in _SAFE or callable(config.get("custom_dataset"))


def _load(file: Path, trust: bool, above: tuple[Path, ...]) -> dict[str, Any]:
    """The definition with what it includes; its own entries win, as in lm-eval."""
    if file.resolve() in above:
        raise RequestError(f"{file} includes itself.")
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), _loader(file, trust))  # noqa: S506, a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise RequestError(f"{file} does not define a task: a mapping with `task: NAME` is wanted.")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        other = file.parent / str(name)
        if not other.is_file():
            raise RequestError(f"{file} includes {name}, which is not there.")
        merged |= _load(other, trust, (*above, file.resolve()))
    return merged | config


def _loader(file: Path, trust: bool) -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if not trust:
            raise RequestError(
                f"{file} wants to run code of its own (!function {node.value}); allow that with --trust-remote-code."
            )
        check_installed()
        from lm_eval.utils import import_function

        return import_function(loader, node, yaml_path=file.resolve())

    Loader.add_constructor("!function", function)
    return Loader


def _check_harmless(config: Mapping[str, Any], file: Path) -> None:
    """Refuses what lm-eval would run or fetch to run, besides functions."""
    if config.get("use_prompt"):
        raise RequestError(f"{file}: use_prompt loads templates from elsewhere; allow that with --trust-remote-code.")
    if config.get("unsafe_code"):
        raise RequestError(f"{file} runs what a model writes (unsafe_code); allow that with --trust-remote-code.")
    reader = config.get("dataset_path")
    if reader in _UNPICKLE:
        raise RequestError(
            f"{file}: data read as {reader} may hold code that runs; store it as JSON, CSV or Parquet, or allow that with "
            "--trust-remote-code."
        )
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        raise RequestError(f"{file}: its data set would run code of its own; allow that with --trust-remote-code.")
    for entry in config.get("metric_list") or []:
        if isinstance(entry, Mapping) and entry.get("hf_evaluate"):
            raise RequestError(
                f"{file}: the metric {entry.get('metric')} would be fetched and run (hf_evaluate); allow that with "
                "--trust-remote-code."
            )


def _place_data(config: dict[str, Any], asked: Asked) -> None:
    """Makes the data of a definition absolute paths for each split, and forgets splits for which there is none."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    named = config.get("dataset_path")
    place = asked.data
    if place is None and isinstance(named, str) and named not in BUILDERS.values() and Path(named).is_dir():
        place = Path(named)
    if place is not None:
        files = {_measured(config, asked): [place]} if place.is_file() else _in_folder(config, place, asked)
    elif named in _SAFE:
        given = kwargs.get("data_files")
        # without a split of its own, data is called train by the datasets library
        files = {
            split: list(_found(paths, asked))
            for split, paths in (given if isinstance(given, Mapping) else {"train": given}).items()
            if paths
        }
        if not any(files.values()):
            raise RequestError(f"{asked.file} reads {named}, but `dataset_kwargs: {{data_files: …}}` names no file.")
    else:
        if not isinstance(named, str) and not callable(config.get("custom_dataset")):
            raise RequestError(f"{asked.file} names no data; give it `dataset_path`, or write {asked.spec}=DATA.")
        return
    if place is not None:
        suffixes = {path.suffix for paths in files.values() for path in paths}
        unknown = next((suffix for suffix in sorted(suffixes) if suffix not in BUILDERS), None)
        if unknown is not None or len({BUILDERS[suffix] for suffix in suffixes}) > 1:
            raise RequestError(
                f"the data of {asked.spec} is {', '.join(sorted(suffixes)) or 'nothing'}; give files of one kind: "
                f"{', '.join(BUILDERS)}."
            )
        config["dataset_path"] = BUILDERS[suffixes.pop()]
        config["dataset_name"] = None
        if config["dataset_path"] != named:
            kwargs = {}  # how another kind of file was read
    config["dataset_kwargs"] = kwargs | {
        "data_files": {split: [str(p) for p in paths] for split, paths in files.items()}
    }
    for key in _SPLITS:
        if config.get(key) and config[key] not in files:
            config[key] = None
    if not (config.get("test_split") or config.get("validation_split")):
        raise RequestError(
            f"{asked.spec}: no data for the questions; there is {', '.join(files)}, and the definition wants "
            "`test_split` or `validation_split` to name one of them."
        )
    examples = config.get("training_split") or config.get("fewshot_split") or (config.get("fewshot_config") or {})
    if config.get("num_fewshot") and not examples:
        raise RequestError(
            f"{asked.spec} puts {config['num_fewshot']} examples before a question, and there is no data for them; give a "
            "folder that holds the training split too."
        )


def _measured(config: Mapping[str, Any], asked: Asked) -> str:
    """The split whose questions are asked: the test split where there is one, as in lm-eval."""
    split = config.get("test_split") or config.get("validation_split")
    if not split:
        raise RequestError(f"{asked.file} says neither `test_split` nor `validation_split`: which questions to ask?")
    return str(split)


def _in_folder(config: Mapping[str, Any], folder: Path, asked: Asked) -> dict[str, list[Path]]:
    """The files of each split in a folder: SPLIT.jsonl, SPLIT-00000-of-00002.parquet, or SPLIT/*.csv; also below NAME."""
    wanted = {str(config[key]) for key in _SPLITS if config.get(key)}
    for place in (folder, folder / str(config["task"])):
        found = {split: files for split in sorted(wanted) if (files := list(_of_split(place, split)))}
        if _measured(config, asked) in found:
            return found
    raise RequestError(
        f"{folder} holds no {_measured(config, asked)} split for the task {config['task']}: a file "
        f"{_measured(config, asked)}.jsonl (or .json, .csv, .parquet) is wanted."
    )


def _of_split(place: Path, split: str) -> Iterator[Path]:
    for pattern in (f"{split}.*", f"{split}-*", f"{split}/*"):
        yield from sorted(path for path in place.glob(pattern) if path.suffix in BUILDERS)


def _found(paths: str | Sequence[str], asked: Asked) -> Iterator[Path]:
    """Files by their names or patterns, from where one stands, as in lm-eval, or else from where the definition lies."""
    assert asked.file is not None
    for name in [paths] if isinstance(paths, str) else paths:
        for base in (Path.cwd(), asked.file.resolve().parent):
            whole = base / Path(name).expanduser()
            # a pattern is tried only where no file has that very name
            matching = (
                [whole] if whole.is_file() else sorted(Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
            )
            if matching:
                yield from matching
                break
        else:
            raise RequestError(f"the task {asked.spec} reads {name}, which is not there; write {asked.spec}=DATA.")

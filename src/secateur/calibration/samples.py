"""The tokens that methods learn from: cut from a text or a dataset, given as ids, or written by the model itself.

Sequences are whole windows that do not overlap, so nothing is padded and no token counts twice. Held-out sequences come on
top of those asked for and are never solved on: every layer's report shows its error on both, and a method may choose by them
how strongly it solves.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RequestError
from secateur.evaluation.text import read_text, self_written, tokenize
from secateur.files import read_json, read_tensors, write_json, write_tensors
from secateur.network.checkpoint import line
from secateur.network.source import Source, dense_model, load, tokenizer

logger = logging.getLogger(__name__)

SELF, DATASET = "self", "dataset:"
LENGTH, SAMPLES, SAMPLES_OF_ITS_OWN = 512, 128, 32  # writing takes far longer than reading


class Calibration(BaseModel):
    """What a recipe says of calibration.

    Args:
        data: a text file, a `.json` or `.jsonl` file (texts, {"text": ...}, lists of token ids or {"input_ids": ...}),
            `dataset:NAME[,CONFIGURATION][,SPLIT[,COLUMN]]` of the datasets library, or `self`: the model writes
            the tokens, with or without a tokenizer (`secateur.evaluation.self_written` says how they begin).
        samples: how many sequences; default 128, and 32 where the model writes them.
        length: tokens of each; default 512, or the model's positions if those are fewer.
        held_out: sequences beside those, to judge by: for the reports, and for methods that choose how strongly to
            solve; default an eighth more.
        order: whether windows are drawn at random (by the run's seed) or taken from the beginning.
        inputs: whether a block's inputs come through the compressed blocks before it, or through the dense ones.
        sequential: solve each matrix as soon as all tokens have reached it, so that those after it in the block see it
            changed (true-sequential); one pass in place of two, but the activations of all tokens in a block are in memory.
        skip: tokens at the beginning of each sequence that are passed through but not counted; default 0 for single weights
            and for streams turned place by place, 4 for units, because the activations of the first tokens are often a
            hundred times as large as all others.
        dtype: of the passes through blocks; statistics and solving stay in float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = SELF
    samples: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=2)
    held_out: int | None = Field(default=None, ge=0)
    order: Literal["random", "first"] = "random"
    inputs: Literal["compressed", "dense"] = "compressed"
    sequential: bool = False
    skip: int | None = Field(default=None, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def count(self) -> int:
        return self.samples or (SAMPLES_OF_ITS_OWN if self.data == SELF else SAMPLES)

    @property
    def held_out_count(self) -> int:
        return -(-self.count // 8) if self.held_out is None else self.held_out

    def identity(self) -> dict[str, Any]:
        """What decides the tokens: the settings, and for a file its content."""
        path = Path(self.data)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return {**self.model_dump(), "content": content}

    def check(self) -> None:
        """Raises RequestError when `data` names nothing that can be read."""
        if self.sequential and self.inputs == "dense":
            raise RequestError("calibration: sequential needs compressed inputs; leave inputs out.")
        if self.data.startswith(DATASET):
            _parts_of(self.data.removeprefix(DATASET))
            return
        if self.data == SELF or Path(self.data).is_file():
            return
        raise RequestError(
            f"there is no calibration text at {self.data}; name a text or JSON file, dataset:NAME, or self."
        )


@dataclass(frozen=True)
class Samples:
    """Token ids to calibrate on.

    Args:
        sequences: (tokens,) int64 each; equal lengths lie together.
        held_out: further ones, to judge by.
        name: where they come from.
    """

    sequences: list[Tensor]
    held_out: list[Tensor]
    name: str

    @property
    def sha256(self) -> str:
        """Of the exact ids, sequence by sequence, held-out ones last."""
        digest = hashlib.sha256()
        for part in (self.sequences, self.held_out):
            for ids in part:
                digest.update(len(ids).to_bytes(8, "little") + ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the receipt."""
        tokens, beside = (sum(map(len, part)) for part in (self.sequences, self.held_out))
        return {
            "data": self.name, "sequences": len(self.sequences), "tokens": tokens, "held_out_tokens": beside,
            "sha256": self.sha256,
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """As `from_tensors` takes them back."""
        both = [*self.sequences, *self.held_out]
        lengths = torch.tensor([len(ids) for ids in both])
        return {"ids": torch.cat(both), "lengths": lengths, "held_out": torch.tensor(len(self.held_out))}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> "Samples":
        both = list(tensors["ids"].split(tensors["lengths"].tolist()))
        count = len(both) - int(tensors["held_out"])
        return cls(both[:count], both[count:], name)


def collect_samples(
    source: Source, wanted: Calibration, generator: torch.Generator, seed: int = 0, progress: Progress = silent
) -> Samples:
    """The sequences that `wanted` asks for.

    Args:
        generator: draws the windows.
        seed: of what the model writes itself.

    Raises RequestError when there are too few tokens, an id is outside the vocabulary, or a file cannot be understood.
    """
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    length = wanted.length or min(LENGTH, positions or LENGTH)
    if positions and length > positions:
        raise RequestError(
            f"calibration sequences of {length} tokens are longer than the model's {positions} positions; ask for at most "
            f"{positions}."
        )
    total = wanted.count + wanted.held_out_count
    if wanted.data == SELF:
        windows = _own(source, total, length, seed, progress)
        name = f"written by the model itself ({total} x {length} tokens, seed {seed})"
    else:
        pieces = _pieces(source, wanted.data)
        windows = [
            window for ids in pieces for window in ids.split(length) if len(window) == length or len(ids) < length
        ]
        windows = [window for window in windows if len(window) > 1]
        # what stands on this machine is nobody's business elsewhere, and the hash says which text it was
        name = wanted.data if wanted.data.startswith(DATASET) else Path(wanted.data).name
        if len(windows) < total:
            raise RequestError(
                f"{name} holds {len(windows)} sequences of up to {length} tokens, but {wanted.count} are asked for and "
                f"{wanted.held_out_count} held out; ask for fewer or shorter ones."
            )
        if wanted.order == "random":
            chosen = torch.randperm(len(windows), generator=generator)[:total]
            windows = [windows[index] for index in chosen.tolist()]
    vocabulary = source.anatomy.vocabulary
    for ids in windows[:total]:
        if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
            raise RequestError(
                f"{name} holds token id {int(ids.max() if ids.max() >= vocabulary else ids.min())}, outside the model's "
                f"vocabulary of {vocabulary}; encode the text with the model's own tokenizer."
            )
    by_length = sorted(windows[: wanted.count], key=len), sorted(windows[wanted.count : total], key=len)
    return Samples(*by_length, name)


def kept_samples(
    source: Source,
    wanted: Calibration,
    state: Path,
    generator: torch.Generator,
    seed: int,
    progress: Progress = silent,
    library: Path | None = None,
) -> Samples:
    """As `collect_samples`: collected by the first process once, then read from the folder `state`.

    library: a folder in which several runs on this source keep what they collected, each the same samples once.
    """
    path, name = state / "samples.safetensors", state / "samples.json"
    if processes()[0] == 0 and not name.exists():
        if library is None:
            samples = collect_samples(source, wanted, generator, seed, progress)
        else:
            samples = _of_library(library, source, wanted, generator, seed, progress)
        write_tensors(path, samples.tensors())
        write_json(name, samples.name)
    barrier()
    return Samples.from_tensors(read_tensors(path)[0], read_json(name))


def _of_library(
    library: Path, source: Source, wanted: Calibration, generator: torch.Generator, seed: int, progress: Progress
) -> Samples:
    """As `collect_samples`, from the library where they are there, into it where not."""
    # all that decides the tokens, and nothing of how they are passed through a network
    random = wanted.data != SELF and wanted.order == "random"
    content = wanted.identity()["content"]
    decides = [
        source.quick_print(), wanted.data, content, wanted.count, wanted.held_out_count, wanted.length, wanted.order,
        generator.initial_seed() if random else None, seed if wanted.data == SELF else None,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    path = library / f"samples-{key}.safetensors"
    if path.exists():
        tensors, told = read_tensors(path)
        return Samples.from_tensors(tensors, told["name"])
    samples = collect_samples(source, wanted, generator, seed, progress)
    # another process may be at the same: each writes a file of its own, and the renames agree
    own = path.with_name(f"{path.name}-{os.getpid()}")
    write_tensors(own, samples.tensors(), {"name": samples.name})
    own.replace(path)
    return samples


def _own(source: Source, count: int, length: int, seed: int, progress: Progress) -> list[Tensor]:
    """Sequences that the model writes; it is loaded whole for that."""
    if source.live is not None:
        # in float32, as the same model would write from a directory
        model, words = dense_model(source, "cpu"), None
    else:
        model, words = load(source.spec, trust_remote_code=source.trust_remote_code)
    written = self_written(model, words, sequences=count, length=length, seed=seed, progress=progress)
    return list(written.ids.split(length))


def read_entries(data: str) -> Iterator[str | list[int]]:
    """The texts and lists of token ids that `data` holds, empty ones left out. Raises RequestError for anything else."""
    path = Path(data)
    documents: Iterator[Any] | Sequence[Any]
    if data.startswith(DATASET):
        documents = _dataset(data.removeprefix(DATASET))
    elif path.suffix in (".json", ".jsonl"):
        documents = _json(path)
    else:
        documents = [read_text(path)]
    for entry in documents:
        value = entry.get("input_ids", entry.get("text")) if isinstance(entry, dict) else entry
        if value in ([], ""):
            continue
        ids = isinstance(value, list) and all(type(number) is int and abs(number) < 2**63 for number in value)
        if not (isinstance(value, str) or ids):
            raise RequestError(
                f'{data} holds {json.dumps(entry)[:60]}, which is no text, list of token ids, or {{"text": ...}} or '
                '{"input_ids": ...} with one.'
            )
        yield cast("str | list[int]", value)


def _pieces(source: Source, data: str) -> list[Tensor]:
    """Runs of token ids: the documents of a dataset joined, or each list of ids of a file as it is."""
    encode: Callable[[str], Tensor] | None = None
    text, given = [], []
    for value in read_entries(data):
        if isinstance(value, str):
            if encode is None:
                encode = _encoder(source)
            text.append(encode(value))
        else:
            given.append(torch.tensor(value, dtype=torch.int64))
    return [*given, torch.cat(text)] if text else given


def _encoder(source: Source) -> Callable[[str], Tensor]:
    place = source.place
    if place.file is None and source.directory is not None:
        # an earlier step may have left another vocabulary than the model had that the person named
        place = replace(place, directory=source.directory)
    words = tokenizer(place, source.trust_remote_code) if source.live is None else None
    if words is None:
        raise RequestError(
            f"{source.spec} has no tokenizer; give calibration data as a JSON file of token ids, or self."
        )
    return lambda text: tokenize(text, words).ids


def _json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        entries = (
            [json.loads(each) for each in text.split("\n") if each.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (ValueError, OSError) as error:
        raise RequestError(f"{path} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}.") from error
    if not isinstance(entries, list):
        raise RequestError(f"{path} does not hold a list of texts or token ids.")
    return entries


def _parts_of(name: str) -> tuple[list[str], str, str]:
    """What `dataset:name` names: the dataset and its configuration if any, the split, the column. Raises RequestError."""
    repository, *rest = name.split(",")
    if rest and rest[0].partition("[")[0] in ("train", "validation", "test"):
        configuration = []
    else:
        configuration, rest = rest[:1], rest[1:]
    split, column, *more = [*rest, *("train", "text")[len(rest) :]]
    if more or not all((repository, *configuration, split, column)):
        raise RequestError(
            f"dataset:{name} is not of the form dataset:NAME[,CONFIGURATION][,SPLIT[,COLUMN]]; name a dataset, and leave no "
            "part empty."
        )
    return [repository, *configuration], split, column


def _dataset(name: str) -> Iterator[Any]:
    """Rows of a dataset of the datasets library, their text column as "text"."""
    named, split, column = _parts_of(name)
    try:
        import datasets
    except ImportError as error:
        raise RequestError(
            f"dataset:{name} needs the datasets library: pip install secateur[data], or name a file."
        ) from error
    try:
        rows = datasets.load_dataset(*named, split=split)
    except Exception as error:  # each builder and the hub fail in their own ways
        raise RequestError(f"dataset:{name} could not be opened: {line(error)}") from error
    if column not in rows.column_names and "input_ids" not in rows.column_names:
        raise RequestError(f"dataset:{name} has no column '{column}'; it has: {', '.join(rows.column_names)}.")
    return ({"text": row[column]} if column in row else {"input_ids": row["input_ids"]} for row in rows)

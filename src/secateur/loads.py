"""What loads a model and computes the same: each loader tried in a process of its own, none taken at its word."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from torch import Tensor

from secateur.errors import RequestError, SecateurError
from secateur.export import export
from secateur.export.check import Tried, difference, score_difference, try_loader
from secateur.export.clean_run import LOADERS
from secateur.export.onnx import FILE
from secateur.network.locate import locate
from secateur.network.modelling_file import is_ours
from secateur.network.source import open_model
from secateur.network.verify import TOLERANCE, prompt

# llama.cpp rounds activations to eight bits where weights are quantized
_ROUNDED = 6e-2


@dataclass(frozen=True)
class Row:
    """What one loader did.

    Args:
        loads: None where it was not tried; `note` says why.
        difference: of its logits from those of transformers, relative to the largest; None where they were not compared.
        equal: whether that is within what the order of sums, or the loader's own rounding, may do.
        speed: tokens a second of greedy generation, as the loader does it.
    """

    loader: str
    version: str = ""
    loads: bool | None = None
    difference: float | None = None
    equal: bool | None = None
    speed: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def loads(model: str | Path, trust_remote_code: bool = False, tokens: int = 8) -> Iterator[Row]:
    """Tries every loader on MODEL, one row each, as they come.

    Loaders of other formats get the model as `secateur export` writes it, in a temporary folder.

    tokens: how many each generates. Raises RequestError where there is no model.
    """
    if (Path(model) / FILE).is_file() and not any(Path(model).glob("*.safetensors")):
        yield from _of_a_graph(Path(model), tokens)
        return
    place = locate(str(model))
    if place.file is not None:
        yield from _of_a_file(place.file, tokens)
        return
    source = open_model(model, trust_remote_code=trust_remote_code)
    ids = prompt(source.anatomy.vocabulary)
    ask: dict[str, Any] = {"tokens": tokens, "ids": ids}
    plain = try_loader("transformers", place.directory, **ask)
    reference, code = plain, list(place.directory.glob("*.py"))
    rows = []
    if code and (trust_remote_code or is_ours(place.directory)):
        reference = try_loader("transformers", place.directory, trust=True, **ask)
        rows = [_reference("transformers, trust_remote_code", reference)]
    elif code:
        rows = [Row("transformers, trust_remote_code", note="brings code, which runs only with --trust-remote-code")]
    yield _reference("transformers", plain) if plain is reference else _row("transformers", plain, reference.logits)
    yield from rows
    yield _row("safetensors", try_loader("safetensors", place.directory, **ask), None)
    yield _row(
        "secateur", try_loader("secateur", place.directory, trust=source.trust_remote_code, **ask), reference.logits
    )
    yield from _exported(model, trust_remote_code)
    yield from _servers(place.directory, ids)


def _exported(model: str | Path, trust: bool) -> Iterator[Row]:
    """Loaders of other formats. The export compares logits by itself, with weights rounded alike."""
    for loader, to, name in (("llama.cpp", "gguf", "model.gguf"), ("onnxruntime", "onnx", "onnx")):
        with tempfile.TemporaryDirectory() as folder:
            # only the version, or that it is not there
            seen = try_loader(loader, Path(folder) / "nothing", [0])
            if seen.missing:
                yield _row(loader, seen, None)
                continue
            try:
                done = export(model, to, Path(folder) / name, trust_remote_code=trust)
            except SecateurError as error:
                yield Row(
                    loader, seen.version, None if isinstance(error, RequestError) else False, note=_line(str(error))
                )
                continue
            apart = done.measured["difference"]
            how = f"by --to {to} ({done.architecture}, {done.dtype})"
            yield Row(loader, seen.version, True, apart, True, done.measured["speed"], how)


def _of_a_file(file: Path, tokens: int) -> Iterator[Row]:
    source = open_model(str(file))
    ids = prompt(source.anatomy.vocabulary)
    reference = try_loader("transformers", file, ids, tokens=tokens)
    yield _reference("transformers", reference)
    yield _row("gguf", try_loader("gguf", file, ids), None)
    yield _row("llama.cpp", try_loader("llama.cpp", file, ids, tokens=tokens), reference.logits)
    yield from _servers(file, ids)


def _of_a_graph(directory: Path, tokens: int) -> Iterator[Row]:
    """A directory as `--to onnx` writes it; what its logits were compared with then is not there any more."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        words = int((config.get("text_config") or config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{directory} holds {FILE} but no config.json that says its vocab_size, so no tokens can be made for it; copy "
            "the model's config.json beside it."
        ) from error
    ids = prompt(words)
    yield _row("transformers", try_loader("transformers", directory, ids, tokens=tokens), None)
    yield _row("onnxruntime", try_loader("onnxruntime", directory, ids, tokens=tokens), None)
    yield from _servers(directory, ids)


def _servers(location: Path, ids: list[int]) -> Iterator[Row]:
    for loader, (_, use) in LOADERS.items():
        if use is None:
            yield _row(loader, try_loader(loader, location, ids), None)


def _reference(loader: str, tried: Tried) -> Row:
    row = _row(loader, tried, None)
    return replace(row, note="what the logits of others are compared with") if row.loads else row


def _row(loader: str, tried: Tried, reference: Tensor | None) -> Row:
    if tried.missing:
        return Row(loader, note="not installed")
    if tried.error:
        return Row(loader, tried.version, False, note=_line(tried.error))
    if (
        tried.logits is None
        and tried.scores is None
        and tried.speed is None
        and loader in ("vllm", "sglang", "exllamav3")
    ):
        return Row(loader, tried.version, note=tried.note)
    apart, allowed = None, TOLERANCE
    if reference is not None and tried.logits is not None:
        apart = difference(reference, tried.logits)
    elif reference is not None and tried.scores is not None:
        # the first step reads the same tokens; those after it may have gone another way
        apart, allowed = score_difference(reference[-1:], tried.scores[:1]), _ROUNDED
    equal = None if apart is None else apart <= allowed
    return Row(loader, tried.version, True, apart, equal, tried.speed, tried.note)


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def table(rows: Sequence[Row]) -> Table:
    """The matrix that is printed."""
    said = {None: "–", True: "yes", False: "no"}
    shown = Table(Column("loader", no_wrap=True), "version", "loads", "logits equal", "tokens/s", "note")
    for row in rows:
        equal = said[row.equal] + ("" if row.difference is None else f" ({row.difference:.1g})")
        speed = "–" if not row.speed else f"{row.speed:.3g}"
        shown.add_row(row.loader, row.version, said[row.loads], equal, speed, row.note)
    return shown

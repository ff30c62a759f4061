"""Measures a model, alone or against a reference, and fills the result card."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.context import Progress, silent
from secateur.errors import RequestError, suggest
from secateur.evaluation.arithmetic import multiply_adds, parameters
from secateur.evaluation.card import Column, ResultCard, findings
from secateur.evaluation.divergence import Divergence, compare
from secateur.evaluation.facts import read_facts
from secateur.evaluation.forward import check_length, maximum_positions
from secateur.evaluation.kick import Kick, examine_dense
from secateur.evaluation.kick import kick as measure_kick
from secateur.evaluation.memory import Memory, bytes_on_disk, memory
from secateur.evaluation.perplexity import Perplexity, perplexity
from secateur.evaluation.speed import PREFILL
from secateur.evaluation.speed import speed as measure_speed
from secateur.evaluation.tasks import load_tasks, score
from secateur.evaluation.text import Tokens, check_same_tokenizer, one_cut_from_other, read_text, self_written, tokenize
from secateur.network.locate import locate
from secateur.network.source import check_device, load, open_model

DTYPES = ("float32", "bfloat16", "float16", "float64")
WINDOW = 1024
WRITTEN_WINDOW = 256
WRITTEN_WINDOWS = 4
_OTHER_TOKENS = "The vocabularies differ, so perplexities per token, the KL and the first token cannot be compared; "
_BY_BYTE = "bits per byte can (each model over the text that its own windows hold)."
_NO_TEXT = "with a text, bits per byte can."
Model = str | Path | tuple[nn.Module, Any]


@dataclass(frozen=True)
class _Opened:
    """A model that is loaded, and what is known of its files (None for a live module)."""

    name: str
    module: nn.Module
    tokenizer: Any
    memory: Memory | None = None
    disk: int | None = None
    disk_format: str | None = None


def evaluate(
    model: Model,
    reference: Model | None = None,
    *,
    text: str | Path | None = None,
    window: int | None = None,
    windows: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    speed: bool = True,
    pairs: int = 10,
    prefill: int | None = None,
    decode: int = 32,
    seed: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    kick: bool = False,
    facts: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ResultCard:
    """Measures `model`, and beside it `reference`, which it was made from.

    model, reference: a MODEL as on the command line, or a live pair (module, tokenizer), which has no files and so
    neither bytes on disk nor a memory of its own. text: a UTF-8 file for perplexity and divergence; without one the
    divergence is measured on text that the reference writes itself, and there is no perplexity. window: tokens read at
    once, by default 1024 (256 on self-written text) or the models' positions if those are fewer. windows: how many of
    the first windows, by default all of the text (4 that the reference writes). speed: whether to measure it; pairs,
    prefill, decode: as in `speed`. dtype, device: what a MODEL is loaded as; live modules stay as they are. seed: of
    the self-written text and of the tokens that speed is measured on. progress: opens a bar for a label and a total.

    Where one vocabulary was cut from the other there is no divergence, and perplexities come with bits per byte.

    Raises RequestError when the text is missing or too short for the windows, the tokenizers differ otherwise, or the
    device cannot be used; RunError when a model gives non-finite logits or a clean process cannot load it.
    """
    content = read_text(text) if text is not None else None
    if dtype not in DTYPES:
        raise RequestError(f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")
    check_device(device)
    asked = load_tasks(tasks, limit, trust_remote_code)
    kicked = kick or facts is not None
    if kicked and reference is None:
        raise RequestError("--kick compares with the dense model: name it with --reference ORIGINAL.")
    known = read_facts(facts, limit) if kicked else None
    specs = [model] if reference is None else [model, reference]
    for spec in specs:
        if not isinstance(spec, tuple):
            # Headers alone: a damaged model is refused at once, not by a child process that fails on it.
            open_model(spec, trust_remote_code=trust_remote_code)
    # All clean processes come before anything is held here, or their memory would come on top of that of the models.
    memories = [_memory(spec, dtype, trust_remote_code) for spec in specs]
    opened = [_open(spec, used, dtype, device, trust_remote_code) for spec, used in zip(specs, memories, strict=True)]
    alike = True
    if len(opened) == 2 and all(each.tokenizer is not None for each in opened):
        alike = not one_cut_from_other(opened[0].tokenizer, opened[1].tokenizer)
        if alike:
            check_same_tokenizer(opened[0].tokenizer, opened[1].tokenizer)
    shift: Divergence | None = None
    qualities: list[Perplexity | None] = [None] * len(opened)
    if text is not None and content is not None:
        name = "/".join(Path(text).parts[-2:])
        shift, qualities = _on_text(opened, content, name, window, windows, progress, alike)
    elif len(opened) == 2 and alike:
        shift = _on_written(opened, window, windows, seed, progress)
    modules = [each.module for each in opened]
    timed = (
        measure_speed(*modules, prefill=prefill, decode=decode, pairs=pairs, seed=seed, progress=progress)
        if speed
        else None
    )
    pairs_of = [(each.module, each.tokenizer) for each in opened]
    scores = score(asked, *pairs_of[0], pairs_of[1] if len(opened) == 2 else None, progress)
    knowledge: Kick | None = None
    if known is not None:
        dense = examine_dense(*pairs_of[1], known, limit=limit, progress=progress)
        knowledge = measure_kick(*pairs_of[0], dense, texts=alike, progress=progress)
    counted = timed.prefill.tokens if timed else _within(prefill or PREFILL, modules)
    columns = [
        Column(
            name=each.name,
            parameters=parameters(each.module),
            multiply_adds=multiply_adds(each.module, counted),
            multiply_adds_tokens=counted,
            bytes_on_disk=each.disk,
            disk_format=each.disk_format,
            memory=each.memory,
            perplexity=quality,
        )
        for each, quality in zip(opened, qualities, strict=True)
    ]
    card = ResultCard(
        model=columns[0],
        reference=columns[1] if len(columns) == 2 else None,
        divergence=shift,
        speed=timed,
        expected_gain=columns[1].multiply_adds / columns[0].multiply_adds - 1 if len(columns) == 2 else None,
        tasks=scores,
        kick=knowledge,
        versions=_versions(bool(asked)),
    )
    said: tuple[str, ...] = () if alike else (_OTHER_TOKENS + (_BY_BYTE if content is not None else _NO_TEXT),)
    if knowledge is not None:
        said += knowledge.findings(*(quality.perplexity if quality and alike else None for quality in qualities))
    return card.model_copy(update={"notes": said + findings(card)})


def _memory(spec: Model, dtype: str, trust_remote_code: bool) -> Memory | None:
    return None if isinstance(spec, tuple) else memory(spec, dtype=dtype, trust_remote_code=trust_remote_code)


def _open(spec: Model, used: Memory | None, dtype: str, device: str, trust_remote_code: bool) -> _Opened:
    if isinstance(spec, tuple):
        module, tokenizer = spec
        return _Opened(type(module).__name__, module, tokenizer)
    module, tokenizer = load(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return _Opened(str(spec), module, tokenizer, used, bytes_on_disk(spec), locate(str(spec)).weights)


def _on_text(
    opened: Sequence[_Opened],
    content: str,
    name: str,
    window: int | None,
    windows: int | None,
    progress: Progress,
    alike: bool,
) -> tuple[Divergence | None, list[Perplexity | None]]:
    texts = [_tokens(each, content, name) for each in opened]
    if window is None:
        window = _within(WINDOW, [each.module for each in opened])
    if len(opened) == 1 or not alike:
        pairs = zip(opened, texts, strict=True)
        return None, [
            perplexity(each.module, text, window=window, windows=windows, progress=progress) for each, text in pairs
        ]
    if not texts[0].ids.equal(texts[1].ids):
        raise RequestError(
            "The model and its reference split the text into different tokens, though their vocabularies agree: their "
            "predictions cannot be compared token by token; evaluate the model without a reference."
        )
    ours, theirs = (each.module for each in opened)
    compared = compare(ours, theirs, texts[0], window=window, windows=windows, progress=progress)
    return compared.divergence, [compared.model, compared.reference]


def _tokens(opened: _Opened, content: str, name: str) -> Tokens:
    if opened.tokenizer is None:
        raise RequestError(f"{opened.name} has no tokenizer, so the text cannot be read; add its tokenizer files.")
    return tokenize(content, opened.tokenizer, name)


def _on_written(
    opened: Sequence[_Opened], window: int | None, windows: int | None, seed: int, progress: Progress
) -> Divergence:
    ours, theirs = opened
    length = window if window is not None else _within(WRITTEN_WINDOW, [ours.module, theirs.module])
    check_length(ours.module, length, "A window")
    if theirs.tokenizer is None:
        raise RequestError(f"{theirs.name} has no tokenizer, so it cannot write text; add its tokenizer files.")
    count = windows if windows is not None else WRITTEN_WINDOWS
    tokens = self_written(theirs.module, theirs.tokenizer, sequences=count, length=length, seed=seed, progress=progress)
    return compare(ours.module, theirs.module, tokens, window=length, progress=progress).divergence


def _within(tokens: int, models: Sequence[nn.Module]) -> int:
    """`tokens`, or the fewest positions that one of the models has."""
    return min([tokens, *(limit for model in models if (limit := maximum_positions(model)) is not None)])


def _versions(asked: bool) -> dict[str, str]:
    names = ("torch", "transformers", *(("lm-eval", "datasets") if asked else ()))
    libraries = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **libraries}

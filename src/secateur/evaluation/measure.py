"""Measures a model, alone or against a reference, and fills the result card."""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from secateur.context import Progress, silent
from secateur.errors import RequestError, SecateurError, suggest
from secateur.evaluation.arithmetic import multiply_adds, parameters
from secateur.evaluation.card import Column, ResultCard, findings
from secateur.evaluation.divergence import Divergence, compare
from secateur.evaluation.divergent import Continuations, DivergentTokens, divergent_tokens
from secateur.evaluation.energy import Meter
from secateur.evaluation.facts import Facts, read_facts
from secateur.evaluation.forward import check_length, maximum_positions
from secateur.evaluation.kick import Kick, examine_dense
from secateur.evaluation.kick import kick as measure_kick
from secateur.evaluation.memory import Memory, bytes_on_disk, memory
from secateur.evaluation.perplexity import Perplexity, perplexity
from secateur.evaluation.remembered import Remembered
from secateur.evaluation.speed import PREFILL, Speed, speeds
from secateur.evaluation.tasks import check_limit, load_tasks, score
from secateur.evaluation.text import Tokens, check_same_tokenizer, one_cut_from_other, read_text, self_written, tokenize
from secateur.network.locate import locate
from secateur.network.source import check_device, load, open_model

_Part = TypeVar("_Part")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WINDOW = 1024
WRITTEN_WINDOW = 256
WRITTEN_WINDOWS = 4
_OTHER_TOKENS = "The vocabularies differ, so perplexities per token, the KL and the first token cannot be compared; "
_BY_BYTE = "bits per byte can (each model over the text that its own windows hold)."
_NO_TEXT = "with a text, bits per byte can."


@dataclass(frozen=True)
class Opened:
    """A model that is loaded, and what is known of its files (None for a live module).

    remembered: the module with a memory for its logits, where many models are compared with it. written: texts that it
    wrote itself, by (sequences, length, seed). answered: what it said to tasks and questions, by what was asked.
    """

    name: str
    module: nn.Module
    tokenizer: Any
    memory: Memory | None = None
    disk: int | None = None
    disk_format: str | None = None
    remembered: Remembered | None = None
    written: dict[tuple[int, int, int], Tokens] = field(default_factory=dict)
    answered: dict[Any, Any] = field(default_factory=dict)

    @property
    def predicts(self) -> nn.Module:
        """What is asked for logits of a text."""
        return self.remembered or self.module


Model = str | Path | tuple[nn.Module, Any] | Opened


def open_reference(
    spec: str | Path, *, dtype: str = "float32", device: str = "cpu", remember: int = 0, trust_remote_code: bool = False
) -> Opened:
    """A model that many are measured against, loaded and measured once: give it to `evaluate` as the reference.

    remember: bytes that its logits may take in memory; what does not fit is computed again for each model.
    """
    found = _open(spec, _memory(spec, dtype, trust_remote_code), dtype, device, trust_remote_code)
    return replace(found, remembered=Remembered(found.module, remember))


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
    prefill: int | Sequence[int] | None = None,
    batch: int | Sequence[int] = 1,
    decode: int = 32,
    divergent: bool | Continuations = False,
    seed: int = 0,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    kick: bool = False,
    facts: str | Path | None = None,
    strict: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> ResultCard:
    """Measures `model`, and beside it `reference`, which it was made from.

    model, reference: a MODEL as on the command line, or a live pair (module, tokenizer), which has no files and so
    neither bytes on disk nor a memory of its own; as reference also what `open_reference` gave. text: a UTF-8 file for
    perplexity and divergence; without one the divergence is measured on text that the reference writes itself, and there
    is no perplexity. window: tokens read at once, by default 1024 (256 on self-written text) or the models' positions if
    those are fewer. windows: how many of the first windows, by default all of the text (4 that the reference writes).
    speed: whether to measure it; pairs, prefill, batch, decode: as in `speeds`, one number or several. divergent: whether to
    measure divergent tokens too, or with which `Continuations`; their prompts are cut from the text, or written by the
    reference. tasks: as `load_tasks` reads them; limit: how many questions of each. kick: LLM-KICK's questions too,
    on the `facts` of a JSONL file or the shipped ones. strict: refuse what cannot be measured of tasks, kick and divergent;
    otherwise a note says so. dtype, device: what a MODEL is loaded as; live modules stay as they are. seed: of the
    self-written text and of the tokens that speed is measured on. progress: opens a bar for a label and a total.

    Where one vocabulary was cut from the other there is no divergence, and perplexities come with bits per byte.

    Raises RequestError when the text is missing or too short for the windows, the tokenizers differ otherwise, or the
    device cannot be used; RunError when a model gives non-finite logits or a clean process cannot load it.
    """
    content = read_text(text) if text is not None else None
    if dtype not in DTYPES:
        raise RequestError(f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")
    check_device(device)
    missed: list[str] = []

    def part(measured: Callable[[], _Part]) -> _Part | None:
        """What is measured besides size, speed and perplexity; a note where it cannot be and the others are wanted still."""
        try:
            return measured()
        except SecateurError as error:
            if strict:
                raise
            missed.append(f"Not measured: {error}")
            return None

    if reference is None and strict and divergent:
        raise RequestError(
            "divergent tokens compare with a reference; name the model it was made from with --reference."
        )
    kicked = kick or facts is not None
    check_limit(limit, bool(tasks or kicked))
    asked = load_tasks(tasks, limit, trust_remote_code)
    if kicked and reference is None and strict:
        raise RequestError("--kick compares with the dense model: name it with --reference ORIGINAL.")
    if (kicked or divergent) and reference is None:
        missed.append("Divergent tokens and LLM-KICK compare with a reference on disk, which there was not.")
        kicked, divergent = False, False
    known = read_facts(facts, limit) if kicked else None
    specs = [model] if reference is None else [model, reference]
    for spec in specs:
        if isinstance(spec, str | Path):
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
        shift, qualities = _on_text(opened, content, _name(text), window, windows, progress, alike)
    elif len(opened) == 2 and alike:
        shift = _on_written(opened, window, windows, seed, progress)
    apart = part(lambda: _divergent(opened, content, text, divergent, seed, progress, alike)) if divergent else None
    modules = [each.module for each in opened]
    lengths, batches = _several(prefill), _several(batch)
    timed = (
        speeds(
            *modules, prefill=lengths, batch=batches, decode=decode, pairs=pairs, seed=seed, meter=Meter.find(),
            progress=progress,
        )
        if speed
        else ()
    )  # fmt: skip
    pairs_of = [(each.module, each.tokenizer) for each in opened]
    theirs = pairs_of[1] if len(opened) == 2 else None
    scores = part(lambda: score(asked, *pairs_of[0], theirs, progress, opened[-1].answered)) or ()
    knowledge: Kick | None = None
    if known is not None:
        facts_asked = known
        knowledge = part(lambda: _knowledge(opened, facts_asked, limit, alike, progress))
    counted = timed[0].prefill.tokens if timed else _within(lengths[0] if lengths else PREFILL, modules)
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
        divergent=apart,
        speed=timed[0] if timed else None,
        more_speed=timed[1:],
        expected_gain=columns[1].multiply_adds / columns[0].multiply_adds - 1 if len(columns) == 2 else None,
        tasks=scores,
        kick=knowledge,
        versions=_versions(bool(asked)),
    )
    said: tuple[str, ...] = () if alike else (_OTHER_TOKENS + (_BY_BYTE if content is not None else _NO_TEXT),)
    said += tuple(missed)
    if knowledge is not None:
        said += knowledge.findings(*(quality.perplexity if quality and alike else None for quality in qualities))
    return card.model_copy(update={"notes": said + findings(card)})


def _several(wanted: int | Sequence[int] | None) -> list[int]:
    return [wanted] if isinstance(wanted, int) else list(wanted or ())


def _divergent(
    opened: Sequence[Opened],
    content: str | None,
    text: str | Path | None,
    wanted: bool | Continuations,
    seed: int,
    progress: Progress,
    alike: bool,
) -> DivergentTokens:
    ours, theirs = opened
    if not alike:
        raise RequestError(
            "Divergent tokens compare token by token, and the vocabularies differ; leave --divergent out."
        )
    written = wanted if isinstance(wanted, Continuations) else Continuations()
    if content is not None:
        tokens = _tokens(theirs, content, _name(text))
    else:
        tokens = _written(theirs, written.prompts, written.prompt, seed, progress)
    return divergent_tokens(
        ours.module, theirs.module, tokens, written=written, progress=progress, known=theirs.answered
    )


def _knowledge(opened: Sequence[Opened], facts: Facts, limit: int | None, alike: bool, progress: Progress) -> Kick:
    ours, theirs = opened
    key = ("kick", facts.sha256, limit)
    if key not in theirs.answered:
        theirs.answered[key] = examine_dense(
            theirs.module, theirs.tokenizer, facts, limit=limit, predicts=theirs.predicts, progress=progress
        )
    return measure_kick(ours.module, ours.tokenizer, theirs.answered[key], texts=alike, progress=progress)


def _name(text: str | Path | None) -> str:
    """What a text is called on the card: where it stands on this machine is nobody's business elsewhere."""
    return "/".join(Path(text or "").parts[-2:])


def _memory(spec: Model, dtype: str, trust_remote_code: bool) -> Memory | None:
    if isinstance(spec, Opened):
        return spec.memory
    return None if isinstance(spec, tuple) else memory(spec, dtype=dtype, trust_remote_code=trust_remote_code)


def _open(spec: Model, used: Memory | None, dtype: str, device: str, trust_remote_code: bool) -> Opened:
    if isinstance(spec, Opened):
        return spec
    if isinstance(spec, tuple):
        module, tokenizer = spec
        return Opened(type(module).__name__, module, tokenizer)
    module, tokenizer = load(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return Opened(str(spec), module, tokenizer, used, bytes_on_disk(spec), locate(str(spec)).weights)


def _on_text(
    opened: Sequence[Opened],
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
            perplexity(each.predicts, text, window=window, windows=windows, progress=progress) for each, text in pairs
        ]
    if not texts[0].ids.equal(texts[1].ids):
        raise RequestError(
            "The model and its reference split the text into different tokens, though their vocabularies agree: their "
            "predictions cannot be compared token by token; evaluate the model without a reference."
        )
    ours, theirs = (each.predicts for each in opened)
    compared = compare(ours, theirs, texts[0], window=window, windows=windows, progress=progress)
    return compared.divergence, [compared.model, compared.reference]


def _tokens(opened: Opened, content: str, name: str) -> Tokens:
    if opened.tokenizer is None:
        raise RequestError(f"{opened.name} has no tokenizer, so the text cannot be read; add its tokenizer files.")
    return tokenize(content, opened.tokenizer, name)


def _on_written(
    opened: Sequence[Opened], window: int | None, windows: int | None, seed: int, progress: Progress
) -> Divergence:
    ours, theirs = opened
    length = window if window is not None else _within(WRITTEN_WINDOW, [ours.module, theirs.module])
    check_length(ours.module, length, "A window")
    count = windows if windows is not None else WRITTEN_WINDOWS
    tokens = _written(theirs, count, length, seed, progress)
    return compare(ours.module, theirs.predicts, tokens, window=length, progress=progress).divergence


def with_speed(card: ResultCard, timed: Speed, model: nn.Module, reference: nn.Module) -> ResultCard:
    """The card with a speed that was measured later, its multiply-adds for as many tokens as that read."""
    tokens = timed.prefill.tokens

    def column(before: Column, module: nn.Module) -> Column:
        counted = {"multiply_adds": multiply_adds(module, tokens), "multiply_adds_tokens": tokens}
        return before.model_copy(update=counted)

    assert card.reference is not None, "a speed with a gain has one"
    ours, theirs = column(card.model, model), column(card.reference, reference)
    gain = theirs.multiply_adds / ours.multiply_adds - 1
    plain = {"model": ours, "reference": theirs, "speed": timed, "expected_gain": gain}
    said = tuple(note for note in card.notes if note not in findings(card))
    timed_card = card.model_copy(update=plain)
    return timed_card.model_copy(update={"notes": said + findings(timed_card)})


def _written(opened: Opened, count: int, length: int, seed: int, progress: Progress) -> Tokens:
    """What the model writes itself, once for all that are compared with it."""
    if opened.tokenizer is None:
        raise RequestError(f"{opened.name} has no tokenizer, so it cannot write text; add its tokenizer files.")
    key = (count, length, seed)
    if key not in opened.written:
        opened.written[key] = self_written(
            opened.module, opened.tokenizer, sequences=count, length=length, seed=seed, progress=progress
        )
    return opened.written[key]


def _within(tokens: int, models: Sequence[nn.Module]) -> int:
    """`tokens`, or the fewest positions that one of the models has."""
    return min([tokens, *(limit for model in models if (limit := maximum_positions(model)) is not None)])


def _versions(asked: bool) -> dict[str, str]:
    names = ("torch", "transformers", *(("lm-eval", "datasets") if asked else ()))
    libraries = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **libraries}

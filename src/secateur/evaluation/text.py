"""The text that a model is measured on, as token ids that remember where they came from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.forward import (
    check_length,
    evaluating,
    finite,
    has_cache,
    logits_of,
    maximum_positions,
    step,
    text_config,
)


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text with their provenance.

    ids: (tokens,) int64. name: what the text is called. sha256: of the text's UTF-8 bytes (of the ids where the text
    was written by a model). tokenizer: class name. vocabulary: number of entries of the tokenizer. bos: whether the
    first id is the beginning-of-sequence token. Fields that are not known are None.
    """

    ids: Tensor
    name: str | None = None
    sha256: str | None = None
    tokenizer: str | None = None
    vocabulary: int | None = None
    bos: bool | None = None
    ends: Tensor | None = None


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file. RequestError when there is none, or it is not text.

    Line ends of any system become "\\n", as everywhere in Python: a carriage return would change the perplexity.
    """
    path = Path(path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing"
        raise RequestError(f"The text {path} is not a file: found {found} there; give a UTF-8 text file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The text {path} is not UTF-8 (byte {error.start}); convert it first.") from None


def tokenize(text: str, tokenizer: Any, name: str | None = None) -> Tokens:
    """The whole `text` as token ids; no special token is added, so windows start wherever the text does."""
    placed = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=placed)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return Tokens(
        ids=ids,
        name=name,
        sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        tokenizer=type(tokenizer).__name__,
        vocabulary=len(tokenizer),
        bos=bool(len(ids)) and ids[0].item() == tokenizer.bos_token_id,
        ends=_ends(text, encoded["offset_mapping"]) if placed else None,
    )


def _ends(text: str, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """How many bytes of `text` have been read with each token, from where tokens lie in it by characters.

    A character made of several tokens is read with the first of them, which all say that they lie on the whole of it.
    """
    widths = torch.tensor([len(character.encode("utf-8")) for character in text], dtype=torch.int64)
    read = torch.cat([torch.zeros(1, dtype=torch.int64), widths.cumsum(0)])
    ends = torch.tensor([end for _, end in offsets], dtype=torch.int64)
    return read[ends].cummax(0).values if len(ends) else ends


def one_cut_from_other(tokenizer: Any, reference: Any) -> bool:
    """Whether all tokens of one are tokens of the other, which has more: a vocabulary that was cut, and the whole one."""
    ours, theirs = set(tokenizer.get_vocab()), set(reference.get_vocab())
    return ours < theirs or theirs < ours


def check_same_tokenizer(tokenizer: Any, reference: Any) -> None:
    """Raises RequestError unless both tokenizers give every token the same id."""
    ours, theirs = tokenizer.get_vocab(), reference.get_vocab()
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        found = f"{len(ours)} tokens against the reference's {len(theirs)}"
    else:
        token = min(token for token in theirs if ours.get(token) != theirs[token])
        found = f"token {token!r} has id {ours.get(token)} against the reference's {theirs[token]}"
    raise RequestError(
        f"The model and its reference have different vocabularies ({found}), so their predictions cannot be compared "
        "token by token; evaluate the model without a reference."
    )


def self_written(
    reference: nn.Module,
    tokenizer: Any | None,
    *,
    sequences: int = 4,
    length: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Tokens:
    """Text that `reference` writes itself: what to compare two models on when there is no data.

    Each sequence starts with a token drawn uniformly from the ordinary vocabulary and goes on by sampling the
    reference's own distribution at temperature 1. Sequence i draws from a stream addressed by (seed, i) alone.

    tokenizer: says which tokens are ordinary. Writing ids needs none: without one every sequence starts with the
    `bos_token_id` of the generation configuration or the configuration, else with their `eos_token_id` (of several the
    first), and where they name neither, with an id drawn uniformly from the whole vocabulary.
    length: tokens per sequence, by default 256 or the model's positions if those are fewer. Returns `Tokens` whose ids
    are the sequences one after the other, so that windows of `length` are exactly the sequences.
    """
    if length is None:
        length = min(256, maximum_positions(reference) or 256)
    if sequences < 1 or length < 2:
        raise RequestError(
            f"{sequences} sequences of {length} tokens cannot be written; at least one of 2 tokens is needed."
        )
    check_length(reference, length, "A sequence")
    generators = [torch.Generator().manual_seed(_address(seed, index)) for index in range(sequences)]
    first = _first_ids(reference, tokenizer)
    starts = [first[torch.randint(len(first), (1,), generator=generator)] for generator in generators]
    written = torch.stack(starts)
    cache = None
    with evaluating(reference), progress("text by the reference", length - 1) as bar:
        while written.shape[1] < length:
            if has_cache(reference):
                logits, cache = step(reference, written if cache is None else written[:, -1:], cache)
            else:
                logits = logits_of(reference, written)
            last = finite(logits[:, -1], f"token {written.shape[1]} of the text the reference writes")
            probabilities = torch.softmax(last.cpu().double(), dim=-1)
            drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
            written = torch.cat([written, torch.stack(drawn)], dim=1)
            bar.advance()
    ids = written.flatten()
    return Tokens(
        ids=ids,
        name=f"written by the reference itself ({sequences} x {length} tokens, seed {seed})",
        sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        tokenizer=None if tokenizer is None else type(tokenizer).__name__,
        vocabulary=None if tokenizer is None else len(tokenizer),
        bos=False if tokenizer is not None else None,
    )


def _first_ids(reference: nn.Module, tokenizer: Any | None) -> Tensor:
    """(ids,) int64: those that a sequence may start with."""
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        return torch.tensor([index for index in sorted(tokenizer.get_vocab().values()) if index not in special])
    vocabulary = text_config(reference).vocab_size
    for name in ("bos_token_id", "eos_token_id"):
        for config in (getattr(reference, "generation_config", None), text_config(reference)):
            value = getattr(config, name, None)
            for index in value if isinstance(value, list | tuple) else [value]:
                # an id that lies outside is one of another tokenizer: nothing can be read from it
                if isinstance(index, int) and 0 <= index < vocabulary:
                    return torch.tensor([index])
    return torch.arange(vocabulary)


def _address(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/self-written/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

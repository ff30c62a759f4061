"""Text of an exact number of characters, by a model that writes tokens.

At every step only tokens are drawn from that can still end on the wanted number: what they write must continue UTF-8, hold
no more characters than are left, and leave no part of a character at the end. So every run meets its lengths, with any
vocabulary that writes bytes or characters; one of single characters (`charpoet`) was trained or tuned to live with it.
"""

import codecs
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError, RunError
from secateur.evaluation.forward import check_length, evaluating, finite, has_cache, logits_of, step
from secateur.network.token_file import TokenFile


@dataclass(frozen=True)
class Written:
    """segments: each of exactly the characters asked for. text: all with its separators. tokens: how many were drawn."""

    segments: tuple[str, ...]
    text: str
    tokens: int


def readable(character: str) -> bool:
    """What takes a place in a line: no control or format characters, line breaks, or code points without a meaning."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp") and character != "\ufffd"


def generate_lengths(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    counts: Sequence[int],
    *,
    separators: Sequence[str] | str = "\n",
    allowed: Callable[[str], bool] = readable,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Written:
    """Continues `prompt` by segments of exactly `counts` characters (Unicode code points).

    Args:
        model: a causal language model. tokenizer: its fast tokenizer.
        separators: what stands behind each segment and is not drawn, such as punctuation: one for all, or one for each.
        allowed: whether a character may be written.
        temperature: 0 takes the likeliest token.
        top_k: draw from the likeliest tokens alone, of those that are possible.
        seed: same seed, same text.

    Raises RequestError where a length, a separator or the tokenizer does not fit, RunError where no token can go on.
    """
    ends = [separators] * len(counts) if isinstance(separators, str) else list(separators)
    wrong = [count for count in counts if type(count) is not int or count < 1]
    if wrong or not counts:
        raise RequestError(f"lengths {list(counts)} were asked for; each is a whole number of at least 1.")
    if len(ends) != len(counts):
        raise RequestError(
            f"there are {len(ends)} separators for {len(counts)} segments; give one for each, or one text."
        )
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise RequestError(
            f"temperature={temperature} and top_k={top_k}: neither is negative, and top_k is at least 1."
        )
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise RequestError("the prompt holds no tokens, and the tokenizer puts none before it; give a prompt.")
    reader = _Reader(model, ids)
    rules = _Rules(_bytes_of_tokens(tokenizer), allowed)
    generator = torch.Generator().manual_seed(seed)
    segments, drawn = [], 0
    with evaluating(model):
        for number, (count, end) in enumerate(zip(counts, ends, strict=True)):
            written = b""
            left, part = count, b""
            while left:
                logits = reader.logits()
                possible = rules.possible(part, left, len(logits))
                if not len(possible):
                    raise RunError(
                        f"segment {number}: no token of this vocabulary can go on with {left} characters left; allow more "
                        "characters, or keep tokens of single characters or bytes."
                    )
                token = _draw(logits, possible, temperature, top_k, generator)
                written += rules.bytes[token]
                characters, part = _read(part + rules.bytes[token])
                left -= len(characters)
                reader.add([token])
                drawn += 1
            segments.append(written.decode())
            if number + 1 < len(counts):
                reader.add(tokenizer(end, add_special_tokens=False)["input_ids"] if end else [])
    text = "".join(segment + end for segment, end in zip(segments, ends, strict=True))
    return Written(tuple(segments), text, drawn)


class _Reader:
    """A model on its way through a text, with a cache where it keeps one."""

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self._model, self._ids, self._read = model, list(ids), 0
        self._cache: Any = None

    def add(self, ids: Iterable[int]) -> None:
        self._ids += ids

    def logits(self) -> Tensor:
        """(vocabulary,) of the next token, float64."""
        check_length(self._model, len(self._ids), "A text")
        if has_cache(self._model):
            new = torch.tensor([self._ids[self._read :]])
            logits, self._cache = step(self._model, new, self._cache)
            self._read = len(self._ids)
        else:
            logits = logits_of(self._model, torch.tensor([self._ids]))
        return finite(logits[0, -1], f"token {len(self._ids)} of the text").cpu().double()


class _Rules:
    """Which tokens may come next.

    Args:
        bytes: what each token writes; tokens that write nothing are missing.
        allowed: whether a character may be written.
    """

    def __init__(self, bytes: dict[int, bytes], allowed: Callable[[str], bool]) -> None:  # noqa: A002
        self.bytes = bytes
        self._allowed = allowed
        # a character that is begun can only be ended where every byte can follow
        self._spells = set(range(0x80, 0xC0)) <= {each[0] for each in bytes.values() if len(each) == 1}
        self._behind = lru_cache(maxsize=None)(self._table)

    def possible(self, part: bytes, left: int, rows: int) -> Tensor:
        """(k,) tokens that may follow the bytes `part` of a character when `left` characters are to be written."""
        tokens, characters, ends = self._behind(part)
        # what leaves a character open takes one more
        return tokens[(characters + (~ends).long() <= left) & (tokens < rows)]

    def _table(self, part: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that may stand behind `part`, how many characters each completes, and whether it leaves none open."""
        rows = []
        for token, written in self.bytes.items():
            if part and not 0x80 <= written[0] < 0xC0:
                continue
            try:
                characters, rest = _read(part + written)
            except UnicodeDecodeError:
                continue
            if all(map(self._allowed, characters)) and (not rest or (self._spells and _can_end(rest, self._allowed))):
                rows.append((token, len(characters), not rest))
        tokens, counts, ends = zip(*rows, strict=True) if rows else ((), (), ())
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor(counts), torch.tensor(ends, dtype=torch.bool)


# kept between calls: how a character may go on has nothing to do with the model
@lru_cache(maxsize=10_000)
def _can_end(part: bytes, allowed: Callable[[str], bool]) -> bool:
    """Whether these first bytes of a character can become one that is allowed."""
    length = 2 if part[0] < 0xE0 else 3 if part[0] < 0xF0 else 4
    for rest in product(range(0x80, 0xC0), repeat=length - len(part)):
        try:
            character = (part + bytes(rest)).decode()
        except UnicodeDecodeError:
            continue
        if allowed(character):
            return True
    return False


def _read(written: bytes) -> tuple[str, bytes]:
    """The whole characters of some bytes, and the bytes of one that is begun. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    characters = decoder.decode(written)
    return characters, decoder.getstate()[0]


def _draw(logits: Tensor, possible: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    scores = logits[possible]
    if temperature == 0:
        return int(possible[scores.argmax()])
    if top_k is not None and top_k < len(scores):
        scores, places = scores.topk(top_k)
        possible = possible[places]
    drawn = torch.multinomial(torch.softmax(scores / temperature, dim=-1), 1, generator=generator)
    return int(possible[drawn])


def _bytes_of_tokens(tokenizer: Any) -> dict[int, bytes]:
    """{token: what it writes in the middle of a text}. Raises RequestError where that is not its letters alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so it is not known what each token writes; open it with "
            "AutoTokenizer."
        )
    tokens = TokenFile(json.loads(backend.to_str()))
    if tokens.kind in ("WordPiece", "WordLevel"):
        raise RequestError(
            f"a {tokens.kind} tokenizer puts spaces between words that no token stands for, so characters cannot be "
            "counted; use a model with a BPE or Unigram tokenizer."
        )
    return {token: written for token in tokens.strings if (written := tokens.bytes_of(token))}

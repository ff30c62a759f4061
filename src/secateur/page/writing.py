"""What the original and the compressed model write after the same prompts, and from where on they differ."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.evaluation import divergent
from secateur.evaluation.forward import evaluating, maximum_positions
from secateur.network.source import load

PROMPTS = (
    "The capital of France is",
    "To make a good cup of tea, first",
    "Once upon a time there was a fox who",
)
"""Plain beginnings that a small model can go on from: a fact, instructions, a story."""
TOKENS = 48
"""Written after each prompt."""


@dataclass(frozen=True)
class Written:
    """pieces: the text of each token that was written, in order. ended: the model wrote its end token."""

    pieces: tuple[str, ...]
    ended: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Pair:
    """What two models wrote after one prompt.

    same: how many tokens both have before the first that differs; None where all are the same. left, right: of the original
    and the result, stretches of text and whether each differs. ended: whether they wrote their end token.
    """

    prompt: str
    same: int | None
    left: tuple[tuple[str, bool], ...]
    right: tuple[tuple[str, bool], ...]
    ended: tuple[bool, bool] = (False, False)


def write(spec: str, prompts: Sequence[str], tokens: int, trust_remote_code: bool = False) -> list[Written]:
    """What MODEL writes greedily after each prompt, in float32. Raises RequestError where it cannot be loaded."""
    model, tokenizer = load(spec, trust_remote_code=trust_remote_code)
    return [greedy(model, tokenizer, prompt, tokens) for prompt in prompts]


def greedy(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> Written:
    """The likeliest token after the other, up to `tokens`, the model's end token, or the end of its positions."""
    ids, end = torch.tensor([tokenizer(prompt)["input_ids"]]), tokenizer.eos_token_id
    room = (maximum_positions(model) or ids.shape[1] + tokens) - ids.shape[1]
    with evaluating(model):
        text = divergent.greedy(
            model,
            ids,
            min(tokens, room),
            what=f"the model after {prompt!r}",
            enough=lambda text: int(text[0, -1]) == end,
        )
    made = text[0].tolist()
    ended = made[-1:] == [end]
    return Written(_pieces(tokenizer, made[:-1] if ended else made), ended)


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds: one that ends within a character adds nothing until the next has completed it."""
    pieces, told = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        whole = text if count == len(ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(told) :])
        told = whole if len(whole) > len(told) else told
    return tuple(pieces)


def side_by_side(prompt: str, original: Written, result: Written) -> Pair:
    """Both texts, with the words that differ marked from the first token on that is not the same.

    Tokens are compared by what they write, which means the same where one vocabulary was cut from the other.
    """
    shared = next(
        (place for place, (a, b) in enumerate(zip(original.pieces, result.pieces, strict=False)) if a != b),
        min(len(original.pieces), len(result.pieces)),
    )
    if original == result:
        both = _told([(original.text, False)])
        return Pair(prompt, None, both, both, (result.ended,) * 2)
    start = "".join(original.pieces[:shared])
    rests = [_words("".join(written.pieces[shared:])) for written in (original, result)]
    left, right = [(start, False)], [(start, False)]
    # without "junk", by which words that occur often would be passed over
    for kind, a, b, c, d in difflib.SequenceMatcher(a=rests[0], b=rests[1], autojunk=False).get_opcodes():
        left.append(("".join(rests[0][a:b]), kind != "equal"))
        right.append(("".join(rests[1][c:d]), kind != "equal"))
    return Pair(prompt, shared, _told(left), _told(right), (original.ended, result.ended))


def _words(text: str) -> list[str]:
    """Words, each with the space before it."""
    return re.findall(r"\s*\S+|\s+$", text)


def _told(parts: Sequence[tuple[str, bool]]) -> tuple[tuple[str, bool], ...]:
    return tuple((_shorter(text), differs) for text, differs in parts if text)


def _shorter(text: str) -> str:
    """A model that writes nothing but line breaks would fill a page with them: from the third on they are counted."""
    return re.sub(r"(?:[ \t]*\n){3,}", lambda found: f"\n⏎ × {found[0].count(chr(10))}\n", text)

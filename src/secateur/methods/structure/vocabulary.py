"""Vocabulary pruning: tokens that a text does not use go, with their rows in embedding and head.

arXiv:2501.02631 compares it with a retrained tokenizer for an encoder and one language, Estonian, and reports no loss on
named entities. Its thresholds are not known here, so the default is that of the generic tool lm-vocab-trimmer (seen at
least twice, or the most frequent K; special tokens always stay).

Ours: causal models too; merges are filtered with the tokens, and each BPE token on the way to a kept one stays, so that
words whose tokens are kept are split as before, which is checked on the text; choice by script needs no text.
"""

import sys
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from secateur.errors import suggest
from secateur.registry import Context, KeptTokens, TokenCounts, Vocabulary, method

MINIMUM, SCRIPTS = 2, ["LATIN"]


@cache
def _known() -> frozenset[str]:
    """First words of the Unicode names of all letters."""
    letters = (chr(code) for code in range(sys.maxunicode + 1) if chr(code).isalpha())
    return frozenset(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters)


def _scripts_of_letters(names: list[str]) -> list[str]:
    for name in names:
        if name.upper() not in _known():
            raise ValueError(
                f"no letter's Unicode name begins with {name}.{suggest(name.upper(), _known())}".rstrip(".?")
            )
    return names


Names = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    AfterValidator(_scripts_of_letters),
]


def _unread(given: Mapping[str, Any]) -> str | None:
    if given["by"] == "script" and (given["keep"] is not None or given["minimum"] != MINIMUM):
        return "keep and minimum count a text, and by=script reads none; leave them out, or by=script."
    if given["by"] == "text" and given["scripts"] != SCRIPTS:
        return "by=text keeps what the text uses, in any script; leave scripts out, or say by=script."
    if given["keep"] is not None and given["minimum"] != MINIMUM:
        return "keep says how many tokens stay, whatever their counts; give either keep or minimum."
    return None


@method(
    "vocabulary",
    kind="structure",
    paper="arXiv:2501.02631",
    claim="dropping unused tokens costs nothing on the language that is kept, and is better than a retrained tokenizer",
    when="after training",
    speedup="universal",
    criterion=("frequency", "characters"),
    schedule="one-shot",
    only={"counts": {"by": "text"}},
    refuses=_unread,
)
def vocabulary(
    words: Vocabulary,
    context: Context,
    counts: TokenCounts | None,
    *,
    by: Literal["text", "script"] = "text",
    minimum: Annotated[int, Field(ge=1)] = MINIMUM,
    keep: Annotated[int | None, Field(ge=1)] = None,
    scripts: Names = SCRIPTS,
    characters: bool = False,
    multiple_of: Annotated[int, Field(ge=1)] = 1,
) -> KeptTokens:
    """Removes tokens that a text or a script does not use, from tokenizer, embedding and head.

    Args:
        by: text keeps what the whole calibration text uses (its samples and length do not matter here); script what is
            written in `scripts` alone, whatever the language, and needs no text.
        minimum: how often a token must occur in the text.
        keep: how many of the most frequent tokens stay, instead of `minimum`; what they are merged from comes on top.
        scripts: first words of Unicode names of letters: LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, CJK, HIRAGANA, HANGUL, ...
        characters: keep every token of one character, for text that was not foreseen.
        multiple_of: rows are rounded up to a multiple of this, by keeping more tokens.
    """
    if counts is None:
        order = sorted(words.strings)
        known = {name.upper() for name in scripts}
        wanted = [token for token in order if (text := words.text_of(token)) and _scripts(text) <= known]
    else:
        context.note("counted", f"{counts.total:,} tokens of {counts.name}, {len(counts.most_frequent()):,} different")
        order = counts.most_frequent()
        wanted = order[:keep] if keep is not None else [t for t in order if int(counts.counts[t]) >= minimum]
        order += [token for token in sorted(words.strings) if not int(counts.counts[token])]
    letters = [token for token in words.strings if len(words.text_of(token) or "") == 1]
    kept = words.keep(wanted + letters if characters else wanted, order, multiple_of)
    if not words.bytes and (gone := len(set(letters) - set(kept.ids))):
        context.warn(
            f"vocabulary: {gone:,} tokens of a single character go, and this tokenizer spells nothing in bytes, so they "
            "become unknown tokens; characters=true keeps them."
        )
    if len(kept.ids) % multiple_of:
        context.warn(f"vocabulary: all {len(kept.ids)} rows are kept, which is no multiple of {multiple_of}.")
    return kept


def _scripts(text: str) -> set[str]:
    """First words of the names of its letters; digits, signs and spaces belong to every script."""
    return {unicodedata.name(letter, "UNKNOWN").split()[0] for letter in text if letter.isalpha()}

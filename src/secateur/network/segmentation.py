"""Whether a tokenizer with fewer tokens splits a text as the whole one does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from tokenizers import Encoding, Tokenizer

from secateur.errors import RunError

_AT_ONCE = 1000


@dataclass
class Coverage:
    """before, after: tokens of the texts. kept: of those before. words: of the texts; covered: those whose tokens are all
    kept. Where a tokenizer splits nothing before it looks at tokens, a text is one word.
    """

    before: int = 0
    kept: int = 0
    after: int = 0
    words: int = 0
    covered: int = 0


def check_segmentation(whole: Tokenizer, cut: Tokenizer, kept: Sequence[int], texts: Iterable[str]) -> Coverage:
    """Compares word by word: one whose tokens are all kept must be split into the same ones, under their new ids.

    A word is what the tokenizer itself splits a text into before it looks at tokens; that depends on no vocabulary.

    Raises RunError naming the first word that is not.
    """
    new = {old: number for number, old in enumerate(kept)}
    found = Coverage()
    remaining = iter(texts)
    while lines := list(islice(remaining, _AT_ONCE)):
        pairs = zip(*(each.encode_batch(lines, add_special_tokens=False) for each in (whole, cut)), strict=True)
        for text, (before, after) in zip(lines, pairs, strict=True):
            found.before += len(before.ids)
            found.kept += sum(number in new for number in before.ids)
            found.after += len(after.ids)
            words = _words(after)
            for word, ids in _words(before).items():
                found.words += 1
                if any(number not in new for number in ids):
                    continue
                found.covered += 1
                if words.get(word) != [new[number] for number in ids]:
                    at = before.word_to_chars(word) if word is not None else None
                    shown = text[slice(*at)] if at else text
                    raise RunError(
                        f"with {len(kept)} tokens {shown[:60]!r} is split otherwise than before, though its tokens are all "
                        "kept: this tokenizer cannot be cut so."
                    )
    return found


def _words(encoding: Encoding) -> dict[int | None, list[int]]:
    """The tokens of each word."""
    both = zip(encoding.word_ids, encoding.ids, strict=True)
    return {word: [number for _, number in group] for word, group in groupby(both, key=lambda pair: pair[0])}

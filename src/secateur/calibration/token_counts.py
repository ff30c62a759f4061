"""How often each token occurs in a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from secateur.calibration.samples import read_entries
from secateur.context import Progress, silent
from secateur.errors import RequestError

_AT_ONCE = 10**6


@dataclass(frozen=True)
class TokenCounts:
    """Counts of a whole text, from its first token to its last.

    Args:
        counts: (rows of the embedding,) int64.
        name: what the text is called.
    """

    counts: Tensor
    name: str

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def most_frequent(self) -> list[int]:
        """Every token that occurs, the most frequent first; of equal ones the lower id."""
        seen = [(-count, token) for token, count in enumerate(self.counts.tolist()) if count]
        return [token for _, token in sorted(seen)]


def count_tokens(data: str, words: Tokenizer, rows: int, progress: Progress = silent) -> TokenCounts:
    """Counts the tokens of everything that `data` holds (as `Calibration.data`), split by the tokenizer `words`.

    Raises RequestError when it holds nothing, or an id that is no row.
    """
    name = data if data.startswith("dataset:") else Path(data).name
    counts = torch.zeros(rows, dtype=torch.int64)
    with progress("counting tokens", 1) as bar:
        for entry in read_entries(data):
            for ids in _encoded(entry, words):
                found = torch.tensor(ids, dtype=torch.int64)
                if len(found) and not 0 <= int(found.min()) <= int(found.max()) < rows:
                    raise RequestError(
                        f"{name} holds a token id outside the model's vocabulary of {rows}; encode it with the model's own "
                        "tokenizer."
                    )
                counts += torch.bincount(found, minlength=rows)
        bar.advance()
    if not int(counts.sum()):
        raise RequestError(f"{name} holds no tokens to count; name another text.")
    return TokenCounts(counts, name)


def _encoded(entry: str | list[int], words: Tokenizer) -> Iterator[list[int]]:
    """Token ids of a text, in parts of about `_AT_ONCE` characters that end with a line: each token takes some hundred
    bytes until it is counted.
    """
    if not isinstance(entry, str):
        yield entry
        return
    part: list[str] = []
    size = 0
    for line in entry.splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= _AT_ONCE:
            yield words.encode("".join(part), add_special_tokens=False).ids
            part, size = [], 0
    yield words.encode("".join(part), add_special_tokens=False).ids


def lines_of(data: str) -> Iterator[str]:
    """The texts that `data` holds, line by line with their ends; lists of ids are none."""
    for entry in read_entries(data):
        if isinstance(entry, str):
            yield from entry.splitlines(keepends=True)

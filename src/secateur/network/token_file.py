"""What `tokenizer.json` says of single tokens, and the same file with fewer of them.

Everything is known by the kind of its model (BPE, Unigram, WordPiece, WordLevel) and of its parts. What every text needs
stays: bytes, the unknown token, added tokens, and for BPE each token on the way to one that is kept.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache, cached_property
from typing import Any

from tokenizers import pre_tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenFile:
    """The tokens of one `tokenizer.json`.

    Args:
        raw: its content.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.model: Mapping[str, Any] = raw["model"]
        self.kind = _kind(self.model)
        vocab = self.model["vocab"]
        entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
        self.strings: dict[int, str] = {number: token for token, number in entries}
        self.added: dict[int, str] = {entry["id"]: entry["content"] for entry in raw.get("added_tokens") or ()}
        self.special = frozenset(entry["id"] for entry in raw.get("added_tokens") or () if entry["special"])
        self.strings |= self.added
        self.ids = {token: number for number, token in self.strings.items()}
        parts = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(raw.get(key))]
        self.byte_level = any(part["type"] == "ByteLevel" for part in parts)
        self._spaces = {part["replacement"] for part in parts if part["type"] == "Metaspace"}
        self._spaces |= {
            part["pattern"]["String"]
            for part in _parts(raw.get("decoder"))
            if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]
        }

    @property
    def unknown(self) -> int | None:
        """The token for what has none."""
        if self.kind == "Unigram":
            found: int | None = self.model.get("unk_id")
            return found
        return self.ids.get(self.model.get("unk_token") or "")

    @cached_property
    def single_bytes(self) -> dict[int, int]:
        """{token: the one byte that it stands for}, where any text can be spelled in bytes."""
        if self.byte_level:
            letters = _byte_letters()
            return {self.ids[letter]: byte for letter, byte in letters.items() if letter in self.ids}
        found = {number: _BYTE.fullmatch(token) for number, token in self.strings.items()}
        return {number: int(match[1], 16) for number, match in found.items() if match and number not in self.added}

    @property
    def needed(self) -> frozenset[int]:
        """What must stay whatever is cut: added tokens, bytes, the unknown token; and Unigram's least likely piece, because
        its score is what unknown characters are scored by.
        """
        always = {*self.added, *self.single_bytes} | ({self.unknown} - {None})
        if self.kind == "Unigram":
            always.add(min(range(len(self.model["vocab"])), key=lambda number: self.model["vocab"][number][1]))
        return frozenset(number for number in always if number is not None)

    def bytes_of(self, token: int) -> bytes | None:
        """The UTF-8 that a token writes in the middle of a text, perhaps a part of a character; None for an added token,
        the unknown one, and an id that no token has.
        """
        if token in self.added or token == self.unknown or token not in self.strings:
            return None
        if token in self.single_bytes:
            return bytes([self.single_bytes[token]])
        text = self.strings[token]
        if self.byte_level:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in text) if all(letter in letters for letter in text) else None
        prefix, suffix = self._affixes
        if prefix and text.startswith(prefix):
            text = text[len(prefix) :]
        if suffix and text.endswith(suffix):
            text = text[: -len(suffix)] + " "
        for mark in self._spaces:
            text = text.replace(mark, " ")
        return text.encode()

    def text_of(self, token: int) -> str | None:
        """What a token writes; None where that is nothing, or a part of a character."""
        try:
            return (self.bytes_of(token) or b"").decode() or None
        except UnicodeDecodeError:
            return None

    def on_the_way(self, token: int) -> set[int]:
        """BPE: the tokens that its own merges make of its letters before they make it, letters too; else none.

        Where a word is split into this token and others, exactly these merges happen inside it, in this order: a merge
        across its edge would have swallowed the edge.
        """
        if self.kind != "BPE" or token in self.added or token not in self.strings:
            return set()
        text, (prefix, suffix) = self.strings[token], self._affixes
        starts = prefix if prefix and text.startswith(prefix) else ""
        ends = suffix if suffix and text.endswith(suffix) else ""
        letters = list(text[len(starts) : len(text) - len(ends)])
        if not letters:
            return set()
        symbols = [(prefix or "" if index or starts else "") + letter for index, letter in enumerate(letters)]
        symbols[-1] += ends
        if any(symbol not in self.ids for symbol in symbols):
            return set()
        passed = {self.ids[symbol] for symbol in symbols}
        while len(symbols) > 1:
            ranked = [(self._ranks.get(pair, (len(self._ranks), "")), at) for at, pair in enumerate(_pairs(symbols))]
            (_, made), at = min(ranked)
            if not made:
                return set()  # no merges lead to it; it is found whole or never
            symbols[at : at + 2] = [made]
            passed.add(self.ids[made])
        return passed - {token}

    def closed(self, tokens: Iterable[int]) -> list[int]:
        """These tokens and all that they cannot do without, sorted."""
        found = set(tokens) | self.needed
        for token in sorted(found):
            # what is on the way to something on the way is on the way itself
            found |= self.on_the_way(token)
        return sorted(found)

    def rebuilt(self, kept: list[int]) -> dict[str, Any]:
        """`tokenizer.json` with the tokens `kept` alone, numbered in that order; ids that no token has leave a gap."""
        new = {old: number for number, old in enumerate(kept)}
        raw = deepcopy(dict(self.raw))
        model = raw["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {token: new[old] for token, old in self.model["vocab"].items() if old in new}
        else:
            model["vocab"] = [entry for old, entry in enumerate(self.model["vocab"]) if old in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
        if self.kind == "BPE":
            left = set(model["vocab"])
            model["merges"] = [
                merge
                for merge, pair in zip(self.model["merges"], self._merges, strict=True)
                if {*pair, self._made(pair)} <= left
            ]
        raw["added_tokens"] = [
            {**entry, "id": new[entry["id"]]} for entry in raw.get("added_tokens") or () if entry["id"] in new
        ]
        _renumber_processor(raw.get("post_processor"), new)
        if raw.get("padding"):
            raw["padding"]["pad_id"] = new.get(raw["padding"]["pad_id"], 0)
        return raw

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        """Older files write a merge as one string."""
        return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in self.model["merges"]]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], tuple[int, str]]:
        return {pair: (rank, self._made(pair)) for rank, pair in reversed(list(enumerate(self._merges)))}

    def _made(self, pair: tuple[str, str]) -> str:
        prefix = self._affixes[0]
        return pair[0] + (pair[1].removeprefix(prefix) if prefix else pair[1])

    @property
    def _affixes(self) -> tuple[str, str]:
        """What a token inside a word begins with, and what one at its end ends with; "" for nothing."""
        return self.model.get("continuing_subword_prefix") or "", self.model.get("end_of_word_suffix") or ""


def _pairs(symbols: list[str]) -> Iterator[tuple[str, str]]:
    return zip(symbols, symbols[1:], strict=False)


def _kind(model: Mapping[str, Any]) -> str:
    """Older files do not say it."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every part of a pipeline, those inside sequences too."""
    if isinstance(value, list):
        for entry in value:
            yield from _parts(entry)
    elif isinstance(value, dict):
        if "type" in value:
            yield value
        for entry in value.values():
            yield from _parts(entry) if isinstance(entry, list) else ()


def _renumber_processor(value: Any, new: Mapping[int, int]) -> None:
    """Tokens that are put around a text are held as text and number: in templates, or as pairs."""
    for part in _parts(value):
        for entry in (part.get("special_tokens") or {}).values():
            entry["ids"] = [new[old] for old in entry["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name][1] = new[part[name][1]]  # type: ignore[index]


@cache
def _byte_letters() -> dict[str, int]:
    """{letter: byte} of byte-level tokenizers: printable bytes are their own letters, the others follow from 256 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}

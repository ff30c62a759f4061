"""A tokenizer as GGUF holds it: byte-level BPE ("gpt2") and BPE on whole characters with bytes behind it ("llama").

What llama.cpp does before it merges is not in the file but in its code, under a name. The name is found by what
`tokenizer.json` does before merging, step by step; a tokenizer that does anything else is refused.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from secateur.errors import RequestError

# Words of llama 3: contractions, letters with one mark before them, digits, marks, line breaks, spaces.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WHOLE_BYTES = ("ByteLevel", False)
_PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}", "Isolated"), _WHOLE_BYTES): "llama-bpe",
    (("Split", _WORDS % r"\p{N}", "Isolated"), _WHOLE_BYTES): "qwen2",
}
_SPACE = "▁"


@dataclass(frozen=True)
class Words:
    """A tokenizer in the terms of GGUF; `model` and `pre` name code of llama.cpp."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space)
        if self.template:
            writer.add_chat_template(self.template)


def read_words(directory: Path, tokenizer: Any, rows: int, spec: str) -> Words:
    """The tokenizer of a model directory for an embedding of `rows` rows.

    tokenizer: as transformers opened it. Raises RequestError where GGUF, or this export, has no way to say it.
    """
    path = directory / "tokenizer.json"
    if tokenizer is None or not path.exists():
        raise RequestError(
            f"{spec} has no tokenizer.json, and a GGUF file holds its tokenizer; put one beside the model."
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    core = raw["model"]
    kind = core.get("type") or ("BPE" if "merges" in core else "Unigram")
    if kind != "BPE":
        raise RequestError(f"the tokenizer of {spec} is of type {kind}; only BPE can be exported to GGUF so far.")
    added = {entry["id"]: entry for entry in raw.get("added_tokens", [])}
    names = {number: token for token, number in core["vocab"].items()}
    if names and max(names) >= rows:
        raise RequestError(f"the tokenizer of {spec} knows token {max(names)}, but its embedding has {rows} rows.")
    # transformers may add a token that the model never had when it reads a tokenizer out of a GGUF file
    names |= {number: entry["content"] for number, entry in added.items() if number < rows}
    whole = core.get("byte_fallback", False)
    pre = "default" if whole else _pre_tokenizer(raw, spec)
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in core["merges"]]
    tokens, types = [], []
    for number in range(rows):
        # rows that no token stands for, mostly for round sizes
        token = names.get(number, f"[PAD{number}]")
        tokens.append(token)
        types.append(_type(token, number in names, added.get(number), whole, core.get("unk_token")))
    return Words(
        model="llama" if whole else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if whole else None,
        merges=None if whole else merges,
        special=_special(tokenizer, rows),
        **_added_around(tokenizer),
        add_space=whole and _first_piece(tokenizer).startswith(_SPACE),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        notes=_notes(raw, pre, whole),
    )


def _pre_tokenizer(raw: dict[str, Any], spec: str) -> str:
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    seen: list[tuple[Any, ...]] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            seen.append((kind, step.get("use_regex", True)))
        elif kind == "Digits":
            seen.append((kind, step.get("individual_digits", False)))
        elif kind == "Split":
            seen.append((kind, step["pattern"].get("Regex", step["pattern"].get("String")), step.get("behavior")))
        else:
            seen.append((kind,))
    name = _PRE_TOKENIZERS.get(tuple(seen))
    if name is None or any(step.get("add_prefix_space") for step in steps):
        raise RequestError(
            f"the tokenizer of {spec} splits text before merging in a way ({', '.join(str(step[0]) for step in seen)}) that "
            "this export has no name of llama.cpp for; export it with llama.cpp's own converter."
        )
    return name


def _type(token: str, known: bool, added: dict[str, Any] | None, whole: bool, unknown: str | None) -> int:
    if not known:
        return int(TokenType.UNUSED)
    if whole and token == unknown:
        return int(TokenType.UNKNOWN)
    if added is not None:
        return int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)
    if whole and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result has the highest score; BPE the pair that comes first in its list."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _special(tokenizer: Any, rows: int) -> dict[str, int]:
    named = {"bos": "bos", "eos": "eos", "unk": "unk", "sep": "sep", "pad": "pad", "mask": "mask"}
    found = {ours: getattr(tokenizer, f"{theirs}_token_id", None) for ours, theirs in named.items()}
    return {name: number for name, number in found.items() if number is not None and number < rows}


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Which tokens it puts around a text: seen on one."""
    plain, around = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    extra = len(around) - len(plain)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "add_bos": extra > 0 and bos is not None and around[0] == bos,
        "add_eos": extra > 0 and eos is not None and around[-1] == eos and plain[-1:] != [eos],
    }


def _first_piece(tokenizer: Any) -> str:
    return str(tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0])


def _notes(raw: dict[str, Any], pre: str, whole: bool) -> list[str]:
    normaliser = (raw.get("normalizer") or {}).get("type")
    if not whole and normaliser:
        return [f"the tokenizer normalises text ({normaliser}) before it splits it, which llama.cpp does not do."]
    return []

"""Fewer tokens: what methods see of a vocabulary, which tensors have a row for each token, what the other files say then."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from secateur.errors import RequestError
from secateur.network.checkpoint import line, stored_buffers
from secateur.network.source import Source
from secateur.network.store import Entry, build, companions, config_entries, raw_config, set_entry
from secateur.network.token_file import TokenFile

TOKENIZER = "tokenizer.json"
# What slow tokenizers read beside it: the whole vocabulary in other forms, which would contradict the result.
_OLDER_FORMS = re.compile(r"vocab\.(json|txt)|merges\.txt|.*\.(model|tiktoken|spm|bpe)")


@dataclass(frozen=True)
class KeptTokens:
    """Which tokens stay, all others go: old ids, sorted; their places are the new ids."""

    ids: tuple[int, ...]


class Vocabulary:
    """The tokens of a model.

    Args:
        rows: rows of the embedding, which may be more than there are tokens.
        tokens: what the tokenizer's file says of them.
        named: ids that the configuration names, such as the one that ends a text.
    """

    def __init__(self, rows: int, tokens: TokenFile, named: Iterable[int] = ()) -> None:
        self.rows, self._tokens = rows, tokens
        self.needed = tokens.needed | {number for number in named if number < rows}

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return self._tokens.kind

    @property
    def strings(self) -> Mapping[int, str]:
        """Every token by its id as the tokenizer's file spells it, added ones too."""
        return self._tokens.strings

    @property
    def special(self) -> frozenset[int]:
        """Tokens that say something about a text and are no part of it."""
        return self._tokens.special

    @property
    def added(self) -> frozenset[int]:
        """Tokens that texts are split at before anything else, special or not: they all stay."""
        return frozenset(self._tokens.added)

    @property
    def bytes(self) -> frozenset[int]:
        """Tokens that each stand for one byte, where any text can be spelled in bytes."""
        return frozenset(self._tokens.single_bytes)

    def text_of(self, token: int) -> str | None:
        """What a token writes; None where that is nothing, or a part of a character."""
        return self._tokens.text_of(token)

    def keep(self, wanted: Iterable[int], order: Iterable[int] = (), multiple_of: int = 1) -> KeptTokens:
        """The tokens `wanted` and all that they cannot do without.

        order: what to keep besides, until the rows are a `multiple_of`; rows that no token has come last.
        """
        kept = set(self._closed(wanted))
        spare = [*order, *(row for row in range(self.rows) if row not in self.strings)]
        for token in spare if len(kept) % multiple_of else ():
            if len(kept) % multiple_of == 0:
                break
            if self._tokens.on_the_way(token) <= kept:
                kept.add(token)
        return KeptTokens(tuple(sorted(kept)))

    def wrong(self, kept: KeptTokens) -> str:
        """Why these tokens cannot stay alone, "" where they can."""
        ids = list(kept.ids)
        if ids != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] >= self.rows:
            return f"the {len(ids)} tokens kept are not sorted ids below {self.rows}"
        missing = [self.strings.get(number, str(number)) for number in self._closed(ids) if number not in set(ids)]
        return f"tokens that others need were not kept, such as {missing[0]!r}" if missing else ""

    def _closed(self, wanted: Iterable[int]) -> list[int]:
        return self._tokens.closed({*wanted} | self.needed)


def open_vocabulary(source: Source) -> tuple[Vocabulary, TokenFile, Tokenizer]:
    """What methods see of a model's tokens, their file, and the tokenizer itself as transformers opens it.

    Raises RequestError where there is no tokenizer, or none that can be written down with fewer tokens.
    """
    if source.live is not None or source.directory is None:
        raise RequestError(
            f"{source.spec} is a live module, which brings no tokenizer, so it is not known what its tokens are; save both "
            "to a directory and name that."
        )
    fast = open_fast(source.directory, source.spec)
    path, rows = source.directory / TOKENIZER, source.anatomy.vocabulary
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    known = TokenFile(raw).ids if raw is not None else {}
    # some classes of transformers add tokens of their own, which a model without a row for them never knew
    used = {token: number for token, number in _vocab(fast).items() if token in known or number < rows}
    if raw is None or used != known:
        # transformers makes it from older files, or adds tokens that other files name
        raw = json.loads(fast.to_str())
    tokens = TokenFile(raw)
    if tokens.kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise RequestError(
            f"the tokenizer of {source.spec} is a {tokens.kind}, which is not known how to cut; BPE, Unigram, WordPiece and "
            "WordLevel are."
        )
    over = [number for number in tokens.needed if number >= rows]
    if over:
        raise RequestError(
            f"the tokenizer of {source.spec} gives {tokens.strings[over[0]]!r} the id {over[0]}, but the embedding has only "
            f"{rows} rows; the two are not of one model."
        )
    named = {number for content in _named_in(source) for number in named_tokens(content) if 0 <= number < rows}
    return Vocabulary(rows, tokens, named), tokens, fast


def misnumbered(fast: Tokenizer, tokens: TokenFile, kept: Sequence[int]) -> list[str]:
    """The tokens that a tokenizer made for the tokens `kept` does not give their new ids, and others that it has."""
    wanted = {tokens.strings[old]: new for new, old in enumerate(kept) if old in tokens.strings}
    found = _vocab(fast)
    others = [
        token for token, number in found.items() if token not in wanted and (token in tokens.ids or number < len(kept))
    ]
    return [token for token, number in wanted.items() if found.get(token) != number] + others


def _vocab(fast: Tokenizer) -> dict[str, int]:
    found: dict[str, int] = fast.get_vocab(with_added_tokens=True)
    return found


def open_fast(directory: Path, spec: str) -> Tokenizer:
    """The tokenizer of a directory as the tokenizers library runs it, without padding. Raises RequestError."""
    try:
        words = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer file fails in its own way
        raise RequestError(f"the tokenizer of {spec} could not be read: {line(error)}") from error
    backend = getattr(words, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise RequestError(
            f"the tokenizer of {spec} ({type(words).__name__}) has no fast form, so it cannot be written with fewer tokens; "
            "convert it to tokenizer.json first."
        )
    fast = Tokenizer.from_str(backend.to_str())
    fast.no_padding()
    fast.no_truncation()
    return fast


@dataclass(frozen=True)
class Rows:
    """Which tensors have a row for each token.

    entries: of the configuration, that say how many tokens there are. dims: {stored tensor: the dimension of its rows}.
    count: rows.
    """

    entries: tuple[Entry, ...]
    dims: Mapping[str, int]
    count: int


def token_rows(source: Source) -> Rows:
    """Found by trying: entries of the configuration that equal the number of rows are raised by one, and what grows with
    the embedding has a row for each token. Of a source that is not converted yet only the entries are known.

    Raises RequestError where nothing does, or what grows is not stored as it is.
    """
    model, rows = source.skeleton, source.anatomy.vocabulary
    embedding = _token_embedding(source)
    raw = raw_config(source)
    for path, value in config_entries(raw, source):
        if type(value) is not int or value != rows:
            continue
        same = [other for other, found in config_entries(raw, source) if other[-1] == path[-1] and found == rows]
        for entries in dict.fromkeys((tuple(same), (path,))):
            grown = build(source, _with_rows(raw, entries, rows + 1))
            dims = _grown(model, grown, rows) if grown is not None else None
            if dims and embedding in dims and source.anatomy.head in dims:
                return Rows(entries, _stored(source, dims) if source.tensors else {}, rows)
    raise RequestError(
        f"the configuration of {type(model).__name__} has no entry that sets how many tokens it knows, so {source.spec} "
        "with fewer could not be opened again."
    )


def _token_embedding(source: Source) -> str:
    """The name of the embedding that token ids look up."""
    model, rows = source.skeleton, source.anatomy.vocabulary
    found = [name for name in source.anatomy.embeddings if model.get_parameter(name).shape[0] == rows]
    if len(found) > 1 and hasattr(model, "get_input_embeddings"):  # positions may be as many
        tokens = model.get_input_embeddings().weight  # type: ignore[operator]
        found = [name for name in found if model.get_parameter(name) is tokens]
    if len(found) != 1:
        raise RequestError(f"it is not known which embedding of {source.spec} looks up tokens: {len(found)} fit.")
    return found[0]


def _with_rows(raw: Mapping[str, Any], entries: Sequence[Entry], rows: int) -> dict[str, Any]:
    changed = deepcopy(dict(raw))
    for entry in entries:
        set_entry(changed, entry, rows)
    return changed


def _grown(model: nn.Module, grown: nn.Module, rows: int) -> dict[str, int] | None:
    """{tensor: dimension} of those with one more row; None where anything else has changed."""
    before, after = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (model, grown))
    dims: dict[str, int] = {}
    if before.keys() != after.keys():
        return None
    for name, shape in before.items():
        differ = [dim for dim, pair in enumerate(zip(shape, after[name], strict=True)) if pair[0] != pair[1]]
        if differ and (len(differ) > 1 or (shape[differ[0]], after[name][differ[0]]) != (rows, rows + 1)):
            return None
        dims |= {name: differ[0]} if differ else {}
    return dims


def _stored(source: Source, dims: Mapping[str, int]) -> dict[str, int]:
    buffers, found = stored_buffers(source.skeleton, source.tensors), {}
    parameters = {name for name, _ in source.skeleton.named_parameters(remove_duplicate=False)}
    for name, dim in dims.items():
        keys = source.stored_keys(name) if name in parameters else tuple(filter(None, [buffers.get(name)]))
        for key in keys:
            if len(keys) > 1 or source.tensors[key].shape[dim] != source.anatomy.vocabulary:
                raise RequestError(
                    f"{source.spec} stores {name} in another layout than the model has it, so no token can be removed."
                )
            found[key] = dim
    return found


def cut_config(source: Source, rows: Rows, kept: Sequence[int]) -> dict[str, Any]:
    """The source's configuration for the tokens `kept`: fewer rows, and every token that it names under its new id.

    Raises RequestError when the architecture cannot be built so.
    """
    new = {old: number for number, old in enumerate(kept)}
    complete = raw_config(source)
    raw = renumbered(complete, new, rows.count)
    for path, value in config_entries(complete, source):
        # what the configuration leaves to its default is an old id too
        if path[-1].endswith(("token_id", "token_ids")) and value is not None:
            changed = _mapped(value, new, rows.count)
            if changed != value:
                set_entry(raw, path, changed)
    raw = _with_rows(raw, rows.entries, len(kept))
    built, wanted = build(source, raw), {}
    for name, tensor in source.skeleton.named_parameters(remove_duplicate=False):
        dim = next((rows.dims[key] for key in source.stored_keys(name) if key in rows.dims), None)
        wanted[name] = tuple(len(kept) if at == dim else size for at, size in enumerate(tensor.shape))
    found = {} if built is None else dict(built.named_parameters(remove_duplicate=False))
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != wanted:
        raise RequestError(
            f"the configuration of {type(source.skeleton).__name__} cannot say that {source.spec} has {len(kept)} tokens; "
            "keep another number of them, with multiple_of."
        )
    return raw


def cut_companions(source: Source, tokens: TokenFile, kept: Sequence[int]) -> dict[str, str | None]:
    """What becomes of the files beside the weights, by name: their new text, or None for one that is left out."""
    new = {old: number for number, old in enumerate(kept)}
    changed: dict[str, str | None] = {TOKENIZER: _json(tokens.rebuilt(list(kept)))}
    for path in companions(source):
        if _OLDER_FORMS.fullmatch(path.name):
            changed[path.name] = None
        elif path.suffix == ".json" and path.name != TOKENIZER:
            content = _read(path)
            if path.name == "added_tokens.json" and isinstance(content, dict):
                changed[path.name] = _json({token: new[old] for token, old in content.items() if old in new})
            elif (
                isinstance(content, dict) and (other := renumbered(content, new, source.anatomy.vocabulary)) != content
            ):
                changed[path.name] = _json(other)
    return changed


def named_tokens(value: Any, key: str = "") -> Iterator[int]:
    """Ids under entries that name tokens, such as eos_token_id: one, or a list of them."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from named_tokens(entry, str(name))
    elif key.endswith(("token_id", "token_ids")):
        yield from (number for number in (value if isinstance(value, list) else [value]) if type(number) is int)


# Entries of generation_config.json that hold ids under names of another form.
_LISTS = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"}
_PAIRS = {"forced_decoder_ids": 1, "sequence_bias": 0}
"""Lists of pairs, and which of a pair holds ids."""


def renumbered(content: Mapping[str, Any], new: Mapping[int, int], rows: int) -> dict[str, Any]:
    """JSON content with every token that it names under its new id; lists lose what names a token that is gone.

    rows: how many ids there were; a number beyond them, or below 0, stands for something else and stays.
    """
    changed: dict[str, Any] = {}
    for name, value in content.items():
        if name == "added_tokens_decoder" and isinstance(value, dict):
            changed[name] = {str(new[int(old)]): entry for old, entry in value.items() if int(old) in new}
        elif name.endswith(("token_id", "token_ids")) or (name in _LISTS and value is not None):
            changed[name] = _mapped(value, new, rows)
        elif name in _PAIRS and isinstance(value, list):
            at = _PAIRS[name]
            # [[ids]] is a list of one sequence, and empty where that cannot be written any more
            read = [(pair, _mapped([pair[at]], new, rows)) for pair in value]
            changed[name] = [[*pair[:at], *found, *pair[at + 1 :]] for pair, found in read if found]
        elif isinstance(value, dict):
            changed[name] = renumbered(value, new, rows)
        else:
            changed[name] = deepcopy(value)
    return changed


def _mapped(value: Any, new: Mapping[int, int], rows: int) -> Any:
    """One id, or lists of ids; None for an id that is gone, and for a sequence that holds one."""
    if type(value) is int:
        return new.get(value) if 0 <= value < rows else value
    if not isinstance(value, list):
        return value
    found = [_mapped(each, new, rows) for each in value]
    if any(isinstance(each, list) for each in value):  # sequences: one that cannot be written any more is no rule
        return [each for each, old in zip(found, value, strict=True) if len(each) == len(old)]
    return [each for each, old in zip(found, value, strict=True) if each is not None or old is None]


def _named_in(source: Source) -> Iterator[Any]:
    yield source.config.to_dict()
    yield raw_config(source)
    for path in companions(source):
        if path.suffix == ".json" and path.name != TOKENIZER:
            yield _read(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # no JSON after all: nothing that transformers reads


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

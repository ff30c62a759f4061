"""Takes out of plain data where files lie on this machine, for what is made to be shown to others."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Two parts at least, so that a slash between words, in an address or before a unit is none.
_INSIDE = re.compile(r"""(?<![\w./~])(?:(?<!:)/+|/(?!/))[^\s/"'`<>]+(?:/+[^\s/"'`<>]+)+/*|file:/+[^\s"'`<>]+""")
_PLAIN = re.compile(r"""[^\s"'`<>]*""")


def without_paths(value: Any) -> Any:
    """Plain data in which every absolute path is its last part, in the middle of a sentence too."""
    # where a path with a space in it ends is known only from a place where it stands alone
    odd = sorted({path for path in _alone(value) if not _PLAIN.fullmatch(path)}, key=len, reverse=True)
    return _bare(value, odd)


def _alone(value: Any) -> Iterator[str]:
    """Strings that are an absolute path, or one behind an equals sign (task=/a/file)."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _alone(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _alone(entry)
    elif isinstance(value, str):
        for path in (value, value.partition("=")[2]):
            if _is_path(path):
                yield path


def _is_path(text: str) -> bool:
    """A sentence, with its full stop, is none, even where it begins with one."""
    return text.startswith("/") and Path(text).is_absolute() and not text.endswith(".")


def _bare(value: Any, odd: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {_bare(name, odd): _bare(entry, odd) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(entry, odd) for entry in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if _is_path(value):
        return Path(value).name
    for path in odd:
        value = value.replace(path, Path(path).name)
    return _INSIDE.sub(lambda found: Path(found[0]).name, value)

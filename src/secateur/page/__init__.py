"""`secateur report`: one HTML file that shows what runs did, from their receipts.

The file is whole in itself: nothing is fetched when it is opened, which its Content-Security-Policy makes sure of, and what
comes from files is escaped. A part that a receipt or a model does not give is left out, or says why it is not there.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.files import write_text
from secateur.page.gather import Comparison, Run, gather
from secateur.page.models import Shown, look
from secateur.page.sections import overview, section
from secateur.page.writing import PROMPTS, TOKENS
from secateur.paths import without_paths

MARK = "<!-- written by secateur report -->"
"""In the first lines of every report: only such a file is written over."""
LARGEST = 3_000_000
"""Bytes that a report may have: it is sent around, and is to open at once."""
_RECEIPTS = 600_000
"""Bytes that the receipts on a page may have together."""
SECONDS = 60.0
"""After which no further spectrum of a run is begun."""


def write_report(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = TOKENS,
    generate: bool = True,
    spectra: bool = True,
    seconds: float = SECONDS,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """Writes one HTML page about finished runs and comparisons.

    Args:
        directories: what `secateur compress` or `secateur compare` has written.
        output: the file, ending with .html; an earlier report is replaced, any other file is not.
        prompts: what original and result go on from, greedily, `tokens` tokens each.
        generate: show what both write; loads both models, one after the other.
        spectra: show singular values of a few matrices before and after.
        seconds: for each run, after which no further spectrum is begun.

    Raises RequestError where a directory holds no finished run, or the file cannot be written over; nothing is written then.
    """
    path = Path(output)
    _check(path, prompts, tokens)
    comparisons, runs = gather(directories)
    with tempfile.TemporaryDirectory() as work:
        wanted = list(prompts) if generate else []
        shown = look(runs, wanted, tokens, seconds if spectra else 0.0, Path(work), trust_remote_code, progress)
    write_text(path, _page(comparisons, runs, shown))
    return path


def _check(path: Path, prompts: Sequence[str], tokens: int) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--output {path}: a report is an HTML file; give it a name that ends with .html.")
    if path.is_dir() or (path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:400]):
        raise RequestError(f"{path} exists and is not a report of Secateur: name another file, or remove it.")
    if not path.parent.is_dir():
        raise RequestError(f"the report cannot be written to {path}: there is no directory {path.parent}.")
    if tokens < 1:
        raise RequestError(f"--tokens {tokens} writes nothing; ask for at least 1.")
    if any(not prompt.strip() for prompt in prompts):
        raise RequestError("a prompt is empty: give it at least one word.")


def _page(comparisons: Sequence[Comparison], runs: Sequence[Run], shown: Sequence[Shown]) -> str:
    """The whole file. Receipts are shortened first where there are many."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("secateur.page", "parts"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["with_code"] = with_code
    style, script = (_part(environment, name) for name in ("page.css", "page.js"))
    room = _RECEIPTS // max(len(runs), 1)
    text = environment.get_template("page.html").render(
        mark=Markup(MARK),
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        version=version("secateur"),
        overview=overview(comparisons, runs),
        runs=[
            section(
                run, seen, alone=len(runs) == 1 and not comparisons, receipt=abridged(without_paths(run.receipt), room)
            )
            for run, seen in zip(runs, shown, strict=True)
        ],
    )
    # a lone half of a surrogate pair, which JSON can hold, has no place in UTF-8
    return text.encode("utf-8", "replace").decode("utf-8")


def _part(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def with_code(text: str) -> Markup:
    """A sentence in which what stands in `backticks` is set as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one that is not closed is a character as any other
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )


def _digest(text: str) -> str:
    """By which the policy knows a style or script of the page itself, and lets no other in."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def abridged(receipt: Any, room: int) -> str:
    """A receipt as JSON text of at most `room` bytes, if need be with a few entries of each long list or mapping."""
    for most in (0, 100, 30, 8, 3, 1):
        text = json.dumps(_shortened(receipt, most) if most else receipt, indent=1, ensure_ascii=False)
        if len(text.encode("utf-8", "replace")) <= room:
            return text
    return "too long to be shown here; it lies beside the model."


def _shortened(value: Any, most: int) -> Any:
    if isinstance(value, dict):
        kept = dict(_first(value.items(), most))
        more = {"…": f"{len(value) - most:,} more"} if len(value) > most >= 0 and _uniform(value) else {}
        return {key: _shortened(entry, most) for key, entry in (kept if more else value).items()} | more
    if isinstance(value, list):
        more_items = [f"… {len(value) - most:,} more"] if len(value) > most else []
        return [_shortened(entry, most) for entry in value[:most]] + more_items
    return value


def _uniform(value: dict[str, Any]) -> bool:
    """Whether a mapping is a table: all its entries are mappings with the same names."""
    return len({tuple(entry) if isinstance(entry, dict) else None for entry in value.values()}) == 1


def _first(items: Any, most: int) -> Iterator[Any]:
    for _, item in zip(range(most), items, strict=False):
        yield item

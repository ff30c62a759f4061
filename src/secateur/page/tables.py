"""Tables of a page: cells with what they show and what they are sorted by."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.figures import number

ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """text: what is shown. value: what the column is sorted by; None where nothing is known, which comes last. link: an
    anchor on the page."""

    text: str
    value: float | str | None = None
    link: str = ""


@dataclass(frozen=True)
class Table:
    """caption: what it shows. columns: (heading, whether it holds numbers). rows: the first cell of each names it."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], most: int = 0, note: str = "") -> Table:
    """A table without the columns that are empty in every row, and with no more than `most` rows."""
    whole = [tuple(row) for row in rows]
    if most and len(whole) > most:
        note = f"{most:,} of {len(whole):,} rows; the others stand in the receipt. {note}".strip()
        whole = whole[:most]
    used = [place for place in range(len(columns)) if any(row[place].text != ABSENT for row in whole)]
    return Table(
        caption,
        tuple((columns[place], any(isinstance(row[place].value, int | float) for row in whole)) for place in used),
        tuple(tuple(row[place] for place in used) for row in whole),
        note,
    )


def text(value: Any) -> Cell:
    """A word."""
    return Cell(ABSENT) if value is None else Cell(str(value), str(value))


def figure(value: Any, show: Callable[[float], str]) -> Cell:
    """A number as `show` writes it, "–" for anything that is none."""
    found = number(value)
    return Cell(ABSENT) if found is None else Cell(show(found), found)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share, small ones with two digits that count."""
    return f"{100 * value:.2g} %" if 0 < abs(value) < 0.01 else f"{100 * value:.1f} %"


def share(value: float) -> str:
    """A share as short as can be, for an axis."""
    return f"{100 * value:.3g} %"


def change(value: float) -> str:
    """A change, with its sign; "none" where there is none at all."""
    return f"{100 * value:+.1f} %" if value else "none"


def plain(value: float) -> str:
    """A number of any size with four digits that count."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"

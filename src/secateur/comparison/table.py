"""A comparison as a table for people, and as CSV."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from secateur.comparison.summary import card_of, quality_of
from secateur.evaluation.card import ResultCard
from secateur.evaluation.speed import Pace
from secateur.evaluation.task_table import score_sentences
from secateur.files import human, write_text
from secateur.scores import Score, scores_of

Row = Mapping[str, Any]
_QUALITY = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "kl": "KL, nats"}
_ABREAST = 6
"""Scores beside each other in one table."""
_FRONTS = {"parameters": "size", "bytes": "bytes", "prefill": "prefill", "decode": "decode"}
CSV = (
    "name", "status", "error", "parameters", "multiply_adds", "bytes", "zeros", "budget_missed", "quality", "median",
    "lower", "upper", "runs", "perplexity", "bits_per_byte", "kl", "agreement", "prefill_gain", "decode_gain", "seconds",
    "peak_memory", "fronts", "result",
)  # fmt: skip


def render(summary: Mapping[str, Any]) -> RenderableType:
    """The table of `compare.json` as a rich renderable: a line for each row, then what its reader must know."""
    quality, rows = summary["protocol"]["quality"], summary["rows"]
    table = Table(
        Column("recipe", overflow="fold", min_width=12),
        *(Column(name, justify="right") for name in ("parameters", "bytes", _QUALITY[quality])),
        *([] if quality == "kl" else [Column(_QUALITY["kl"], justify="right")]),
        *(Column(name, justify="right") for name in ("prefill", "decode", "time")),
        "best in",
        title=f"{summary['model']}: {len(rows)} recipes",
        title_justify="left",
        title_style="bold",
    )
    cards = [card for row in rows if (card := card_of(row))]
    table.add_row(*map(Text, _reference(summary, cards[0] if cards else None)), end_section=True)
    for row in rows:
        table.add_row(*map(Text, _cells(summary, row)), style=None if row["status"] == "done" else "dim")
    return Group(table, *_score_tables(rows), *(Text(line) for line in _sentences(summary, cards)))


def _reference(summary: Mapping[str, Any], card: ResultCard | None) -> list[str]:
    """The line of the uncut model."""
    size, quality = summary["reference"], summary["protocol"]["quality"]
    worth = quality_of(card, quality, reference=True) if card else None
    on = [_FRONTS[figure] for figure, front in summary["fronts"].items() if front["reference"]]
    between = [] if quality == "kl" else ["0" if card and card.divergence else ""]
    return [
        "(not compressed)", f"{size['parameters'] / 1e6:,.1f} M", human(size["bytes"]), _number(worth), *between, "", "", "",
        ", ".join(on),
    ]  # fmt: skip


def _cells(summary: Mapping[str, Any], row: Row) -> list[str]:
    quality, card = summary["protocol"]["quality"], card_of(row)
    if not row["achieved"]:
        empty = 6 if quality == "kl" else 7
        return [row["name"], row["status"], *[""] * empty]
    whole = summary["reference"]["parameters"]
    less = f" (−{1 - row['achieved']['parameters'] / whole:.1%})" if row["achieved"]["parameters"] < whole else ""
    told = row["quality"]
    worth = "" if told is None else _number(float(told["median"]))
    if told and told["runs"] > 1:
        worth += f" ({_number(float(told['lower']))} to {_number(float(told['upper']))})"
    return [
        row["name"] + ("" if row["status"] == "done" else f", {row['status']}"),
        f"{row['achieved']['parameters'] / 1e6:,.1f} M{less}",
        human(row["achieved"]["bytes"]),
        worth,
        *([] if quality == "kl" else [_number(quality_of(card, "kl")) if card else ""]),
        _gain(card.speed.prefill if card and card.speed else None),
        _gain(card.speed.decode if card and card.speed else None),
        f"{row['seconds']:.0f} s",
        ", ".join(_FRONTS[figure] for figure in row["fronts"]),
    ]


def _columns(rows: list[Row]) -> dict[str, str]:
    """Every score that some row has, by its column, with its label."""
    return {score.column: score.name for row in rows for score in scores_of(row["card"])}


def _score_tables(rows: list[Row]) -> list[RenderableType]:
    """A line for each row that was asked, and as many tables as its scores need in width."""
    told = {row["name"]: {score.column: score for score in found} for row in rows if (found := scores_of(row["card"]))}
    columns, tables = list(_columns(rows).items()), list[RenderableType]()
    for start in range(0, len(columns), _ABREAST):
        shown = columns[start : start + _ABREAST]
        table = Table(Column("scores", overflow="fold", min_width=12))
        for _, label in shown:
            table.add_column(Text(label), justify="right")
        dense = {column: score.reference for scores in told.values() for column, score in scores.items()}
        table.add_row("(not compressed)", *(_number(dense[column]) for column, _ in shown), end_section=True)
        for name, scores in told.items():
            table.add_row(Text(name), *(_score(scores.get(column)) for column, _ in shown))
        tables.append(table)
    return tables


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    return _number(score.value) + (f" ± {_number(score.error)}" if score.error is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value >= 1e5 else f"{value:,.4g}" if value >= 100 else f"{value:.4f}"[:6].rstrip(".")


def _gain(pace: Pace | None) -> str:
    if pace is None or pace.gain is None:
        return ""
    unsure = pace.gain.lower <= 0 <= pace.gain.upper
    return f"{pace.gain.median:+.1%}" + (" ?" if unsure else "")


def _sentences(summary: Mapping[str, Any], cards: list[ResultCard]) -> list[str]:
    rows, lines = summary["rows"], []
    for row in rows:
        if row["error"]:
            lines.append(f"{row['name']}, {row['status']}: {row['error']}")
    if budget := summary["budget"]:
        lines += _of_budget(budget, rows)
    if cautioned := [row["name"] for row in rows if row["cautions"]]:
        lines.append(f"Zeros alone make neither files nor speed better, in {', '.join(cautioned)}.")
    for sentence in dict.fromkeys(row["not_measured"] for row in rows if row["not_measured"]):
        lines.append(f"Not measured: {sentence}")
    if cards and (found := cards[0].model.perplexity or cards[0].divergence):
        lines.append(f"Measured on: {found.protocol.sentence()}.")
    if cards:
        lines += score_sentences(cards[0])
    if cards and cards[0].divergent:
        lines.append(f"Divergent tokens: {cards[0].divergent.sentence()}.")
    timed = next((card.speed for card in cards if card.speed), None)
    if timed:
        lines.append(
            f"Prefill of {timed.prefill.tokens} tokens and decoding behind them, median gain over {timed.pairs} turns with "
            f"the model that was not compressed, {timed.threads} threads; ? where the quartiles hold 0."
        )
    if any(row["quality"] and row["quality"]["runs"] > 1 for row in rows):
        lines.append("Several seeds: median (range); all other figures of a row are those of the run in the middle.")
    if summary["fronts"]:
        lines.append(
            "Best in: no other row is at least as good in quality and in that figure, and better in one of them."
        )
    return lines


def _of_budget(budget: Mapping[str, Any], rows: list[Row]) -> list[str]:
    """What was asked of all, and who missed it."""
    asked = f"{budget['asked']:g}" if budget["asked"] < 1 else f"{budget['asked']:,.0f}"
    told = [(row["name"], row["budget"]) for row in rows if row["budget"]]
    within = sum(said["within"] for _, said in told)
    lines = [
        f"Budget: {budget['measure'].replace('_', '-')}={asked}, within {budget['tolerance']:.1%}: met by {within} of "
        f"{len(told)} results."
    ]
    for name, said in told:
        what, parts = said["measure"].replace("_", "-"), [said["note"]] if said["note"] else []
        if not said["within"] and said["missed"] is not None:
            missed = f"{said['reached']:,} {what} where {said['wanted']:,} were wanted, {said['missed']:+.1%}"
            parts.insert(0, missed)
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}.")
    return lines


def write_csv(path: Path, summary: Mapping[str, Any]) -> None:
    """One line for each row; what was not measured is empty. Scores follow, a column for each that some row has."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*CSV, *_columns(summary["rows"])], lineterminator="\n")
    writer.writeheader()
    for row in summary["rows"]:
        card = card_of(row)
        line: dict[str, Any] = {
            key: row[key] for key in ("name", "status", "error", "seconds", "peak_memory", "result")
        }
        line |= row["achieved"] or {}
        line["fronts"] = " ".join(row["fronts"])
        line["budget_missed"] = row["budget"]["missed"] if row["budget"] else None
        if told := row["quality"]:
            line |= {"quality": told["measure"], **{key: told[key] for key in ("median", "lower", "upper", "runs")}}
        if card:
            found = card.model.perplexity
            line["perplexity"], line["bits_per_byte"] = (
                (found.perplexity, found.bits_per_byte) if found else (None, None)
            )
            shift = card.divergence
            line["kl"], line["agreement"] = (shift.kl, shift.agreement) if shift else (None, None)
            for phase in ("prefill", "decode"):
                pace = getattr(card.speed, phase, None)
                line[f"{phase}_gain"] = pace.gain.median if pace and pace.gain else None
            line |= {score.column: score.value for score in scores_of(row["card"])}
        writer.writerow(line)
    write_text(path, text.getvalue())

"""The parts of a page, as its template takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from secateur.explain import Explanation, explain
from secateur.figures import at, number
from secateur.files import human
from secateur.page.charts import Chart, Series, brief, lines
from secateur.page.gather import Comparison, Run
from secateur.page.layers import cut_charts, error_charts, layer_tables
from secateur.page.measured import card_notes, card_table, divergence_chart, kick_table, task_table
from secateur.page.models import Shown
from secateur.page.overview import Entry, overview_table, pareto_charts, scores_table
from secateur.page.spectra import Spectrum
from secateur.page.tables import Cell, Table, change, figure, percent, table, text
from secateur.page.writing import Pair
from secateur.paths import without_paths
from secateur.scores import scores_of
from secateur.telling import Told


@dataclass(frozen=True)
class Tile:
    """One figure that stands out."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Everything about one run; what is empty is left out."""

    anchor: str
    title: str
    lead: str
    open: bool
    tiles: Sequence[Tile]
    explanation: Explanation
    card: Table | None
    card_notes: Sequence[str]
    no_card: str
    tasks: Table | None
    kick: Table | None
    divergence: Chart | None
    cuts: Sequence[Chart]
    errors: Sequence[Chart]
    spectra: Sequence[Chart]
    spectra_table: Table | None
    no_spectra: str
    pairs: Sequence[Pair]
    no_pairs: str
    tables: Sequence[Table]
    recipe: str
    facts: Table
    receipt: str


@dataclass(frozen=True)
class Overview:
    """Several runs beside each other."""

    facts: Sequence[tuple[str, str]] = ()
    table: Table | None = None
    scores: Table | None = None
    charts: Sequence[Chart] = ()
    divergence: Chart | None = None
    notes: Sequence[str] = ()


def card_of(receipt: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result card, empty where nothing was measured."""
    card = receipt.get("card")
    return card if isinstance(card, dict) and "skipped" not in card else {}


def overview(comparisons: Sequence[Comparison], runs: Sequence[Run]) -> Overview | None:
    """The table of all runs and what they cost against what they save; None for one run alone."""
    comparisons = [_published(comparison) for comparison in comparisons]
    entries: list[Entry] = []
    told: set[str] = set()
    for comparison in comparisons:
        for place, row in enumerate(comparison.rows):
            run = comparison.runs.get(place)
            entries.append(_of_row(len(entries) + 1, row, run))
            told |= {run.anchor} if run else set()
    entries += [
        _of_run(len(entries) + place, run) for place, run in enumerate((r for r in runs if r.anchor not in told), 1)
    ]
    if not comparisons and len(entries) < 2:
        return None
    compared = comparisons[0].told if len(comparisons) == 1 and len(entries) == len(comparisons[0].rows) else None
    facts = [fact for comparison in comparisons for fact in _facts_of(comparison)]
    cards = {entry.name: entry.card for entry in entries if entry.card}
    cautions = [
        str(said) for comparison in comparisons for row in comparison.rows for said in row.get("cautions") or ()
    ]
    return Overview(
        facts, overview_table(entries), scores_table(entries), pareto_charts(entries, compared),
        divergence_chart(cards) if len(cards) > 1 else None, tuple(dict.fromkeys(cautions)),
    )  # fmt: skip


def _published(comparison: Comparison) -> Comparison:
    told = without_paths(comparison.told)
    return replace(comparison, told=told, rows=told["rows"])


def _of_run(place: int, run: Run) -> Entry:
    receipt = without_paths(run.receipt)
    card = card_of(receipt)
    return Entry(
        place, run.name, _methods(receipt), card, {} if card else _counted(receipt),
        seconds=number(receipt.get("seconds")), peak_memory=number(receipt.get("peak_memory")), anchor=run.anchor,
    )  # fmt: skip


def _of_row(place: int, row: Mapping[str, Any], run: Run | None) -> Entry:
    card = row.get("card") or {}
    recipe = row.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    named = " → ".join(name for step in steps for name in step) if steps else ""
    return Entry(
        place, str(row["name"]), named or (_methods(run.receipt) if run else ""), card if "skipped" not in card else {},
        row.get("achieved") or {}, str(row.get("status") or "done"), str(row.get("error") or ""),
        number(row.get("seconds")), number(row.get("peak_memory")), number(at(row, ("budget", "missed"))),
        run.anchor if run else "",
    )  # fmt: skip


def _counted(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that the run counted, where nothing was measured."""
    counted = {"parameters": at(receipt, ("shape", "parameters"))}
    for step in range(len(receipt["decisions"])):
        for what in ("parameters", "multiply_adds"):
            after = at(receipt, ("decisions", step, "budget", "reached", what, "after"))
            counted |= {what: after} if after is not None else {}
    return counted


def _methods(receipt: Mapping[str, Any]) -> str:
    return " → ".join(decision["method"] for decision in receipt["decisions"])


def _facts_of(comparison: Comparison) -> list[tuple[str, str]]:
    """What was compared, as far as the comparison says it."""
    said = [("Comparison", comparison.name)]
    for key, label in (("model", "Model"), ("budget", "Budget"), ("protocol", "Protocol")):
        if value := comparison.told.get(key):
            said.append((label, _plain(value)))
    return said


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{str(key).replace('_', ' ')} {_plain(entry)}" for key, entry in value.items() if entry is not None
        )
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def section(run: Run, shown: Shown, alone: bool, receipt: str) -> Section:
    """One run. alone: it is the only one, and is shown unfolded. receipt: as text, as long as there is room for."""
    data: Mapping[str, Any] = without_paths(run.receipt)
    card = card_of(data)
    steps = range(len(data["decisions"]))
    spectrum_charts = [_spectrum_chart(each) for each in shown.spectra]
    skipped = data.get("card") or {}
    return Section(
        anchor=run.anchor,
        title=run.name,
        lead=f"{at(data, ('source', 'model'))}, compressed by {_methods(data)}",
        open=alone,
        tiles=_tiles(data, card),
        explanation=explain(data),
        card=card_table(card) if card else None,
        card_notes=card_notes(card) if card else (),
        no_card=str(skipped.get("skipped") or "") if not card else "",
        tasks=task_table(card),
        kick=kick_table(card),
        divergence=divergence_chart({"result": card}),
        cuts=[chart for step in steps for chart in cut_charts(data, step)],
        errors=[chart for step in steps for chart in error_charts(data, step)],
        spectra=spectrum_charts,
        spectra_table=_spectrum_table(shown.spectra) if shown.spectra else None,
        no_spectra=shown.no_spectra,
        pairs=shown.pairs,
        no_pairs=shown.no_pairs,
        tables=[made for step in steps for made in layer_tables(data, step)],
        recipe=yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True),
        facts=_facts(data),
        receipt=receipt,
    )


def _tiles(receipt: Mapping[str, Any], card: Mapping[str, Any]) -> list[Tile]:
    """Size, quality and speed, as far as they were measured."""
    tiles = []
    counted = _counted(receipt)
    after, before = (number(at(card, (side, "parameters"))) for side in ("model", "reference"))
    if after is not None and before:
        tiles.append(Tile("parameters", change(after / before - 1), f"{brief(before)} → {brief(after)}"))
    elif (size := number(counted.get("parameters"))) is not None:
        tiles.append(Tile("parameters", brief(size)))
    told = Told(receipt)
    zeros, of = (number(at(receipt, ("zeros", key))) for key in ("zeros", "of"))
    if zeros is not None and of:
        tiles.append(Tile("weights that are zero", percent(zeros / of), f"{brief(zeros)} of {brief(of)}"))
    if (loss := told.loss) is not None:
        ours, theirs = (number(at(card, (side, "perplexity", "perplexity"))) for side in ("model", "reference"))
        if ours is not None and theirs is not None and loss.keys[0][-1] == "perplexity":
            tiles.append(Tile("perplexity", f"{ours:.4g}", f"original {theirs:.4g}"))
        else:
            tiles.append(Tile("loss of quality", f"{loss.nats:.3g} nats", "a token, to the original"))
    if (agreement := number(at(card, ("divergence", "agreement")))) is not None:
        tiles.append(Tile("same first token", percent(agreement), "as the original"))
    for phase, label in (("prefill", "reading"), ("decode", "writing")):
        gain, lower, upper = (number(at(card, ("speed", phase, "gain", key))) for key in ("median", "lower", "upper"))
        if gain is not None and lower is not None and upper is not None:
            tiles.append(Tile(f"speed of {label}", change(gain), f"{change(lower)} to {change(upper)}"))
    return tiles + _score_tiles(card)


def _score_tiles(card: Mapping[str, Any]) -> list[Tile]:
    """How many of the tasks got worse, and in how many of LLM-KICK the result matches the original."""
    tiles, found = [], scores_of(card)
    tasks = [score for score in found if score.kind == "task" and score.change_error is not None]
    if tasks:
        fell = sum(score.fell for score in tasks)
        tiles.append(Tile("scores of tasks that fell", f"{fell} of {len(tasks)}", "beyond two standard errors"))
    if judged := [score for score in found if score.kind == "kick" and score.matching is not None]:
        matching = sum(bool(score.matching) for score in judged)
        tiles.append(Tile("LLM-KICK", f"{matching} of {len(judged)} match", "at most 5 % below the original"))
    return tiles


def _spectrum_chart(spectrum: Spectrum) -> Chart:
    named = (f"original, {_shape(spectrum.shapes[0])}", f"result, {_shape(spectrum.shapes[1])}")
    series = [
        Series(name, curve, style)
        for name, curve, style in zip(named, spectrum.curves, ("before", "after"), strict=True)
    ]
    return lines(
        spectrum.name.removesuffix(".weight"),
        series,
        "rank, of all",
        "singular value",
        log=True,
        show_x=lambda x: f"{x:.0%}",
    )


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} × {shape[1]:,}"


def _spectrum_table(found: Sequence[Spectrum]) -> Table:
    rows = [
        (text(each.name), text(_shape(each.shapes[0])), text(_shape(each.shapes[1])),
         figure(each.distance, lambda value: f"{value:.3f}"), figure(each.energy, percent))
        for each in found
    ]  # fmt: skip
    columns = ("matrix", "before", "after", "distance of the distributions (KS)", "energy left")
    return table("Spectra in numbers", columns, rows, note="Energy: the sum of the squared singular values.")


def _facts(receipt: Mapping[str, Any]) -> Table:
    """When it was made, of what, with what, and how long it took."""
    rows: list[tuple[Cell, ...]] = [(text("original"), text(at(receipt, ("source", "model"))))]
    for label, keys in (("licence", ("source", "licence")), ("seed", ("recipe", "seed")), ("threads", ("threads",))):
        rows.append((text(label), text(at(receipt, keys))))
    for name, digest in (at(receipt, ("source", "sha256")) or {}).items():
        rows.append((text(f"sha256 of {name}"), text(digest)))
    check = receipt.get("reload_check") or {}
    rows.append((text("reload check"), text(check.get("how"))))
    rows.append(
        (text("largest relative difference"), figure(check.get("largest_difference"), lambda value: f"{value:.2g}"))
    )
    for name, seconds in (receipt.get("timings") or {}).items():
        rows.append((text(name), figure(seconds, lambda value: f"{value:,.1f} s")))
    rows.append((text("whole run"), figure(receipt.get("seconds"), lambda value: f"{value:,.1f} s")))
    rows.append((text("peak memory"), figure(receipt.get("peak_memory"), human)))
    for name, version in (receipt.get("versions") or {}).items():
        rows.append((text(name), text(version)))
    known = [row for row in rows if row[1].text != "–"]
    return table("The run", ("", "value"), known)

"""What a comparison says: one row for each recipe, its quality, and which rows no other beats."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from secateur.evaluation.card import ResultCard
from secateur.evaluation.pareto import pareto_front
from secateur.evaluation.speed import Pace

Quality = Literal["perplexity", "bits_per_byte", "kl"]
Told = Mapping[str, Any]
"""What is known of one run: status, error, achieved, card, seconds, peak_memory, seed."""
FRONTS = ("parameters", "bytes", "prefill", "decode")
"""What quality is set against: sizes, and how long a token takes beside the reference, 1 being as long."""


def card_of(told: Told) -> ResultCard | None:
    """The card of a run, if it was measured."""
    return ResultCard.from_dict(told["card"]) if told.get("card") else None


def quality_of(card: ResultCard, quality: Quality, reference: bool = False) -> float | None:
    """One figure, of which less is better; None where it was not measured. reference: of what the run started from."""
    if quality == "kl":
        return (0.0 if reference else card.divergence.kl) if card.divergence else None
    column = card.reference if reference else card.model
    found = column.perplexity if column else None
    if found is None:
        return None
    return found.perplexity if quality == "perplexity" else found.bits_per_byte


def common_quality(cards: Sequence[ResultCard]) -> Quality:
    """What all these can be compared by: perplexity where a text was read with one vocabulary, bits per byte where with
    several, the divergence from the reference where there was no text.
    """
    measured = [card for card in cards if card.model.perplexity is not None]
    if not measured:
        return "kl"
    vocabularies = {
        column.perplexity.protocol.vocabulary
        for card in measured
        for column in (card.model, card.reference)
        if column is not None and column.perplexity is not None
    }
    return "perplexity" if len(vocabularies) == 1 else "bits_per_byte"


def row_of(name: str, runs: Sequence[dict[str, Any]], quality: Quality) -> dict[str, Any]:
    """The row of a recipe, from its runs, one for each seed.

    Its figures are those of the run whose quality is the median (of an even number the better one of the two); its status is
    the worst of theirs.
    """
    done = [told for told in runs if told["status"] == "done"]
    values = []
    for told in done:
        card = card_of(told)
        value = quality_of(card, quality) if card else None
        if value is not None:
            values.append((value, told))
    values.sort(key=lambda pair: pair[0])
    shown = values[(len(values) - 1) // 2][1] if values else done[0] if done else runs[0]
    failed = next((told for told in runs if told["status"] != "done"), None)
    several = len(runs) > 1
    row = {
        "name": name,
        "status": failed["status"] if failed else "done",
        "error": f"seed {failed['seed']}: {failed['error']}" if failed and several else failed and failed["error"],
        "quality": _spread([value for value, _ in values], quality) if values else None,
    }
    kept = ["run", "recipe", "achieved", "budget", "card", "not_measured", "seconds", "peak_memory", "cautions"]
    kept += ["result", "receipt"]
    return row | {key: shown.get(key) for key in kept} | {"seeds": list(runs), "fronts": []}


def _spread(values: Sequence[float], quality: Quality) -> dict[str, Any]:
    told = {"median": median(values), "lower": min(values), "upper": max(values)}
    plain = {key: value if math.isfinite(value) else str(value) for key, value in told.items()}
    return {"measure": quality, **plain, "runs": len(values)}


def fronts_of(rows: Sequence[Mapping[str, Any]], quality: Quality) -> dict[str, Any]:
    """{figure: {"rows": names of the rows on the front, "reference": whether the uncut model is on it}}.

    The uncut model takes part: what is no smaller (or faster) and worse than it is on no front. It stays out where its files
    are stored in another form, so that bytes do not compare.
    """
    done = [(row, card) for row in rows if row["status"] == "done" and (card := card_of(row))]
    told = {}
    for figure in FRONTS:
        points: list[tuple[str | None, tuple[float, float]]] = []
        for row, card in done:
            cost = _cost(card, row["achieved"], figure)
            if cost is not None and row["quality"] is not None:
                points.append((row["name"], (cost, float(row["quality"]["median"]))))
        against = next((found for _, card in done if (found := _reference(card, figure, quality))), None)
        if against is not None:
            points.append((None, against))
        if not points:
            continue
        front = [points[index][0] for index in pareto_front([point for _, point in points])]
        told[figure] = {"rows": [name for name in front if name is not None], "reference": None in front}
    return told


def _cost(card: ResultCard, achieved: Mapping[str, Any], figure: str) -> float | None:
    if figure in ("parameters", "bytes"):
        found = achieved.get(figure)
        return None if found is None else float(found)
    pace = getattr(card.speed, figure, None)
    return latency(pace)


def latency(pace: Pace | None) -> float | None:
    """How long a token takes, the reference's being 1; what lies within the spread of the measurement counts as 1."""
    if pace is None or pace.gain is None:
        return None
    return 1.0 if pace.gain.lower <= 0 <= pace.gain.upper else 1 / (1 + pace.gain.median)


def _reference(card: ResultCard, figure: str, quality: Quality) -> tuple[float, float] | None:
    """Where the uncut model stands."""
    worth, column = quality_of(card, quality, reference=True), card.reference
    if worth is None or column is None:
        return None
    if figure == "parameters":
        return float(column.parameters), worth
    if figure == "bytes":
        alike = column.bytes_on_disk is not None and column.disk_format == card.model.disk_format
        return (float(column.bytes_on_disk or 0), worth) if alike else None
    return (1.0, worth) if latency(getattr(card.speed, figure, None)) is not None else None

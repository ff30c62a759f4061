"""What was measured of one run: the result card as a table, scores of tasks, how soon its writing leaves the original's."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from pydantic import ValidationError

from secateur.evaluation import ResultCard, sentences
from secateur.figures import at, number
from secateur.files import human
from secateur.page.charts import Chart, Series, lines
from secateur.page.tables import ABSENT, Cell, Table, change, figure, percent, plain, share, table, text, whole

Card = Mapping[str, Any]


def card_table(card: Card) -> Table:
    """The figures of a card beside the reference's, without those that it lacks."""
    rows: list[tuple[Cell, ...]] = []
    tokens = at(card, ("model", "multiply_adds_tokens"))
    for label, keys, show in (
        ("parameters", ("parameters",), whole),
        ("bytes on disk", ("bytes_on_disk",), human),
        ("peak memory", ("memory", "peak"), human),
        ("memory while loading", ("memory", "loading"), human),
        ("memory while reading", ("memory", "prefill"), human),
        ("memory while writing", ("memory", "decode"), human),
        (f"multiply-adds of {tokens} tokens", ("multiply_adds",), lambda value: f"{value / 1e9:,.3f} G"),
        ("perplexity", ("perplexity", "perplexity"), plain),
        ("bits per byte", ("perplexity", "bits_per_byte"), lambda value: f"{value:.4f}"),
    ):
        rows.append(_against(card, label, keys, show))
    kl, agreement = (at(card, ("divergence", key)) for key in ("kl", "agreement"))
    rows.append((text("KL to the original, nats a token"), Cell(ABSENT), figure(kl, plain), Cell(ABSENT)))
    rows.append((text("same first token"), Cell(ABSENT), figure(agreement, percent), Cell(ABSENT)))
    rows += _divergent_rows(card)
    settings = [speed for speed in (at(card, ("speed",)), *(at(card, ("more_speed",)) or ())) if speed]
    for speed, (phase, name) in product(settings, (("prefill", "reading"), ("decode", "writing"))):
        pace = speed.get(phase) or {}
        batch = f" of each of {speed['batch']}" if (number(speed.get("batch")) or 1) > 1 else ""
        behind = f" behind {at(speed, ('prefill', 'tokens'))}" if phase == "decode" else ""
        label = f"{name} {pace.get('tokens')} tokens{behind}{batch} ({phase}), tokens/s"
        gain = at(pace, ("gain", "median"))
        rows.append(
            (text(label), _spread(pace.get("reference"), 1), _spread(pace.get("model"), 1), figure(gain, change))
        )
        lower, upper = (number(at(pace, ("gain", key))) for key in ("lower", "upper"))
        if lower is not None and upper is not None:
            spread = Cell(f"{change(lower)} to {change(upper)}", lower)
            rows.append((text(f"{name}, quartiles of the gain"), Cell(ABSENT), Cell(ABSENT), spread))
        spent = [number(at(pace, (key, "median"))) for key in ("reference_joules", "joules")]
        moved = spent[1] / spent[0] - 1 if spent[0] and spent[1] is not None else None
        shown = [_spread(pace.get(key), 3) for key in ("reference_joules", "joules")]
        rows.append((text(f"{name}{behind}{batch}, joules a token"), *shown, figure(moved, change)))
        work = [number(pace.get(key)) for key in ("reference_multiply_adds", "multiply_adds")]
        promised = work[0] / work[1] - 1 if work[0] is not None and work[1] else None
        shown = [figure(each, lambda found: f"{found / 1e9:,.3f} G") for each in work]
        rows.append((text(f"{name}{behind}{batch}, multiply-adds and the gain they promise"), *shown,
                     figure(promised, change)))  # fmt: skip
    expected = at(card, ("expected_gain",))
    rows.append((text("gain that multiply-adds promise"), Cell(ABSENT), Cell(ABSENT), figure(expected, change)))
    rows = [row for row in rows if any(cell.text != ABSENT for cell in row[1:])]
    return table("Result card", ("", "original", "result", "change"), rows)


def _divergent_rows(card: Card) -> list[tuple[Cell, ...]]:
    """How soon and how often greedy text is another than the original's."""
    found = at(card, ("divergent",)) or {}
    rows: list[tuple[Cell, ...]] = []
    for share_of, label in (
        ("0.1", "a tenth"), ("0.25", "a quarter"), ("0.5", "half"), ("0.75", "three quarters"), ("0.9", "nine tenths"),
    ):  # fmt: skip
        quantiles = found.get("quantiles") or {}
        if share_of in quantiles:
            after = number(quantiles[share_of])
            shown = figure(after, whole) if after is not None else text(f"> {found.get('continuation')}")
            name = f"tokens before the first divergent one, in {label} of the texts at most"
            rows.append((text(name), Cell(ABSENT), shown, Cell(ABSENT)))
    mean = figure(found.get("mean"), lambda value: f"{value:,.2f}")
    rows.append((text("tokens before the first divergent one, on average"), Cell(ABSENT), mean, Cell(ABSENT)))
    for key, label in (
        ("censored", "texts that never diverge"),
        ("share", "divergent tokens, each reading its own text"),
        ("corrected", "divergent tokens, reading the original's text"),
    ):
        rows.append((text(label), Cell(ABSENT), figure(found.get(key), percent), Cell(ABSENT)))
    return rows


def kick_table(card: Card) -> Table | None:
    """Scores of the LLM-KICK protocol beside the original's."""
    scores = at(card, ("kick", "scores"))
    if not scores:
        return None
    rows = []
    for score in scores:
        before, after, drop = (number(score.get(key)) for key in ("reference", "value", "drop"))
        moved = after - before if before is not None and after is not None else None
        matches = {True: "yes", False: "no"}.get(score.get("matching"))
        rows.append((
            text(score.get("task")), _score(before, score.get("reference_stderr")), _score(after, score.get("stderr")),
            _score(moved, score.get("change_stderr"), "+.3f"), figure(None if drop is None else -drop, change),
            text(matches), figure(score.get("chance"), plain),
            figure(score.get("kl"), plain), figure(score.get("agreement"), percent), figure(score.get("n"), whole),
        ))  # fmt: skip
    columns = (
        "task", "original", "result", "difference", "of the original", "matches", "chance", "KL, nats", "same first token",
        "questions",
    )  # fmt: skip
    note = "± one standard error; those of differences are over the same questions. A match is at most 5 % below."
    return table("Knowledge (LLM-KICK)", columns, rows, note=note)


def _against(card: Card, label: str, keys: tuple[str, ...], show: Callable[[float], str]) -> tuple[Cell, ...]:
    before, after = (number(at(card, (side, *keys))) for side in ("reference", "model"))
    moved = after / before - 1 if before and after is not None else None
    if keys[0] == "perplexity" and keys[-1] == "perplexity" and not _same_vocabulary(card):
        moved = None
    return text(label), figure(before, show), figure(after, show), figure(moved, change)


def _same_vocabulary(card: Card) -> bool:
    sizes = [at(card, (side, "perplexity", "protocol", "vocabulary")) for side in ("model", "reference")]
    return sizes[0] == sizes[1]


def _spread(told: Any, digits: int) -> Cell:
    """A median, with its quartiles where they are known."""
    middle, lower, upper = (number(at(told, (key,))) for key in ("median", "lower", "upper"))
    known = lower is not None and upper is not None
    quartiles = f" ({lower:,.{digits}f} to {upper:,.{digits}f})" if known else ""
    return figure(middle, lambda value: f"{value:,.{digits}f}{quartiles}")


def card_notes(card: Card) -> list[str]:
    """What a reader of the figures must know, in the words of the printed card: how each was measured, and its notes."""
    try:
        return sentences(ResultCard.from_dict({**card}))
    except ValidationError:
        said = (
            "How it was measured stands in the receipt, written by another version in a way that this one cannot read."
        )
        return [said, *map(str, at(card, ("notes",)) or ())]


def task_table(card: Card) -> Table | None:
    """Scores of tasks beside the original's."""
    tasks = at(card, ("tasks",))
    if not tasks:
        return None
    rows = []
    for score in tasks:
        before, after = number(score.get("reference")), number(score.get("value"))
        moved = after - before if before is not None and after is not None else None
        rows.append((
            text(score.get("name")), text(score.get("metric")), _score(before, score.get("reference_stderr")),
            _score(after, score.get("stderr")), _score(moved, score.get("change_stderr"), "+.3f"),
            figure(score.get("n"), whole), figure(score.get("of"), whole), figure(score.get("shots"), whole),
            text({True: "more", False: "less"}.get(score.get("higher_is_better"))),
        ))  # fmt: skip
    columns = (
        "task",
        "metric",
        "original",
        "result",
        "difference",
        "questions",
        "of",
        "examples before each",
        "better is",
    )
    note = "± one standard error; those of differences are over the same questions where a metric is their mean."
    return table("Tasks", columns, rows, note=note)


def _score(value: float | None, error: Any, form: str = ".3f") -> Cell:
    spread = number(error)
    return figure(value, lambda found: format(found, form) + ("" if spread is None else f" ± {spread:.3f}"))


def survival(card: Card) -> list[tuple[float, float]]:
    """(position, share of the continuations that have not left the original's by then)."""
    curve = at(card, ("divergent", "survival")) or []
    return [
        (float(entry[0]), float(entry[1])) for entry in curve if isinstance(entry, list | tuple) and len(entry) == 2
    ]


def divergence_chart(cards: Mapping[str, Card]) -> Chart | None:
    """One curve for each model that has one."""
    curves = {name: survival(card) for name, card in cards.items()}
    styles = ("after", "other", "third", "fourth", "fifth", "sixth")
    series = [
        Series(name, curve, styles[place % len(styles)])
        for place, (name, curve) in enumerate((name, curve) for name, curve in curves.items() if curve)
    ]
    if not series:
        return None
    return lines(
        "Continuations that still are the original's", series[:len(styles)], "token", "share", steps=True, show=share,
        show_x=lambda x: f"{x:.0f}",
    )  # fmt: skip

"""Several runs beside each other: one table, and what they cost in quality against what they save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.comparison.summary import latency
from secateur.evaluation.pareto import pareto_front
from secateur.evaluation.speed import Pace, Spread
from secateur.figures import at, number
from secateur.files import human
from secateur.page.charts import Chart, Point, brief, scatter
from secateur.page.tables import ABSENT, Cell, Table, change, figure, percent, plain, share, table, text, whole
from secateur.scores import Score, scores_of


@dataclass(frozen=True)
class Entry:
    """One run among several.

    number: as marked in plots. methods: what it did, in short. status: "done", "failed" or "refused". achieved: parameters,
    multiply_adds and bytes of the result where they are known without a card. missed: by which fraction it missed the
    budget of its comparison. anchor: where the page tells more of it.
    """

    number: int
    name: str
    methods: str
    card: Mapping[str, Any]
    achieved: Mapping[str, Any]
    status: str = "done"
    error: str = ""
    seconds: float | None = None
    peak_memory: float | None = None
    missed: float | None = None
    anchor: str = ""

    def size(self, what: str) -> float | None:
        """Its "parameters", "multiply_adds" or "bytes"."""
        own = number(self.achieved.get(what))
        return (
            own if own is not None else number(at(self.card, ("model", "bytes_on_disk" if what == "bytes" else what)))
        )

    def gain(self, phase: str) -> float | None:
        return number(at(self.card, ("speed", phase, "gain", "median")))


def overview_table(entries: Sequence[Entry]) -> Table:
    """One row for each run, failed ones too."""
    rows = []
    for entry in entries:
        card = entry.card
        failed = "" if entry.status == "done" else f"{entry.status}: {entry.error}".rstrip(": ")
        rows.append((
            Cell(entry.name, entry.name, entry.anchor), Cell(str(entry.number), entry.number), text(entry.methods or None),
            text(failed or None),
            figure(entry.size("parameters"), whole), figure(_less(entry, "parameters"), change),
            figure(entry.size("multiply_adds"), brief), figure(entry.size("bytes"), human),
            figure(at(card, ("model", "perplexity", "perplexity")), plain),
            figure(at(card, ("divergence", "kl")), plain), figure(at(card, ("divergence", "agreement")), percent),
            figure(entry.gain("prefill"), change), figure(entry.gain("decode"), change),
            figure(entry.seconds, lambda value: f"{value:,.0f} s"), figure(entry.peak_memory, human),
            figure(entry.missed, change),
        ))  # fmt: skip
    columns = (
        "run", "no.", "methods", "not done", "parameters", "of the original", "multiply-adds", "bytes", "perplexity",
        "KL, nats", "same first token", "prefill gain", "decoding gain", "time", "memory", "off the budget",
    )  # fmt: skip
    return table("The runs", columns, rows)


def scores_table(entries: Sequence[Entry]) -> Table | None:
    """Tasks, LLM-KICK and divergent tokens of all runs that were asked, a column for each score; None where none was.

    The original has a row where all agree on what it scored: they may have started from different ones, or been asked
    different questions.
    """
    found = [(entry, {score.column: score for score in scores_of(entry.card)}) for entry in entries]
    names = {score.column: score.name for _, own in found for score in own.values()}
    if not names:
        return None
    dense = {column: {own[column].reference for _, own in found if column in own} for column in names}
    rows = [] if any(len(values) > 1 for values in dense.values()) else [
        (text("(original)"), *(_figure(value) for [value] in dense.values()))
    ]  # fmt: skip
    for entry, own in found:
        if own:
            rows.append((Cell(entry.name, entry.name, entry.anchor), *(_score(own.get(column)) for column in names)))
    note = "± one standard error. * worse than the original by more than two standard errors of the difference."
    return table("Scores", ("run", *names.values()), rows, note=note)


def _score(score: Score | None) -> Cell:
    if score is None:
        return Cell(ABSENT)
    error = "" if score.error is None else f" ± {score.error:.3f}"
    return Cell(f"{plain(score.value)}{error}{' *' if score.fell else ''}", score.value)


def _figure(value: float | None) -> Cell:
    return Cell(ABSENT) if value is None else Cell(plain(value), value)


def _less(entry: Entry, what: str) -> float | None:
    ours, theirs = entry.size(what), number(at(entry.card, ("reference", what)))
    return ours / theirs - 1 if ours is not None and theirs else None


def _seconds(entry: Entry) -> float | None:
    """Time to read a text, relative to the original's in the same measurement: machines and loads cancel out."""
    found = {key: number(at(entry.card, ("speed", "prefill", "gain", key))) for key in ("median", "lower", "upper")}
    known = {key: value for key, value in found.items() if value is not None}
    if len(known) < len(found) or known["median"] <= -1:
        return None
    gain = Spread(**known, samples=())
    return latency(Pace(tokens=0, model=gain, reference=None, gain=gain))


_SIZES: tuple[tuple[str, str, Callable[[Entry], float | None], tuple[str, ...] | None, Callable[[float], str]], ...] = (
    ("parameters", "parameters", lambda entry: entry.size("parameters"), ("parameters",), brief),
    ("bytes on disk", "bytes", lambda entry: entry.size("bytes"), ("bytes_on_disk",), human),
    ("time to read, of the original's", "prefill", _seconds, None, share),
)


@dataclass(frozen=True)
class _Quality:
    """A figure by which runs may be compared, less being better. measure: its name in a comparison. keys: in a card.
    protocol: what must be alike for that.
    """

    name: str
    measure: str
    keys: tuple[str, ...]
    protocol: tuple[tuple[str, ...], ...]

    def origin(self, card: Mapping[str, Any]) -> float | None:
        """The original's: its own perplexity, or no divergence from itself."""
        return number(at(card, ("reference", *self.keys[1:]))) if self.keys[0] == "model" else 0.0


_OF_TEXT = ("model", "perplexity", "protocol")
_TEXTS = ((*_OF_TEXT, "sha256"), (*_OF_TEXT, "window"))
_QUALITIES = (
    _Quality("perplexity", "perplexity", ("model", "perplexity", "perplexity"), (_OF_TEXT,)),
    _Quality(
        "bits per byte",
        "bits_per_byte",
        ("model", "perplexity", "bits_per_byte"),
        ((*_OF_TEXT, "sha256"), (*_OF_TEXT, "window")),
    ),
    _Quality("KL to the original, nats a token", "kl", ("divergence", "kl"), (("divergence", "protocol"),)),
)


def pareto_charts(entries: Sequence[Entry], told: Mapping[str, Any] | None = None) -> list[Chart]:
    """Quality against size and time, for the runs that were measured in the same way against the same original: by the
    figure that most of them have.

    A plot needs two runs at least. The original is drawn too, where it is stored alike, and takes part: a run that is no
    smaller and worse is on no front. told: the comparison that all of them are of, whose fronts are taken as it says them.
    """
    groups = [(quality, _alike(entries, quality)) for quality in _QUALITIES]
    quality, alike = max(groups, key=lambda group: len(group[1]))
    charts = []
    for what, figure_of, size, original, show in _SIZES if len(alike) > 1 else ():
        points = [(entry, size(entry), number(at(entry.card, quality.keys))) for entry in alike]
        known = [(entry, x, y) for entry, x, y in points if x is not None and y is not None]
        if len(known) < 2 or len({x for _, x, _ in known}) + len({y for _, _, y in known}) < 3:
            continue
        marks = [
            Point(x, y, str(entry.number), f"{entry.name}: {what} {show(x)}, {quality.name} {plain(y)}")
            for entry, x, y in known
        ]
        ys = [mark.y for mark in marks]
        wide = min(ys) > 0 and max(ys) / min(ys) > 20
        origin = _origin(known[0][0].card, quality, original)
        if origin and (origin[1] > 0 or not wide):  # nothing is as good as a logarithm's zero
            hint = f"the original: {what} {show(origin[0])}, {quality.name} {plain(origin[1])}"
            marks.insert(0, Point(*origin, "0", hint, "before"))
        said_front = at(told, ("fronts", figure_of)) if at(told, ("protocol", "quality")) == quality.measure else None
        if said_front:
            names = [*([None] if marks[0].label == "0" else []), *(entry.name for entry, _, _ in known)]
            on = [*said_front.get("rows", ()), *([None] if said_front.get("reference") else [])]
            front = [place for place, name in enumerate(names) if name in on]
        else:
            front = pareto_front([(mark.x, mark.y) for mark in marks])
        marks = [replace(mark, front=place in front) for place, mark in enumerate(marks)]
        title = f"{quality.name[:1].upper()}{quality.name[1:]} against {what}"
        made = scatter(title, marks, what, quality.name, log=wide, show_x=show)
        said = "Numbers as in the table; less is better in both; filled are the runs that nothing else beats in both."
        charts.append(
            Chart(title, made.svg, made.legend, said + (" 0 is the original." if marks[0].label == "0" else ""))
        )
    return charts


def _alike(entries: Sequence[Entry], quality: _Quality) -> list[Entry]:
    """The most runs whose quality was measured in the same way; two figures of different protocols do not compare."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if number(at(entry.card, quality.keys)) is not None:
            protocol = [at(entry.card, keys) for keys in (*quality.protocol, ("reference", "parameters"))]
            groups.setdefault(str(protocol), []).append(entry)
    return max(groups.values(), key=len, default=[])


def _origin(card: Mapping[str, Any], quality: _Quality, size: tuple[str, ...] | None) -> tuple[float, float] | None:
    """Where the original lies."""
    formats = [at(card, (side, "disk_format")) for side in ("reference", "model")]
    if size == ("bytes_on_disk",) and formats[0] != formats[1]:
        return None  # a quantized file beside floats
    x, y = 1.0 if size is None else number(at(card, ("reference", *size))), quality.origin(card)
    return (x, y) if x is not None and y is not None else None

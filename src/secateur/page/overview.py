"""Several runs beside each other: one table, and what they cost in quality against what they save."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.pareto import pareto_front
from secateur.figures import at, number
from secateur.files import human
from secateur.page.charts import Chart, Point, brief, scatter
from secateur.page.tables import Cell, Table, change, figure, percent, plain, share, table, text, whole


@dataclass(frozen=True)
class Entry:
    """One run among several.

    number: as marked in plots. methods: what it did, in short. status: "done", "failed" or "refused". achieved: parameters,
    multiply_adds and bytes of the result where they are known without a card. anchor: where the page tells more of it.
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
        ))  # fmt: skip
    columns = (
        "run", "no.", "methods", "not done", "parameters", "of the original", "multiply-adds", "bytes", "perplexity",
        "KL, nats", "same first token", "prefill gain", "decoding gain", "time", "memory",
    )  # fmt: skip
    return table("The runs", columns, rows)


def _less(entry: Entry, what: str) -> float | None:
    ours, theirs = entry.size(what), number(at(entry.card, ("reference", what)))
    return ours / theirs - 1 if ours is not None and theirs else None


def _seconds(entry: Entry) -> float | None:
    """Time to read a text, relative to the original's in the same measurement: machines and loads cancel out."""
    gain = entry.gain("prefill")
    return 1 / (1 + gain) if gain is not None and gain > -1 else None


_SIZES: tuple[tuple[str, Callable[[Entry], float | None], tuple[str, ...] | None, Callable[[float], str]], ...] = (
    ("parameters", lambda entry: entry.size("parameters"), ("parameters",), brief),
    ("bytes on disk", lambda entry: entry.size("bytes"), ("bytes_on_disk",), human),
    ("time to read, of the original's", _seconds, None, share),
)


def pareto_charts(entries: Sequence[Entry]) -> list[Chart]:
    """Quality against size and time, for the runs that were measured on the same text in the same way.

    A plot needs two runs at least; the original is drawn where it was measured alike.
    """
    qualities: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("perplexity", ("model", "perplexity", "perplexity"), ("model", "perplexity", "protocol")),
        ("KL to the original, nats a token", ("divergence", "kl"), ("divergence", "protocol")),
    )
    for quality, keys, protocol in qualities:
        alike = _alike(entries, keys, protocol)
        if len(alike) < 2:
            continue
        charts = []
        for what, size, whole_model, show in _SIZES:
            points = [(entry, size(entry), number(at(entry.card, keys))) for entry in alike]
            known = [(entry, x, y) for entry, x, y in points if x is not None and y is not None]
            if len(known) < 2 or len({x for _, x, _ in known}) + len({y for _, _, y in known}) < 3:
                continue
            front = pareto_front([(x, y) for _, x, y in known])
            marks = [
                Point(
                    x,
                    y,
                    str(entry.number),
                    f"{entry.name}: {what} {show(x)}, {quality} {plain(y)}",
                    front=place in front,
                )
                for place, (entry, x, y) in enumerate(known)
            ]
            origin = _origin(known[0][0], keys, whole_model)
            if origin:
                hint = f"the original: {what} {show(origin[0])}, {quality} {plain(origin[1])}"
                marks.insert(0, Point(*origin, "0", hint, "before"))
            ys = [mark.y for mark in marks]
            wide = min(ys) > 0 and max(ys) / min(ys) > 20
            made = scatter(
                f"{quality[:1].upper()}{quality[1:]} against {what}", marks, what, quality, log=wide, show_x=show
            )
            said = "Numbers as in the table; less is better in both; filled are the runs that no other beats in both."
            charts.append(Chart(made.title, made.svg, made.legend, said + (" 0 is the original." if origin else "")))
        if charts:
            return charts
    return []


def _alike(entries: Sequence[Entry], keys: tuple[str, ...], protocol: tuple[str, ...]) -> list[Entry]:
    """The most runs whose quality was measured in the same way; two figures of different protocols do not compare."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if number(at(entry.card, keys)) is not None:
            groups.setdefault(str(at(entry.card, protocol)), []).append(entry)
    return max(groups.values(), key=len, default=[])


def _origin(entry: Entry, keys: tuple[str, ...], size: tuple[str, ...] | None) -> tuple[float, float] | None:
    """Where the original lies: its own perplexity, or no divergence from itself."""
    quality = number(at(entry.card, ("reference", *keys[1:]))) if keys[0] == "model" else None
    x = 1.0 if size is None else number(at(entry.card, ("reference", *size)))
    if size == ("bytes_on_disk",) and at(entry.card, ("reference", "disk_format")) != at(
        entry.card, ("model", "disk_format")
    ):
        return None  # a quantized file beside floats
    return (x, quality) if x is not None and quality is not None else None

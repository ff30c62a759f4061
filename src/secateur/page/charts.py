"""Charts as inline SVG: sharp at any size, in the page's own colours by light and dark, and without anything fetched.

Colours come from classes that the page's style names, never from attributes, so that both schemes have their own. Each chart
is one element with a title for those who do not see it; shapes carry what they mean as text that shows when pointed at.
Everything is built as a tree, which escapes what comes from files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 380, 214
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 36
_INNER = WIDTH - LEFT - RIGHT
Show = Callable[[float], str]


@dataclass(frozen=True)
class Chart:
    """title: one line above it. svg: the picture. legend: (class of the swatch, what it stands for). note: a line below."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Series:
    """points: (x, y) in the order of x. style: class of the line, which the page's style knows: "before", "after" or
    "other"."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Bar:
    """kept of a whole, drawn inside it. gone: drawn as taken away altogether."""

    label: str
    kept: float
    of: float
    hint: str
    gone: bool = False


@dataclass(frozen=True)
class Point:
    """label: a few characters inside the mark. front: whether nothing is better in both."""

    x: float
    y: float
    label: str
    hint: str
    style: str = "after"
    front: bool = False


def brief(value: float) -> str:
    """1530000 -> 1.53M, 0.00042 -> 0.00042, 12 -> 12."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def bars(title: str, entries: Sequence[Bar], x_label: str, y_label: str, show: Show = brief) -> Chart:
    """One upright bar for each entry, the part that is kept filled."""
    top = max([entry.of for entry in entries] or [1.0]) or 1.0
    svg = _picture(title)
    counts = all(float(entry.of).is_integer() for entry in entries)
    scale = _axis_y(svg, 0.0, top, show, y_label, least=1.0 if counts else 0.0)
    slot = _INNER / max(len(entries), 1)
    width = min(max(slot * 0.8, 0.8), 48)
    for place, entry in enumerate(entries):
        x = LEFT + place * slot + (slot - width) / 2
        group = _add(svg, "g")
        _add(group, "title").text = entry.hint
        whole, kept = scale(entry.of), scale(entry.kept)
        _add(group, "rect", "gone" if entry.gone else "whole", x=x, y=whole, width=width, height=scale(0) - whole)
        if not entry.gone:
            _add(group, "rect", "kept", x=x, y=kept, width=width, height=max(scale(0) - kept, 0))
    _labels_x(svg, [entry.label for entry in entries], slot, x_label)
    gone = any(entry.gone for entry in entries)
    legend = (("kept", "kept"), ("gone", "removed")) if gone else (("kept", "kept"), ("whole", "removed"))
    return Chart(title, _done(svg), legend)


def lines(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, steps: bool = False,
    show: Show = brief, show_x: Show = brief, zero: bool = True, marks: bool = False,
) -> Chart:  # fmt: skip
    """A line for each series. log: y by powers of ten, where points at or below zero are left out. steps: y holds until the
    next x. zero: y begins at zero. marks: points are drawn too, where there are few.
    """
    drawn = [Series(each.name, [(x, y) for x, y in each.points if not log or y > 0], each.style) for each in series]
    xs = [x for each in drawn for x, _ in each.points] or [0.0, 1.0]
    ys = [y for each in drawn for _, y in each.points] or [0.0, 1.0]
    svg = _picture(title)
    scale_y = _axis_y(svg, min(ys) if log or not zero else min(0.0, *ys), max(ys), show, y_label, log)
    counts = all(float(x).is_integer() for x in xs)
    scale_x = _axis_x(svg, min(xs), max(xs), show_x, x_label, 1.0 if counts else 0.0)
    for each in drawn:
        path = ""
        for x, y in each.points:
            if steps and path:
                path += f"H{scale_x(x):.1f}"
            path += f"{'L' if path else 'M'}{scale_x(x):.1f} {scale_y(y):.1f}"
        group = _add(svg, "g")
        _add(group, "title").text = each.name
        if path:
            _add(group, "path", f"line {each.style}", d=path)
        if marks and len(each.points) <= 64:
            for x, y in each.points:
                mark = _add(group, "circle", f"mark {each.style}", cx=scale_x(x), cy=scale_y(y), r=2.2)
                _add(mark, "title").text = f"{each.name}, {x_label} {show_x(x)}: {show(y)}"
    return Chart(title, _done(svg), tuple((f"line {each.style}", each.name) for each in drawn))


def heat(
    title: str, rows: Sequence[str], columns: Sequence[int], values: Mapping[tuple[str, int], float], x_label: str,
    show: Show,
) -> Chart:  # fmt: skip
    """A cell for each row and column, the fuller the larger its value; empty where there is none."""
    left, low, high = 112, min(values.values()), max(values.values())
    side = min((WIDTH - left - RIGHT) / max(len(columns), 1), 22)
    height = max(min(side, 18), 14)
    svg = _picture(title, TOP + len(rows) * height + BOTTOM)
    for line, row in enumerate(rows):
        y = TOP + line * height
        label = _add(svg, "text", "tick", x=left - 6, y=y + height / 2 + 3.5, **{"text-anchor": "end"})
        label.text = row if len(row) <= 18 else f"…{row[-17:]}"
        _add(label, "title").text = row
        for place, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            # a fifth of the colour is left for the least, so that it is told from an empty cell
            strength = 0.2 + 0.8 * (value - low) / (high - low) if high > low else 0.6
            cell = _add(
                svg, "rect", "cell", x=left + place * side, y=y, width=max(side - 0.8, 0.6), height=height - 0.8
            )
            cell.set("fill-opacity", f"{strength:.3f}")
            _add(cell, "title").text = f"{row}, {x_label} {column}: {show(value)}"
    every = max(1, math.ceil(len(columns) / max(len(columns) * side // 26, 1)))
    foot = TOP + len(rows) * height
    for place in range(0, len(columns), every):
        _text(svg, left + (place + 0.5) * side, foot + 13, str(columns[place]), "middle")
    _text(svg, left + len(columns) * side / 2, foot + 29, x_label, "middle", "label")
    spread = f"{show(low)} to {show(high)}" if high > low else f"{show(low)} everywhere"
    return Chart(title, _done(svg), (), f"{spread}; the fuller the colour, the more.")


def scatter(
    title: str, points: Sequence[Point], x_label: str, y_label: str, *, log: bool = False, show: Show = brief,
    show_x: Show = brief,
) -> Chart:  # fmt: skip
    """Numbered marks; the front, where both are the smaller the better, is joined."""
    svg = _picture(title)
    ys = [point.y for point in points]
    scale_y = _axis_y(svg, *_roomy(ys, log), show, y_label, log)
    scale_x = _axis_x(svg, *_roomy([point.x for point in points], False), show_x, x_label)
    front = sorted((point.x, point.y) for point in points if point.front)
    if len(front) > 1:
        path = f"M{scale_x(front[0][0]):.1f} {scale_y(front[0][1]):.1f}"
        path += "".join(f"H{scale_x(x):.1f}V{scale_y(y):.1f}" for x, y in front[1:])
        _add(svg, "path", "line front", d=path)
    for point in points:
        group = _add(svg, "g")
        _add(group, "title").text = point.hint
        style = point.style if point.front or point.style != "after" else "beside"
        _add(group, "circle", f"point {style}", cx=scale_x(point.x), cy=scale_y(point.y), r=8)
        _text(group, scale_x(point.x), scale_y(point.y) + 3.4, point.label, "middle", f"number {style}")
    return Chart(title, _done(svg))


def _roomy(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The range of these values and a little more, so that no mark lies on the edge."""
    low, high = min(values), max(values)
    if log and low > 0:
        room = (high / low) ** 0.08 if high > low else 1.2
        return low / room, high * room
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _picture(title: str, height: float = HEIGHT) -> ElementTree.Element:
    return ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": title})


def _add(parent: ElementTree.Element, tag: str, style: str = "", **attributes: float | str) -> ElementTree.Element:
    given = {"class": style} if style else {}
    for name, value in attributes.items():
        given[name] = value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
    return ElementTree.SubElement(parent, tag, given)


def _text(
    parent: ElementTree.Element, x: float, y: float, text: str, anchor: str, style: str = "tick"
) -> ElementTree.Element:
    made = _add(parent, "text", style, x=x, y=y, **{"text-anchor": anchor})
    made.text = text
    return made


def _done(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # every text and attribute in it is escaped


def _axis_y(
    svg: ElementTree.Element, low: float, high: float, show: Show, label: str, log: bool = False, least: float = 0.0
) -> Callable[[float], float]:
    """Draws the axis with its lines; returns where a value lies."""
    if not high > low:
        low, high = (low / 2, low * 2) if log else (low, low + 1)
    places = log_ticks(low, high) if log else ticks(low, high, 4, least)
    if not log:
        high = max(high, places[-1])
    height = HEIGHT - TOP - BOTTOM

    def scale(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return TOP + height * (1 - share)

    for place in places:
        _add(svg, "path", "grid", d=f"M{LEFT} {scale(place):.1f}H{WIDTH - RIGHT}")
        _text(svg, LEFT - 5, scale(place) + 3.5, show(place), "end")
    made = _text(svg, 0, 0, label, "middle", "label")
    made.set("transform", f"translate(10 {TOP + height / 2:g}) rotate(-90)")
    return scale


def _axis_x(
    svg: ElementTree.Element, low: float, high: float, show: Show, label: str, least: float = 0.0
) -> Callable[[float], float]:
    if not high > low:
        high = low + 1

    def scale(value: float) -> float:
        return LEFT + _INNER * (value - low) / (high - low)

    for place in ticks(low, high, 5, least):
        if low <= place <= high:
            _text(svg, scale(place), HEIGHT - BOTTOM + 14, show(place), "middle")
    _text(svg, LEFT + _INNER / 2, HEIGHT - 5, label, "middle", "label")
    return scale


def _labels_x(svg: ElementTree.Element, labels: Sequence[str], slot: float, label: str) -> None:
    every = max(1, math.ceil(26 / slot)) if slot else 1
    for place in range(0, len(labels), every):
        _text(svg, LEFT + (place + 0.5) * slot, HEIGHT - BOTTOM + 14, labels[place], "middle")
    _text(svg, LEFT + _INNER / 2, HEIGHT - 5, label, "middle", "label")


def ticks(low: float, high: float, about: int, least: float = 0.0) -> list[float]:
    """Round numbers from `low` on, apart by 1, 2 or 5 times a power of ten and by `least` at least; the last may lie above
    `high`.
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999), least)
    first = math.ceil(low / step - 1e-9)
    found = [first * step]
    while found[-1] < high * (1 - 1e-9):
        found.append((first + len(found)) * step)
    return [round(value, 12) for value in found]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, with 2 and 5 times where there would be few; at most eight."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= 7:
            break
    if len(found) > 7:
        found = found[:: math.ceil(len(found) / 7)]
    return found or [low, high]

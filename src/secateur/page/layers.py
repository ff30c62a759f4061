"""What a run did layer by layer, as pictures and tables."""

from collections.abc import Mapping
from typing import Any

from secateur.figures import Layer, at, by_block, kind_of, matrix_layers, number, unit_layers
from secateur.page.charts import Bar, Chart, Series, bars, brief, heat, lines
from secateur.page.tables import Cell, Table, figure, percent, share, table, text, whole
from secateur.report import UNITS

MOST_ROWS = 320
"""Of a table of matrices: a mixture of experts has thousands, and the page must open at once."""


def cut_charts(receipt: Mapping[str, Any], step: int) -> list[Chart]:
    """What a step left of each layer: units, blocks, channels, tokens, or weights."""
    decision = at(receipt, ("decisions", step))
    charts = [
        bars(
            _capital(UNITS.get(axis, axis)),
            [
                Bar(str(layer.block), layer.kept, layer.of,
                    f"block {layer.block}: {layer.kept:,} of {layer.of:,} kept, {percent(layer.removed)} removed")
                for layer in layers
            ],
            "block", "how many", brief,
        )
        for axis, layers in unit_layers(receipt, step).items()
    ]  # fmt: skip
    if blocks := decision.get("blocks"):
        charts.append(_blocks(blocks))
    for key, name in (("channels", "channels of the residual stream"), ("vocabulary", "tokens of the vocabulary")):
        if not (told := decision.get(key)):
            continue
        hint = f"{told['kept']:,} of {told['of']:,} {name} kept, {percent(1 - told['kept'] / told['of'])} removed"
        charts.append(bars(_capital(name), [Bar(f"{told['kept']:,} of {told['of']:,}", told["kept"], told["of"], hint)],
                           "", "how many"))  # fmt: skip
    matrices = [layer for layer in matrix_layers(receipt, step) if layer.block is not None]
    if matrices:
        charts.append(_heat("Weights that are zero", matrices, "removed"))
    return charts


def _blocks(told: Mapping[str, Any]) -> Chart:
    """The blocks that stayed and those that went, as high as their scores where the method gave some."""
    gone = set(told["removed"])
    scores = {int(index): value for index, entry in told["scores"].items() if (value := number(entry)) is not None}
    what = told.get("part", "block").replace("_", "-")
    entries = []
    drawn = bool(scores) and min(scores.values()) >= 0
    for index in sorted([*told["kept"], *gone]):
        score = scores.get(index)
        said = "removed" if index in gone else "kept"
        height = score if drawn and score is not None else 1.0
        scored = "" if score is None else f", score {score:.4g}"
        entries.append(Bar(str(index), height, height, f"{what} {index}: {said}{scored}", index in gone))
    title = f"{_capital(what)}s, by their scores" if drawn else f"{_capital(what)}s"
    return bars(title, entries, "block", "score" if drawn else "", brief if drawn else lambda value: "")


def _heat(title: str, layers: list[Layer], value: str) -> Chart:
    """A cell for each kind of matrix and block, the mean of its experts."""
    grouped: dict[str, list[Layer]] = {}
    for layer in layers:
        grouped.setdefault(kind_of(layer.name), []).append(layer)
    values = {(kind, block): mean for kind, found in grouped.items() for block, mean in by_block(found, value).items()}
    return heat(title, list(grouped), sorted({block for _, block in values}), values, "block", percent)


def error_charts(receipt: Mapping[str, Any], step: int) -> list[Chart]:
    """The error of each block's output on the tokens that were learned from and on held-out ones."""
    charts = []
    kinds = {_capital(UNITS.get(axis, axis)): layers for axis, layers in unit_layers(receipt, step).items()}
    matrices = matrix_layers(receipt, step)
    if matrices:
        kinds["Mean of the matrices of each block"] = matrices
    for title, layers in kinds.items():
        series = [
            Series(name, list(by_block(layers, value).items()), style)
            for name, value, style in (
                ("on tokens it learned from", "calibration", "after"),
                ("on held-out tokens", "held_out", "other"),
            )
        ]
        series = [each for each in series if each.points]
        if series:
            charts.append(lines(title, series, "block", "relative error", show=share, show_x=lambda x: f"{x:.0f}",
                                marks=True))  # fmt: skip
    rated = [layer for layer in matrices if layer.error is not None and layer.block is not None]
    if rated:
        held = any(layer.held_out is not None for layer in rated)
        charts.append(
            _heat(f"Error of each matrix on {'held-out tokens' if held else 'tokens it learned from'}", rated, "error")
        )
    return charts


def layer_tables(receipt: Mapping[str, Any], step: int) -> list[Table]:
    """The same as numbers: one row for each block or matrix."""
    method = at(receipt, ("decisions", step, "method"))
    tables = []
    for axis, layers in unit_layers(receipt, step).items():
        rows = [
            (Cell(str(layer.block), layer.block), figure(layer.of, whole), figure(layer.kept, whole),
             figure(layer.removed, percent), figure(layer.calibration, percent), figure(layer.held_out, percent))
            for layer in layers
        ]  # fmt: skip
        columns = ("block", "before", "after", "removed", "calibration error", "held-out error")
        tables.append(table(f"{method}: {UNITS.get(axis, axis)}, block by block", columns, rows, MOST_ROWS))
    if matrices := matrix_layers(receipt, step):
        # where not all fit, those with the largest errors tell most
        ranked = sorted(matrices, key=lambda layer: -(layer.error or 0)) if len(matrices) > MOST_ROWS else matrices
        rows = [
            (text(layer.name), figure(layer.of, whole), figure(layer.of - layer.kept, whole),
             figure(layer.removed, percent), figure(layer.calibration, percent), figure(layer.held_out, percent))
            for layer in ranked
        ]  # fmt: skip
        note = "Those with the largest errors." if len(matrices) > MOST_ROWS else ""
        columns = ("matrix", "weights", "zeros", "share", "calibration error", "held-out error")
        tables.append(table(f"{method}: weights, matrix by matrix", columns, rows, MOST_ROWS, note))
    if blocks := at(receipt, ("decisions", step, "blocks")):
        scores = {int(index): entry for index, entry in blocks["scores"].items()}
        gone = set(blocks["removed"])
        told = [
            (Cell(str(index), index), text("removed" if index in gone else "kept"),
             figure(scores.get(index), lambda value: f"{value:.4g}"))
            for index in sorted([*blocks["kept"], *gone])
        ]  # fmt: skip
        tables.append(table(f"{method}: block by block", ("block", "", "score"), told, MOST_ROWS))
    return tables


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]

"""The result card as a table for people."""

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.evaluation.card import Column, ResultCard
from secateur.evaluation.divergent import DivergentTokens
from secateur.evaluation.memory import Memory
from secateur.evaluation.speed import Pace, Speed, Spread
from secateur.evaluation.task_table import score_rows, score_sentences

ABSENT = "not measured"
Row = tuple[str, str, str, str]


def render(card: ResultCard) -> RenderableType:
    """The card as a rich renderable: figures with their change, then protocols and notes as sentences."""
    compared = card.reference is not None
    table = Table(title="Result card", title_justify="left", title_style="bold")
    table.add_column("")
    if compared:
        table.add_column("reference", justify="right")
    table.add_column("result" if compared else "model", justify="right")
    if compared:
        table.add_column("change", justify="right")
    for label, before, after, change in _rows(card):
        cells = [label, before, after, change] if compared else [label, after]
        table.add_row(*(Text(cell) for cell in cells))
    settings = [_settings_table(card)] if card.more_speed else []
    return Group(table, *settings, *(Text(line) for line in sentences(card)))


def _rows(card: ResultCard) -> list[Row]:
    model, reference = card.model, card.reference
    tokens = model.multiply_adds_tokens
    rows: list[Row] = [("name", reference.name if reference else "", model.name, "")]
    rows += [
        _row(card, "parameters", lambda column: column.parameters, lambda value: f"{value / 1e6:,.1f} M"),
        _row(card, "bytes on disk", lambda column: column.bytes_on_disk, _megabytes),
        _row(card, "peak memory", lambda column: column.memory.peak if column.memory else None, _megabytes),
        _row(
            card,
            f"multiply-adds, {tokens} tokens",
            lambda column: column.multiply_adds,
            lambda value: f"{value / 1e9:,.2f} G",
        ),
        _row(
            card,
            "perplexity",
            lambda column: column.perplexity.perplexity if column.perplexity else None,
            lambda value: f"{value:,.3f}" if value < 1e6 else f"{value:.3g}",
        ),
    ]
    if reference and _sizes(model) != _sizes(reference):
        rows[-1] = (*rows[-1][:3], "not comparable")
        rows.append(
            _row(
                card,
                "bits per byte",
                lambda column: column.perplexity.bits_per_byte if column.perplexity else None,
                lambda value: f"{value:.4f}",
            )
        )
    if card.divergence is not None:
        rows.append(("KL to the reference, nats a token", "0", f"{card.divergence.kl:.4f}", ""))
        rows.append(("same first token", "100 %", f"{100 * card.divergence.agreement:.1f} %", ""))
    if card.divergent is not None:
        rows.append(("tokens before the first divergent one", "never", _before_divergent(card.divergent), ""))
        rows.append(("divergent tokens", "0 %", f"{100 * card.divergent.share:.1f} %", ""))
    if card.speed is not None:
        rows.append(_pace_row(f"prefill of {card.speed.prefill.tokens}, tokens/s", card.speed.prefill))
        if card.expected_gain is not None:
            rows.append(("  expected from multiply-adds", "", "", _percent(card.expected_gain)))
        if card.speed.decode is not None:
            rows.append(_pace_row(f"decoding of {card.speed.decode.tokens}, tokens/s", card.speed.decode))
        for name, pace in _phases(card.speed):
            if pace.joules is not None:
                before = _spread(pace.reference_joules, 3) if pace.reference_joules else ""
                rows.append((f"{name}, J/token", before, _spread(pace.joules, 3), ""))
    return rows + score_rows(card)


def _phases(speed: Speed) -> list[tuple[str, Pace]]:
    return [("prefill", speed.prefill), *([("decoding", speed.decode)] if speed.decode else [])]


def _before_divergent(found: DivergentTokens) -> str:
    lower, median, upper = (
        f"> {found.continuation}" if (value := found.quantiles[share]) is None else f"{value}"
        for share in ("0.25", "0.5", "0.75")
    )
    return f"{median} ({lower} … {upper})"


def _settings_table(card: ResultCard) -> Table:
    """Tokens a second in every setting that was measured."""
    table = Table(title="Speed, tokens/s", title_justify="left", title_style="bold")
    compared = card.reference is not None
    columns = ["phase", "tokens", "at once", *(["reference"] if compared else []), "result" if compared else "model"]
    columns += ["change", "expected"] if compared else []
    for name in columns:
        table.add_column(name, justify="left" if name == "phase" else "right")
    assert card.speed is not None, "there is a first where there are more"
    for speed in (card.speed, *card.more_speed):
        for name, pace in _phases(speed):
            _, before, after, change = _pace_row(name, pace)
            where = f"{pace.tokens}" if pace is speed.prefill else f"{pace.tokens} behind {speed.prefill.tokens}"
            expected = "" if pace.expected_gain is None else _percent(pace.expected_gain)
            cells = [name, where, f"{speed.batch}", *([before, after, change, expected] if compared else [after])]
            table.add_row(*(Text(cell) for cell in cells))
    return table


def _sizes(column: Column) -> int | None:
    """How many entries the tokenizer has that its perplexity was measured with."""
    return column.perplexity.protocol.vocabulary if column.perplexity else None


def _row(card: ResultCard, label: str, value: Callable[[Column], float | None], show: Callable[[float], str]) -> Row:
    after = value(card.model)
    before = value(card.reference) if card.reference is not None else None
    change = _percent(after / before - 1) if before and after is not None else ""
    shown = [ABSENT if figure is None else show(figure) for figure in (before, after)]
    return label, shown[0], shown[1], change


def _pace_row(label: str, pace: Pace) -> Row:
    return (
        label,
        _spread(pace.reference) if pace.reference else "",
        _spread(pace.model),
        f"{_percent(pace.gain.median)} ({_percent(pace.gain.lower)} … {_percent(pace.gain.upper)})"
        if pace.gain
        else "",
    )


def sentences(card: ResultCard) -> list[str]:
    """What a reader of the figures must know: how each was measured, and the card's own notes."""
    lines = []
    if card.model.perplexity is not None:
        lines.append(f"Perplexity: {card.model.perplexity.protocol.sentence()}.")
        if (other := card.reference and card.reference.perplexity) and _sizes(card.model) != _sizes(card.reference):
            lines.append(f"Perplexity of the reference: {other.protocol.sentence()}.")
    if card.divergence is not None and (
        card.model.perplexity is None or card.divergence.protocol != card.model.perplexity.protocol
    ):
        lines.append(f"KL and same first token: {card.divergence.protocol.sentence()}.")
    if card.speed is not None:
        speed = card.speed
        turns = f"{speed.pairs} turns in alternating order" if card.reference is not None else f"{speed.pairs} runs"
        sizes = list(dict.fromkeys(str(each.batch) for each in (speed, *card.more_speed)))
        batches = f"batches of {', '.join(sizes)}" if len(sizes) > 1 else f"batch {sizes[0]}"
        energy = (
            f"joules of {' and '.join(speed.energy)}, whatever else ran"
            if speed.energy
            else "energy is not exposed here"
        )
        lines.append(
            f"Speed: {turns}, {batches}, {speed.dtype}, {speed.device}, {speed.threads} threads; median (quartiles); "
            f"{energy}."
        )
    if (memory := card.model.memory) is not None:
        lines.append(
            f"Peak memory: a clean process with plain transformers loads the model ({memory.dtype}) and reads "
            f"{memory.tokens} tokens; {_megabytes(memory.baseline)} of it were there before loading."
            + _phases_of(memory)
        )
    if card.divergent is not None:
        lines.append(f"Divergent tokens, median (quartiles): {card.divergent.sentence()}.")
    return [*lines, *score_sentences(card), *card.notes]


def _phases_of(memory: Memory) -> str:
    """The peak of each phase, where phases could be told apart."""
    peaks = (("loading", memory.loading), ("reading", memory.prefill), (f"writing {memory.decoded}", memory.decode))
    known = [f"{name} {_megabytes(peak)}" for name, peak in peaks if peak is not None]
    return f" By phase: {', '.join(known)}." if known else ""


def _spread(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:,.{digits}f} ({spread.lower:,.{digits}f} … {spread.upper:,.{digits}f})"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+,.1f} %"

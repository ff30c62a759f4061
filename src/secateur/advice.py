"""What to try after a run: rules that read its receipt's figures and the cards of the registry.

Thresholds are rules of thumb of our own, not of any paper; each stands once, here or in `score_advice`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from secateur.alternatives import alike, gives_smaller, names, ranked, reads_text, rewrites
from secateur.commands import changed, exchanged, ratios
from secateur.figures import Layer, by_block, matrix_layers, unit_layers
from secateur.files import human
from secateur.registry import Method, methods
from secateur.score_advice import MUCH, fallen, few_questions, kept_not, read_it
from secateur.telling import Keys, Sentence, Told, percent, times

LITTLE = math.log(1.05)
"""Nats a token: perplexity 5 % higher, within what texts differ by."""
APART = 1.25
"""Held-out over calibration error, above which a method has learned its sample rather than the text."""
ALIKE = 1.1
"""The same ratio, below which more samples of the same text change next to nothing."""
CONCENTRATED = 3.0
"""How many times their even share of the error a tenth of the blocks must hold to be worth treating apart."""
PROMISED = 0.7
"""Fraction of the speed that multiply-adds promise, below which one asks why."""
TABLES = 0.2
"""Fraction of the parameters in tables of tokens, above which a smaller vocabulary is worth a step."""
FEW_TOKENS = 8000
"""Predicted tokens, below which a perplexity tells only large differences."""
MISSED = 0.01
"""Fraction of the budget by which a run may miss it unsaid."""
TILE = 32
"""Matrix kernels work in tiles of this many numbers, or multiples of it."""
ONES = ("neurons", "expert_neurons")
"""Kinds of units that are single columns of a matrix: heads and experts are wide already."""


def advice(told: Told) -> Iterator[Sentence]:
    """What to try next, most telling first."""
    for rule in RULES:
        yield from rule(told)


def _only_zeros(told: Told) -> Iterator[Sentence]:
    """Zeros are stored as any other number."""
    for index in range(len(told.methods)):
        layers = matrix_layers(told.receipt, index)
        before, after = (told.number("card", side, "parameters") for side in ("reference", "model"))
        if not layers or (before and after and after < before):
            continue
        removed = sum(layer.of - layer.kept for layer in layers)
        pruned = told.at("decisions", index, "method")
        smaller = names(
            [other for other in methods().values() if other.kind == "structure" and gives_smaller(other)], told
        )
        stored = [told.number("stored", side, "bytes") for side in ("source", "result")]
        size = f", and its files take {human(stored[1])}" if stored[1] else ""
        keys: list[Keys] = [
            (*layers[0].keys, "removed"),
            ("card", "model", "parameters"),
            ("stored", "result", "bytes"),
        ]
        yield told.say(
            f"{pruned} wrote {removed:,} zeros and nothing is smaller or faster for it{size}. To get a smaller network, "
            f"remove whole units instead, with {smaller}; to gain from zeros, store them compressed, or use --set "
            "pattern=2:4 on a device with kernels for it (secateur.to_semi_structured).",
            *keys,
        )


def _without_text(told: Told) -> Iterator[Sentence]:
    """A loss that a method suffered without having seen text."""
    loss = kept_not(told)
    if loss is None:
        return
    for index, method in enumerate(told.methods):
        if method is None or told.learned(index):
            continue
        others = [other for other in alike(told, index, method) if reads_text(other)]
        if others:
            yield told.say(
                f"{loss.text}, and {method.name} read no text. Methods that do lose less as a rule: {names(others, told)}"
                f"{exchanged(told, index, ranked(others))}.",
                *loss.keys, ("decisions", index, "method"),
            )  # fmt: skip


def _few_samples(told: Told) -> Iterator[Sentence]:
    """Held-out error beside the error on what was learned from."""
    loss = told.loss
    for index in range(len(told.methods)):
        notes = ("decisions", index, "notes")
        learned, apart = (*notes, "mean calibration error"), (*notes, "mean held out error")
        seen, other = told.number(*learned), told.number(*apart)
        sequences, tokens = (*notes, "calibration", "sequences"), (*notes, "calibration", "tokens")
        if not seen or not other or not told.number(*sequences):
            continue
        name, had = told.at("decisions", index, "method"), int(told.number(*sequences) or 0)
        if other / seen > APART:
            yield told.say(
                f"{name}: the error on held-out tokens is {times(other / seen)} that on the tokens it learned from "
                f"({percent(other)} against {percent(seen)}): {had} sequences ({told.at(*tokens):,} tokens) were too few. "
                f"Give it more, such as --samples {4 * had}.",
                learned, apart, sequences, tokens,
            )  # fmt: skip
        elif other / seen < ALIKE and loss is not None and loss.nats > MUCH:
            yield told.say(
                f"{name}: the error on held-out tokens ({percent(other)}) is about that on the tokens it learned from "
                f"({percent(seen)}), so more samples would change little; remove less, or use a stronger method.",
                learned, apart, *loss.keys,
            )  # fmt: skip


def _repair(told: Told) -> Iterator[Sentence]:
    """A loss in spite of text: methods that rewrite what stays."""
    loss = kept_not(told)
    if loss is None:
        return
    for index, method in enumerate(told.methods):
        if method is None or not told.learned(index) or rewrites(method):
            continue
        if others := [other for other in alike(told, index, method) if rewrites(other)]:
            yield told.say(
                f"{loss.text}. {method.name} does not ask for the second moment of the inputs, from which kept weights can "
                f"make up for what goes; methods that do: {names(others, told)}{exchanged(told, index, ranked(others))}.",
                *loss.keys, ("decisions", index, "method"),
            )  # fmt: skip
    if others := [other for other in methods().values() if other.kind == "recovery"]:
        yield told.say(f"Quality can be brought back afterwards: {names(others, told)}.", *loss.keys)


def _concentrated(told: Told) -> Iterator[Sentence]:
    """Errors that a few blocks make."""
    for index, method in enumerate(told.methods):
        for layers in [*unit_layers(told.receipt, index).values(), matrix_layers(told.receipt, index)]:
            errors = by_block(layers)
            top = math.ceil(len(errors) / 10)
            total = sum(errors.values())
            if len(errors) < 4 or not total:
                continue
            worst = sorted(sorted(errors, key=lambda block: errors[block])[-top:])
            share = sum(errors[block] for block in worst) / total
            if share < CONCENTRATED * top / len(errors):
                continue
            named = f"block {worst[0]} has" if top == 1 else f"blocks {', '.join(map(str, worst))} have"
            yield told.say(
                f"{told.at('decisions', index, 'method')}: {named} {share:.0%} of the error of all {len(errors)} blocks"
                f"{_spare(told, index, method, worst, layers)}.",
                *_most(layers, worst),
            )


def _most(layers: Sequence[Layer], blocks: Sequence[int]) -> list[Keys]:
    """Where the largest error of each of these blocks stands."""
    found: list[Keys] = []
    for block in blocks:
        here = [layer for layer in layers if layer.block == block and layer.error is not None]
        found.append(max(here, key=lambda layer: layer.error or 0.0).error_keys)
    return found


def _spare(told: Told, index: int, method: Method | None, worst: Sequence[int], layers: Sequence[Layer]) -> str:
    """How to take less from some blocks, by the parameters that the method has."""
    if method is None or index >= len(told.steps):
        return ""
    known, parameters = method.schema.model_fields, told.steps[index].parameters
    where = f"{index}." if len(told.steps) > 1 else ""
    ways = []
    if "protect" in known:
        ways.append(f"protect them (--set {where}protect={list(worst)})")
    if "ratios" in known and parameters.get("ratios") is None:
        ways.append(f"give each block a ratio of its own (--set {where}ratios=[…], less for these)")
    if "allocation" in known and not parameters.get("allocation"):
        scopes = {"matrices", "widths"} if method.scope == "units" else {"matrices"}
        dividers = [other for other in methods().values() if other.kind == "allocation" and other.scope in scopes]
        if dividers:
            ways.append(f"let an allocation divide the budget (--set {where}allocation=NAME: {names(dividers, told)})")
    elif "allocation" in known:
        [used] = parameters["allocation"]
        ways.append(f"try another allocation than {used}, which has not evened this out")
    return ": " + ", or ".join(ways) if ways else ""


def _slower_than_promised(told: Told) -> Iterator[Sentence]:
    """Measured prefill beside what multiply-adds promise."""
    expected = told.number("card", "expected_gain")
    gain = ("card", "speed", "prefill", "gain")
    middle, lower, upper = (told.number(*gain, key) for key in ("median", "lower", "upper"))
    if expected is None or expected <= 0.02 or middle is None or lower is None or upper is None:
        return
    if middle >= PROMISED * expected:
        return
    keys: list[Keys] = [("card", "expected_gain"), *((*gain, key) for key in ("median", "lower", "upper"))]
    said = f"Reading gained {middle:+.0%} where multiply-adds promise {expected:+.0%}"
    odd, where = _odd_width(told)
    if upper >= expected:
        yield told.say(
            f"{said}, but the quartiles ({lower:+.0%} to {upper:+.0%}) reach that far: the machine was busy or the runs "
            "were too few; measure again on a quiet one, with `secateur evaluate … --pairs 30`.",
            *keys,
        )
    elif odd:
        yield told.say(
            f"{said}: kept widths such as {odd} are not multiples of {TILE}, the tiles in which matrix kernels work; set "
            f"multiple_of={TILE}.",
            *keys, where,
        )  # fmt: skip
    else:
        size = told.number("card", "model", "parameters")
        small = f" in a model of {size / 1e6:,.0f} M parameters" if size else ""
        yield told.say(
            f"{said}: what they do not count (norms, softmax, the cost of each call, reading the weights) has not shrunk "
            f"with them{small}; larger models, longer inputs or whole blocks removed come nearer.",
            *keys, ("card", "model", "parameters"),
        )  # fmt: skip


def _widths(told: Told) -> Iterator[Sentence]:
    """Widths off the tiles, where no speed was measured that would say it."""
    odd, where = _odd_width(told)
    if odd and told.number("card", "speed", "prefill", "gain", "median") is None:
        yield told.say(
            f"A width of {odd} is not a multiple of {TILE}, the tiles in which matrix kernels work: multiple_of={TILE} is "
            "faster for about the same size.",
            where,
        )


def _odd_width(told: Told) -> tuple[int | None, Keys]:
    """A kept width that is no multiple of the tile although the whole one was, and where it stands."""
    for index in range(len(told.methods)):
        for axis, layers in unit_layers(told.receipt, index).items():
            for layer in layers:
                if axis in ONES and layer.kept % TILE and layer.of % TILE == 0 and layer.kept > TILE:
                    return layer.kept, (*layer.keys, "kept")
    return None, ()


def _tables(told: Told) -> Iterator[Sentence]:
    """The share of embedding and head, which cutting blocks leaves."""
    keys = ("shape", "token_parameters"), ("shape", "parameters"), ("shape", "vocabulary")
    tables, whole, words = (told.number(*where) for where in keys)
    cut = any(method is not None and method.scope == "vocabulary" for method in told.methods)
    others = [other for other in methods().values() if other.scope == "vocabulary"]
    if tables and whole and words and tables / whole > TABLES and others and not cut:
        yield told.say(
            f"Embedding and head hold {tables / whole:.0%} of what is left ({tables:,.0f} of {whole:,.0f} parameters, "
            f"{words:,.0f} tokens). If one language or one kind of text is enough, remove tokens: {names(others, told)}.",
            *keys,
        )


def _disk(told: Told) -> Iterator[Sentence]:
    """A result that is larger than the quantized file it was made from."""
    sides = [("card", side, "bytes_on_disk") for side in ("model", "reference")]
    after, before = (told.number(*keys) for keys in sides)
    if after and before and after > before and told.at("card", "reference", "disk_format") == "gguf":
        yield told.say(
            f"The original's file is quantized, so the result takes more on disk ({human(after)} against {human(before)}): "
            "`secateur export DIR --to gguf --dtype q8_0 --output FILE` writes it with fewer bits.",
            *sides, ("card", "reference", "disk_format"),
        )  # fmt: skip


def _budget(told: Told) -> Iterator[Sentence]:
    """A target that was not met."""
    for index in range(len(told.methods)):
        asked, reached = ("decisions", index, "budget", "asked"), ("decisions", index, "budget", "reached")
        measure, wanted = told.at(*asked, "of"), told.number(*asked, "target")
        if measure not in ("parameters", "multiply_adds") or not wanted:
            continue
        before, after = told.number(*reached, measure, "before"), told.number(*reached, measure, "after")
        goal = wanted if wanted >= 1 else wanted * (before or 0)
        if after and goal and abs(after / goal - 1) > MISSED:
            yield told.say(
                f"{told.at('decisions', index, 'method')} was asked for {goal:,.0f} {measure.replace('_', '-')} and reached "
                f"{after:,.0f} ({after / goal - 1:+.1%}): widths move in steps; a smaller multiple_of, or more kinds of "
                "units (axis), come nearer.",
                (*asked, "target"), (*reached, measure, "after"),
            )  # fmt: skip


def _unmeasured(told: Told) -> Iterator[Sentence]:
    """Figures that one would want and that are not there."""
    card = told.at("card")
    model = told.at("source", "model")
    if not card or "skipped" in card:
        why = f" ({card['skipped'].rstrip('.')})" if card else ""
        yield told.say(
            f"Nothing was measured{why}: `secateur evaluate DIR --reference {model} --text FILE` says what it cost.",
            ("card", "skipped"), ("source", "model"),
        )  # fmt: skip
        return
    tokens = ("card", "model", "perplexity", "protocol", "tokens")
    if told.number("card", "model", "perplexity", "nll") is None:
        yield told.say(
            "No text was given, so there is no perplexity, and the divergence was measured on text that the original writes "
            f"itself: measure on your own with `secateur evaluate DIR --reference {model} --text FILE`.",
            ("card", "divergence", "protocol", "text"), ("source", "model"),
        )  # fmt: skip
    elif (read := told.number(*tokens)) is not None and read < FEW_TOKENS:
        yield told.say(
            f"Perplexity was measured on {read:,.0f} tokens: small differences between methods mean nothing yet; give more "
            "text, or more --windows.",
            tokens,
        )


def _room(told: Told) -> Iterator[Sentence]:
    """Hardly any loss, of perplexity or of a score: more can go."""
    loss = told.loss
    before, after = (told.number("card", side, "parameters") for side in ("reference", "model"))
    if loss is None or loss.nats >= LITTLE or not before or not after or after >= before or fallen(told):
        return
    if more := {index: round(1.5 * ratio, 2) for index, ratio in ratios(told).items() if 0 < ratio < 0.6}:
        asked = [score for score in told.scores if score.kind != "divergent"]
        held = f", and no score of {len(asked)} certainly fell" if asked else ""
        blind = "" if asked else (
            "; what became of knowledge, which falls before perplexity does, `secateur evaluate DIR --reference "
            f"{told.at('source', 'model')} --kick` says"
        )  # fmt: skip
        yield told.say(
            f"{loss.text}{held}, for {1 - after / before:.1%} fewer parameters: there is room; try `{changed(told, more)}`"
            f"{blind}.",
            *loss.keys, ("card", "model", "parameters"), ("card", "reference", "parameters"),
            *(("card", *score.keys, "change_stderr") for score in asked),
        )  # fmt: skip


def _less(told: Told) -> Iterator[Sentence]:
    """A ruinous loss, or scores that fell where perplexity hardly did: first of all, less should go."""
    loss = kept_not(told)
    if loss is None or MUCH <= loss.nats < 2 * MUCH:
        return
    if less := {index: round(ratio / 2, 3) for index, ratio in ratios(told).items() if ratio > 0.05}:
        why = "at this size that is more than a method alone makes good" if loss.nats >= MUCH else (
            "what a model knows goes before its perplexity does"
        )  # fmt: skip
        yield told.say(
            f"{loss.text}: {why}; try `{changed(told, less)}`, and see how much each half costs.",
            *loss.keys, *(("recipe", "steps", index) for index in less),
        )  # fmt: skip


def _time(told: Told) -> Iterator[Sentence]:
    """Measuring that took longer than the work."""
    timings = told.at("timings") or {}
    measuring, whole = told.number("timings", "measuring"), told.number("seconds")
    work = sum(value for name, value in timings.items() if name.startswith("step "))
    if measuring and whole and measuring > 2 * work and measuring > 60:
        yield told.say(
            f"Measuring took {measuring / whole:.0%} of the run's {whole:,.0f} s: while you try things out, --windows 8 or "
            "--no-evaluate saves most of it.",
            ("timings", "measuring"), ("seconds",),
        )  # fmt: skip


RULES: tuple[Callable[[Told], Iterator[Sentence]], ...] = (
    _only_zeros, _without_text, _few_samples, _repair, _less, read_it, _concentrated, _slower_than_promised, _widths,
    _tables, _disk, _budget, _unmeasured, few_questions, _room, _time,
)  # fmt: skip

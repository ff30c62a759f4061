"""Says of a finished run in plain words what was done, what it cost, what it gained, and what to try next.

Everything is derived from the receipt alone, and each sentence names the figures of it that it rests on. What methods are
and need is read from their cards in the registry.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.advice import advice
from secateur.evaluation.card import ResultCard, findings
from secateur.figures import matrix_layers, read_receipt, unit_layers
from secateur.files import human
from secateur.registry import Method
from secateur.report import summary
from secateur.telling import Keys, Sentence, Told, count, percent, times


@dataclass(frozen=True)
class Explanation:
    """What a run did, what it cost, what it gained, and what to try next, in sentences."""

    done: tuple[Sentence, ...]
    cost: tuple[Sentence, ...]
    gained: tuple[Sentence, ...]
    next: tuple[Sentence, ...]

    @property
    def parts(self) -> dict[str, tuple[Sentence, ...]]:
        """By heading, without those that have nothing to say."""
        named = {
            "What was done": self.done,
            "What it cost": self.cost,
            "What it gained": self.gained,
            "What to try next": self.next,
        }
        return {heading: sentences for heading, sentences in named.items() if sentences}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, figures: bool = False) -> Iterator[str]:
        """As text for a terminal. figures: behind each sentence, where in the receipt what it says stands."""
        for number, (heading, sentences) in enumerate(self.parts.items()):
            yield from ["", heading] if number else [heading]
            for sentence in sentences:
                yield f"- {sentence.text}"
                if figures:
                    yield from (f"    {where} = {value}" for where, value in sentence.figures.items())


def explain(run: str | Path | Mapping[str, Any]) -> Explanation:
    """Explains a run: its directory, its receipt's path, or the receipt itself as plain data.

    Raises RequestError where there is no finished run.
    """
    told = Told(run if isinstance(run, Mapping) else read_receipt(run))
    return Explanation(tuple(_done(told)), tuple(_cost(told)), tuple(_gained(told)), tuple(advice(told)))


def _done(told: Told) -> Iterator[Sentence]:
    model, seed = ("source", "model"), ("recipe", "seed")
    steps = len(told.at("decisions"))
    yield told.say(f"{told.at(*model)} was compressed in {count(steps, 'step')}, seed {told.at(*seed)}.", model, seed)
    for index in range(steps):
        yield from _step(told, index)
    check = ("reload_check", "how")
    if told.at(*check):
        apart = told.number("reload_check", "largest_difference")
        said = f"The result was checked: {told.at(*check)}"
        differs = "" if apart is None else (
            f"; its logits differ by at most {apart:.1g} of the largest from those due" if apart else
            "; its logits are exactly those due"
        )  # fmt: skip
        yield told.say(f"{said}{differs}.", check, ("reload_check", "largest_difference"))


def _step(told: Told, index: int) -> Iterator[Sentence]:
    decision = told.at("decisions", index)
    basis: list[Keys] = [("decisions", index, "method")]
    layers = [*matrix_layers(told.receipt, index), *(y for x in unit_layers(told.receipt, index).values() for y in x)]
    basis += [(*layers[0].keys, key) for key in ("kept", "removed", "of") if layers and told.at(*layers[0].keys, key)]
    for keys in (("blocks", "removed"), ("blocks", "of"), ("vocabulary", "kept"), ("vocabulary", "of"),
                 ("channels", "kept"), ("channels", "of"), ("channels", "asked"), ("budget", "asked")):  # fmt: skip
        if told.at("decisions", index, *keys) is not None:
            basis.append(("decisions", index, *keys))
    # the lines that the run printed, in the words that it printed them in
    lines = summary({"decisions": [{"units": {}, **decision}]})
    text = "; ".join(line.removeprefix(f"{decision['method']}: ") for line in lines)
    method = told.methods[index]
    name, divider = decision["method"], told.divider(index)
    shared = f", its budget divided by {divider.name}{_card(divider)}" if divider else ""
    basis += [("recipe", "steps", index, name, "allocation")] if divider else []
    yield told.say(f"{name}{_card(method) if method else ''}{shared}: {text}.", *basis)
    learned = ("decisions", index, "notes", "calibration")
    if told.at(*learned):
        data, sequences, tokens, beside = (
            told.at(*learned, key) for key in ("data", "sequences", "tokens", "held_out_tokens")
        )
        who = " and ".join(told.readers(index))
        apart = f", and {beside:,} more were held out to check it" if beside else ""
        yield told.say(
            f"{who} learned from {count(sequences, 'sequence')} ({data}), {tokens:,} tokens in all{apart}.",
            learned,
        )
    for place, warning in enumerate(decision.get("warnings", ())):
        yield told.say(warning, ("decisions", index, "warnings", place))


def _card(method: Method) -> str:
    """What a method is, in parentheses."""
    return f" ({method.summary.rstrip('.')}{f'; {method.paper}' if method.paper else ''})"


def _cost(told: Told) -> Iterator[Sentence]:
    if loss := told.loss:
        yield told.say(f"{loss.text}.", *loss.keys)
    agreement, kl = told.number("card", "divergence", "agreement"), told.number("card", "divergence", "kl")
    if agreement is not None and kl is not None:
        text = told.at("card", "divergence", "protocol", "text")
        where = f" on {'text ' if str(text).startswith('written by') else ''}{text}" if text else ""
        yield told.say(
            f"It ranks the same token first as the original for {percent(agreement)} of the tokens, and its predictions lie "
            f"{kl:.3g} nats a token from the original's (KL){where}.",
            ("card", "divergence", "agreement"), ("card", "divergence", "kl"),
        )  # fmt: skip
    yield from _tasks(told)
    yield from _knowledge(told)
    yield from _diverging(told)
    yield from _notes(told)
    for index in range(len(told.at("decisions"))):
        mean = ("decisions", index, "notes", "mean held out error")
        learned = ("decisions", index, "notes", "mean calibration error")
        found, seen = told.number(*mean), told.number(*learned)
        if found is not None or seen is not None:
            said = [f"{percent(found)} on held-out tokens"] if found is not None else []
            said += [f"{percent(seen)} on those it learned from"] if seen is not None else []
            yield told.say(
                f"{told.at('decisions', index, 'method')}: outputs of the layers it changed are off by "
                f"{' and '.join(said)}, on average and relative to their size.",
                mean, learned,
            )  # fmt: skip
    seconds, memory = told.number("seconds"), told.number("peak_memory")
    if seconds is not None and memory is not None:
        yield told.say(
            f"The run took {_duration(seconds)} and {human(memory)} of memory at its peak.",
            ("seconds",),
            ("peak_memory",),
        )
    if told.at("code"):
        yield told.say(
            "Its blocks differ from each other, so transformers loads it only with trust_remote_code=True, through the file "
            f"{', '.join(told.at('code'))} beside it.",
            ("code",),
        )


def _tasks(told: Told) -> Iterator[Sentence]:
    """Scores beside those of the original, where tasks were measured."""
    for score in told.scores:
        if score.kind != "task":
            continue
        error = "" if score.error is None else f" ± {score.error:.3f}"
        said = f"{score.name}: {score.value:.3f}{error}"
        if score.reference is not None and score.change is not None:
            beside = "" if score.reference_error is None else f" ± {score.reference_error:.3f}"
            sure = "" if score.change_error is None else f" ± {score.change_error:.3f}"
            said += f"; the original has {score.reference:.3f}{beside}, a change of {score.change:+.3f}{sure}"
        keys = ("value", "stderr", "reference", "reference_stderr", "change_stderr", "n")
        asked = "" if score.asked is None else f", on {count(score.asked, 'question')}"
        yield told.say(f"{said}{asked}.", *(("card", *score.keys, key) for key in keys))


def _knowledge(told: Told) -> Iterator[Sentence]:
    """In how many of the LLM-KICK tasks it matches the original, where it does not, and what it scores in each."""
    scores = told.at("card", "kick", "scores") or ()
    judged = {place: score for place, score in enumerate(scores) if score.get("matching") is not None}
    if judged:
        worse = {place: score for place, score in judged.items() if not score["matching"]}
        drops = [f"{score['task']} ({percent(score['drop'])} lower)" for score in worse.values()]
        missed = f"; it does not in {', '.join(drops)}" if drops else ""
        yield told.say(
            f"In {len(judged) - len(worse)} of {count(len(judged), 'task')} of LLM-KICK it matches the original, at most "
            f"5 % below it{missed}.",
            *(("card", "kick", "scores", place, key) for place in judged for key in ("matching", "drop")),
        )  # fmt: skip
    if found := [score for score in told.scores if score.kind == "kick"]:
        guesses = (told.number("card", *score.keys, "chance") for score in found)
        chance = dict.fromkeys(f"{guess:.2f}" for guess in guesses if guess is not None)
        said = []
        for score in found:
            beside = "" if score.reference is None else f" ({score.reference:.3f})"
            sure = "" if score.change_error is None else f", a change of {score.change:+.3f} ± {score.change_error:.3f}"
            said.append(f"{score.name.removeprefix('kick: ')} {score.value:.3f}{beside}{sure}")
        guessing = f"; guessing gives {' or '.join(chance)} where one is chosen" if chance else ""
        yield told.say(
            f"Its scores there, the original's in parentheses: {'; '.join(said)}{guessing}.",
            *(("card", *score.keys, key) for score in found
              for key in ("value", "reference", "change_stderr", "chance")),
        )  # fmt: skip
    for place, score in enumerate(scores):
        here = ("card", "kick", "scores", place)
        kl, agreement = told.number(*here, "kl"), told.number(*here, "agreement")
        if kl is not None and agreement is not None:
            yield told.say(
                f"Reading what the original wrote ({score['task']}), its predictions lie {kl:.3g} nats a token from the "
                f"original's (KL), and it ranks the same token first for {percent(agreement)} of the tokens.",
                (*here, "kl"), (*here, "agreement"),
            )  # fmt: skip


def _notes(told: Told) -> Iterator[Sentence]:
    """What the card itself says that nothing else here does."""
    card = told.at("card")
    try:
        known = findings(ResultCard.from_dict({**card})) if card else ()
    except ValidationError:  # of another version, or nothing was measured
        known = ()
    for place, note in enumerate(told.at("card", "notes") or ()):
        if note not in known:
            yield told.say(f"{str(note).rstrip('.')}.", ("card", "notes", place))


def _diverging(told: Told) -> Iterator[Sentence]:
    """How soon what it writes leaves what the original writes. The card counts the tokens before the first other one."""
    here = ("card", "divergent")
    median, censored, share = (*here, "quantiles", "0.5"), (*here, "censored"), (*here, "share")
    never, other, middle = told.number(*censored), told.number(*share), told.number(*median)
    if never is None or other is None:
        return
    half = f"half of its texts leave the original's by token {middle + 1:g}" if middle is not None else (
        f"more than half of its texts stay with the original's for all {told.at(*here, 'continuation')} tokens"
    )  # fmt: skip
    yield told.say(
        f"Writing greedily, {half}; {percent(never)} never leave it, and {percent(other)} of all tokens are other ones.",
        median, censored, share,
    )  # fmt: skip
    corrected, mean = (*here, "corrected"), (*here, "mean")
    wrong, before = told.number(*corrected), told.number(*mean)
    if wrong is not None and before is not None:
        yield told.say(
            f"On average {before:.1f} tokens come before the first other one; reading the original's text, it would have to "
            f"be put right for {percent(wrong)} of the tokens.",
            mean, corrected,
        )  # fmt: skip


def _gained(told: Told) -> Iterator[Sentence]:
    measures: tuple[tuple[str, tuple[str, ...], Callable[[float], str]], ...] = (
        ("parameters", ("parameters",), lambda value: f"{value:,.0f}"),
        ("multiply-adds of reading a text", ("multiply_adds",), lambda value: f"{value / 1e9:,.3g} G"),
        ("memory to load and run it", ("memory", "peak"), human),
        ("memory while loading", ("memory", "loading"), human),
        ("memory while reading a text", ("memory", "prefill"), human),
        ("memory while writing", ("memory", "decode"), human),
    )
    for what, keys, show in measures:
        # loading a GGUF file takes memory of its own, which says nothing of the model
        if keys[0] == "memory" and told.at("card", "reference", "disk_format") == "gguf":
            continue
        if (found := _against(told, what, keys, show)) is not None:
            yield found
    if told.at("card", "model") is None:
        yield from _counted(told)
    yield from _disk(told)
    yield from _speeds(told)


def _speeds(told: Told) -> Iterator[Sentence]:
    """Tokens a second and joules a token, in every setting that was measured, and what multiply-adds promise."""
    more = len(told.at("card", "more_speed") or ())
    settings: list[tuple[str | int, ...]] = [
        ("card", "speed"),
        *(("card", "more_speed", place) for place in range(more)),
    ]
    for here in settings:
        batch, read = told.number(*here, "batch") or 1, told.number(*here, "prefill", "tokens")
        at_once = f", {batch:g} at once" if batch > 1 else ""
        for phase, name in (("prefill", "Reading (prefill)"), ("decode", "Writing (decoding)")):
            where = f" {'of' if phase == 'prefill' else 'behind'} {read:,.0f} tokens{at_once}" if more and read else ""
            yield from _gain(told, (*here, phase), f"{name}{where}")
            yield from _energy(told, (*here, phase), f"{name}{where}")
    expected = told.number("card", "expected_gain")
    if expected:
        yield told.say(
            f"Multiply-adds promise that reading is {abs(expected):.1%} {'faster' if expected > 0 else 'slower'}.",
            ("card", "expected_gain"),
        )


def _gain(told: Told, here: tuple[str | int, ...], name: str) -> Iterator[Sentence]:
    gain = (*here, "gain")
    middle, lower, upper = (told.number(*gain, key) for key in ("median", "lower", "upper"))
    if middle is None or lower is None or upper is None:
        return
    faster = f"{abs(middle):.0%} {'faster' if middle > 0 else 'slower'} than the original"
    if lower <= 0 <= upper:
        faster = f"not measurably faster or slower than the original ({middle:+.0%})"
    ours, theirs = (*here, "model", "median"), (*here, "reference", "median")
    rates = [told.number(*side) for side in (theirs, ours)]
    shown = "" if None in rates else f"; {rates[0]:,.1f} → {rates[1]:,.1f} tokens a second"
    yield told.say(
        f"{name} is {faster}; quartiles {lower:+.0%} to {upper:+.0%}{shown}.",
        *((*gain, key) for key in ("median", "lower", "upper")), theirs, ours,
    )  # fmt: skip


def _energy(told: Told, here: tuple[str | int, ...], name: str) -> Iterator[Sentence]:
    theirs, ours = (*here, "reference_joules", "median"), (*here, "joules", "median")
    before, after = told.number(*theirs), told.number(*ours)
    if before and after is not None:
        yield told.say(
            f"{name} takes {before:.3g} → {after:.3g} J a token ({after / before - 1:+.1%}), of the whole machine.",
            theirs, ours,
        )  # fmt: skip


def _against(told: Told, what: str, keys: tuple[str, ...], show: Callable[[float], str]) -> Sentence | None:
    """A figure of the result beside the reference's."""
    here, there = ("card", "model", *keys), ("card", "reference", *keys)
    after, before = told.number(*here), told.number(*there)
    if after is None or not before:
        return None
    change = after / before - 1
    said = f"{show(before)} → {show(after)}"
    if abs(change) < 5e-4:
        return told.say(f"As many {what} as before ({show(after)})." if what == "parameters"
                        else f"{what[0].upper()}{what[1:]}: no change ({show(after)}).", here, there)  # fmt: skip
    return told.say(f"{what[0].upper()}{what[1:]}: {said} ({change:+.1%}).", here, there)


def _counted(told: Told) -> Iterator[Sentence]:
    """What a run counted that was not measured."""
    for index in range(len(told.at("decisions"))):
        for measure in ("parameters", "multiply_adds"):
            keys = ("decisions", index, "budget", "reached", measure)
            before, after = told.number(*keys, "before"), told.number(*keys, "after")
            if before and after is not None:
                yield told.say(
                    f"{told.at('decisions', index, 'method')}: {measure.replace('_', '-')} {before:,} → {after:,} "
                    f"({after / before - 1:+.1%}).",
                    (*keys, "before"), (*keys, "after"),
                )  # fmt: skip


def _disk(told: Told) -> Iterator[Sentence]:
    ours, theirs = ("card", "model"), ("card", "reference")
    after, before = told.number(*ours, "bytes_on_disk"), told.number(*theirs, "bytes_on_disk")
    formats = [told.at(*side, "disk_format") for side in (ours, theirs)]
    keys = [(*side, key) for side in (ours, theirs) for key in ("bytes_on_disk", "disk_format")]
    if after and before and formats[0] == formats[1]:
        found = _against(told, "bytes on disk", ("bytes_on_disk",), human)
        assert found is not None
        yield found
    elif after and before:
        yield told.say(
            f"On disk it takes {human(after)} as {formats[0]}; the original takes {human(before)} as {formats[1]}, so the "
            "two do not compare.",
            *keys,
        )
    packed = {side: told.number("stored", side, "zstd") for side in ("source", "result")}
    if packed["source"] and packed["result"]:
        yield told.say(
            f"Under zstd the weights take {human(packed['result'])}, the original's {human(packed['source'])} "
            f"({times(packed['source'] / packed['result'])} as much).",
            ("stored", "result", "zstd"), ("stored", "source", "zstd"),
        )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

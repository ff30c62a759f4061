"""What scores of tasks and of LLM-KICK say on what to try next: they fall before perplexity does.

Thresholds are rules of thumb of our own, not of any paper.
"""

import math
from collections.abc import Iterator

from secateur.scores import SURE, Score
from secateur.telling import Loss, Sentence, Told

MUCH = math.log(1.5)
"""Nats a token: perplexity half as high again, a loss that one does not keep without recovering it."""
COARSE = 0.1
"""Fraction of the original's score by which another must differ before its error lets one say so, above which questions
were too few: twice what LLM-KICK calls a match."""


def fallen(told: Told) -> list[Score]:
    """The scores of tasks and LLM-KICK that certainly fell, those first that lost the largest part."""
    fell = [score for score in told.scores if score.kind != "divergent" and score.fell]
    return sorted(fell, key=lambda score: -abs(score.change or 0.0) / (abs(score.reference or 0.0) or 1.0))


def kept_not(told: Told) -> Loss | None:
    """The loss that one does not keep: of perplexity, or of scores, which fall before it does."""
    if told.loss is not None and told.loss.nats >= MUCH:
        return told.loss
    if not (fell := fallen(told)):
        return None
    each = [f"{score.name} {score.reference:.3f} → {score.value:.3f}" for score in fell[:3]]
    rest = f" and {len(fell) - 3} more" if len(fell) > 3 else ""
    hidden = f", where {told.loss.text[0].lower()}{told.loss.text[1:]}" if told.loss is not None else ""
    keys = [("card", *score.keys, key) for score in fell for key in ("reference", "value", "change_stderr")]
    nats = told.loss.nats if told.loss is not None else 0.0
    return Loss(
        nats,
        f"Scores fell by more than two standard errors ({', '.join(each)}{rest}){hidden}",
        (*keys, *(told.loss.keys if told.loss is not None else ())),
    )


def read_it(told: Told) -> Iterator[Sentence]:
    """Facts that are lost from memory and still found in a text."""
    scores = {score.name: score for score in told.scores if score.kind == "kick"}
    for end in ("", ", generated"):
        closed, opened = scores.get(f"kick: closed book{end}"), scores.get(f"kick: open book{end}")
        if closed is None or opened is None or not closed.fell or not opened.matching:
            continue
        yield told.say(
            f"Facts are lost (closed book{end} {closed.reference:.3f} → {closed.value:.3f}), and still found in a text that "
            f"holds them (open book{end} {opened.reference:.3f} → {opened.value:.3f}): where knowledge counts, give the "
            "model the text with the question.",
            *(("card", *score.keys, key) for score in (closed, opened) for key in ("reference", "value", "matching")),
        )  # fmt: skip
        return


def few_questions(told: Told) -> Iterator[Sentence]:
    """Scores whose errors are so large that a fall would not show."""
    least = {
        score: SURE * score.change_error / abs(score.reference)
        for score in told.scores
        if score.kind != "divergent" and score.change_error is not None and score.reference and not score.fell
    }
    if not least or max(least.values()) <= COARSE:
        return
    score = max(least, key=lambda each: least[each])
    assert score.change_error is not None, "it was compared"
    asked = f" on {score.asked:,} questions" if score.asked else ""
    limited = (
        "without --limit, or on a larger set" if score.kind == "task" else "without --limit, or --facts of your own"
    )
    yield told.say(
        f"Of {score.name}{asked} only a change of more than {SURE * score.change_error:.3f} would be certain, "
        f"{least[score]:.0%} of the original's score: small falls do not show; ask more, {limited}.",
        *(("card", *score.keys, key) for key in ("change_stderr", "reference", "n")),
    )  # fmt: skip

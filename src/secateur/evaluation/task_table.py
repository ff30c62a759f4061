"""Scores of tasks, and of LLM-KICK, on the printed card."""

from secateur.evaluation.card import ResultCard
from secateur.evaluation.tasks import TaskScore


def score_rows(card: ResultCard) -> list[tuple[str, str, str, str]]:
    """Label, reference, model and change of every score, with standard errors."""
    compared = card.reference is not None
    rows = []
    for score in card.tasks:
        change = ""
        if score.reference is not None:
            change = _with_error(score.value - score.reference, score.change_stderr, "+")
        before = _with_error(score.reference, score.reference_stderr) if compared else ""
        rows.append((f"{score.name} {score.metric}", before, _with_error(score.value, score.stderr), change))
    for one in card.kick.scores if card.kick else ():
        drop = (
            "" if one.drop is None else f"{-100 * one.drop:+.1f} %, {'matches' if one.matching else 'does not match'}"
        )
        label = f"kick: {one.task}" + (f" (chance {one.chance:.2f})" if one.chance is not None else "")
        rows.append((label, _with_error(one.reference, one.reference_stderr), _with_error(one.value, one.stderr), drop))
        if one.kl is not None and one.agreement is not None:
            rows.append(("  KL, same first token", "", f"{one.kl:.4f}, {100 * one.agreement:.1f} %", ""))
    return rows


def score_sentences(card: ResultCard) -> list[str]:
    """What was asked, how much of it, and of which files."""
    tasks = {score.name: score for score in card.tasks}
    lines = [_protocol(score, card.versions.get("lm-eval", "")) for score in tasks.values()]
    if any(score.change_stderr is not None for score in card.tasks):
        lines.append("Errors of scores are standard errors; those of changes are over the same questions.")
    return lines + ([f"{card.kick.sentence()}."] if card.kick else [])


def _protocol(score: TaskScore, version: str) -> str:
    source = score.source
    some = f"the first {score.n} of {score.of} questions" if score.of and score.n < score.of else f"{score.n} questions"
    digest = f" (sha256 {source.sha256[:12]})" if source.sha256 else ""
    data = ", ".join(f"{name} (sha256 {hashed[:12]})" for name, hashed in source.data.items())
    shots = "" if score.shots is None else f", {score.shots} examples before each"
    return (
        f"{score.name}: {some}{shots}; {source.definition}{digest}{f', data {data}' if data else ''}; asked and scored by "
        f"lm-eval {version}".rstrip()
        + "."
    )


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "not measured"
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

"""Facts that a model may know, each with a text that holds it: the questions of `kick`."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import RequestError
from secateur.files import sha256

TABLE = Path(__file__).with_name("facts.yaml")
ALTERNATIVES = 3
"""Wrong answers beside the right one where a file of facts gives none."""
AROUND = 4
"""Other sentences of the relation around the one that answers, in the context of a shipped fact."""
_HINT = 'each line is a JSON object with "question", "answers" (a text or a list) and "context"'


@dataclass(frozen=True)
class Fact:
    """A question, the answers that count as right, a text that holds one of them, and wrong answers of the same kind."""

    question: str
    answers: tuple[str, ...]
    context: str
    alternatives: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Facts in the order in which they are asked. name, sha256: of the file they come from; of: how many it holds."""

    items: tuple[Fact, ...]
    name: str
    sha256: str
    of: int


def read_facts(path: str | Path | None = None, limit: int | None = None) -> Facts:
    """The facts of a JSONL file, or those that come with Secateur.

    Lines of the file: question; answers, one text or a list, each counted as right; context, a text that holds an answer;
    and, if wanted, alternatives, wrong answers of the same kind (else drawn from the answers of other lines). limit: how
    many of the first. Shipped facts are mixed, so that the first are of all kinds.

    Raises RequestError where the file is not there or a line is not a fact.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} asks nothing; ask for at least 1 question.")
    file = TABLE if path is None else Path(path)
    if not file.is_file():
        raise RequestError(f"there are no facts at {file}.")
    found = list(_shipped() if path is None else _of_file(file))
    return Facts(tuple(found[:limit]), "facts of Secateur" if path is None else file.name, sha256(file), len(found))


def _shipped() -> Iterator[Fact]:
    relations: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    pairs = [(relation, subject) for relation, entry in relations.items() for subject in entry["known"]]
    random.Random("order").shuffle(pairs)
    for relation, subject in pairs:
        entry = relations[relation]
        known: Mapping[str, str] = entry["known"]
        # addressed by the fact, so that a longer table leaves the others as they are asked
        drawn = random.Random(f"{relation}/{subject}")
        # one of whom the same is true would make the context hold the answer twice
        others = [other for other in known if known[other] != known[subject]]
        told = [subject, *drawn.sample(others, min(AROUND, len(others)))]
        drawn.shuffle(told)
        said = (entry["sentence"].format(each, known[each]) for each in told)
        yield Fact(
            entry["question"].format(subject),
            (known[subject],),
            " ".join(sentence[0].upper() + sentence[1:] for sentence in said),
            _draw(drawn, known.values(), (known[subject],)),
        )


def _of_file(file: Path) -> Iterator[Fact]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"The facts {file} are not UTF-8 (byte {error.start}); convert them first.") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            rows.append((number, *_row(text, f"{file}, line {number}")))
    if not rows:
        raise RequestError(f"{file} holds no facts; {_HINT}.")
    known = [answers[0] for _, _, answers, _, _ in rows]
    for number, question, answers, context, given in rows:
        wrong = given or _draw(random.Random(question), known, answers)
        if not wrong:
            raise RequestError(
                f'{file}, line {number}: there is no wrong answer to "{question}"; give "alternatives", or facts with other '
                "answers."
            )
        yield Fact(question, answers, context, wrong)


def _row(text: str, where: str) -> tuple[str, tuple[str, ...], str, tuple[str, ...]]:
    """Question, answers, context and alternatives of a line."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where} is not JSON ({error.msg}); {_HINT}.") from None
    if not isinstance(row, dict):
        raise RequestError(f"{where} is not a fact; {_HINT}.")
    answers, given = row.get("answers", row.get("answer")), row.get("alternatives", [])
    answers = [answers] if isinstance(answers, str) else answers
    for name, value in (("answers", answers), ("alternatives", given)):
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            raise RequestError(f'{where} has no "{name}" that are texts; {_HINT}.')
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise RequestError(f'{where} has no "{name}"; {_HINT}.')
    if not answers:
        raise RequestError(f'{where} has no "answers"; {_HINT}.')
    return row["question"], tuple(answers), row["context"], tuple(given)


def _draw(drawn: random.Random, known: Any, right: tuple[str, ...]) -> tuple[str, ...]:
    wrong = sorted({each for each in known if each not in right})
    return tuple(drawn.sample(wrong, min(ALTERNATIVES, len(wrong))))

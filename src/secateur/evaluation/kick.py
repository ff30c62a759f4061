"""What compression does to knowledge, where perplexity hides it: LLM-KICK (arXiv 2310.01382), without a judge.

A compressed model is *matching* on a task where its score is at most 5 % below that of the dense model, relative to it.
From the paper: that rule, the prompt of factoid questions, generation up to three times the prompt's length, an answer that
counts wherever it occurs with spaces removed; for questions with a context, its cut to 3072 characters and 32 new tokens.

Ours: the facts, which are our own or the user's instead of FreebaseQA and TriviaQA; the same facts closed and open book, so
that only the context differs; answers are looked for in what the model adds, not in the prompt, without regard to case;
and, since small models say little, a second score for each, whether the right answer is likelier for each of its bytes than
wrong ones of the same kind. Summaries and answers to instructions are judged by GPT-4 in the paper. Here the dense model
writes them, and the score is how likely the compressed model finds each token of that text (the geometric mean for each
text), with KL and agreement beside it; that measures distance from the dense model, not quality.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.divergent import greedy
from secateur.evaluation.facts import Fact, Facts
from secateur.evaluation.forward import evaluating, finite, has_cache, logits_of, maximum_positions, step
from secateur.evaluation.perplexity import log_probabilities
from secateur.evaluation.remembered import logits_after
from secateur.evaluation.tasks import mean_error

MATCHING = 0.05
"""The relative drop up to which a compressed model matches the dense one."""
CONTEXT_CHARACTERS = 3072
OPEN_TOKENS = 32
WRITTEN_TOKENS = 64
"""Tokens that the dense model writes of a summary or an answer."""
QUESTION = "Please give answer to this question: {question} The answer is"
SUMMARY = "Summarize the following text in a few sentences.\n\n{passage}\n\nSummary:"
MATERIAL = Path(__file__).with_name("kick.yaml")
TOGETHER = 8
"""Prompts of one length that are read at once."""

TaskName = Literal[
    "closed book", "closed book, generated", "open book", "open book, generated", "summarisation", "instructions"
]


class KickScore(BaseModel):
    """One task of the protocol. value, reference: of the model and the dense one, the larger the better, with standard
    errors; change_stderr: of their difference, question by question. drop: 1 - value / reference; matching: whether it is
    at most 0.05; None where the dense model's score is 0. chance: what guessing gives. kl: mean KL(dense || model) in nats
    for each token of what the dense model wrote, agreement: share of those where both rank the same token first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    task: TaskName
    n: int
    value: float
    stderr: float | None
    reference: float
    reference_stderr: float | None
    change_stderr: float | None
    drop: float | None
    matching: bool | None
    chance: float | None = None
    kl: float | None = None
    agreement: float | None = None


class Kick(BaseModel):
    """All scores, and what they were measured on. facts, sha256: the file; of: how many facts it holds. written: most tokens
    of a text by the dense model. chat: whether instructions were put in the tokenizer's chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[KickScore, ...]
    facts: str
    sha256: str
    of: int
    written: int
    chat: bool

    def score(self, task: str) -> KickScore | None:
        """The score of a task; None where it was not measured."""
        return next((score for score in self.scores if score.task == task), None)

    def sentence(self) -> str:
        """The protocol in words."""
        asked = self.score("closed book")
        assert asked is not None
        some = f"first {asked.n} of " if asked.n < self.of else ""
        return (
            f"LLM-KICK without a judge: {self.facts} (sha256 {self.sha256[:12]}), {some}{self.of} facts, in the answer's "
            "rank among alternatives and in greedy text; summaries and instructions by the likelihood of up to "
            f"{self.written} tokens each that the reference wrote{' in its chat template' if self.chat else ''}; matching: "
            "at most 5 % below the reference"
        )

    def findings(self, perplexity: float | None, reference: float | None) -> tuple[str, ...]:
        """Sentences that follow from the scores. perplexity, reference: of the model and the dense one, where known."""
        said = []
        closed = self.score("closed book")
        assert closed is not None
        if closed.chance is not None and closed.reference - 2 * (closed.reference_stderr or 0) <= closed.chance:
            said.append(
                "The reference itself hardly knows these facts better than chance, so closed book says nothing of the model."
            )
        elif closed.drop is not None and perplexity is not None and reference is not None:
            rise = perplexity / reference - 1
            said.append(
                f"Closed-book knowledge fell by {100 * closed.drop:.1f} % where perplexity rose by {100 * rise:.1f} %."
            )
        for score in self.scores:
            error = score.change_stderr
            away = score.value - (1 - MATCHING) * score.reference
            if error and score.matching is not None and abs(away) < 2 * error:
                said.append(
                    f"Whether the model matches in {score.task} is not certain: the limit lies within two standard errors."
                )
        return tuple(said)


@dataclass(frozen=True)
class Text:
    """What the dense model wrote. ids: (tokens,) of prompt and text; the text begins at `start`."""

    ids: Tensor
    start: int


@dataclass(frozen=True)
class Dense:
    """What the dense model answered and wrote: compressed models are measured against it one after another.

    predicts: the dense model, asked for its logits of what it wrote; one that is `Remembered` computes them once for all.
    """

    predicts: nn.Module
    facts: Facts
    answered: Mapping[TaskName, Sequence[float]]
    texts: Mapping[TaskName, Sequence[Text]]
    written: int
    chat: bool


def examine_dense(
    module: nn.Module,
    tokenizer: Any,
    facts: Facts,
    *,
    limit: int | None = None,
    written: int = WRITTEN_TOKENS,
    generated: bool = True,
    predicts: nn.Module | None = None,
    progress: Progress = silent,
) -> Dense:
    """Lets the dense model answer all facts, summarise, and follow instructions.

    predicts: the same model with a memory for its logits (`Remembered`), where several are compared with it. limit: how many
    of the shipped passages and of the instructions; all by default. written: most new tokens of each. generated: whether
    facts are answered in greedy text too, which takes most of the time.
    """
    if tokenizer is None:
        raise RequestError(f"{type(module).__name__} has no tokenizer, so it cannot be asked anything; add its files.")
    material = yaml.safe_load(MATERIAL.read_text(encoding="utf-8"))
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompts: dict[TaskName, list[str]] = {
        "summarisation": [SUMMARY.format(passage=text) for text in material["passages"][:limit]],
        "instructions": material["instructions"][:limit],
    }
    answered = _answers(module, tokenizer, facts, generated, progress)
    texts: dict[TaskName, list[Text]] = {}
    for task, asked in prompts.items():
        ids = [_told(tokenizer, text) if chat else _encoded(tokenizer, text) for text in asked]
        with progress(task, len(ids)) as bar:
            found = _greedy(module, ids, [written] * len(ids), bar.advance, tokenizer.eos_token_id)
        # that the model stops counts too
        texts[task] = [Text(torch.tensor([*read, *_ended(new, tokenizer)]), len(read)) for read, new in found]
    return Dense(predicts or module, facts, answered, texts, written, chat)


def kick(module: nn.Module, tokenizer: Any, dense: Dense, *, texts: bool = True, progress: Progress = silent) -> Kick:
    """The scores of a compressed model beside those of the dense one.

    texts: whether its tokens are the dense model's, so that it can read what that wrote. Raises RequestError where they are
    not and were said to be, or there is no tokenizer; RunError where a logit is not finite.
    """
    if tokenizer is None:
        raise RequestError(f"{type(module).__name__} has no tokenizer, so it cannot be asked anything; add its files.")
    ours = _answers(module, tokenizer, dense.facts, "open book, generated" in dense.answered, progress)
    choices = [len(fact.answers) / (len(fact.answers) + len(fact.alternatives)) for fact in dense.facts.items]
    chance = sum(choices) / len(choices)
    scores = [
        _score(task, values, dense.answered[task], chance=None if "generated" in task else chance)
        for task, values in ours.items()
    ]
    if texts:
        scores += [_follow(task, module, dense.predicts, read, progress) for task, read in dense.texts.items()]
    return Kick(
        scores=tuple(scores), facts=dense.facts.name, sha256=dense.facts.sha256, of=dense.facts.of,
        written=dense.written, chat=dense.chat,
    )  # fmt: skip


def _score(task: TaskName, values: Sequence[float], references: Sequence[float], **more: float | None) -> KickScore:
    count = len(values)
    value, reference = sum(values) / count, sum(references) / count
    several = count > 1
    drop = 1 - value / reference if reference > 0 else None
    return KickScore(
        task=task,
        n=count,
        value=value,
        stderr=mean_error(values) if several else None,
        reference=reference,
        reference_stderr=mean_error(references) if several else None,
        change_stderr=mean_error([a - b for a, b in zip(values, references, strict=True)]) if several else None,
        drop=drop,
        # a drop of exactly 5 % matches, however it is rounded
        matching=None if drop is None else drop <= MATCHING + 1e-9,
        **more,
    )


def _answers(
    module: nn.Module, tokenizer: Any, facts: Facts, generated: bool, progress: Progress
) -> dict[TaskName, list[float]]:
    """For each task and fact whether it was answered: 1 or 0."""
    found: dict[TaskName, list[float]] = {}
    books: tuple[tuple[TaskName, TaskName, list[str]], ...] = (
        ("closed book", "closed book, generated", [QUESTION.format(question=fact.question) for fact in facts.items]),
        ("open book", "open book, generated", [_with_context(fact) for fact in facts.items]),
    )
    for ranked, written, prompts in books:
        with progress(ranked, len(prompts)) as bar:
            found[ranked] = []
            for fact, prompt in zip(facts.items, prompts, strict=True):
                answers = (*fact.answers, *fact.alternatives)
                sums = _log_likelihoods(module, [_pair(tokenizer, prompt, answer) for answer in answers])
                each = [total / len(answer.encode("utf-8")) for total, answer in zip(sums, answers, strict=True)]
                right, wrong = each[: len(fact.answers)], each[len(fact.answers) :]
                # a model that finds all alike knows nothing
                found[ranked].append(float(max(right) > max(wrong)))
                bar.advance()
        if not generated:
            continue
        ids = [_encoded(tokenizer, prompt) for prompt in prompts]
        counts = [2 * len(each) if ranked == "closed book" else OPEN_TOKENS for each in ids]

        def answered(index: int, new: list[int]) -> bool:
            text = tokenizer.decode(_ended(new, tokenizer), skip_special_tokens=True)
            return _hit(text, facts.items[index].answers)

        with progress(written, len(ids)) as bar:
            texts = _greedy(module, ids, counts, bar.advance, tokenizer.eos_token_id, answered)
        found[written] = [float(answered(index, new)) for index, (_, new) in enumerate(texts)]
    return found


def _with_context(fact: Fact) -> str:
    return fact.context[:CONTEXT_CHARACTERS] + "\n\n" + QUESTION.format(question=fact.question)


def _hit(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs, spaces removed as in the protocol, and without regard to case."""
    said = "".join(text.split()).casefold()
    return any("".join(answer.split()).casefold() in said for answer in answers)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids with what the tokenizer puts before a text (BOS), and nothing behind it."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and end is not None and ids[-1] == end else ids


def _told(tokenizer: Any, text: str) -> list[int]:
    """An instruction in the tokenizer's chat template, up to where the answer begins."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Ids of prompt and answer read together, as they would be written, and where the answer begins."""
    return _encoded(tokenizer, f"{prompt} {answer}"), len(_encoded(tokenizer, prompt))


def _ended(new: Sequence[int], tokenizer: Any) -> list[int]:
    """New tokens up to where the text ends, its end included."""
    end = tokenizer.eos_token_id
    return list(new[: new.index(end) + 1] if end is not None and end in new else new)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of sequences of one length, a few at a time: nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for _, indices in sorted(by_length.items()):
        yield from (indices[begin : begin + TOGETHER] for begin in range(0, len(indices), TOGETHER))


def _log_likelihoods(module: nn.Module, pairs: Sequence[tuple[list[int], int]]) -> list[float]:
    """For each sequence the log-likelihood of its tokens from `start` on, in nats. What all begin with is read once."""
    limit = maximum_positions(module)
    # of a sequence that is too long, its end is what matters
    cut = [
        (ids[-limit:], max(1, start - len(ids) + limit)) if limit and len(ids) > limit else (ids, start)
        for ids, start in pairs
    ]
    shared = 0
    if has_cache(module):
        first = [ids[: len(ids) - 1] for ids, _ in cut]
        shared = next(
            (at for at, tokens in enumerate(zip(*first, strict=False)) if len(set(tokens)) > 1), min(map(len, first))
        )
    found = []
    with evaluating(module):
        begun, cache = step(module, torch.tensor([cut[0][0][:shared]]), None) if shared else (None, None)
        # the last token predicts nothing that counts
        rests = [ids[shared:-1] for ids, _ in cut]
        went_on = _go_on(module, rests, cache)
        for (ids, start), rest, logits in zip(cut, rests, went_on, strict=True):
            parts = ([] if begun is None else [begun[0].cpu()]) + ([logits.cpu()] if rest else [])
            log_p = log_probabilities(finite(torch.cat(parts)[start - 1 :], "a question"))
            found.append(float(log_p.gather(-1, torch.tensor(ids[start:])[:, None]).sum()))
    return found


def _go_on(module: nn.Module, rests: Sequence[list[int]], cache: Any) -> Iterator[Tensor]:
    """Logits (tokens, vocabulary) of each continuation of what `cache` holds; None: of each sequence by itself.

    Where the cache can be repeated all are read at once, the shorter ones filled up behind their end, which nothing before
    it sees.
    """
    longest = max(map(len, rests))
    if cache is not None and longest and len(rests) > 1 and hasattr(cache, "batch_repeat_interleave"):
        cache.batch_repeat_interleave(len(rests))
        filled = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests])
        logits = step(module, filled, cache)[0]
        yield from (row[: len(rest)] for row, rest in zip(logits, rests, strict=True))
        return
    for rest in rests:
        if not rest:
            yield torch.empty(0)
        elif cache is not None:
            yield step(module, torch.tensor([rest]), deepcopy(cache))[0][0]
        else:
            yield logits_of(module, torch.tensor([rest]))[0]


def _greedy(
    module: nn.Module,
    prompts: Sequence[list[int]],
    counts: Sequence[int],
    advance: Callable[[int], None],
    end: int | None = None,
    enough: Callable[[int, list[int]], bool] = lambda index, new: False,
) -> list[tuple[list[int], list[int]]]:
    """For each prompt what was read of it, and the likeliest next tokens one by one.

    counts: how many tokens for each. Prompts of one length are read together, and end together where each has met `end` or
    has `enough`, which is asked of its index and new tokens.
    """
    limit = maximum_positions(module)
    cut = []
    for ids, count in zip(prompts, counts, strict=True):
        new = count if limit is None else min(count, limit // 2)
        cut.append((ids if limit is None else ids[-(limit - new) :], new))
    found: list[tuple[list[int], list[int]]] = [([], [])] * len(cut)
    with evaluating(module):
        for indices in _batches([len(ids) for ids, _ in cut]):

            def answered(text: Tensor, indices: list[int] = indices) -> bool:
                rows = zip(indices, text.tolist(), strict=True)
                return all(end in new or enough(index, new) for index, new in rows)

            read = torch.tensor([cut[index][0] for index in indices])
            most = max(cut[index][1] for index in indices)
            written = greedy(module, read, most, what="the model", enough=answered)
            for row, index in enumerate(indices):
                found[index] = (cut[index][0], written[row, : cut[index][1]].tolist())
            advance(len(indices))
    return found


def _follow(
    task: TaskName, module: nn.Module, reference: nn.Module, texts: Sequence[Text], progress: Progress
) -> KickScore:
    """How likely both find what the dense model wrote, and how far their predictions lie apart on it."""
    ours, theirs = [], []
    kl = agreed = 0.0
    tokens = 0
    with evaluating(module, reference), progress(task, len(texts)) as bar:
        for text in texts:
            log_q, log_p = (
                log_probabilities(finite(logits_after(model, text.ids[None], text.start - 1)[0, :-1], task)).cpu()
                for model in (module, reference)
            )
            if log_q.shape != log_p.shape:
                raise RequestError(
                    f"The model predicts over {log_q.shape[-1]} tokens and its reference over {log_p.shape[-1]}; what the "
                    "reference wrote cannot be read by the model."
                )
            target = text.ids[text.start :, None]
            ours.append(float(log_q.gather(-1, target).mean().exp()))
            theirs.append(float(log_p.gather(-1, target).mean().exp()))
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            tokens += len(target)
            bar.advance()
    return _score(task, ours, theirs, kl=kl / tokens, agreement=agreed / tokens)

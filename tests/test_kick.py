"""LLM-KICK without a judge: facts, scores against plain formulas, and when a model matches."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Cache

import tiny
from secateur.errors import RequestError
from secateur.evaluation import Continuations, ResultCard, evaluate, examine_dense, kick, read_facts
from secateur.evaluation.facts import Fact, Facts
from secateur.evaluation.kick import QUESTION, _encoded, _greedy, _hit, _log_likelihoods, _score, _with_context
from secateur.evaluation.measure import Opened
from secateur.evaluation.remembered import Remembered, logits_after
from secateur.evaluation.task_table import score_rows, score_sentences

SHORT = Continuations(2, 4, 3)


def test_shipped_facts_answer_themselves() -> None:
    facts = read_facts()
    assert facts.of == len(facts.items) >= 300 and facts == read_facts()
    assert len({fact.question for fact in facts.items}) == facts.of
    for fact in facts.items:
        [answer] = fact.answers
        said = fact.context[:1].lower() + fact.context[1:]
        assert answer.lower() in said.lower(), fact
        assert len(fact.alternatives) == 3 and answer not in fact.alternatives, fact
    first = read_facts(limit=40)
    assert first.items == facts.items[:40] and len({fact.question.split()[0] for fact in first.items}) >= 3


def test_facts_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    rows = [
        {"question": "Q1?", "answers": "a", "context": "It is a."},
        {"question": "Q2?", "answers": ["b", "B"], "context": "It is b.", "alternatives": ["x"]},
        {"question": "Q3?", "answer": "c", "context": "It is c."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    facts = read_facts(file)
    assert [fact.answers for fact in facts.items] == [("a",), ("b", "B"), ("c",)]
    assert set(facts.items[0].alternatives) == {"b", "c"} and facts.items[1].alternatives == ("x",)
    for text, wanted in (
        ("", "holds no facts"),
        ("[1]", "line 1 is not a fact"),
        ("{", "is not JSON"),
        ('{"question": "Q?", "context": "c"}', '"answers"'),
        ('{"question": "Q?", "answers": [], "context": "c"}', '"answers"'),
        ('{"question": "Q?", "answers": "a"}', '"context"'),
        ('{"question": "Q?", "answers": "a", "context": "c"}', "no wrong answer"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=wanted):
            read_facts(file)
    with pytest.raises(RequestError, match="no facts at"):
        read_facts(tmp_path / "none.jsonl")


@pytest.mark.parametrize("repeats", [True, False], ids=["all at once", "one by one"])
def test_likelihoods_and_greedy_text_are_what_plain_calls_give(repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not repeats:  # as of a cache of some other kind
        monkeypatch.delattr(Cache, "batch_repeat_interleave")
    module, words = tiny.make("llama"), tiny.tokenizer()
    texts = ["The cat sat", "A dog ran far away", "It is so", "The hat fit"]
    ids = [_encoded(words, text) for text in texts]
    # with and without a beginning that all share
    options = [_encoded(words, f"The cat sat on{end}") for end in (" the mat", " a hat", "e", " the map and ran")]
    ids += options
    found = _log_likelihoods(module, [(each, 2) for each in ids[:4]])
    found += _log_likelihoods(module, [(each, 2) for each in options])
    with torch.no_grad():
        for each, total in zip(ids, found, strict=True):
            rows = module(torch.tensor([each])).logits[0, 1:-1].double().log_softmax(-1)
            assert total == pytest.approx(float(rows.gather(-1, torch.tensor(each[2:])[:, None]).sum()), abs=1e-5)
        for (read, new), each in zip(
            _greedy(module, ids, [4, 6, 5, 3, 3, 3, 3, 3], lambda steps: None), ids, strict=True
        ):
            plain = module.generate(
                torch.tensor([each]), max_new_tokens=len(new), do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert read == each and new == plain[0, len(each) :].tolist()


def test_greedy_text_ends_where_it_is_enough() -> None:
    module, words = tiny.make("llama"), tiny.tokenizer()
    ids = [_encoded(words, text) for text in ("The cat sat", "The hat is")]
    whole = [new for _, new in _greedy(module, ids, [8, 8], lambda steps: None)]
    asked = [new for _, new in _greedy(module, ids, [8, 8], lambda steps: None, None, lambda index, new: len(new) > 2)]
    ended = [new for _, new in _greedy(module, ids[:1], [8], lambda steps: None, end=whole[0][1])]
    assert asked == [new[:3] for new in whole] and ended == [whole[0][: whole[0].index(whole[0][1]) + 1]]


def test_long_prompts_keep_their_end() -> None:
    module, words = tiny.make("llama"), tiny.tokenizer()
    ids = _encoded(words, "z" * 300 + " end")
    [(read, new)] = _greedy(module, [ids], [16], lambda steps: None)
    assert read == ids[-(tiny.CONTEXT - 16) :] and len(new) == 16
    [total] = _log_likelihoods(module, [(ids, len(ids) - 2)])
    [short] = _log_likelihoods(module, [(ids[-tiny.CONTEXT :], tiny.CONTEXT - 2)])
    assert total == short


def test_what_counts_as_a_hit() -> None:
    assert _hit("it is New  York, I think", ("NewYork",)) and _hit("PARIS", ("Rome", "Paris"))
    assert not _hit("", ("Paris",)) and not _hit("Pari s it", ("Lisbon",))
    assert "x" * 3072 in _with_context(Fact("Q?", ("a",), "x" * 4000, ("b",)))
    assert "x" * 3073 not in _with_context(Fact("Q?", ("a",), "x" * 4000, ("b",)))


class Knows(nn.Module):
    """Goes on with the answer behind each prompt that it knows, and with a full stop behind others."""

    def __init__(self, words, known: dict[str, str]):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.entries = len(words)
        self.stop = words(".")["input_ids"][-1]
        self.known = {}
        for prompt, answer in known.items():
            ids = _encoded(words, f"{prompt} {answer}")
            for end in range(len(_encoded(words, prompt)), len(ids)):
                self.known[tuple(ids[:end])] = ids[end]

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.entries)
        for row, each in enumerate(ids.tolist()):
            for end in range(len(each)):
                logits[row, end, self.known.get(tuple(each[: end + 1]), self.stop)] = 9.0
        return logits


def test_what_a_model_knows_and_forgets_is_what_it_scores() -> None:
    words = tiny.tokenizer()
    known = (("Rome", ("Oslo", "Bern")), ("Lima", ("Kyiv",)), ("Cairo", ("Minsk",)), ("Paris", ("Delhi",)))
    items = tuple(
        Fact(f"Capital {i}?", (answer,), f"It is {answer}.", wrong) for i, (answer, wrong) in enumerate(known)
    )
    facts = Facts(items, "four", "0" * 64, 4)
    closed = {QUESTION.format(question=fact.question): fact.answers[0] for fact in items}
    opened = {_with_context(fact): fact.answers[0] for fact in items}
    dense = examine_dense(Knows(words, closed | opened), words, facts, limit=1, written=4)
    forgets = {prompt: answer if place < 2 else "Berne" for place, (prompt, answer) in enumerate(closed.items())}
    found = kick(Knows(words, forgets | opened), words, dense)
    scores = {score.task: score for score in found.scores}
    assert [scores[task].reference for task in ("closed book", "closed book, generated", "open book")] == [
        1.0,
        1.0,
        1.0,
    ]
    assert scores["closed book, generated"].value == 0.5 and scores["closed book, generated"].drop == 0.5
    assert scores["closed book, generated"].matching is False
    assert scores["open book"].value == scores["open book, generated"].value == 1.0 and scores["open book"].matching
    assert scores["closed book"].chance == pytest.approx((1 / 3 + 3 / 2) / 4)
    assert scores["summarisation"].matching and scores["summarisation"].agreement == 1.0


def test_a_model_matches_itself(tmp_path: Path) -> None:
    module, words = tiny.make("llama"), tiny.tokenizer()
    dense = examine_dense(module, words, read_facts(limit=2), limit=1, written=4)
    found = kick(module, words, dense)
    assert [score.n for score in found.scores] == [2, 2, 2, 2, 1, 1]
    for score in found.scores:
        assert score.value == score.reference and score.matching is not False
    assert all(score.kl == pytest.approx(0, abs=1e-9) and score.agreement == 1 for score in found.scores[4:])
    assert [score.task for score in kick(module, words, dense, texts=False).scores] == [
        s.task for s in found.scores[:4]
    ]


def test_matching_is_a_relative_drop_of_five_percent() -> None:
    def matches(right: int, of_dense: int) -> bool | None:
        values = [[1.0] * count + [0.0] * (100 - count) for count in (right, of_dense)]
        return _score("closed book", *values).matching

    assert matches(38, 40) is True and matches(37, 40) is False and matches(50, 40) is True and matches(3, 0) is None


def test_kick_on_the_card() -> None:
    pair = [(tiny.make("llama", seed), tiny.tokenizer()) for seed in (0, 1)]
    card = evaluate(*pair, kick=True, limit=2, speed=False, windows=1, window=16)
    assert ResultCard.from_dict(json.loads(card.to_json())) == card
    labels = [row[0] for row in score_rows(card)]
    assert "kick: open book, generated" in labels and any(
        label.startswith("kick: closed book (chance 0.25") for label in labels
    )
    assert "first 2 of" in score_sentences(card)[-1]
    with pytest.raises(RequestError, match="--reference"):
        evaluate(pair[0], kick=True, speed=False)


def test_a_second_model_costs_no_pass_of_the_dense_one(tmp_path: Path) -> None:
    """What the dense model answers, writes and predicts is computed once, and is the same as without a memory."""
    text = tmp_path / "text.txt"
    text.write_text("the river ran over stones and the light was gone " * 8)
    dense, words = tiny.make("llama"), tiny.tokenizer()
    asked = {"text": text, "kick": True, "limit": 1, "speed": False, "window": 16, "windows": 1, "divergent": SHORT}
    passes: list[int] = []
    dense.register_forward_pre_hook(lambda *_: passes.append(1))
    reference = Opened("dense", dense, words, remembered=Remembered(dense))
    cards = []
    for seed in (1, 2):
        passes.clear()
        cards.append(evaluate((tiny.make("llama", seed), words), reference, **asked))
    assert not passes and cards[0].kick.scores[0].reference == cards[1].kick.scores[0].reference
    assert cards[1] == evaluate((tiny.make("llama", 2), words), (dense, words), **asked).model_copy(
        update={"reference": cards[1].reference}
    )
    assert passes


def test_only_the_logits_of_what_was_written_are_kept() -> None:
    module, ids = tiny.make("llama"), torch.arange(10)[None]
    kept = Remembered(module, most=4 * tiny.VOCABULARY * 4)  # of four tokens
    with torch.inference_mode():
        whole = module(ids).logits
        assert torch.equal(logits_after(kept, ids, 6), whole[:, 6:]) and torch.equal(kept.after(ids, 6), whole[:, 6:])
        module.forward = None  # not asked again
        assert torch.equal(kept.after(ids, 6), whole[:, 6:])
    assert sum(each.untyped_storage().nbytes() for each in kept._seen.values()) == 4 * tiny.VOCABULARY * 4

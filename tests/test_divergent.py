"""Divergent tokens: the pass over the reference's text against generation, ties, endings, and the card."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from command import secateur
from secateur.errors import RequestError
from secateur.evaluation import Continuations, ResultCard, divergent_tokens, evaluate
from secateur.evaluation.divergent import (
    compare_forced,
    counted_tokens,
    cut_prompts,
    end_tokens,
    first_divergent,
    greedy,
    tie_tolerance,
)
from secateur.evaluation.forward import evaluating
from secateur.evaluation.measure import Opened
from test_evaluation import VOCABULARY, Fixed, ids, llama, words
from test_evaluation_card import shown

SMALL = Continuations(prompts=12, prompt=5, continuation=20)


def near(model: nn.Module, by: float, seed: int = 0) -> nn.Module:
    """The same model with a little noise on its weights, so that texts go together for a while."""
    other, generator = llama(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
            parameter.copy_(own + by * torch.randn(own.shape, generator=generator))
    return other


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
@pytest.mark.parametrize("by", [0.02, 0.1])
def test_one_pass_finds_the_token_at_which_generation_diverges(by: float, tolerance: float, cache: bool) -> None:
    reference, prompts = llama(), cut_prompts(ids(200), SMALL)
    model = near(reference, by)
    with evaluating(model, reference):
        text = greedy(reference, prompts, 20, cache=cache)
        forced = compare_forced(model, prompts, text, tolerance)
        # one prompt at a time, one token after the other: nothing is shared with the pass
        written = [
            greedy(model, prompt[None], 20, toward=row[None], tolerance=tolerance, cache=cache)
            for prompt, row in zip(prompts, text, strict=True)
        ]
    lengths = [20] * len(prompts)
    first = first_divergent(forced.differs, lengths)
    assert first == first_divergent(torch.cat(written) != text, lengths)
    assert 0 < sum(first) < sum(lengths), "some agree for a while, and some diverge"


def test_a_model_never_diverges_from_itself() -> None:
    found = divergent_tokens(llama(), llama(), ids(200), written=SMALL)
    assert (found.censored, found.share, found.corrected, found.ties) == (1, 0, 0, 0)
    assert set(found.quantiles.values()) == {None} and found.mean == 20
    assert found.survival == tuple((after, 1.0) for after in range(1, 21))
    half = divergent_tokens(llama().bfloat16(), llama().bfloat16(), ids(200), written=SMALL)
    assert half.censored == 1 and half.tolerance == tie_tolerance("bfloat16") == 2 * 2**-7


def test_figures_follow_from_what_both_write() -> None:
    reference, prompts = llama(), cut_prompts(ids(200), SMALL)
    reference.config.eos_token_id = reference.generation_config.eos_token_id = None
    model = near(reference, 0.02)
    found = divergent_tokens(model, reference, ids(200), written=SMALL)
    with evaluating(model, reference):
        theirs, ours = greedy(reference, prompts, 20), greedy(model, prompts, 20)
    differs = ours != theirs
    first = sorted(int(row.long().argmax()) if row.any() else 20 for row in differs)
    never = first.count(20)
    assert 0 < never < 12, "the case says something"
    assert found.share == pytest.approx(float(differs.float().mean()))
    assert found.censored == pytest.approx(never / 12) and found.mean == pytest.approx(sum(first) / 12)
    # of twelve values the quarter is the third, the median the sixth
    assert found.quantiles["0.25"] == (first[2] if first[2] < 20 else None)
    assert found.quantiles["0.5"] == (first[5] if first[5] < 20 else None)
    assert dict(found.survival)[20] == pytest.approx(never / 12)
    assert found.tokens == 240 and 0 < found.corrected < found.share, "a text that went astray differs more"


def test_farther_models_diverge_sooner() -> None:
    means = [divergent_tokens(near(llama(), by), llama(), ids(200), written=SMALL).mean for by in (0.001, 0.02, 0.5)]
    assert means[0] > means[1] > means[2]


def test_ties_are_the_references() -> None:
    reference, model = Fixed([1.0, 0.0, 0.0]), Fixed([1.0, 1.0 + 5e-5, 0.0])
    text = torch.zeros(40, dtype=torch.int64)
    found = divergent_tokens(model, reference, text, written=SMALL._replace(prompts=4))
    assert (found.censored, found.ties) == (1, 1), "what rounding could have turned round is no divergence"
    exact = divergent_tokens(model, reference, text, written=SMALL._replace(prompts=4), tolerance=0.0)
    assert (exact.censored, exact.ties, exact.share, exact.quantiles["0.1"]) == (0, 0, 1, 0)
    equal = divergent_tokens(Fixed([0.5] * 3), reference, text, written=SMALL._replace(prompts=4), tolerance=0.0)
    assert equal.censored == 1, "among equal logits the reference's token counts"


def test_a_text_ends_with_its_end_token() -> None:
    reference = llama()
    reference.generation_config.eos_token_id = [3, 7]
    assert end_tokens(reference) == (3, 7) and end_tokens(Fixed([0.0])) == ()
    text = torch.tensor([[1, 3, 5, 7], [1, 2, 5, 6], [7, 7, 7, 7]])
    assert counted_tokens(text, (3, 7)).tolist() == [
        [True, True, False, False],
        [True] * 4,
        [True, False, False, False],
    ]
    assert bool(counted_tokens(text, ()).all())
    prompts = cut_prompts(ids(200), SMALL)
    with evaluating(reference):
        lengths = counted_tokens(greedy(reference, prompts, 20), (3, 7)).sum(1).tolist()
    assert min(lengths) < 20, "the case says something"
    found = divergent_tokens(near(reference, 0.1), reference, ids(200), written=SMALL)
    assert found.tokens == sum(lengths)


def test_what_cannot_be_compared_is_refused(tmp_path) -> None:
    with pytest.raises(RequestError, match="12 are needed"):
        divergent_tokens(llama(), llama(), ids(40), written=SMALL)
    with pytest.raises(RequestError, match="64 positions"):
        divergent_tokens(llama(), llama(), ids(200), written=SMALL._replace(continuation=60))
    with pytest.raises(RequestError, match=r"at least 1 of 1 \+ 1"):
        divergent_tokens(llama(), llama(), ids(200), written=SMALL._replace(prompts=0))
    with pytest.raises(RequestError, match="over 2 tokens"):
        divergent_tokens(Fixed([0.0, 1.0]), Fixed([0.0, 0.0, 1.0]), torch.zeros(200, dtype=torch.int64), written=SMALL)
    with pytest.raises(RequestError, match="--reference"):
        evaluate((llama(), words()), divergent=True)


def test_prompts_are_spread_over_the_text() -> None:
    prompts = cut_prompts(torch.arange(103), Continuations(4, 5, 1))
    assert prompts[:, 0].tolist() == [0, 25, 50, 75] and prompts[0].tolist() == [0, 1, 2, 3, 4]


def test_on_the_card_by_text_and_self_written(tmp_path) -> None:
    reference = (llama(), words())
    model = (near(llama(), 0.05), words())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index % (VOCABULARY - 1) + 1}" for index in range(130)))
    card = evaluate(model, reference, text=text, speed=False, divergent=SMALL)
    assert card.divergent is not None and card.divergent.text.endswith("/text.txt")
    assert ResultCard.from_dict(json.loads(card.to_json())) == card
    said = shown(card)
    assert "tokens before the first divergent one" in said and "12 prompts of 5 tokens" in said
    own = evaluate(model, reference, speed=False, divergent=SMALL, seed=4)
    assert "written by the reference itself (12 x 5 tokens, seed 4)" in own.divergent.text
    assert own == evaluate(model, reference, speed=False, divergent=SMALL, seed=4)
    never = evaluate(reference, reference, speed=False, divergent=SMALL)
    assert "> 20 (> 20 … > 20)" in shown(never) and "0.0 %" in shown(never)
    assert evaluate(model, reference, speed=False).divergent is None


def test_the_command_line_says_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def measured(*_models, **options):
        asked.append(options)
        raise RequestError("enough is known")

    monkeypatch.setattr("secateur.evaluation.evaluate", measured)
    more = ("--divergent", "--prompts", 3, "--prompt-length", 4, "--continuation", 5, "--decode", 0)
    for arguments in ((), (*more, "--prefill", 128, "--prefill", 512, "--batch", 1, "--batch", 4)):
        assert secateur("evaluate", "anything", *arguments).code == 2
    plain, full = asked
    assert not plain["divergent"] and not plain["prefill"] and plain["batch"] == 1 and plain["decode"] == 32
    assert full["divergent"] == Continuations(3, 4, 5) and full["decode"] == 0
    assert (full["prefill"], full["batch"]) == ([128, 512], [1, 4])


def test_a_reference_writes_once_for_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Opened("dense", llama(), words())
    wrote: list[str] = []

    def counted(model: nn.Module, *given: Any, **more: Any) -> torch.Tensor:
        wrote.append(more.get("what", "the model"))
        return greedy(model, *given, **more)

    monkeypatch.setattr("secateur.evaluation.divergent.greedy", counted)
    asked = {"windows": 2, "window": 16, "speed": False, "divergent": Continuations(4, 5, 6)}
    cards = [evaluate((near(reference.module, 0.05, seed), words()), reference, **asked) for seed in (0, 1)]
    assert wrote.count("the reference") == 1 and wrote.count("the model") == 2
    alone = evaluate((near(reference.module, 0.05, 1), words()), (reference.module, words()), **asked)
    assert cards[1].divergent == alone.divergent


def test_what_cannot_be_measured_beside_the_rest_is_refused_or_told() -> None:
    model, long = (llama(), words()), Continuations(4, 5, 10**4)
    with pytest.raises(RequestError, match="position"):
        evaluate(model, model, windows=1, window=16, speed=False, divergent=long)
    card = evaluate(model, model, windows=1, window=16, speed=False, divergent=long, strict=False)
    assert card.divergent is None and card.divergence is not None
    assert any(note.startswith("Not measured: ") and "position" in note for note in card.notes)
    with pytest.raises(RequestError, match="--reference"):
        evaluate(model, speed=False, kick=True)
    card = evaluate(model, speed=False, kick=True, strict=False)
    assert card.kick is None and any("compare with a reference" in note for note in card.notes)

"""Speed, counted work, memory and the card."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from secateur.errors import RequestError, RunError
from secateur.evaluation import (
    ResultCard,
    Spread,
    bytes_on_disk,
    memory,
    multiply_adds,
    parameters,
    render,
    speed,
    write_json,
)
from secateur.evaluation.card import Column, findings
from secateur.evaluation.measure import evaluate
from secateur.evaluation.memory import Memory
from test_evaluation import VOCABULARY, Fixed, ids, llama, words


class Clock:
    """A clock that stands still except for what the models take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def slow(model, clock, seconds):
    """Lets every token that `model` reads take so many seconds."""

    def wait(module, arguments, output):
        clock.now += seconds * arguments[0].shape[1]

    model.register_forward_hook(wait)
    return model


def test_turns_alternate_and_rates_and_gains_are_what_the_clock_says():
    clock = Clock()
    model, reference = slow(llama(), clock, 0.01), slow(llama(1), clock, 0.015)
    found = speed(model, reference, prefill=8, decode=4, pairs=3, clock=clock)
    assert found.order == ("reference", "model", "model", "reference", "reference", "model")
    for pace, tokens in ((found.prefill, 8), (found.decode, 4)):
        assert pace.tokens == tokens
        assert pace.model.median == pytest.approx(100) and pace.reference.median == pytest.approx(1 / 0.015)
        assert pace.gain.median == pytest.approx(0.5) and len(pace.gain.samples) == 3


def test_both_models_read_the_same_tokens_and_the_first_turn_is_not_counted():
    seen = {}
    models = {"model": Fixed([0.0] * 9), "reference": Fixed([0.0] * 9)}
    for model in models.values():
        model.embedding = torch.nn.Embedding(9, 1)
    found = speed(models["model"], models["reference"], prefill=6, pairs=2)
    seen = {name: model.read for name, model in models.items()}
    assert seen["model"] == seen["reference"] and len(seen["model"]) == 3
    assert found.decode is None, "a module without a cache cannot be timed decoding"


def test_speed_without_a_reference():
    found = speed(llama(), prefill=8, decode=2, pairs=2)
    assert found.order == ("model", "model") and found.prefill.gain is None and found.decode.reference is None


def test_speed_refuses_what_does_not_compare():
    with pytest.raises(RequestError, match="dtype is bfloat16"):
        speed(llama().bfloat16(), llama())
    with pytest.raises(RequestError, match="64 positions"):
        speed(llama(), prefill=60, decode=10)
    with pytest.raises(RequestError, match="at least 1 pair"):
        speed(llama(), pairs=0)
    assert speed(llama(), pairs=1, decode=4).prefill.tokens == 60, "the default makes room for what is decoded"


def test_spread_is_median_and_quartiles_in_the_order_measured():
    found = Spread.of([5, 1, 3, 2, 4])
    assert (found.median, found.lower, found.upper, found.samples) == (3, 2, 4, (5, 1, 3, 2, 4))
    assert Spread.of([7]).lower == 7


def test_multiply_adds_of_a_llama_by_hand():
    # q 16x16, k and v 8x16, o 16x16; gate, up, down 16x24; head 16x40
    linear = 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24) + 16 * VOCABULARY
    assert multiply_adds(llama(), 1) == linear + 2 * 2 * 16 * 1
    assert multiply_adds(llama(), 10) == 10 * linear + 2 * 2 * 16 * 55
    assert multiply_adds(llama(), 1, context=9) == linear + 2 * 2 * 16 * 10
    assert sum(multiply_adds(llama(), 1, context=c) for c in range(10)) == multiply_adds(llama(), 10)


def test_multiply_adds_agree_with_the_counter_of_torch():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids(12)[None])
    # torch counts two operations for a multiply-add, and the full square of attention where we count what is seen
    square = 2 * 2 * 16 * (12 * 12 - 12 * 13 // 2)
    assert counter.get_total_flops() == 2 * (multiply_adds(model, 12) + square)


def test_multiply_adds_count_the_experts_that_a_token_visits_and_sliding_windows():
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    assert multiply_adds(model, 1) == 4 * 16 * 16 + 2 * 3 * 16 * 24 + 16 * VOCABULARY + 2 * 16
    sliding = llama()
    sliding.config.layer_types, sliding.config.sliding_window = ["full_attention", "sliding_attention"], 3
    assert multiply_adds(llama(), 10) - multiply_adds(sliding, 10) == 2 * 16 * (55 - (1 + 2 + 8 * 3))


def test_tied_parameters_count_once():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    tied, linear = LlamaForCausalLM(config), 4 * 16 * 16 + 3 * 16 * 24
    assert parameters(tied) == linear + 16 * VOCABULARY + 3 * 16
    assert multiply_adds(tied, 1) == linear + 16 * VOCABULARY + 2 * 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=30_000,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="50MB")
    words(30_000).save_pretrained(folder)
    return folder


def test_memory_is_that_of_the_clean_process_and_disk_that_of_the_weights(saved):
    size = bytes_on_disk(saved)
    assert size == pytest.approx(4 * (30_000 * 512 + 4 * 512 * 512 + 3 * 512 * 64), rel=0.01)
    ballast = torch.ones(400_000_000)  # 1.6 GB here must not show up there
    found = memory(saved)
    assert found.baseline < found.peak < ballast.nbytes
    assert 0.8 * size < found.peak - found.baseline < 5 * size
    assert found.tokens == 64, "no more than the model's positions"
    assert found.decode is None and found.decoded == 0, "and none are left to write at"


def test_a_damaged_model_is_refused_before_a_clean_process_starts(saved, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved.iterdir():
        (broken / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    for measured in (memory, evaluate):
        with pytest.raises(RequestError, match="damaged or cut short"):
            measured(broken)


def test_weights_that_only_transformers_finds_wrong(saved, tmp_path):
    """The files are whole and the configuration is one; that they do not fit each other is found by loading."""
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(RunError, match="does not load with plain transformers"):
        memory(other)


@pytest.fixture(scope="module")
def card(saved, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "sample.txt"
    text.write_text(" ".join(f"w{index % 97 + 1}" for index in range(150)))
    return evaluate(saved, saved, text=text, pairs=1, prefill=8, decode=2)


def test_evaluate_fills_the_card(card, saved):
    assert card.model.bytes_on_disk == bytes_on_disk(saved) and card.model.memory.peak > 0
    assert card.model.disk_format == "safetensors"
    assert card.model.perplexity == card.reference.perplexity
    protocol = card.model.perplexity.protocol
    assert (protocol.window, protocol.windows, protocol.unused) == (64, 2, 22), "the positions bound the default window"
    assert protocol.text.endswith("/sample.txt") and protocol.vocabulary == 30_000
    assert (card.divergence.kl, card.divergence.agreement, card.expected_gain) == (0, 1, 0)
    assert "no fewer parameters" in card.notes[0]


def test_the_card_survives_json(card, tmp_path, capsys):
    write_json(card, tmp_path / "card.json")
    write_json(card, "-")
    written = (tmp_path / "card.json").read_text()
    assert capsys.readouterr().out == written
    assert ResultCard.from_dict(json.loads(written)) == card == ResultCard.from_dict(card.to_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]
    with pytest.raises(RequestError, match="no directory"):
        write_json(card, tmp_path / "missing" / "card.json")


def shown(card):
    console = Console(file=io.StringIO(), width=160)
    console.print(render(card))
    return console.file.getvalue()


def test_the_table_shows_figures_and_their_protocol(card):
    text = shown(card)
    assert f"{card.model.perplexity.perplexity:,.3f}" in text
    assert "expected from multiply-adds" in text and "+0.0 %" in text
    assert card.model.perplexity.protocol.sha256[:12] in text and "no BOS" in text


def test_live_modules_are_compared_on_text_the_reference_writes():
    model, reference = llama(0), llama(1)
    card = evaluate((model, words()), (reference, words()), speed=False, seed=3)
    assert card.model.perplexity is None and card.model.memory is None and card.model.bytes_on_disk is None
    assert "written by the reference itself (4 x 64 tokens, seed 3)" in card.divergence.protocol.text
    assert card.divergence.kl > 0 and card == evaluate((model, words()), (reference, words()), speed=False, seed=3)
    text = shown(card)
    assert "written by the reference itself" in text and "not measured" in text


def test_a_model_alone_has_no_comparison():
    card = evaluate((llama(), words()), speed=False)
    assert card.reference is None and card.divergence is None and card.expected_gain is None
    assert "change" not in shown(card)


def test_evaluate_refuses_before_it_measures(tmp_path):
    with pytest.raises(RequestError, match="found nothing"):
        evaluate((llama(), words()), text=tmp_path / "missing")
    with pytest.raises(RequestError, match="different vocabularies"):
        evaluate((llama(), words()), (llama(), words(prefix="v")))
    (tmp_path / "text").write_text("w1 w2")
    with pytest.raises(RequestError, match="too short"):
        evaluate((llama(), words()), text=tmp_path / "text")
    with pytest.raises(RequestError, match="Did you mean 'bfloat16'"):
        evaluate((llama(), words()), dtype="bflot16")
    for device in ("cudda", "cuda:99", "meta"):
        with pytest.raises(RequestError, match=f"device '{device}'"):
            evaluate((llama(), words()), device=device)
    with pytest.raises(RequestError, match="no tokenizer"):
        evaluate((llama(), None), text=tmp_path / "text")


def test_a_slower_model_is_called_slower():
    clock = Clock()
    model, reference = slow(llama(), clock, 0.02), slow(llama(1), clock, 0.01)
    timed = speed(model, reference, prefill=8, decode=2, pairs=2, clock=clock)
    column = Column(name="x", parameters=1, multiply_adds=1, multiply_adds_tokens=8)
    card = ResultCard(model=column, reference=column.model_copy(update={"parameters": 2}), speed=timed)
    assert findings(card) == ("Prefill is slower than the reference's.", "Decoding is slower than the reference's.")
    even = speed(model, model, prefill=8, decode=2, pairs=2, clock=clock)
    assert "not measurably faster" in findings(card.model_copy(update={"speed": even}))[0]


def test_the_memory_of_a_gguf_reference_is_explained():
    used = Memory(peak=2, baseline=1, tokens=8, dtype="float32")
    model = Column(name="x", parameters=1, multiply_adds=1, multiply_adds_tokens=8, memory=used)
    reference = model.model_copy(update={"parameters": 2, "disk_format": "gguf"})
    [said] = findings(ResultCard(model=model, reference=reference))
    assert "de-quantising" in said
    assert not findings(ResultCard(model=model, reference=reference.model_copy(update={"memory": None})))

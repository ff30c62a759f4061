"""Perplexity, divergence and the text they are measured on, against plain formulas."""

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.errors import RequestError, RunError
from secateur.evaluation import (
    Tokens,
    check_same_tokenizer,
    compare,
    divergence,
    perplexity,
    read_text,
    self_written,
    tokenize,
)

VOCABULARY = 40


def llama(seed=0, positions=64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def words(count=VOCABULARY, prefix="w"):
    vocabulary = {"<unk>": 0} | {f"{prefix}{index}": index for index in range(1, count)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def ids(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Says the same logits for every token, and remembers what it was asked to read."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.read = []

    def forward(self, ids):
        self.read.append(ids.flatten().tolist())
        return self.logits.expand(*ids.shape, -1)


def test_perplexity_equals_cross_entropy_by_hand():
    model, text = llama(), ids(35)
    losses = []
    with torch.no_grad():
        for start in (0, 10, 20):
            logits = model(text[None, start : start + 10]).logits[0].double()
            for position in range(9):
                row = logits[position]
                losses.append(float(row.exp().sum().log() - row[text[start + position + 1]]))
    found = perplexity(model, text, window=10)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 27), rel=1e-9)
    assert (found.protocol.windows, found.protocol.tokens, found.protocol.unused) == (3, 27, 5)
    assert found.protocol.stride == found.protocol.window == 10


def test_perplexity_of_indifference_is_the_size_of_the_vocabulary():
    assert perplexity(Fixed([0.7] * 123), ids(64), window=16).perplexity == pytest.approx(123, rel=1e-12)


def test_windows_follow_each_other_and_never_overlap():
    model, text = Fixed([0.0] * VOCABULARY), torch.arange(VOCABULARY)
    perplexity(model, text, window=7, windows=4)
    assert sum(model.read, []) == list(range(28))
    assert [len(window) for window in model.read] == [7] * 4


def test_dropout_is_off_inside_and_back_on_after():
    model = llama()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    quiet = perplexity(model, ids(32), window=16).nll
    model.train()
    model.lm_head.eval()
    assert perplexity(model, ids(32), window=16).nll == quiet
    assert model.training and model.model.layers[0].training and not model.lm_head.training


@pytest.mark.parametrize(
    ("length", "window", "windows", "sentence"),
    [
        (15, 16, None, "too short: it has 15 tokens"),
        (40, 16, 3, "2 full windows of 16, and 3 are needed"),
        (200, 65, None, "the model's 64 positions"),
        (40, 1, None, "predicts nothing"),
        (40, 16, 0, "at least 1"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(length, window, windows, sentence):
    with pytest.raises(RequestError, match=sentence):
        perplexity(llama(), ids(length), window=window, windows=windows)
    with pytest.raises(RequestError, match=sentence):
        divergence(llama(), llama(), ids(length), window=window, windows=windows)


def test_a_logit_that_is_not_finite_stops_the_run():
    with pytest.raises(RunError, match="window 0"):
        perplexity(Fixed([0.0, float("nan")]), torch.zeros(8, dtype=torch.int64), window=4)
    with pytest.raises(RunError, match="window 0 of the reference"):
        divergence(Fixed([0.0, 1.0]), Fixed([0.0, float("inf")]), torch.zeros(8, dtype=torch.int64), window=4)


def test_a_perplexity_beyond_floating_point_is_infinite_and_keeps_its_mean():
    found = perplexity(Fixed([0.0, 2000.0]), torch.zeros(8, dtype=torch.int64), window=4)
    assert found.perplexity == math.inf and found.nll == pytest.approx(2000)
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_a_model_does_not_diverge_from_itself():
    found = divergence(llama(), llama(), ids(32), window=16)
    assert (found.kl, found.agreement) == (0, 1)


def test_divergence_has_its_closed_form_and_its_direction():
    model, reference = Fixed([0.0, 0.0]), Fixed([math.log(3.0), 0.0])  # (1/2, 1/2) and (3/4, 1/4)
    text = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1])
    forward = divergence(model, reference, text, window=4)
    assert forward.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert forward.agreement == 1
    backward = divergence(reference, model, text, window=4)
    assert backward.kl == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    assert divergence(Fixed([0.0, 1.0]), reference, text, window=4).agreement == 0


def test_one_pass_gives_the_same_perplexities_as_two():
    model, reference, text = llama(0), llama(1), ids(48)
    found = compare(model, reference, text, window=16)
    assert found.model == perplexity(model, text, window=16)
    assert found.reference == perplexity(reference, text, window=16)
    assert found.divergence.kl > 0 and 0 <= found.divergence.agreement < 1


def test_different_vocabularies_are_refused():
    with pytest.raises(RequestError, match="over 2 tokens and its reference over 3"):
        divergence(Fixed([0.0, 1.0]), Fixed([0.0, 1.0, 2.0]), torch.zeros(8, dtype=torch.int64), window=4)
    check_same_tokenizer(words(), words())
    with pytest.raises(RequestError, match="41 tokens against the reference's 40"):
        check_same_tokenizer(words(41), words())
    with pytest.raises(RequestError, match="token 'w1' has id None"):
        check_same_tokenizer(words(prefix="v"), words())


def test_tokens_remember_their_text():
    tokens = tokenize("w3 w1 w4", words(), "pi")
    assert tokens.ids.tolist() == [3, 1, 4]
    assert (tokens.name, tokens.vocabulary, tokens.bos) == ("pi", VOCABULARY, False)
    protocol = perplexity(llama(), tokens, window=3).protocol
    assert protocol.sha256 == tokens.sha256 and protocol.sha256.startswith(protocol.sentence().split("sha256 ")[1][:12])
    assert perplexity(llama(), Tokens(tokens.ids), window=3).protocol.sha256 is None


def test_no_special_token_is_added_and_one_that_is_there_is_told():
    tokenizer = words()
    tokenizer.bos_token = "w1"
    assert tokenize("w3 w1", tokenizer).ids.tolist() == [3, 1]
    assert tokenize("w1 w3", tokenizer).bos is True


def test_text_files_are_read_or_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"one\r\ntwo\n")
    assert read_text(tmp_path / "text") == "one\ntwo\n"
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(RequestError, match="not UTF-8"):
        read_text(tmp_path / "bytes")
    with pytest.raises(RequestError, match="found nothing"):
        read_text(tmp_path / "missing")
    with pytest.raises(RequestError, match="found a directory"):
        read_text(tmp_path)


def test_the_reference_writes_the_same_text_for_the_same_seed():
    first = self_written(llama(), words(), sequences=3, length=20, seed=5)
    again = self_written(llama(), words(), sequences=3, length=20, seed=5)
    other = self_written(llama(), words(), sequences=3, length=20, seed=6)
    assert first.ids.equal(again.ids) and first.sha256 == again.sha256
    assert not first.ids.equal(other.ids)
    assert first.ids.shape == (60,) and "written by the reference itself" in first.name
    assert len(self_written(llama(positions=32), words(), sequences=1).ids) == 32


def test_a_sequence_does_not_depend_on_how_many_are_written():
    one = self_written(llama(), words(), sequences=1, length=20)
    three = self_written(llama(), words(), sequences=3, length=20)
    assert three.ids[:20].equal(one.ids)


@pytest.mark.parametrize(
    ("said", "generation", "starts"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6}, {}, {5}),
        ({"bos_token_id": 5}, {"bos_token_id": 7}, {7}),
        ({"bos_token_id": None, "eos_token_id": [6, 9]}, {}, {6}),
        ({"bos_token_id": VOCABULARY, "eos_token_id": 6}, {}, {6}),
        ({"bos_token_id": None, "eos_token_id": None}, {}, None),
    ],
)
def test_without_a_tokenizer_text_begins_where_the_configuration_says(said, generation, starts):
    model = llama()
    model.config.update(said)
    model.generation_config = GenerationConfig(**{**said, **generation})
    written = self_written(model, None, sequences=6, length=5, seed=3)
    first = written.ids[::5].tolist()
    assert set(first) == starts if starts else len(set(first)) > 2
    assert written.ids.equal(self_written(model, None, sequences=6, length=5, seed=3).ids)
    assert written.tokenizer is None and written.vocabulary is None


def test_written_text_follows_the_reference_with_and_without_a_cache():
    # A module without a cache reads the whole text again for each token; the text must come out the same.
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, ids):
            return self.inner(ids).logits

    cached = self_written(llama(), words(), sequences=2, length=24)
    assert self_written(Plain(), words(), sequences=2, length=24).ids.equal(cached.ids)
    certain = Fixed([0.0] * 7 + [100.0] + [0.0] * (VOCABULARY - 8))
    assert self_written(certain, words(), sequences=1, length=9).ids[1:].tolist() == [7] * 8

"""Fewer tokens: what stays of a tokenizer, what a cut model computes, what files and cards say of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import command
import outcomes
import secateur
import tiny
from secateur import forecast
from secateur.calibration import token_counts
from secateur.calibration.samples import Samples
from secateur.context import Context
from secateur.evaluation import evaluate, render, tokenize
from secateur.generation import _Rules, readable
from secateur.methods.structure.charpoet import charpoet
from secateur.network.segmentation import check_segmentation
from secateur.network.source import open_model
from secateur.network.token_file import TokenFile
from secateur.network.verify import CleanProcess
from secateur.network.vocabulary import KeptTokens, Vocabulary, cut_config, renumbered, token_rows

Make = Callable[..., Path]
TEXT = "the heron and the other hen are near the tree, there is one stone\n" * 4 + "¿dónde está? 東京 – naïve\n" * 3
# not used in TEXT more than once
RARE = "cabbage becomes leather\n"
OTHER = "and then the otters are near the stone"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT + RARE)
    return path


@pytest.fixture
def run(text: Path, clean: CleanProcess) -> Callable[..., secateur.Result]:
    """Compresses by one method, with `TEXT` for what it counts."""

    def compress(
        source: Path, output: Path, parameters: dict | None = None, method: str = "vocabulary", **options: Any
    ) -> Any:
        recipe: dict[str, Any] = {"steps": [{method: parameters or {}}]}
        if secateur.Recipe.parse(recipe).calibrated:
            recipe["calibration"] = {"data": str(text)}
        given = {"evaluate": False, "clean": clean, **options}
        return secateur.compress(source, recipe=secateur.Recipe.parse(recipe), output=output, **given)

    return compress


def old_ids(output: Path) -> torch.Tensor:
    return load_file(output / "secateur" / "vocabulary.safetensors")["old_ids"]


def hidden(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


def trained(kind: str, size: int = 260, byte_fallback: bool = False) -> Tokenizer:
    """A tokenizer of some kind, learned from `TEXT` and a little more, with an added word."""
    texts = (TEXT + RARE * 3 + "\n".join([OTHER] * 3 + ["leather stones becoming nearer, cabbages"])).splitlines()
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    if kind == "BPE":
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer: Any = BpeTrainer(
            vocab_size=size, special_tokens=special + fallback, initial_alphabet=["\n"], show_progress=False
        )
    elif kind == "Unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    if kind == "BPE":
        raw = json.loads(core.to_str())
        # bytes are plain tokens in real vocabularies, and nothing is split before merges
        raw["added_tokens"] = [entry for entry in raw["added_tokens"] if not entry["content"].startswith("<0x")]
        core = Tokenizer.from_str(json.dumps({**raw, "pre_tokenizer": None}))
    core.add_tokens([AddedToken("HERON", normalized=False)])
    return core


def save_with(tokenizer: Tokenizer, directory: Path, name: str = "llama", extra_rows: int = 0) -> Path:
    """A tiny model for that tokenizer, with rows that no token has."""
    config = tiny.ARCHITECTURES[name]()
    config.vocab_size = tokenizer.get_vocab_size() + extra_rows
    config.pad_token_id, config.bos_token_id, config.eos_token_id = (
        0,
        tokenizer.token_to_id("<s>"),
        [tokenizer.token_to_id("</s>")],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


# a tokenizer class of transformers adds a token to that of qwen2 for which there is no row
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gptj", "opt", "qwen2"])
def test_kept_tokens_compute_the_same(name: str, model: Make, run: Callable, tmp_path: Path) -> None:
    run(model(name), tmp_path / "out")
    dense, cut = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model(name), tmp_path / "out"))
    old = old_ids(tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model(name), tmp_path / "out"))
    ids = torch.tensor([after(TEXT[:150])["input_ids"]])
    assert old[ids].tolist() == [before(TEXT[:150])["input_ids"]], "covered text is split as before"
    assert after.decode(ids[0]) == TEXT[:150]
    for ours, theirs in zip(hidden(cut, ids), hidden(dense, old[ids]), strict=True):
        assert torch.equal(ours, theirs), "to the last bit"
    with torch.no_grad():
        torch.testing.assert_close(cut(ids).logits, dense(old[ids]).logits[..., old], atol=1e-6, rtol=1e-6)
    tied = name in ("llama_tied", "opt")
    row = tiny.HIDDEN * (1 if tied else 2) + (name == "gptj")  # its head has a bias
    assert outcomes.parameters(dense) - outcomes.parameters(cut) == (tiny.VOCABULARY - len(old)) * row
    assert not torch.equal(old, torch.arange(len(old))), "and ids did change"


def test_rare_tokens_go_and_are_spelled_by_others(model: Make, run: Callable, tmp_path: Path) -> None:
    run(model("llama"), tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model("llama"), tmp_path / "out"))
    assert "ca" in before.get_vocab() and "ca" not in after.get_vocab(), "it was seen once"
    assert "th" in after.get_vocab() and "ho" not in after.get_vocab()
    for each in (RARE, "ho ho 🦆"):
        assert after.decode(after(each)["input_ids"]) == each
    for special in ("pad_token", "bos_token", "eos_token"):
        assert getattr(after, special) == getattr(before, special)
        assert old_ids(tmp_path / "out")[getattr(after, special + "_id")] == getattr(before, special + "_id")


@pytest.mark.parametrize(
    ("kind", "fallback"), [("BPE", False), ("BPE", True), ("Unigram", False), ("WordPiece", False)]
)
def test_every_kind_of_tokenizer(kind: str, fallback: bool, run: Callable, tmp_path: Path) -> None:
    whole = trained(kind, 420 if fallback else 260, fallback)
    source = save_with(whole, tmp_path / "source", extra_rows=5)
    result = run(source, tmp_path / "out", {"minimum": 3, "characters": True})
    old = old_ids(tmp_path / "out").tolist()
    assert result.receipt["decisions"][0]["vocabulary"] == {"kept": len(old), "of": whole.get_vocab_size() + 5}
    assert len(old) < whole.get_vocab_size(), "tokens are gone"
    cut = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    coverage = check_segmentation(whole, cut, old, TEXT.splitlines(keepends=True))
    assert coverage.covered == coverage.words > 0 and coverage.before == coverage.after
    for text in ("HERON and the hen", OTHER, "zebra 🦆"):
        ids = cut.encode(text, add_special_tokens=False).ids
        assert all(number < len(old) for number in ids)
        if "🦆" not in text or fallback:
            assert cut.decode(ids) == whole.decode(whole.encode(text, add_special_tokens=False).ids)
    for token in ("<unk>", "<s>", "</s>", "HERON"):
        assert old[cut.token_to_id(token)] == whole.token_to_id(token)
    assert cut.encode("the").ids[0] == cut.token_to_id("<s>"), "the template names it by its new id"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [cut.token_to_id("</s>")] and config["bos_token_id"] == cut.token_to_id("<s>")
    if kind == "Unigram":
        scores = dict(map(tuple, json.loads(whole.to_str())["model"]["vocab"]))
        kept = json.loads(cut.to_str())["model"]["vocab"]
        assert dict(map(tuple, kept)) == pytest.approx({token: scores[token] for token, _ in kept}, rel=1e-9)
        assert min(scores.values()) == pytest.approx(min(s for _, s in kept))
    if fallback:
        assert all(cut.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        assert cut.encode("🦆", add_special_tokens=False).tokens == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x86>"]


def bpe(*merges: str, **more: Any) -> TokenFile:
    """A BPE tokenizer of letters and these merges, each written with a space."""
    letters = sorted(set("".join(merges)) - {" "})
    vocab = {token: i for i, token in enumerate([*letters, *dict.fromkeys(m.replace(" ", "") for m in merges)])}
    return TokenFile({"model": {"type": "BPE", "vocab": vocab, "merges": [m.split(" ") for m in merges], **more}})


def test_what_bpe_needs_on_the_way() -> None:
    """Two ways lead to abcd; the one that is taken goes through ab and abc."""
    tokens = bpe("a b", "c d", "ab c", "b c", "a bc", "abc d", "ab cd", "c e")

    def names(ids: Any) -> set[str]:
        return {tokens.strings[number] for number in ids}

    assert names(tokens.on_the_way(tokens.ids["abcd"])) == {"a", "b", "c", "d", "ab", "cd"}
    assert names(tokens.closed([tokens.ids["abc"]])) == {"a", "b", "c", "ab", "abc"}
    assert tokens.on_the_way(tokens.ids["a"]) == set()
    rebuilt = tokens.rebuilt(tokens.closed([tokens.ids["abc"]]))["model"]
    assert rebuilt["merges"] == [["a", "b"], ["ab", "c"]]
    assert list(rebuilt["vocab"].values()) == list(range(5))
    older = TokenFile({"model": {**tokens.model, "merges": [" ".join(m) for m in tokens.model["merges"]]}})
    assert older.rebuilt(older.closed([older.ids["abc"]]))["model"]["merges"] == ["a b", "ab c"]
    dead = bpe("a b", "b c", "a bc")
    assert dead.on_the_way(dead.ids["abc"]) == set(), "ab is merged first, so nothing ever leads to abc"


def test_a_file_names_tokens_by_their_new_ids() -> None:
    """By hand: one piece goes, the unknown token and those that are put around a text move down."""
    pieces = [["a", -1.0], ["b", -9.0], ["ab", -3.0], ["<unk>", 0.0], ["<s>", 0.0], ["c", -2.0]]
    added = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = TokenFile(
        {
            "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces},
            "added_tokens": [{"id": 4, "content": "<s>", **added}],
            "post_processor": {
                "type": "Sequence",
                "processors": [
                    {
                        "type": "TemplateProcessing",
                        "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
                    },
                    {"type": "BertProcessing", "sep": ["<s>", 4], "cls": ["<unk>", 3]},
                ],
            },
            "padding": {"pad_id": 4},
        }
    )
    assert tokens.needed == {1, 3, 4}, "b is the least likely: what is unknown is scored by it"
    assert tokens.unknown == 3 and tokens.special == {4}
    rebuilt = tokens.rebuilt(tokens.closed([5]))
    assert rebuilt["model"] == {"type": "Unigram", "unk_id": 1, "vocab": [pieces[i] for i in (1, 3, 4, 5)]}
    template, pair = rebuilt["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [2] and (pair["sep"], pair["cls"]) == (["<s>", 2], ["<unk>", 1])
    assert rebuilt["added_tokens"][0]["id"] == rebuilt["padding"]["pad_id"] == 2
    assert tokens.raw["model"]["unk_id"] == 3, "the source's file is as it was"


def test_bpe_keeps_its_segmentation_for_any_choice(tmp_path: Path) -> None:
    """Words whose tokens all stay are split as before whatever else goes."""
    whole = trained("BPE", 300)
    tokens = TokenFile(json.loads(whole.to_str()))
    lines = (TEXT + RARE + OTHER).splitlines() + (TEXT + RARE + OTHER).split()
    checked = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        kept = tokens.closed(torch.randperm(len(tokens.strings), generator=generator)[:150].tolist())
        cut = Tokenizer.from_str(json.dumps(tokens.rebuilt(kept)))
        checked += check_segmentation(whole, cut, kept, lines).covered
    assert checked > 100
    open_ = sorted(tokens.needed | {tokens.ids["▁the"]} | {tokens.ids[c] for c in "▁the"})
    cut = Tokenizer.from_str(json.dumps(tokens.rebuilt(open_)))
    with pytest.raises(secateur.RunError, match="' the' is split otherwise than before"):
        check_segmentation(whole, cut, open_, [" the"])


def test_what_single_tokens_write() -> None:
    tokens = TokenFile(json.loads(tiny.tokenizer().backend_tokenizer.to_str()))
    assert tokens.byte_level and len(tokens.single_bytes) == 256
    assert tokens.text_of(tokens.ids["th"]) == "th" and tokens.text_of(tokens.ids["Ġ"]) == " "
    part = tokens.ids["ä"]  # the letter of byte 0xE4
    assert tokens.bytes_of(part) == b"\xe4" and tokens.text_of(part) is None
    assert tokens.bytes_of(tokens.ids["<s>"]) is None
    pieces = TokenFile(json.loads(trained("BPE", 420, True).to_str()))
    assert pieces.bytes_of(pieces.ids["▁the"]) == b" the" and pieces.bytes_of(pieces.ids["<0xE4>"]) == b"\xe4"
    assert pieces.bytes_of(pieces.ids["<unk>"]) is None
    words = TokenFile(json.loads(trained("WordPiece").to_str()))
    assert words.text_of(next(i for t, i in words.ids.items() if t == "##e")) == "e"


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ({"keep": 5}, lambda kept, words: 259 < len(kept) <= 259 + 5),
        (
            {"minimum": 1000},
            lambda kept, words: kept == set(tiny.SPECIAL.values()) | set(pre_tokenizers.ByteLevel.alphabet()),
        ),
        ({"by": "script", "scripts": ["greek"]}, lambda kept, words: "th" not in kept and "Ġ" in kept),
        ({"by": "script"}, lambda kept, words: kept == words),
        ({"minimum": 1000, "multiple_of": 32}, lambda kept, words: len(kept) == 288 and "th" in kept),
        ({"minimum": 1, "multiple_of": 1000}, lambda kept, words: kept == words),
    ],
)
def test_what_is_kept(given: dict, check: Callable, model: Make, run: Callable, tmp_path: Path) -> None:
    result = run(model("llama"), tmp_path / "out", given)
    kept = set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab())
    assert check(kept, set(tiny.tokenizer().get_vocab()))
    warned = result.receipt["decisions"][0]["warnings"]
    assert bool(warned) == (given.get("multiple_of") == 1000)


def test_single_characters_can_all_stay(run: Callable, tmp_path: Path) -> None:
    whole = trained("BPE", 300)
    source = save_with(whole, tmp_path / "source")
    for characters in (False, True):
        result = run(source, tmp_path / str(characters), {"minimum": 50, "characters": characters})
        warned = result.receipt["decisions"][0]["warnings"]
        assert [("become unknown tokens" in each) for each in warned] == [True] * (not characters)
        cut = Tokenizer.from_file(str(tmp_path / str(characters) / "tokenizer.json"))
        assert (cut.token_to_id("東") is not None) == characters


def test_rows_that_no_token_has_fill_up_last(run: Callable, tmp_path: Path) -> None:
    source = save_with(trained("BPE", 260), tmp_path / "source", extra_rows=5)
    rows = open_model(source).anatomy.vocabulary
    run(source, tmp_path / "out", {"minimum": 1, "multiple_of": rows - 1})
    assert len(old_ids(tmp_path / "out")) == rows - 1


def test_files_name_tokens_by_their_new_ids(model: Make, run: Callable, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("llama"), source)
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    ids = words.get_vocab()
    assert ids["<end>"] == tiny.VOCABULARY
    module = AutoModelForCausalLM.from_pretrained(source)
    module.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False)
    module.config.eos_token_id = [2, ids["<end>"], ids["pr"]]
    module.save_pretrained(source)
    words.save_pretrained(source)
    generation = {
        "eos_token_id": ids["<end>"], "suppress_tokens": [ids["ca"], ids["th"]], "bad_words_ids": [[ids["ca"]], [ids["th"]]],
        "forced_decoder_ids": [[1, ids["th"]], [2, ids["ca"]]], "sequence_bias": [[[ids["th"], ids["ca"]], 1.0]],
        "max_length": 300,
    }  # fmt: skip
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "vocab.json").write_text(json.dumps(ids))
    (source / "merges.txt").write_text("t h")
    run(source, tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert "pr" in out and "ca" not in out, "what the configuration names stays"
    config, said = (json.loads((tmp_path / "out" / n).read_text()) for n in ("config.json", "generation_config.json"))
    assert config["eos_token_id"] == [out["</s>"], out["<end>"], out["pr"]] and out["<end>"] == len(out) - 1
    assert said == {
        "eos_token_id": out["<end>"], "suppress_tokens": [out["th"]], "bad_words_ids": [[out["th"]]],
        "forced_decoder_ids": [[1, out["th"]]], "sequence_bias": [], "max_length": 300,
    }  # fmt: skip
    assert not (tmp_path / "out" / "vocab.json").exists() and not (tmp_path / "out" / "merges.txt").exists()


def test_ids_left_to_their_default_are_renumbered(model: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("llama"), source)
    said = json.loads((source / "config.json").read_text())
    assert (said.pop("bos_token_id"), said.pop("eos_token_id")) == (1, 2), "what a llama has that says nothing"
    (source / "config.json").write_text(json.dumps(said))
    opened = open_model(source)
    cut = cut_config(opened, token_rows(opened), [1, 2, 7, 300])
    assert (cut["bos_token_id"], cut["eos_token_id"], cut["pad_token_id"], cut["vocab_size"]) == (0, 1, None, 4)
    changed = renumbered(
        {"a_token_id": 2, "b_token_id": 9, "c": 2, "d_token_id": None, "e": {"f_token_ids": [1, 2]}}, {2: 1}, 5
    )
    assert changed == {"a_token_id": 1, "b_token_id": 9, "c": 2, "d_token_id": None, "e": {"f_token_ids": [1]}}


def test_positions_that_are_as_many_as_tokens_stay(tmp_path: Path, clean: CleanProcess) -> None:
    config = tiny.ARCHITECTURES["gpt2"]()
    config.n_positions = tiny.VOCABULARY
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    rows = token_rows(open_model(tmp_path / "source"))
    assert rows.entries == (("vocab_size",),) and set(rows.dims) == {"transformer.wte.weight"}
    secateur.compress(tmp_path / "source", "charpoet", output=tmp_path / "out", evaluate=False, clean=clean)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cut.transformer.wpe.num_embeddings == tiny.VOCABULARY > cut.transformer.wte.num_embeddings


def test_what_is_written_is_compared_with_the_uncut_network(
    model: Make, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur import vocabulary_stage

    def shifted(self: Any, piece: Any, name: str, journal: Any) -> Any:
        kept, self.kept = self.kept, (*self.kept[1:], self.kept[0])
        try:
            return right(self, piece, name, journal)
        finally:
            self.kept = kept

    right = vocabulary_stage.VocabularyStage._write
    monkeypatch.setattr(vocabulary_stage.VocabularyStage, "_write", shifted)
    with pytest.raises(secateur.RunError, match="logits differ from those of the run"):
        run(model("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"minimum": 0}, "greater than or equal to 1"),
        ({"multiple_of": 0}, "greater than or equal to 1"),
        ({"by": "language"}, "by='language' was refused"),
        ({"by": "script", "scripts": ["LATN"]}, "no letter's Unicode name begins with LATN. Did you mean 'LATIN'"),
        ({"by": "script", "scripts": ["LATIN", "KLINGON"]}, "no letter's Unicode name begins with KLINGON"),
        ({"by": "script", "scripts": []}, "scripts"),
    ],
)
def test_wrong_parameters(given: dict, what: str, model: Make, run: Callable, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        run(model("llama"), tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_cut_is_refused(model: Make, run: Callable, tmp_path: Path, text: Path) -> None:
    with pytest.raises(secateur.RequestError, match="counts the tokens of a text; name one with --calibration"):
        secateur.compress(model("llama"), "vocabulary", output=tmp_path / "out")
    with pytest.raises(secateur.RequestError, match="is a live module, which brings no tokenizer"):
        secateur.compress(tiny.make("llama"), "charpoet")
    bare = tmp_path / "bare"
    tiny.make("llama").save_pretrained(bare)
    with pytest.raises(secateur.RequestError, match="the tokenizer of .* could not be read"):
        run(bare, tmp_path / "out", method="charpoet")
    small = save_with(trained("BPE", 260), tmp_path / "small", extra_rows=-1)
    with pytest.raises(secateur.RequestError, match="gives 'HERON' the id .*, but the embedding has only"):
        run(small, tmp_path / "out", method="charpoet")
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([[1, 2, 3]]))
    steps = [{"charpoet": {}}, {"wanda": {}}]
    with pytest.raises(
        secateur.RequestError, match="holds token ids, which mean other tokens behind charpoet, where wanda"
    ):
        recipe = secateur.Recipe.parse({"steps": steps, "calibration": {"data": str(ids)}})
        secateur.compress(model("llama"), recipe=recipe, output=tmp_path / "out")
    text.write_text("")
    with pytest.raises(secateur.RequestError, match="holds no tokens to count"):
        run(model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "what"), [((5, 3), "not sorted ids"), ((0, 999), "not sorted ids"), ((3, 4), "others need")]
)
def test_what_a_method_may_not_keep(
    ids: tuple, what: str, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vocabulary, "keep", lambda *_, **__: KeptTokens(ids))
    with pytest.raises(secateur.RunError, match=what):
        secateur.compress(model("llama"), "charpoet", output=tmp_path / "out", evaluate=False)


def test_a_tokenizer_that_would_split_otherwise_is_refused(
    model: Make, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the closure is for: without it the result is not written."""
    monkeypatch.setattr(TokenFile, "on_the_way", lambda *_: set())
    source = save_with(trained("BPE", 300), tmp_path / "source")
    with pytest.raises(secateur.RunError, match="split otherwise than before, though its tokens are all kept"):
        run(source, tmp_path / "out", {"keep": 12})
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.every
def test_a_kill_at_each_rename(model: Make, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(model("llama"), tmp_path / "undisturbed", shard_bytes=1)
    for number in range(100):
        output = tmp_path / str(number)
        with monkeypatch.context() as patch:
            outcomes.kill_at_rename(patch, number)
            try:
                run(model("llama"), output, shard_bytes=1)
                break
            except outcomes.Killed:
                pass
        receipt = run(model("llama"), output, shard_bytes=1).receipt
        assert outcomes.promised(output) == outcomes.promised(tmp_path / "undisturbed"), f"rename {number}"
        assert receipt["decisions"] == undisturbed.receipt["decisions"]
    assert 10 < number < 99


def test_steps_before_and_after(model: Make, text: Path, tmp_path: Path, clean: CleanProcess) -> None:
    """What follows reads text with the vocabulary that is left."""
    steps = [{"vocabulary": {}}, {"wanda_units": {"ratio": 0.2}}, {"layer_drop": {}}]
    calibration = {"data": str(text), "samples": 4, "length": 16, "held_out": 0, "order": "first"}
    recipe = secateur.Recipe.parse({"steps": steps, "calibration": calibration})
    said = forecast.dry_run(model("llama"), recipe=recipe, output=tmp_path / "out")
    result = secateur.compress(model("llama"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean)
    cut, words = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert cut.config.vocab_size == len(words) == said["vocabulary"]["kept"]
    assert len(cut.model.layers) == 2 and cut.model.layers[0].mlp.up_proj.out_features == 128
    assert said["parameters_after"] == outcomes.parameters(cut)
    assert not (tmp_path / "out" / "secateur" / "vocabulary.safetensors").exists()
    assert (tmp_path / "out" / "secateur" / "step-0" / "vocabulary.safetensors").exists()
    # the windows that were drawn are those of the new ids
    windows = torch.tensor(words(text.read_text(), add_special_tokens=False)["input_ids"]).split(16)[:4]
    digest = Samples(list(windows), [], "").sha256
    assert result.receipt["decisions"][1]["notes"]["calibration"]["sha256"] == digest


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_forecast_counts_what_goes(name: str, model: Make, tmp_path: Path) -> None:
    recipe = secateur.Recipe.parse({"steps": ["charpoet"]})
    said = forecast.dry_run(model(name), recipe=recipe, output=tmp_path / "out")
    tied = name == "llama_tied"
    assert said["vocabulary"] == {"kept": 259, "of": 320}
    fewer = 61 * 64 * (1 if tied else 2)
    assert said["parameters"] - said["parameters_after"] == fewer
    told = command.compress(model(name), tmp_path / "out", "--dry-run", method="charpoet")
    assert told.code == 0 and "would keep: 259 of 320 tokens" in told.out


def test_what_a_person_reads(model: Make, text: Path, tmp_path: Path) -> None:
    told = command.compress(model("llama"), tmp_path / "out", "--calibration", text, method="vocabulary")
    assert told.code == 0
    for said in (told.out, (tmp_path / "out" / "README.md").read_text()):
        assert f"vocabulary: {len(old_ids(tmp_path / 'out'))} of 320 tokens kept" in said
    assert "% of its tokens are kept; it takes" in told.out
    cards = secateur.list_methods()
    assert (
        cards["vocabulary"].scope == "vocabulary" and "calibration text (by=text)" in cards["vocabulary"].card()["data"]
    )
    assert cards["charpoet"].card()["data"] == "none: weights only"


def test_bits_per_byte_across_vocabularies(model: Make, run: Callable, text: Path, tmp_path: Path) -> None:
    run(model("llama"), tmp_path / "out", method="charpoet")
    both = [
        (AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
        for path in (tmp_path / "out", model("llama"))
    ]
    card = evaluate(*both, text=text, window=32, speed=False)
    assert card.divergence is None and "cannot be compared" in card.notes[0] and "bits per byte can" in card.notes[0]
    content = text.read_text()
    for (module, words), column in zip(both, (card.model, card.reference), strict=True):
        tokens = tokenize(content, words)
        nats, read = 0.0, 0
        for start in range(0, len(tokens.ids) - 31, 32):
            window = tokens.ids[start : start + 32]
            with torch.no_grad():
                rows = torch.log_softmax(module(window[None]).logits[0, :-1].double(), -1)
            nats -= float(rows.gather(-1, window[1:, None]).sum())
            # a whole number of bytes, because byte-level tokens are bytes
            read += sum(
                len(TokenFile(json.loads(words.backend_tokenizer.to_str())).bytes_of(int(i))) for i in window[1:]
            )
        # a character of several tokens counts whole with its first, which windows may cut
        assert column.perplexity.bits_per_byte == pytest.approx(nats / read / torch.tensor(2.0).log().item(), rel=0.02)
    with (tmp_path / "card").open("w") as file:
        Console(width=140, file=file).print(render(card))
    said = (tmp_path / "card").read_text()
    assert "bits per byte" in said and "not comparable" in said and "KL" not in said.partition("The vocabularies")[0]
    bare = evaluate(*both, speed=False)
    assert bare.divergence is None and bare.model.perplexity is None and "with a text" in bare.notes[0]


def test_long_texts_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    words = tiny.tokenizer().backend_tokenizer
    whole = token_counts.count_tokens(str(text), words, tiny.VOCABULARY)
    monkeypatch.setattr(token_counts, "_AT_ONCE", 40)
    assert torch.equal(token_counts.count_tokens(str(text), words, tiny.VOCABULARY).counts, whole.counts)
    assert whole.total == len(words.encode(text.read_text()).ids) and whole.most_frequent()[0] == words.token_to_id("Ġ")


def test_single_characters_and_what_was_added_stay_and_that_is_told() -> None:
    words = trained("BPE")
    tokens, context = TokenFile(json.loads(words.to_str())), Context()
    vocabulary = Vocabulary(words.get_vocab_size(), tokens)
    kept = {tokens.strings[token] for token in charpoet(vocabulary, context).ids}
    assert {each for each in kept if len(each) > 1} == {"<unk>", "<s>", "</s>", "HERON"}
    assert context.notes == {"added tokens of several characters, kept": 1}


LENGTHS = [5, 7, 1, 20]


@pytest.mark.parametrize("kind", ["charpoet", "whole", "pieces"])
def test_lengths_are_exact(kind: str, model: Make, run: Callable, tmp_path: Path) -> None:
    path = model("llama")
    if kind == "charpoet":
        run(path, tmp_path / "out", method="charpoet")
        path = tmp_path / "out"
    elif kind == "pieces":
        path = save_with(trained("BPE", 420, True), tmp_path / "pieces")
    module, words = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = set()
    for seed in range(12):
        written = secateur.generate_lengths(module, words, "the", LENGTHS, separators=[", ", "!\n", "", "."], seed=seed)
        assert [len(segment) for segment in written.segments] == LENGTHS
        assert written.text == "{}, {}!\n{}{}.".format(*written.segments)
        assert "\n" not in "".join(written.segments) and "\ufffd" not in written.text
        texts.add(written.text)
    assert len(texts) == 12
    again = secateur.generate_lengths(module, words, "the", LENGTHS, separators=[", ", "!\n", "", "."], seed=3)
    assert again.text in texts, "same seed, same text"


def test_a_character_is_not_begun_that_would_be_too_many() -> None:
    tokens = {0: b"a", 1: b"a\xc3", 2: b"\xc3", 3: b"aa", **{byte: bytes([byte]) for byte in range(0x80, 0xC0)}}
    rules = _Rules(tokens, readable)
    assert rules.possible(b"", 1, 256).tolist() == [0, 2]
    assert rules.possible(b"", 2, 256).tolist() == [0, 1, 2, 3]
    assert rules.possible(b"", 2, 3).tolist() == [0, 1, 2], "no more rows than the model has"
    assert rules.possible(b"\xc3", 1, 256).tolist() == list(range(0x80, 0xC0)), "À to ÿ"
    assert rules.possible(b"\xc2", 1, 256).tolist() == [b for b in range(0xA0, 0xC0) if b != 0xAD], (
        "no control characters"
    )
    few = _Rules({0: b"a", 2: b"\xc3", 0xA0: b"\xa0"}, readable)
    assert few.possible(b"", 1, 256).tolist() == [0], "what cannot be ended by every byte is not begun"


def test_free_decoding_misses_the_length(model: Make) -> None:
    """What control is for: as many tokens as characters are wanted give another number of characters."""
    module, words = AutoModelForCausalLM.from_pretrained(model("llama")), AutoTokenizer.from_pretrained(model("llama"))
    ids = torch.tensor([words("the")["input_ids"]])
    torch.manual_seed(0)
    found = [
        module.generate(ids, max_new_tokens=20, do_sample=True, pad_token_id=0)[0, ids.shape[1] :] for _ in range(5)
    ]
    assert any(len(words.decode(each)) != 20 for each in found)


def test_generation_follows_the_model(model: Make) -> None:
    """Greedy steps take the likeliest of the possible tokens, with a cache as without."""
    module, words = AutoModelForCausalLM.from_pretrained(model("llama")), AutoTokenizer.from_pretrained(model("llama"))
    letters = set("abcdefghijklmnopqrstuvwxyz")
    written = secateur.generate_lengths(
        module, words, "the", [9], separators="", allowed=letters.__contains__, temperature=0
    )
    assert set(written.text) <= letters and len(written.text) == 9
    ids, text = words("the")["input_ids"], ""
    table = {t: i for t, i in words.get_vocab().items() if set(t) <= letters}
    while len(text) < 9:
        with torch.no_grad():
            logits = module(torch.tensor([ids])).logits[0, -1]
        token = max((t for t in table if len(t) <= 9 - len(text)), key=lambda t: float(logits[table[t]]))
        ids, text = [*ids, table[token]], text + token
    assert written.text == text
    only = secateur.generate_lengths(module, words, "the", [6], allowed=lambda c: c in "東京", seed=1)
    assert set(only.segments[0]) <= set("東京") and only.tokens == 18, "three bytes each"


@pytest.mark.parametrize(
    ("counts", "options", "what"),
    [
        ([0], {}, "whole number of at least 1"),
        ([], {}, "whole number of at least 1"),
        ([2, 3], {"separators": ["."]}, "1 separators for 2 segments"),
        ([2], {"temperature": -1}, "neither is negative"),
        ([2], {"prompt": ""}, "the prompt holds no tokens"),
        ([300], {}, "longer than the model's 256 positions"),
    ],
)
def test_lengths_that_cannot_be(counts: list, options: dict, what: str, model: Make) -> None:
    module, words = AutoModelForCausalLM.from_pretrained(model("llama")), AutoTokenizer.from_pretrained(model("llama"))
    with pytest.raises(secateur.RequestError, match=what):
        secateur.generate_lengths(module, words, options.pop("prompt", "the"), counts, **options)
    with pytest.raises(secateur.RunError, match="no token of this vocabulary can go on"):
        secateur.generate_lengths(module, words, "the", [2], allowed=lambda _: False)

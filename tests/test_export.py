"""Other formats: GGUF in llama.cpp, ONNX in onnxruntime, one width for blocks that differ."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import gguf_file
import tiny
from command import secateur, snapshot
from secateur import compress
from secateur.errors import RequestError, RunError
from secateur.export import check, export
from secateur.export import gguf as gguf_export
from secateur.export.check import Tried, try_loader
from secateur.export.gguf_layout import FAMILIES, Layout
from secateur.loads import loads
from secateur.network.heterogeneous import BlockShape
from secateur.network.source import open_model
from secateur.network.verify import prompt
from test_heterogeneous import write

Make = Callable[..., Path]
HAS = {name: importlib.util.find_spec(name) is not None for name in ("xllamacpp", "onnxruntime", "onnxscript")}
llama_cpp = pytest.mark.skipif(not HAS["xllamacpp"], reason="xllamacpp, which ships llama.cpp, is not installed")
onnx = pytest.mark.skipif(
    not (HAS["onnxruntime"] and HAS["onnxscript"]), reason="onnxruntime and onnxscript are not installed"
)
GGUF = ("llama", "llama_mqa", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")
UNEVEN = {0: BlockShape(units=96), 1: BlockShape(heads=2, kv_heads=1, units=33)}
# block 0 is the hard one: graphs take the width of a head from it
GAPS = {
    0: BlockShape(units=33, skip=("attention",)),
    1: BlockShape(skip=("feed_forward",)),
    2: BlockShape(skip=("attention",)),
}


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "try_loader", lambda *_, **__: Tried(missing="xllamacpp"))


@pytest.fixture(scope="session")
def uneven(model: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, bool], Path] = {}

    def get(name: str, gaps: bool = False) -> Path:
        if (name, gaps) not in made:
            made[name, gaps] = tmp_path_factory.mktemp("uneven") / name
            write(model(name), made[name, gaps], GAPS if gaps else UNEVEN)
        return made[name, gaps]

    return get


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@llama_cpp
@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_computes_what_transformers_does(name: str, model: Make, tmp_path: Path) -> None:
    done = export(model(name), "gguf", tmp_path / "m.gguf")
    # tables in half precision for gelu are the coarsest thing that llama.cpp does in float32
    assert done.measured["difference"] < (1e-5 if "gelu" not in str(_activation(model(name))) else 1e-3)
    assert len(done.checks) == 3 and not done.notes


def _activation(directory: Path) -> object:
    raw = json.loads((directory / "config.json").read_text())
    return [raw.get(name) for name in ("hidden_act", "hidden_activation", "activation_function")]


@llama_cpp
@pytest.mark.parametrize("gaps", [False, True], ids=["widths", "gaps"])
@pytest.mark.parametrize("name", ["llama", "llama_mqa", "qwen2"])
def test_blocks_that_differ_go_through_deci(name: str, gaps: bool, uneven: Callable, tmp_path: Path) -> None:
    done = export(uneven(name, gaps), "gguf", tmp_path / "m.gguf")
    assert done.architecture == "deci" and done.measured["difference"] < 1e-5
    said = fields(tmp_path / "m.gguf")
    heads = tiny.KV_HEADS if name != "llama_mqa" else 1
    if not gaps:
        assert said["deci.feed_forward_length"] == [96, 33, 160]
        assert said["deci.attention.head_count"] == [4, 2, 4]
        assert said["deci.attention.head_count_kv"] == [heads, 1, heads]
    else:
        # a head of zeros in block 0, neurons of zeros in block 1
        assert said["deci.attention.head_count"] == [1, 4, 0] and said["deci.feed_forward_length"] == [33, 32, 160]


@llama_cpp
@pytest.mark.parametrize(("dtype", "bits"), [("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_smaller_numbers(dtype: str, bits: float, model: Make, tmp_path: Path) -> None:
    done = export(model("llama"), "gguf", tmp_path / "m.gguf", dtype)
    matrices = sum(p.numel() for p in tiny.make("llama").parameters() if p.ndim > 1)
    assert abs(done.bytes - matrices * bits / 8) < 12_000  # tokens and metadata
    assert done.dtype == dtype and done.measured["difference"] < 6e-2


@llama_cpp
def test_scaled_positions_are_said_by_factors(tmp_path: Path) -> None:
    model = tiny.make("llama")
    model.config.rope_parameters = {
        "rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    done = export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert done.measured["difference"] < 1e-5
    factors = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight").data
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)


HEAD_DIMS = {"axis": "head_dims", "ratio": 0.3}


@llama_cpp
def test_heads_that_lost_dimensions_run_in_llama_cpp(model: Make, shared_clean: None, tmp_path: Path) -> None:
    compress(model("llama"), "random_units", HEAD_DIMS, output=tmp_path / "m", evaluate=False)
    assert export(tmp_path / "m", "gguf", tmp_path / "m.gguf").measured["difference"] < 1e-5


def test_heads_that_lost_dimensions_keep_their_frequencies(
    model: Make, shared_clean: None, no_llama_cpp: None, tmp_path: Path
) -> None:
    compress(model("llama"), "random_units", HEAD_DIMS, output=tmp_path / "m", evaluate=False)
    export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert {10} == {
        fields(tmp_path / "m.gguf")[f"llama.{name}"] for name in ("attention.key_length", "rope.dimension_count")
    }
    factors = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight").data
    said = json.loads((tmp_path / "m/config.json").read_text())["rope_parameters"]["short_factor"]
    assert factors.tolist() == pytest.approx(said) and len(factors) == 5
    # a graph that takes no factors
    compress(model("qwen2"), "random_units", HEAD_DIMS, output=tmp_path / "q", evaluate=False)
    with pytest.raises(RequestError, match="positions of .* are scaled"):
        export(tmp_path / "q", "gguf", tmp_path / "q.gguf")


def sentencepiece_like(space: bool) -> PreTrainedTokenizerFast:
    """BPE on whole characters with bytes behind it: 3 special tokens, 256 bytes, spaces, letters, pairs."""
    letters = "▁etaoinshrdlucmfwypvbgkqxz"
    pairs = ["th", "he", "in", "er", "an", "▁t", "the", "▁the", "re", "on", "or", "▁a", "nd", "and"]
    made = [
        ("t", "h"),
        ("h", "e"),
        ("i", "n"),
        ("e", "r"),
        ("a", "n"),
        ("▁", "t"),
        ("th", "e"),
        ("▁", "the"),
        ("r", "e"),
    ]
    made += [("o", "n"), ("o", "r"), ("▁", "a"), ("n", "d"), ("a", "nd")]
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pairs]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=made, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if space else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@llama_cpp
@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_like_tokenizers(space: bool, tmp_path: Path) -> None:
    tiny.make("llama").save_pretrained(tmp_path / "m")
    words = sentencepiece_like(space)
    words.chat_template = "{{ messages[0].content }}"
    words.save_pretrained(tmp_path / "m")
    done = export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert any("same" in line and "tokens" in line for line in done.checks)
    said = fields(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_space_prefix"] is space
    assert said["tokenizer.chat_template"] == words.chat_template
    # rows that no token stands for are filled
    assert len(said["tokenizer.ggml.tokens"]) == tiny.VOCABULARY and said["tokenizer.ggml.tokens"][-1] == "[PAD319]"


@llama_cpp
def test_greedy_text_is_the_same(model: Make, tmp_path: Path) -> None:
    export(model("qwen2"), "gguf", tmp_path / "m.gguf")
    ids = prompt(tiny.VOCABULARY)
    told = try_loader("llama.cpp", tmp_path / "m.gguf", ids)
    made = tiny.make("qwen2").generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert list(told.written) == made[0, len(ids) :].tolist()


def test_what_is_written_is_read_back_by_transformers(model: Make, tmp_path: Path, no_llama_cpp: None) -> None:
    done = export(model("llama"), "gguf", tmp_path / "m.gguf")
    assert "not installed" in done.notes[0] and "secateur[llama]" in done.notes[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.tensor([prompt(tiny.VOCABULARY)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tiny.make("llama")(ids).logits)
    # what a GGUF file holds is a model again
    tokens = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert tiny.tokenizer().get_vocab().items() <= tokens.get_vocab().items()


def test_a_gguf_source_keeps_its_numbers(tmp_path: Path, no_llama_cpp: None) -> None:
    gguf_file.write(tmp_path / "a.gguf", gguf.GGMLQuantizationType.F16)
    export(tmp_path / "a.gguf", "gguf", tmp_path / "b.gguf", "f16")
    readers = [gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    before, after = ({t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors} for reader in readers)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_a_file_that_computes_something_else_is_not_kept(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tuple(tiny.tokenizer().encode(check.WORDS))
    wrong = Tried(scores=torch.zeros(2, tiny.VOCABULARY).log_softmax(-1), written=(1, 2), ids=ids, version="1")
    monkeypatch.setattr(gguf_export, "try_loader", lambda *_, **__: wrong)
    told = secateur("export", model("llama"), "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert told.code == 1 and "logits differ" in told.err and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(gguf_export, "try_loader", lambda *_, **__: Tried(error="it fell over"))
    with pytest.raises(RunError, match="it fell over"):
        export(model("llama"), "gguf", tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_export, "score_difference", lambda *_: 0.0)
    monkeypatch.setattr(gguf_export, "try_loader", lambda *_, **__: replace(wrong, ids=(*ids[:5], 9, *ids[6:])))
    with pytest.raises(RunError, match="from token 5 of a test sentence"):
        export(model("llama"), "gguf", tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def _other_activation(directory: Path) -> None:
    _change(directory / "config.json", lambda raw: raw.update(hidden_act="gelu"))


def _other_splitting(directory: Path) -> None:
    _change(directory / "tokenizer.json", lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}))


def _other_tokens(directory: Path) -> None:
    _change(directory / "tokenizer.json", lambda raw: raw["model"].update(type="Unigram"))


def _scaled(directory: Path) -> None:
    said = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    _change(directory / "config.json", lambda raw: raw.update(rope_parameters=said))


def _no_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _change(path: Path, change: Callable) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_activation, "hidden_act"),
        (_other_splitting, "Whitespace"),
        (_scaled, "yarn"),
        (_no_tokenizer, "no tokenizer.json"),
    ],
)
def test_what_llama_cpp_has_no_graph_for_is_refused(change: Callable, said: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "m")
    change(tmp_path / "m")
    before = snapshot(tmp_path)
    told = secateur("export", tmp_path / "m", "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert told.code == 2 and said in told.err and snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("llama", ("--to", "gguff", "--output", "o"), "Did you mean 'gguf'?"),
        ("llama", ("--to", "gguf", "--output", "o"), "named *.gguf"),
        ("llama", ("--to", "gguf", "--output", "o.gguf", "--dtype", "q4_0"), "f32, f16, bf16, q8_0"),
        ("opt", ("--to", "gguf", "--output", "o.gguf"), "models of type opt"),
        ("llama", ("--to", "padded", "--output", "o"), "nothing to pad"),
        ("llama", ("--to", "gguf", "--output", "there.gguf"), "exists already"),
    ],
)
def test_requests_that_cannot_be(
    name: str, arguments: tuple, said: str, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").touch()
    before = snapshot(tmp_path)
    told = secateur("export", model(name), *arguments)
    assert told.code == 2 and said in told.err and snapshot(tmp_path) == before


def test_nothing_is_written_into_the_source(model: Make) -> None:
    told = secateur("export", model("llama"), "--to", "gguf", "--output", model("llama") / "m.gguf")
    assert told.code == 2 and "lies inside it" in told.err


def test_blocks_that_differ_need_a_graph_for_them(uneven: Callable, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--to padded"):
        export(uneven("qwen3"), "gguf", tmp_path / "m.gguf")


def test_every_family_is_tried() -> None:
    kinds = {tiny.ARCHITECTURES[name]().model_type for name in GGUF}
    assert kinds == FAMILIES.keys()


def test_queries_and_keys_are_turned_from_halves_to_pairs(model: Make) -> None:
    source = open_model(model("llama_mqa"))
    layout = Layout(source, "f32")
    for name, heads in (("q", 4), ("k", 1)):
        for part in ("weight", "bias"):
            entry = next(each for each in layout.entries if each.name == f"blk.1.attn_{name}.{part}")
            ours = source.parameter(f"model.layers.1.self_attn.{name}_proj.{part}").reshape(heads, 16, -1)
            theirs = torch.from_numpy(layout.tensor(entry)).reshape(heads, 16, -1)
            assert torch.equal(theirs[:, 0::2], ours[:, :8]) and torch.equal(theirs[:, 1::2], ours[:, 8:])


@pytest.mark.parametrize("gaps", [False, True], ids=["widths", "gaps"])
@pytest.mark.parametrize("name", ["llama_tied", "phi3"])
def test_padded_is_plain_and_equal(name: str, gaps: bool, uneven: Callable, shared_clean: None, tmp_path: Path) -> None:
    done = export(uneven(name, gaps), "padded", tmp_path / "wide")
    assert "no smaller" in done.notes[0] and "no smaller" in (tmp_path / "wide" / "README.md").read_text()
    assert not list((tmp_path / "wide").glob("*.py"))
    raw = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert raw["intermediate_size"] == tiny.UNITS and "per_layer_config" not in raw and "auto_map" not in raw
    assert raw["architectures"] == [type(tiny.make(name)).__name__]
    wide, _ = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32, output_loading_info=True)
    narrow = AutoModelForCausalLM.from_pretrained(uneven(name, gaps), dtype=torch.float32, trust_remote_code=True)
    ids = torch.tensor([prompt(tiny.VOCABULARY)])
    with torch.no_grad():
        assert (wide(ids).logits - narrow(ids).logits).abs().max() < 1e-5
    # as large as before it was cut, and what was cut is zeros
    assert sum(p.numel() for p in wide.parameters()) == sum(p.numel() for p in tiny.make(name).parameters())
    down = load_file(tmp_path / "wide" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    kept = GAPS[0].units if gaps else UNEVEN[0].units
    assert not down[:, kept:].any() and down[:, :kept].any()


def test_padded_fills_a_part_that_alone_is_missing(model: Make, shared_clean: None, tmp_path: Path) -> None:
    write(model("llama_tied"), tmp_path / "cut", {1: BlockShape(skip=("feed_forward",))})
    export(tmp_path / "cut", "padded", tmp_path / "wide")
    raw = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert raw["intermediate_size"] == tiny.UNITS and "per_layer_config" not in raw
    assert not load_file(tmp_path / "wide" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].any()


@onnx
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.every), "gpt2"])
def test_onnxruntime_computes_what_transformers_does(name: str, model: Make, tmp_path: Path) -> None:
    done = export(model(name), "onnx", tmp_path / "o")
    assert done.measured["difference"] < 1e-5 and "KV cache" in done.notes[0]
    assert {"model.onnx", "config.json", "tokenizer.json", "README.md"} <= {p.name for p in (tmp_path / "o").iterdir()}
    if name == "llama":
        told = {row.loader: row for row in loads(tmp_path / "o", tokens=2)}
        assert told["onnxruntime"].loads and told["onnxruntime"].speed and told["transformers"].loads is False
        (tmp_path / "o/config.json").write_text("{}")
        with pytest.raises(RequestError, match="vocab_size"):
            list(loads(tmp_path / "o"))


@pytest.mark.every
@onnx
def test_onnx_of_blocks_that_differ(uneven: Callable, tmp_path: Path) -> None:
    assert export(uneven("llama", True), "onnx", tmp_path / "o").measured["difference"] < 1e-5


@pytest.mark.every
@onnx
def test_what_torch_cannot_trace_is_refused(model: Make, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="as an ONNX graph"):
        export(model("mamba"), "onnx", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda _: None)
    told = secateur("export", model("llama"), "--to", "onnx", "--output", tmp_path / "o")
    assert told.code == 2 and "secateur[export]" in told.err and list(tmp_path.iterdir()) == []


def test_the_card_is_printed(model: Make, tmp_path: Path, no_llama_cpp: None) -> None:
    told = secateur("export", model("llama"), "--to", "gguf", "--output", tmp_path / "m.gguf", "--dtype", "f16")
    assert told.code == 0 and "gguf: llama, f16" in told.out and "byte for byte" in told.out
    told = secateur("export", model("llama"), "--to", "gguf", "--output", tmp_path / "n.gguf", "--json")
    assert json.loads(told.out)["bytes"] == (tmp_path / "n.gguf").stat().st_size
    # equal requests, equal bytes
    export(model("llama"), "gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()

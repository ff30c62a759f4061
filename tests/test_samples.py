"""The tokens to calibrate on: every form in which they may come, and every way in which they may be wrong."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from command import Told, compress, snapshot
from secateur import RequestError
from secateur.calibration.samples import LENGTH, SAMPLES, SAMPLES_OF_ITS_OWN, Calibration, Samples, collect_samples
from secateur.network.source import open_model

Make = Callable[..., Path]
TEXT = "there and back again, and there once more, with others and their sisters in the rain. "
SMALL: dict[str, Any] = {"samples": 3, "length": 8, "held_out": 2, "order": "first"}


def encode(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def collect(model: Make, tmp_path: Path) -> Callable[..., Samples]:
    """Writes `content` into a file of this name, and collects samples of it."""

    def run(content: Any, name: str = "data.json", seed: int = 0, **settings: Any) -> Samples:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        wanted = Calibration(**{**SMALL, "data": str(tmp_path / name), **settings})
        return collect_samples(open_model(model("llama")), wanted, torch.Generator().manual_seed(seed), seed)

    return run


def windows(ids: list[int], length: int = 8) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def plain(sequences: list[Tensor]) -> list[list[int]]:
    return [each.tolist() for each in sequences]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.txt", TEXT * 9),
        ("data.json", [TEXT * 4, TEXT * 5]),
        ("data.json", [{"text": TEXT * 4}, {"text": ""}, {"text": TEXT * 5}]),
        ("data.jsonl", f"{json.dumps({'text': TEXT * 4})}\n\n{json.dumps(TEXT * 5)}\n"),
    ],
)
def test_texts_are_joined_and_cut_into_windows(name: str, content: Any, collect: Callable[..., Samples]) -> None:
    found = collect(content, name)
    parts = encode(TEXT * 9) if name == "text.txt" else encode(TEXT * 4) + encode(TEXT * 5)
    assert plain(found.sequences) + plain(found.held_out) == windows(parts)[:5]
    assert len(found.held_out) == 2
    assert found.name == name, "where it lies on this machine is nobody's business"


def test_a_line_separator_inside_a_text_ends_no_line(collect: Callable[..., Samples]) -> None:
    text = TEXT * 3 + "\u2028" + TEXT * 3
    found = collect(json.dumps({"text": text}, ensure_ascii=False) + "\n", "data.jsonl")
    assert plain(found.sequences) == windows(encode(text))[:3]


def test_ids_are_taken_as_they_are(collect: Callable[..., Samples]) -> None:
    """Each list is cut for itself; one that is shorter than a window is a sequence, a longer one's rest is none."""
    lists = [list(range(3, 22)), [30, 31, 32], [7], {"input_ids": list(range(40, 56))}, []]
    found = collect(lists, samples=4, held_out=1)
    every = [*windows(list(range(3, 22))), [30, 31, 32], *windows(list(range(40, 56)))]
    assert sorted(plain(found.sequences), key=len) == sorted(every[:4], key=len)
    assert plain(found.sequences)[0] == [30, 31, 32], "sequences of equal length lie together"
    assert plain(found.held_out) == every[4:5]


def test_windows_are_drawn_by_the_seed(collect: Callable[..., Samples]) -> None:
    """At random, each once; held-out windows are never calibrated on."""
    lists = [[number] * 8 for number in range(3, 43)]
    first, again, other = (collect(lists, seed=seed, order="random", samples=20, held_out=20) for seed in (0, 0, 1))
    assert plain(first.sequences) == plain(again.sequences) and first.sha256 == again.sha256
    assert plain(first.sequences) != plain(other.sequences) and first.sha256 != other.sha256
    for found in (first, other):
        drawn = [ids[0] for ids in plain(found.sequences) + plain(found.held_out)]
        assert drawn != sorted(drawn) and sorted(drawn) == list(range(3, 43))


def test_defaults() -> None:
    assert Calibration(data="x").count == SAMPLES and Calibration(data="x").held_out_count == SAMPLES // 8
    assert Calibration().count == SAMPLES_OF_ITS_OWN and Calibration().held_out_count == SAMPLES_OF_ITS_OWN // 8
    assert Calibration(data="x", samples=9).held_out_count == 2, "an eighth more, at least one"
    assert Calibration(samples=9, held_out=0).held_out_count == 0


def test_windows_are_no_longer_than_the_positions_of_the_model(collect: Callable[..., Samples]) -> None:
    found = collect([list(range(3, 303))], length=None, samples=1, held_out=0)
    assert [len(ids) for ids in found.sequences] == [tiny.CONTEXT] and tiny.CONTEXT < LENGTH


def test_the_hash_is_of_the_exact_ids(collect: Callable[..., Samples]) -> None:
    lists = [[number] * 8 for number in range(3, 8)]
    found = collect(lists)
    digest = hashlib.sha256()
    for ids in lists:
        digest.update(len(ids).to_bytes(8, "little") + b"".join(number.to_bytes(8, "little") for number in ids))
    assert found.sha256 == digest.hexdigest()
    assert found.describe() == {
        "data": "data.json", "sequences": 3, "tokens": 24, "held_out_tokens": 16, "sha256": found.sha256
    }  # fmt: skip
    for changed in ([[9, *lists[0][1:]], *lists[1:]], [*lists[:4], [9] * 8], [lists[1], lists[0], *lists[2:]]):
        assert collect(changed).sha256 != found.sha256


def test_samples_are_kept_as_tensors(collect: Callable[..., Samples]) -> None:
    found = collect([[5] * 8, [6] * 3, [7] * 8, [8] * 2, [9] * 8])
    again = Samples.from_tensors(found.tensors(), found.name)
    assert plain(again.sequences) == plain(found.sequences) and plain(again.held_out) == plain(found.held_out)
    assert again.describe() == found.describe()
    alone = collect([[5] * 8] * 3, held_out=0)
    assert Samples.from_tensors(alone.tensors(), "").held_out == []


def test_what_the_model_writes_itself_is_seeded(model: Make) -> None:
    source, wanted = open_model(model("llama")), Calibration(samples=2, length=6, held_out=1)
    one, again, other = (collect_samples(source, wanted, torch.Generator(), seed) for seed in (0, 0, 1))
    assert plain(one.sequences) == plain(again.sequences) and plain(one.sequences) != plain(other.sequences)
    assert [len(ids) for ids in (*one.sequences, *one.held_out)] == [6, 6, 6]
    assert len({tuple(ids) for ids in plain(one.sequences + one.held_out)}) == 3
    assert "itself" in one.name and "seed 0" in one.name


LISTS = [[5] * 8] * 9


@pytest.mark.parametrize(
    ("content", "name", "settings", "said"),
    [
        (TEXT, "short.txt", {"samples": 40}, "short.txt holds 8 sequences"),
        ("", "empty.txt", {}, "holds 0 sequences"),
        ([], "data.json", {}, "holds 0 sequences"),
        ([[5] * 7, [6]], "data.json", {}, "holds 1 sequences"),
        ([[5] * 8, [320] * 8] * 3, "data.json", {}, "token id 320, outside the model's vocabulary of 320"),
        ([[5] * 8, [-1] * 8] * 3, "data.json", {}, "token id -1, outside"),
        ([[10**30] * 8] * 5, "data.json", {}, "no text, list of token ids"),
        ([[1.5] * 8] * 5, "data.json", {}, "no text, list of token ids"),
        ([[True] * 8] * 5, "data.json", {}, "no text, list of token ids"),
        ([5, 6, 7] * 9, "data.json", {}, "holds 5, which is no text"),
        ([{"words": "text"}], "data.json", {}, '{"words": "text"}, which is no text'),
        ([{"text": None}], "data.json", {}, "which is no text"),
        ([None], "data.json", {}, "holds null"),
        ({"text": TEXT}, "data.json", {}, "does not hold a list"),
        ("[[5, 5], [5", "data.json", {}, "not valid json"),
        ("[5, 5]\n[5", "data.jsonl", {}, "not valid jsonl"),
        (LISTS, "data.json", {"length": 257}, "longer than the model's 256 positions"),
    ],
)
def test_what_cannot_be_used(
    content: Any, name: str, settings: dict[str, Any], said: str, collect: Callable[..., Samples]
) -> None:
    with pytest.raises(RequestError) as refusal:
        collect(content, name, **settings)
    assert said in str(refusal.value)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value) and str(refusal.value).count(". ") == 0


@pytest.mark.parametrize("name", ["data.txt", "data.json"])
def test_what_is_not_utf_8(name: str, model: Make, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match=name):
        collect_samples(open_model(model("llama")), Calibration(data=str(tmp_path / name)), torch.Generator())


# A dataset of the datasets library, which need not be there.


class Rows(list):
    column_names = ("text", "other")


@pytest.mark.parametrize(
    ("name", "asked", "column"),
    [
        ("some/name", (("some/name",), "train"), "text"),
        ("some/name,validation", (("some/name",), "validation"), "text"),
        ("some/name,train[:5],other", (("some/name",), "train[:5]"), "other"),
        ("some/name,small", (("some/name", "small"), "train"), "text"),
        ("some/name,small,part", (("some/name", "small"), "part"), "text"),
        ("some/name,small,test,other", (("some/name", "small"), "test"), "other"),
    ],
)
def test_a_dataset(
    name: str, asked: tuple[tuple[str, ...], str], column: str, model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*names: str, split: str) -> Rows:
        calls.append((names, split))
        return Rows([{"text": TEXT * 5, "other": "in the end " * 30}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    wanted = Calibration(**SMALL, data=f"dataset:{name}")
    found = collect_samples(open_model(model("llama")), wanted, torch.Generator())
    assert calls == [asked]
    assert plain(found.sequences) == windows(encode(TEXT * 5 if column == "text" else "in the end " * 30))[:3]
    assert found.name == f"dataset:{name}"


def test_a_dataset_that_cannot_be_had(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> str:
        with pytest.raises(RequestError) as refusal:
            collect_samples(open_model(model("llama")), Calibration(data=f"dataset:{name}"), torch.Generator())
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    assert "pip install secateur[data]" in refused("some/name")

    def fail(*_: str, **__: str) -> None:
        raise FileNotFoundError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    assert "could not be opened: FileNotFoundError" in refused("some/name")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: Rows()))
    assert "no column 'words'; it has: text, other" in refused("some/name,small,test,words")
    assert "dataset:NAME[,CONFIGURATION]" in refused("some/name,small,test,text,more")


# On the command line.


@pytest.fixture
def refused(model: Make, tmp_path: Path) -> Callable[..., str]:
    """Runs wanda with these options; returns the sentence that it must be refused with."""

    def run(*arguments: object, source: Path | None = None, method: str = "wanda") -> str:
        before = snapshot(tmp_path)
        told: Told = compress(source or model("llama"), tmp_path / "out" / "deep", *arguments, method=method)
        assert told.code == 2, told.err
        assert told.err.startswith("error: ") and told.err.count("\n") == 1 and len(told.err) < 400
        assert snapshot(tmp_path) == before, "nothing is written"
        return told.err

    return run


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model without a tokenizer."""
    tiny.make("llama").save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def test_a_model_without_a_tokenizer(refused: Callable[..., str], bare: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 9)
    said = refused("--calibration", tmp_path / "text.txt", "--length", 8, "--samples", 2, source=bare)
    assert "no tokenizer" in said and "JSON file of token ids" in said


def test_a_model_without_a_tokenizer_writes_ids(bare: Path) -> None:
    samples = collect_samples(open_model(bare), Calibration(**{**SMALL, "data": "self"}), torch.Generator(), seed=4)
    assert [len(each) for each in (*samples.sequences, *samples.held_out)] == [8] * 5
    assert all(int(each[0]) == 1 for each in samples.sequences), "each begins with bos_token_id"
    assert len({tuple(each.tolist()) for each in (*samples.sequences, *samples.held_out)}) == 5


def test_wrong_options(refused: Callable[..., str], tmp_path: Path) -> None:
    for name in ("", ",small", "some/name,small,test,text,more"):
        assert f"dataset:{name} is not of the form dataset:NAME[" in refused("--calibration", f"dataset:{name}")
    (tmp_path / "ids.json").write_text(json.dumps(LISTS))
    assert "nowhere.txt" in refused("--calibration", tmp_path / "nowhere.txt")
    assert str(tmp_path) in refused("--calibration", tmp_path), "a directory"
    assert "calibration.samples=0" in refused("--samples", 0)
    assert "calibration.length=1" in refused("--length", 1)
    assert "256 positions" in refused("--calibration", tmp_path / "ids.json", "--length", 300)
    assert "holds 9 sequences" in refused("--calibration", tmp_path / "ids.json", "--length", 8, "--samples", 9)


@pytest.mark.parametrize("option", [("--calibration", "self"), ("--samples", 3), ("--length", 9)])
@pytest.mark.parametrize("method", ["magnitude", "random_units"])
def test_calibration_for_a_method_that_learns_nothing(
    method: str, option: tuple[object, ...], refused: Callable[..., str]
) -> None:
    assert f"{method} learns from no text" in refused(*option, method=method)

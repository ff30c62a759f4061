"""The HTML report: whole in itself, nothing in it that files could smuggle in, and what it shows is what there is."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from command import secateur
from receipts import PROTOCOL, column, full, kicked, leaves, lost, old, pruned, put, receipt, unit
from secateur import compress as secateur_compress
from secateur.figures import at
from secateur.network.verify import CleanProcess
from secateur.page import LARGEST, MARK, write_report
from secateur.page.charts import log_ticks, ticks
from secateur.page.measured import card_notes, card_table, divergence_chart, kick_table, task_table
from secateur.page.spectra import blocks_left, compared
from secateur.page.writing import Written, greedy, side_by_side, write
from secateur.paths import without_paths

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: text, tags with their attributes, and whether tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] in (["style"], ["script"]):
            self.raw[self._open[-1]] = self.raw.get(self._open[-1], "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _run(path: Path, made: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "secateur.json").write_text(json.dumps(made))
    return path


def _page(made: dict[str, Any], tmp_path: Path, **options: Any) -> Page:
    plain = {"generate": False, "spectra": False, **options}
    return Page(write_report([_run(tmp_path / "run", made)], tmp_path / "page.html", **plain))


def test_a_page_shows_what_the_receipt_says(tmp_path: Path) -> None:
    page = _page(receipt(**lost(90)), tmp_path)
    for said in ("org/base, compressed by flap", "What to try next", "118,000,000", "Held-out", "0.1.0", "quartiles"):
        assert said.lower() in page.text.lower(), said
    assert "block 3: 1,216 of 1,536 kept, 20.8 % removed" in page.text
    charts = [tag["aria-label"] for tag in page.attributes("svg") if tag.get("role") == "img"]
    assert len(charts) == 2 and len(set(charts)) == 1  # cut, and error, of the same units
    assert page.source.lstrip().startswith("<!DOCTYPE html>")


def test_nothing_is_fetched_and_nothing_else_runs(tmp_path: Path) -> None:
    page = _page(receipt(), tmp_path)
    [policy] = [tag["content"] for tag in page.attributes("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    links = [tag.get(key) for _, tag in page.tags for key in ("src", "href", "srcset", "data", "action") if key in tag]
    assert links and all(link and link.startswith(("#", "data:,")) for link in links)
    assert not re.search(r"@import|url\(|https?://", page.raw["style"] + page.raw["script"])
    # the policy would refuse them, and the browser complain
    assert not [tag for _, tag in page.tags if "style" in tag or any(name.startswith("on") for name in tag)]


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    made = receipt()
    made["source"]["model"] = made["recipe"]["model"] = made["card"]["model"]["name"] = EVIL
    made["decisions"][0]["warnings"] = [EVIL]
    made["decisions"][0]["notes"]["calibration"]["data"] = EVIL
    made["card"]["notes"] = [EVIL]
    made["card"]["divergence"]["protocol"] = {**PROTOCOL, "text": EVIL}
    made["card"]["tasks"] = [{"name": EVIL, "metric": EVIL, "value": 0.5, "n": 3, "source": {"definition": EVIL}}]
    made["versions"][EVIL] = made["timings"]["half of a pair \ud800"] = 1.0
    weights = pruned()
    weights["decisions"][0]["matrices"][f"model.layers.0.{EVIL}.weight"] = {"removed": 1, "of": 2}
    comparison = {
        "model": EVIL,
        "rows": [{"name": EVIL, "status": "failed", "error": EVIL, "recipe": {"steps": [{EVIL: {}}]}}],
    }
    directory = tmp_path / "several"
    directory.mkdir()
    (directory / "compare.json").write_text(json.dumps(comparison))
    directories = [_run(tmp_path / "a", made), _run(tmp_path / "b", weights), directory]
    page = Page(write_report(directories, tmp_path / "page.html", generate=False, spectra=False))
    assert page.text.count("alert(1)") > 10
    assert len(page.attributes("script")) == 1 and not page.attributes("img")
    assert not [tag for _, tag in page.tags if any(name.startswith("on") for name in tag)]


HERE = "/home/someone/my models"


def test_nothing_says_where_files_lie(tmp_path: Path) -> None:
    """Paths inside values and sentences go too, and what only looks like one stays."""
    made = receipt()
    made["recipe"]["evaluate"] = {"tasks": [f"piqa={HERE}/d.jsonl", "arc=/srv/data/e.jsonl"], "facts": f"{HERE}/f.yaml"}
    made["card"] = {
        "skipped": f"there are no facts at {HERE}/f.yaml, and /srv/data/e.jsonl (https://a.org/b/c) is 3 tokens/s"
    }
    made["decisions"][0]["warnings"] = ["see file:///srv/data/notes.txt."]
    directory = _compared(tmp_path)
    told = json.loads((directory / "compare.json").read_text())
    told["rows"][-1] |= {"error": "there is no text at /srv/data/text.txt.", "cautions": ["/srv/data/x is old."]}
    (directory / "compare.json").write_text(json.dumps(told))
    directories = [_run(tmp_path / "run", made), directory]
    page = Page(write_report(directories, tmp_path / "page.html", generate=False, spectra=False))
    assert "/home" not in page.source and "/srv" not in page.source and "my models" not in page.source
    assert "refused: there is no text at text.txt." in page.text and "piqa=d.jsonl" in page.text
    assert "there are no facts at f.yaml, and e.jsonl (https://a.org/b/c) is 3 tokens/s" in page.text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/srv/a/b", "b"),
        ("/srv/a does not exist.", "a does not exist."),
        ("--facts=/srv/a/b, then '/srv/c/d'.", "--facts=b, then 'd'."),
        ("dataset:/srv/a/b → //srv/c/", "dataset:b → c"),
        ("tokens/s, org/base, nats / token, ./a/b, https://arxiv.org/abs/1", None),
    ],
)
def test_paths_are_their_last_part(said: str, shown: str | None) -> None:
    assert without_paths(said) == (shown or said)


def test_all_of_the_card_is_shown(tmp_path: Path) -> None:
    page = _page(full(card__kick__scores__0=kicked("closed book", 0.5, 0.625, chance=0.25)), tmp_path)
    for said in (
        "closed book 0.625 ± 0.072 0.500 ± 0.081 -0.125 ± 0.010 -20.0 % no 0.25",
        "in half of the texts at most – 17", "in nine tenths of the texts at most – > 48", "28.0 %", "41.0 %", "7.0 %",
        "writing 32 tokens behind 512 (decode)", "writing 32 tokens behind 1024 of each of 4 (decode)", "batches of 1, 4",
        "writing behind 512, joules a token 1.500 (1.470 to 1.530) 0.750 (0.735 to 0.765) -50.0 %",
        "memory while loading 124 MB 123 MB", "LLM-KICK 2 of 3 match", "scores of tasks that fell 0 of 1",
        "In 2 of 3 tasks of LLM-KICK it matches the original", "it does not in closed book (20.0 % lower)",
        "arc: the first 500 of 2376 questions, 3 examples before each; arc.yaml (sha256 efefefefefef)",
        "joules of package-0, whatever else ran", "64 prompts of 32 tokens from t.txt",
    ):  # fmt: skip
        assert said in page.text, said


def test_every_number_of_the_card_is_shown() -> None:
    """Changing one changes the page, apart from the receipt in it and the explanation. Not shown are single measurements,
    of which medians and quartiles are, the logarithm of a perplexity, and how the original was measured: as the result,
    and every setting as the first.
    """
    as_the_result = "reference/(multiply_adds_tokens|memory/(baseline|tokens|decoded)|perplexity/protocol)"
    not_shown = re.compile(f"samples|/nll$|more_speed/./(pairs|threads)|{as_the_result}")

    def shown(card: dict[str, Any]) -> list[Any]:
        found = [card_table(card), card_notes(card), task_table(card), kick_table(card), divergence_chart({"x": card})]
        assert "another version" not in str(found[1]), "it is a whole card"
        return found

    made = full()
    before, deaf = shown(made["card"]), set()
    for keys in leaves(made["card"]):
        changed = full()
        # whole numbers stay whole, shares stay shares
        value = at(made["card"], keys)
        put(changed, "__".join(["card", *map(str, keys)]), 2 * value + 3 if isinstance(value, int) else 0.9 * value)
        if shown(changed["card"]) == before:
            deaf.add("/".join(map(str, keys)))
    assert not {each for each in deaf if not not_shown.search(each)}


def test_scores_of_several_runs_are_side_by_side(tmp_path: Path) -> None:
    fell = {"card__tasks__0__value": 0.3, "card__kick__scores__0": kicked("closed book", 0.5, 0.625, chance=0.25)}
    runs = [_run(tmp_path / name, made) for name, made in (("one", full()), ("two", full(**fell)), ("no", receipt()))]
    page = Page(write_report(runs, tmp_path / "page.html", generate=False, spectra=False))
    table = page.text[page.text.index("Scores run arc acc") :]
    assert table.startswith(
        "Scores run arc acc kick: closed book kick: open book kick: summarisation divergent tokens tokens before the first, "
        "mean (original) 0.35 0.625 0.82 0.31 0 – one 0.34 ± 0.021 0.6 ± 0.081 0.81 ± 0.081 0.3 ± 0.081 0.41 25.25 two 0.3 "
        "± 0.021 * 0.5 ± 0.081 * 0.81 ± 0.081 0.3 ± 0.081 0.41 25.25 ± one standard error."
    ), table[:400]
    other = [_run(tmp_path / "other", full(card__tasks__0__reference=0.5)), *runs]
    page = Page(write_report(other, tmp_path / "page.html", generate=False, spectra=False))
    assert "mean other 0.34" in page.text  # the originals differ, so none is shown as that of all
    plain = Page(write_report([runs[2], runs[2]], tmp_path / "page.html", generate=False, spectra=False))
    assert "Scores run" not in plain.text


def test_a_card_of_another_version_is_shown_without_what_cannot_be_read(tmp_path: Path) -> None:
    page = _page(receipt(card__format="secateur-card/9", card__notes=["Mind this."]), tmp_path)
    assert "written by another version" in page.text and "Mind this." in page.text and "118,000,000" in page.text


def test_old_receipts_give_a_page_without_what_they_lack(tmp_path: Path) -> None:
    page = _page(old(), tmp_path)
    assert "Result card" not in page.text and "What was cut, layer by layer" in page.text


def test_zeros_blocks_tokens_and_channels_have_pictures(tmp_path: Path) -> None:
    weights = _page(pruned(), tmp_path / "weights")
    assert "mlp.up_proj, block 3: 50.0 %" in weights.text and "50.0 % everywhere" in weights.text
    made = receipt("block_influence")
    decision = made["decisions"][0]
    decision.pop("units")
    decision["blocks"] = {
        "kept": [0, 1, 3],
        "removed": [2],
        "of": 4,
        "scores": {"0": 0.5, "1": 0.4, "2": 0.1, "3": 0.3},
    }
    decision["vocabulary"], decision["channels"] = {"kept": 3000, "of": 4000}, {"kept": 48, "of": 64}
    page = _page(made, tmp_path / "blocks")
    for said in ("block 2: removed, score 0.1", "3,000 of 4,000 tokens", "48 of 64 channels"):
        assert said in page.text
    assert sum("gone" in (tag.get("class") or "").split() for tag in page.attributes("rect")) >= 1


def test_a_mixture_of_thousands_of_matrices_stays_small(tmp_path: Path) -> None:
    made = pruned()
    made["decisions"][0]["matrices"] = {
        f"model.layers.{block}.mlp.experts.{expert}.{name}.weight": {
            "removed": expert, "of": 4_000_000, "calibration_error": 0.01 * expert, "held_out_error": 0.011 * expert
        }
        for block in range(48) for expert in range(64) for name in ("gate_proj", "up_proj", "down_proj")
    }  # fmt: skip
    page = _page(made, tmp_path)
    assert len(page.source.encode()) < LARGEST / 3
    assert "320 of 9,216 rows" in page.text and "9,116 more" in page.text
    # those that are shown are the worst
    assert "experts.63.gate_proj" in page.text and "experts.1.gate_proj" not in page.text.split("Receipt as JSON")[0]


def _compared(tmp_path: Path) -> Path:
    """A comparison of four runs: two measured, one of which was not kept, one refused."""
    directory = tmp_path / "comparison"
    rows = []
    for name, parameters, perplexity in (("small", 90, 60.0), ("worse", 100, 70.0), ("large", 120, 30.0)):
        card = receipt()["card"]
        card["model"] = column(parameters * 10**6, 60_000_000, perplexity, 2 * parameters * 10**6)
        rows.append({"name": name, "recipe": {"steps": [{"flap": {}}]}, "status": "done", "card": card, "seconds": 9.0,
                     "peak_memory": 10**9, "achieved": {"parameters": parameters * 10**6}, "result": name})  # fmt: skip
    rows.append({"name": "no", "recipe": {"steps": [{"slicegpt": {}}]}, "status": "refused", "error": "it ties its head.",
                 "card": None, "achieved": None, "result": None})  # fmt: skip
    _run(directory / "small", receipt())
    told = {"model": "org/base", "budget": {"measure": "parameters", "asked": 0.8}, "protocol": {}, "rows": rows}
    (directory / "compare.json").write_text(json.dumps(told))
    return directory


def test_a_comparison_is_a_table_with_its_failures_and_fronts(tmp_path: Path) -> None:
    page = Page(write_report([_compared(tmp_path)], tmp_path / "page.html", generate=False, spectra=False))
    assert "refused: it ties its head." in page.text
    assert "small: parameters 90M, perplexity 60" in page.text
    # a row that was kept is told by its row's card, which was completed later, and not by its receipt's
    assert "Perplexity rose from 29 to 60" in page.text
    charts = [tag["aria-label"] for tag in page.attributes("svg") if tag.get("role") == "img"]
    assert charts[:2] == ["Perplexity against parameters", "Perplexity against bytes on disk"]
    fronts = re.findall(r'class="line front" d="([^"]+)"', page.source)
    # from "small" to "large" and the original, which is best, past "worse"
    assert [front.count("H") for front in fronts[:2]] == [2, 2]
    assert [tag["href"] for tag in page.attributes("a")] == ["#run-1"]  # the one that was kept


def test_fronts_are_those_of_the_comparison(tmp_path: Path) -> None:
    """What it says, of every seed; a gain within the spread of its measurement is none."""
    directory = _compared(tmp_path)
    told = json.loads((directory / "compare.json").read_text())
    for row, gain in zip(told["rows"], ((0.3, -0.1, 0.5), (0.2, 0.1, 0.3), (0.1, -0.1, 0.2)), strict=False):
        row["card"]["speed"]["prefill"]["gain"] = dict(zip(("median", "lower", "upper"), gain, strict=True))
    (directory / "compare.json").write_text(json.dumps(told))
    own = write_report([directory], tmp_path / "own.html", generate=False, spectra=False).read_text()
    assert (
        "small: time to read, of the original&#39;s 100 %" in own
        or "small: time to read, of the original's 100 %" in own
    )
    told |= {
        "protocol": {"quality": "perplexity"},
        "fronts": {"parameters": {"rows": ["worse", "large"], "reference": False}},
    }
    (directory / "compare.json").write_text(json.dumps(told))
    said = write_report([directory], tmp_path / "said.html", generate=False, spectra=False).read_text()
    fronts = [re.findall(r'class="line front" d="([^"]+)"', page) for page in (own, said)]
    assert [each[0].count("H") for each in fronts] == [2, 1] and fronts[0][1:] == fronts[1][1:]


def test_several_directories_make_one_page(tmp_path: Path) -> None:
    first, second = _run(tmp_path / "a" / "out", receipt()), _run(tmp_path / "b" / "out", receipt(**lost(90)))
    page = Page(write_report([first, second, first], tmp_path / "page.html", generate=False, spectra=False))
    assert {tag["href"] for tag in page.attributes("a")} == {"#run-1", "#run-2"}
    assert {tag["id"] for tag in page.attributes("section") if "id" in tag} == {"run-1", "run-2"}
    assert "b/out" in page.text


def test_figures_of_other_protocols_are_not_plotted_together(tmp_path: Path) -> None:
    other = receipt(card__model__perplexity__protocol__window=512, card__divergence=None)
    directories = [_run(tmp_path / "a", receipt(card__divergence=None)), _run(tmp_path / "b", other)]
    page = Page(write_report(directories, tmp_path / "page.html", generate=False, spectra=False))
    assert "Perplexity against" not in page.source


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("page.txt", [], "ends with .html"),
        ("mine.html", [], "is not a report of Secateur"),
        ("nowhere/page.html", [], "there is no directory"),
        ("page.html", ["--tokens", "0"], "ask for at least 1"),
        ("page.html", ["--prompt", " "], "a prompt is empty"),
    ],
)
def test_a_wrong_output_is_refused_before_anything_is_done(
    tmp_path: Path, output: str, options: list[str], said: str
) -> None:
    run = _run(tmp_path / "run", receipt())
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    before = sorted(path.name for path in tmp_path.iterdir())
    told = secateur("report", run, "--output", tmp_path / output, *options)
    assert told.code == 2 and said in " ".join(told.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    told = secateur("report", tmp_path, "--output", tmp_path / "page.html")
    assert told.code == 2 and "holds no secateur.json" in told.err and not (tmp_path / "page.html").exists()
    (tmp_path / "compare.json").write_text('{"rows": [{"status": "done"}]}')
    told = secateur("report", tmp_path, "--output", tmp_path / "page.html")
    assert told.code == 2 and "holds no rows with names" in " ".join(told.err.split())
    assert secateur("report", tmp_path / "absent", "--output", tmp_path / "page.html").code == 2


def test_an_original_that_is_gone_is_said(tmp_path: Path) -> None:
    made = receipt()
    made["source"]["model"] = made["recipe"]["model"] = str(tmp_path / "gone")
    page = _page(made, tmp_path, generate=True, spectra=True)
    assert page.text.count("Not shown: the original cannot be opened: there is no model at gone") == 2
    assert str(tmp_path) not in page.source
    made["recipe"]["model"], made["source"]["model"] = None, "LlamaForCausalLM"
    page = _page(made, tmp_path / "live", generate=True, spectra=True)
    assert "Not shown: the original was a module in memory." in page.text


@pytest.fixture(scope="module")
def ran(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, clean: CleanProcess) -> tuple[Path, Path]:
    """A model and a result of it."""
    out = tmp_path_factory.mktemp("ran") / "out"
    cut = {"method": "magnitude_units", "parameters": {"ratio": 0.4}}
    secateur_compress(model("llama"), **cut, output=out, evaluate=False, clean=clean)
    return model("llama"), out


def test_a_page_of_a_real_run(ran: tuple[Path, Path], tmp_path: Path) -> None:
    """Spectra and texts are those of the two models; an earlier report is replaced."""
    source, out = ran
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html>\n{MARK}\nold")
    told = secateur(
        "report", out, "--output", tmp_path / "page.html", "--prompt", "the cat", "--tokens", "6", "--quiet"
    )
    assert told.code == 0, told.err
    page = Page(tmp_path / "page.html")
    assert "model.layers.1.mlp.down_proj" in page.text and "original, 64 × 160" in page.text
    assert "result, 64 × 96" in page.text and "Not shown" not in page.text
    mine, theirs = (write(str(path), ["the cat"], 6)[0] for path in (out, source))
    pair = side_by_side("the cat", theirs, mine)
    assert "".join(text for text, _ in pair.right) == mine.text and mine.text in "".join(page.texts)
    assert str(source.parent) not in page.source  # nothing says where files lie on this machine
    assert json.loads((out / "secateur.json").read_text())["shape"] == {
        "class": "LlamaForCausalLM", "blocks": 3, "hidden": 64, "vocabulary": 320, "parameters": 133_568,
        "token_parameters": 2 * 320 * 64,
    }  # fmt: skip


def test_an_original_that_has_changed_is_not_compared(ran: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(ran[1], tmp_path / "out")
    made = json.loads((tmp_path / "out" / "secateur.json").read_text())
    for entry in made["identity"]["source"]:
        entry[1] += entry[0].endswith(".safetensors")
    (tmp_path / "out" / "secateur.json").write_text(json.dumps(made))
    page = Page(write_report([tmp_path / "out"], tmp_path / "page.html", generate=False))
    assert "is no longer the file that the run read" in page.text


def test_spectra_are_singular_values() -> None:
    whole = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    found = compared("w", 0, whole, whole[:, :9])
    for matrix, curve in ((whole, found.curves[0]), (whole[:, :9], found.curves[1])):
        values = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(torch.tensor([y for _, y in curve]).double(), values, rtol=1e-5, atol=1e-5)
        assert [x for x, _ in curve] == pytest.approx([(i + 1) / len(values) for i in range(len(values))])
    assert found.energy == pytest.approx(float(whole[:, :9].square().sum() / whole.square().sum()))
    assert compared("w", 0, whole, whole).distance == 0 and found.distance > 0


def test_blocks_are_compared_with_those_that_they_were() -> None:
    made = receipt()
    made["decisions"] = [
        {"method": "a", "blocks": {"kept": [0, 2, 3], "removed": [1]}},
        {"method": "b", "blocks": {"kept": [0, 1, 2], "removed": [], "part": "attention"}},
        {"method": "c", "blocks": {"kept": [1, 2], "removed": [0]}},
    ]
    assert blocks_left(made, 4) == [2, 3]


def test_writing_is_what_transformers_writes() -> None:
    model, tokenizer = tiny.make("llama"), tiny.tokenizer()
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert greedy(model, tokenizer, "the cat", 12).text == expected
    # no further than the model has positions
    model.config.max_position_embeddings = ids.shape[1] + 3
    assert len(greedy(model, tokenizer, "the cat", 12).pieces) == 3


def test_writing_ends_with_the_end_token() -> None:
    model, tokenizer = tiny.make("llama"), tiny.tokenizer()
    first = greedy(model, tokenizer, "the cat", 1)
    ids = tokenizer("the cat")["input_ids"]
    with torch.inference_mode():
        chosen = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(chosen)
    assert first.pieces and greedy(model, tokenizer, "the cat", 5) == Written((), ended=True)


def test_words_are_marked_from_the_first_token_that_differs() -> None:
    one = Written((" a", " b", " c", " d"))
    pair = side_by_side("p", one, Written((" a", " b", " x", " d")))
    assert pair.same == 2
    assert pair.left == ((" a b", False), (" c", True), (" d", False))
    assert pair.right == ((" a b", False), (" x", True), (" d", False))
    assert side_by_side("p", one, one).same is None
    # a word that is the same but spelt by other tokens is not marked, and the place is still said
    assert side_by_side("p", Written((" ab",)), Written((" a", "b"))).right == ((" ab", False),)
    shorter = side_by_side("p", one, Written((" a", " b"), ended=True))
    assert (shorter.same, shorter.ended) == (2, (False, True))


def test_a_model_that_writes_only_line_breaks_fills_no_page() -> None:
    broken = side_by_side("p", Written((" a", "\n\nb")), Written((" a", *"\n" * 40)))
    assert "".join(text for text, _ in broken.left) == " a\n\nb"
    assert "".join(text for text, _ in broken.right) == " a\n⏎ × 40\n"


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1536, 4) == [0, 500, 1000, 1500, 2000]
    assert ticks(0, 0.07, 4) == [0, 0.02, 0.04, 0.06, 0.08]
    assert log_ticks(0.5, 300) == [1, 3, 10, 30, 100, 300]
    assert 2 <= len(log_ticks(1e-9, 1e9)) <= 8
    assert log_ticks(1.1, 1.2) == [1.1, 1.2]


def test_units_that_a_receipt_names_by_new_kinds_are_shown(tmp_path: Path) -> None:
    made = receipt(decisions__0__units={"neurons": {"0": unit(3, 4)}})
    page = _page(made, tmp_path)
    assert "block 0: 3 of 4 kept, 25.0 % removed" in page.text

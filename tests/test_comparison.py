"""Many recipes on one model: the runs are those of `compress`, and the table says what became of each."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import command
import outcomes
import secateur
import tiny
from secateur.comparison import Budget, entries, measuring, render
from secateur.comparison import run as running
from secateur.comparison.budget import fit
from secateur.comparison.entries import Entry, measured_alike
from secateur.comparison.state import task_data
from secateur.comparison.summary import fronts_of, row_of
from secateur.comparison.table import write_csv
from secateur.evaluation import forward
from secateur.evaluation.divergent import Continuations
from secateur.evaluation.energy import Counter, Meter
from secateur.evaluation.measure import evaluate
from secateur.evaluation.memory import Memory
from secateur.evaluation.pareto import pareto_front
from secateur.evaluation.remembered import Remembered
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess
from secateur.recipe import Recipe

Make = Callable[..., Path]
WORDS = "the river ran over stones and the children counted them one by one until the light was gone. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 40)
    return path


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    drawn = torch.Generator().manual_seed(0)
    path.write_text(json.dumps(torch.randint(3, tiny.VOCABULARY, (12, 16), generator=drawn).tolist()))
    return path


@pytest.fixture
def quick(clean: CleanProcess, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with which a comparison starts no process of its own; the memory of models is not what is tested here."""
    used = Memory(peak=2, baseline=1, tokens=8, dtype="float32")
    monkeypatch.setattr("secateur.evaluation.measure.memory", lambda *_, **__: used)
    return {"clean": clean, "pairs": 1, "windows": 1}


def steps(*wanted: Any, **settings: Any) -> Recipe:
    return Recipe.parse({"steps": list(wanted), **settings})


def rows_of(told: secateur.Compared) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in told.summary["rows"]}


def shown(summary: dict[str, Any]) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(summary))
    return " ".join(console.export_text().split())


# the front


def test_the_front_is_what_no_point_dominates() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        size = drawn.randint(0, 9)
        points = [(float(drawn.randint(0, 4)), drawn.choice([0.0, 1.0, 2.0, float("inf")])) for _ in range(size)]

        def dominated(one: tuple[float, float], points: list[tuple[float, float]] = points) -> bool:
            return any(p[0] <= one[0] and p[1] <= one[1] and p != one for p in points)

        assert pareto_front(points) == [i for i, point in enumerate(points) if not dominated(point)]
    with pytest.raises(ValueError, match="not a number"):
        pareto_front([(0.0, float("nan"))])


def test_the_uncut_model_keeps_what_is_no_smaller_off_the_front(model: Make, text: Path, quick: dict) -> None:
    card = evaluate(model("llama"), model("llama"), text=text, windows=1, speed=False).to_dict()
    dense = open_model(model("llama")).anatomy.parameters

    def told(parameters: int, nll: float) -> dict[str, Any]:
        perplexity = {**card["model"]["perplexity"], "perplexity": nll}
        own = {**card, "model": {**card["model"], "perplexity": perplexity}}
        achieved = {"parameters": parameters, "bytes": 4 * parameters, "zeros": 0}
        return {"status": "done", "error": None, "seed": 0, "run": "x", "card": own, "achieved": achieved}

    quality = card["reference"]["perplexity"]["perplexity"]
    rows = [
        row_of("worse and as large", [told(dense, quality + 1)], "perplexity"),
        row_of("smaller", [told(dense - 10, quality + 2)], "perplexity"),
        row_of("as small and worse", [told(dense - 10, quality + 3)], "perplexity"),
        row_of("as small and as good", [told(dense - 10, quality + 2)], "perplexity"),
    ]
    assert fronts_of(rows, "perplexity")["parameters"] == {
        "rows": ["smaller", "as small and as good"],
        "reference": True,
    }


def test_a_row_of_several_seeds_shows_the_run_in_the_middle() -> None:
    def told(seed: int, status: str = "done") -> dict[str, Any]:
        return {"status": status, "error": "why" if status != "done" else None, "seed": seed, "run": f"x/{seed}"}

    row = row_of("x", [told(0), told(1, "failed"), told(2)], "kl")
    assert row["status"] == "failed" and row["error"] == "seed 1: why" and row["quality"] is None
    assert [each["seed"] for each in row["seeds"]] == [0, 1, 2]


# what is remembered


def test_logits_are_computed_once_as_far_as_they_fit() -> None:
    module = tiny.make("llama")
    ids = torch.arange(24).view(3, 1, 8)
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        truth = [forward.logits_of(module, each) for each in ids]
        kept = Remembered(module, most=2 * truth[0].nbytes)
        for _ in range(3):
            for each, logits in zip(ids, truth, strict=True):
                assert torch.equal(forward.logits_of(kept, each), logits)
    assert len(calls) == 3 + 3 + 2, "two stay, the third is computed each time"
    assert forward.maximum_positions(kept) == tiny.CONTEXT and forward.dtype_of(kept) == "float32"


# what is compared


def test_rows_are_named_after_files_methods_and_the_grid(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: [block_influence: {ratio: 0.3}, wanda: {pattern: 0.5}]")
    found = entries(
        [tmp_path / "mine.yaml"], ["flap", "magnitude"], ["flap.multiple_of=8", "calibration.length=16"],
        ["flap.ratio=0.1,0.2", "magnitude.pattern=2:4,0.5"], {"samples": 3},
    )  # fmt: skip
    assert [entry.name for entry in found] == [
        "mine", "flap flap.ratio=0.1", "flap flap.ratio=0.2", "magnitude magnitude.pattern=2:4",
        "magnitude magnitude.pattern=0.5",
    ]  # fmt: skip
    assert [entry.recipe.steps[0].parameters.get("ratio") for entry in found[1:3]] == [0.1, 0.2]
    assert found[1].recipe.steps[0].parameters["multiple_of"] == 8
    assert [entry.recipe.steps[0].parameters["pattern"] for entry in found[3:]] == ["2:4", "0.5"]
    assert [entry.recipe.calibration.samples for entry in found] == [3, 3, 3, None, None]
    assert found[0].recipe.calibration.length == 16
    assert found[0].folder == "mine" and found[3].folder == "magnitude-magnitude.pattern=2-4"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name what to compare"),
        (["--method", "flapp"], "no method 'flapp'. Did you mean 'flap'?"),
        (["--method", "flap", "--method", "flap"], "two recipes are called 'flap'"),
        (["--method", "flap", "--set", "rato=1"], "no parameter 'rato'"),
        (["--method", "flap", "--set", "wanda.pattern=0.5"], "no recipe has a step 'wanda'"),
        (["--method", "flap", "--grid", "ratio"], "not of the form key=value,value"),
        (["--method", "magnitude", "--samples", "4"], "take no calibration"),
        (["--method", "magnitude", "--calibration", "nowhere.txt"], "take no calibration"),
        (["--method", "flap", "--calibration", "nowhere.txt"], "no calibration text at nowhere.txt"),
        (["--method", "flap", "--text", "nowhere.txt"], "no text at nowhere.txt"),
        (["--method", "flap", "--budget", "weights=0.5"], "not of the form parameters|multiply_adds|bytes=NUMBER"),
        (["--method", "flap", "--budget", "parameters=none"], "give a fraction"),
        (["--method", "flap", "--budget", "parameters=100M"], "but the model has"),
        (["--method", "magnitude", "--tasks", "piqqa=TEXT"], "no definition of the task 'piqqa'"),
        (["--method", "magnitude", "--tasks", "nowhere.yaml"], "there is no task at nowhere.yaml"),
        (["--method", "magnitude", "--facts", "nowhere.jsonl"], "there are no facts at nowhere.jsonl"),
        (["--method", "flap", "--keep", "some"], "none of all, front and none"),
        (["--method", "flap", "--seed", "1", "--seed", "1"], "named twice"),
        (["--recipe", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["--method", "flap", "--tolerance", "0.1"], "--tolerance would change nothing without --budget"),
        (["--method", "flap", "--no-evaluate", "--kick"], "--kick would change nothing beside --no-evaluate"),
        (
            ["--method", "flap", "--no-evaluate", "--pairs", "3", "--windows", "2"],
            "--windows and --pairs would change nothing beside --no-evaluate",
        ),
        (["--method", "flap", "--limit", "3"], "--limit says how many questions are asked, and none are"),
    ],
)
def test_a_wrong_request_writes_nothing(model: Make, tmp_path: Path, arguments: list[str], said: str) -> None:
    told = command.secateur("compare", model("llama"), "--quiet", "--output", tmp_path / "out", *arguments)
    assert told.code == 2 and said in told.err, told
    assert not (tmp_path / "out").exists()


# budgets

FITTED = {
    "units": {"random_units": {"multiple_of": 1}},
    "heads and units": {"magnitude_units": {"axis": ["heads", "neurons"], "multiple_of": 1}},
    "network": {"prunenet": {"multiple_of": 1}},
    "blocks": {"layer_drop": {}},
    "channels": {"slicegpt": {"multiple_of": 1}},
    "after blocks": [{"layer_drop": {"remove": 1}}, {"random_units": {"multiple_of": 1}}],
}


SLOWER = ("channels", "after blocks")


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        *(pytest.param(name, "parameters", marks=[pytest.mark.every] * (name in SLOWER)) for name in FITTED),
        pytest.param("network", "bytes", marks=pytest.mark.every),
    ],
)
def test_recipes_are_told_what_meets_a_budget(model: Make, tmp_path: Path, name: str, measure: str) -> None:
    """The foretold size is the nearest that there is, tried one by one where there are few."""
    source = open_model(model("llama"))
    wanted = FITTED[name]
    plan = steps(*(wanted if isinstance(wanted, list) else [wanted]), calibration={"samples": 2})
    amount = 0.6 if name == "after blocks" else 0.8
    fitted = fit(source, plan, Budget.parse(f"{measure}={amount}"))
    result = {"parameters": _size(source, fitted.recipe)}
    result["bytes"] = 4 * result["parameters"]  # all float32
    whole = source.anatomy.parameters * (1 if measure == "parameters" else 4)
    assert fitted.wanted == round(amount * whole) and fitted.measure == measure and not fitted.note
    if name == "blocks":
        removals = [steps({"layer_drop": {"remove": count}}) for count in range(tiny.BLOCKS)]
        nearest = min(abs(_size(source, each) - amount * source.anatomy.parameters) for each in removals)
        assert abs(result["parameters"] - amount * source.anatomy.parameters) == nearest
    elif name == "channels":  # as many as the heads divide
        ratios = [1 - kept / 64 for kept in range(4, 64, 4)]
        sizes = [_size(source, steps({"slicegpt": {"multiple_of": 1, "ratio": each}})) for each in ratios]
        assert abs(result[measure] - fitted.wanted) == min(abs(each - fitted.wanted) for each in sizes)
    else:
        assert result[measure] == pytest.approx(fitted.wanted, rel=0.02)
    if name == "after blocks":
        assert fitted.recipe.steps[0] == plan.steps[0], "the last step that can makes up for the rest"


def _size(source: Any, plan: Recipe) -> int:
    from secateur.forecast import foretold

    return foretold(source, plan, 0)["parameters_after"]


def test_a_budget_in_multiply_adds(model: Make) -> None:
    from secateur.unit_budgets import counted

    source = open_model(model("llama"))
    fitted = fit(source, steps({"random_units": {"multiple_of": 1}}), Budget.parse("multiply-adds=0.8"))
    assert fitted.recipe.steps[0].parameters["of"] == "multiply_adds"
    assert fitted.recipe.steps[0].parameters["target"] == round(0.8 * counted(source, "multiply_adds"))


def test_what_only_zeroes_weights_gets_as_many_zeros(model: Make) -> None:
    source = open_model(model("llama"))
    fitted = fit(source, steps({"magnitude": {"pattern": "0.1/8x8"}}), Budget.parse("parameters=0.8"))
    zeros = round(0.2 * source.anatomy.parameters)
    assert fitted.measure == "zeros" and fitted.wanted == zeros and "no smaller" in fitted.note
    fraction, _, tile = fitted.recipe.steps[0].parameters["pattern"].partition("/")
    weights = sum(p.numel() for name, p in source.skeleton.named_parameters() if p.ndim == 2 and "layers" in name)
    assert tile == "8x8" and float(fraction) * weights == pytest.approx(zeros, rel=1e-4)
    fixed = fit(source, steps({"magnitude": {"pattern": "2:4"}}), Budget.parse("parameters=0.8"))
    assert fixed.recipe.steps[0].parameters["pattern"] == "2:4" and "runs as it was given" in fixed.note
    with pytest.raises(secateur.RequestError, match="its matrices hold"):
        fit(source, steps({"magnitude": {"targets": "attention"}}), Budget.parse("parameters=0.5"))


@pytest.mark.every
def test_where_blocks_come_out_differing_the_step_is_told_what_would_do_if_they_did_not(model: Make) -> None:
    source = open_model(model("llama"))
    told = fit(source, steps({"adapt_pruner": {"multiple_of": 1}}), Budget.parse("parameters=0.8"))
    alike = fit(source, steps({"prunenet": {"multiple_of": 1}}), Budget.parse("parameters=0.8"))
    assert told.recipe.steps[0].parameters["overall"] == alike.recipe.steps[0].parameters["ratio"] > 0.2
    assert "if all blocks came out alike" in told.note


# the whole


def test_runs_are_those_of_compress_and_every_row_is_told(
    model: Make, text: Path, calibration: Path, quick: dict, clean: CleanProcess, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    learned = {"calibration": {"data": str(calibration), "samples": 8, "length": 16, "held_out": 2}}
    recipes = {
        "random": steps({"random_units": {"multiple_of": 1}}),
        "flap": steps({"flap": {"multiple_of": 1}}, **learned),
        "two steps": steps({"random_units": {"ratio": 0.1}}, {"magnitude_units": {"multiple_of": 1}}),
        "zeros": steps({"magnitude": {}}),
        "experts": steps({"reap": {}}, **learned),
        "broken": steps({"magnitude_units": {"multiple_of": 1}}),
    }
    real = running.compress

    def compress(*arguments: Any, **options: Any) -> Any:
        if options["output"].name == "broken":
            raise ZeroDivisionError("by zero")
        return real(*arguments, **options)

    monkeypatch.setattr(running, "compress", compress)
    told = secateur.compare(
        model("llama"), recipes, output=tmp_path / "out", budget="parameters=0.8", text=text, **quick
    )
    rows = rows_of(told)
    assert {name: row["status"] for name, row in rows.items()} == {
        "random": "done", "flap": "done", "two steps": "done", "zeros": "done", "experts": "refused", "broken": "failed",
    }  # fmt: skip
    assert "no block" in rows["experts"]["error"] and rows["broken"]["error"] == "ZeroDivisionError: by zero"
    dense = open_model(model("llama")).anatomy.parameters
    for name in ("random", "flap", "two steps"):
        row, result = rows[name], tmp_path / "out" / "runs" / name.replace(" ", "-")
        plan = Recipe.parse({key: value for key, value in row["recipe"].items() if key != "evaluate"})
        real(model("llama"), recipe=plan, output=tmp_path / name, evaluate=False, clean=clean)
        assert outcomes.promised(result) == outcomes.promised(tmp_path / name), name
        assert row["achieved"]["parameters"] == outcomes.parameters(_load(result))
        assert row["budget"]["within"] == (abs(row["achieved"]["parameters"] / (0.8 * dense) - 1) <= 0.01)
        assert row["budget"]["within"], row["budget"]
        assert row["achieved"]["zeros"] == 0
        receipt = json.loads((result / "secateur.json").read_text())
        assert receipt["card"] == row["card"] and "perplexity" in (result / "README.md").read_text()
        alone = evaluate(result, model("llama"), text=text, windows=1, speed=False).to_dict()
        for part in ("model", "reference"):
            assert row["card"][part]["perplexity"] == alone[part]["perplexity"]
        assert row["card"]["divergence"] == alone["divergence"] and row["card"]["speed"]["pairs"] == 1
        assert row["card"]["expected_gain"] > 0
    zeros = rows["zeros"]
    assert zeros["achieved"]["parameters"] == dense and "parameters" not in zeros["fronts"]
    assert zeros["achieved"]["zeros"] == pytest.approx(0.2 * dense, rel=1e-3) and zeros["budget"]["within"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written == told.summary and written["protocol"]["quality"] == "perplexity"
    best = min((row for row in written["rows"] if row["card"]), key=lambda row: row["quality"]["median"])
    assert best["name"] in written["fronts"]["parameters"]["rows"] or written["fronts"]["parameters"]["reference"]
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == list(recipes)
    assert float(lines[1]["kl"]) == rows["flap"]["card"]["divergence"]["kl"] and lines[4]["error"]
    said = shown(written)
    assert "broken, failed: ZeroDivisionError: by zero" in said and "zeros: it only zeroes weights" in said
    assert "met by 4 of 4 results" in said and "Zeros alone make neither files nor speed better, in zeros." in said
    assert not (tmp_path / "out" / ".secateur").exists()
    # what failed is tried again, and nothing else
    again: list[str] = []

    def count(*arguments: Any, **options: Any) -> Any:
        again.append(options["output"].name)
        return real(*arguments, **options)

    monkeypatch.setattr(running, "compress", count)
    told = secateur.compare(
        model("llama"), recipes, output=tmp_path / "out", budget="parameters=0.8", text=text, **quick
    )
    now = rows_of(told)["flap"] | {"fronts": rows["flap"]["fronts"]}  # what is timed now may be faster
    assert again == ["broken"] and now == rows["flap"]
    before = command.snapshot(tmp_path / "out")
    monkeypatch.setattr(measuring, "open_reference", lambda *_, **__: pytest.fail("nothing is left to measure"))
    secateur.compare(model("llama"), recipes, output=tmp_path / "out", budget="parameters=0.8", text=text, **quick)
    assert command.snapshot(tmp_path / "out") == before and again == ["broken"]
    with pytest.raises(secateur.RequestError, match="another comparison, which differs in budget"):
        secateur.compare(model("llama"), recipes, output=tmp_path / "out", budget="parameters=0.7", text=text, **quick)


def _load(result: Path) -> Any:
    from secateur.network.source import load

    return load(result)[0]


def test_what_is_finished_is_not_run_again(
    model: Make, quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"first": steps({"random_units": {}}), "second": steps({"random_units": {"ratio": 0.4}})}
    real, begun = running.compress, list[str]()

    def compress(*arguments: Any, **given: Any) -> Any:
        begun.append(given["output"].name)
        if begun == ["first", "second"]:
            with pytest.MonkeyPatch.context() as patch:
                outcomes.kill_at_rename(patch, 3)
                return real(*arguments, **given)
        return real(*arguments, **given)

    monkeypatch.setattr(running, "compress", compress)
    options = {**quick, "pairs": 0, "evaluate": False}
    with pytest.raises(outcomes.Killed):
        secateur.compare(model("llama"), recipes, output=tmp_path / "out", **options)
    assert (tmp_path / "out" / ".secateur").is_dir() and not (tmp_path / "out" / "compare.json").exists()
    with pytest.raises(secateur.RequestError, match="another comparison, which differs in seeds"):
        secateur.compare(model("llama"), recipes, output=tmp_path / "out", seeds=(7,), **options)
    told = secateur.compare(model("llama"), recipes, output=tmp_path / "out", **options)
    assert begun == ["first", "second", "second"]
    assert [row["status"] for row in told.summary["rows"]] == ["done", "done"]
    assert not list((tmp_path / "out").rglob(".secateur"))


@pytest.mark.every
def test_killed_anywhere_the_same_call_goes_on(
    model: Make, calibration: Path, quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = {"data": str(calibration), "samples": 6, "length": 16, "held_out": 2}
    recipes = {
        "flap": steps({"flap": {}}, calibration=learned),
        "wanda": steps({"wanda_units": {}}, calibration=learned),
    }
    options = {"keep": "front", "seeds": (1,), **quick}
    # Which result is faster differs between two calls: fronts that count, and so what is kept, must not depend on it.
    monkeypatch.setattr("secateur.comparison.summary.latency", lambda pace: None)
    whole = secateur.compare(model("llama"), recipes, output=tmp_path / "whole", **options)
    promised = {key: each for key, each in outcomes.promised(tmp_path / "whole" / "runs").items() if not _said(key)}
    drawn: list[str] = []
    from secateur.calibration import samples

    real_samples, real_compress = samples.collect_samples, running.compress
    finished: list[str] = []

    def collect(*arguments: Any, **given: Any) -> Any:
        drawn.append("collected")
        return real_samples(*arguments, **given)

    def compress(*arguments: Any, **given: Any) -> Any:
        done = real_compress(*arguments, **given)
        finished.append(given["output"].name)
        return done

    monkeypatch.setattr(samples, "collect_samples", collect)
    monkeypatch.setattr(running, "compress", compress)
    deaths = 0
    for at in [1, 5, 9, 10, 10, 6, 3, 2, 1, 1, 0, 500]:
        with pytest.MonkeyPatch.context() as patch:
            outcomes.kill_at_rename(patch, at)
            try:
                told = secateur.compare(model("llama"), recipes, output=tmp_path / "out", **options)
                break
            except outcomes.Killed:
                deaths += 1
    assert deaths >= 6
    assert drawn == ["collected"], "the tokens of both that learn are the same"
    assert set(finished) == {"flap", "wanda"} and len(finished) <= 3, finished
    assert {
        key: each for key, each in outcomes.promised(tmp_path / "out" / "runs").items() if not _said(key)
    } == promised
    for row, other in zip(told.summary["rows"], whole.summary["rows"], strict=True):
        assert row["achieved"] == other["achieved"]
        assert row["card"]["divergence"] == other["card"]["divergence"]


def _said(path: str) -> bool:
    return Path(path).name in outcomes.MEASURED


def test_what_was_asked_of_results_is_shown_and_measured_again_where_it_failed(
    model: Make, quick: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, facts, out = tmp_path / "energy", tmp_path / "facts.jsonl", tmp_path / "out"
    counter.write_text("0")
    asked = {"question": "what ran", "answers": "the river", "context": "the river ran", "alternatives": ["the light"]}
    facts.write_text(json.dumps(asked) + "\n")
    monkeypatch.setattr(measuring.Meter, "find", lambda: Meter([Counter("package-0", counter, 10**6)]))
    recipes = {"half": steps({"random_units": {"ratio": 0.5}})}
    real, options = measuring.measure, {"output": out, "limit": 1, "facts": facts, **quick, "window": 16}
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: {"skipped": "there is no room"})
    told = secateur.compare(model("llama"), recipes, **options, keep="front")
    [row] = told.summary["rows"]
    assert row["card"] is None and row["not_measured"] == "there is no room" and row["result"]
    measured: list[str] = []

    def measure(*arguments: Any, **given: Any) -> Any:
        measured.append("again")
        return real(*arguments, **given)

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(running, "scanned", lambda *_: pytest.fail("nothing is left to run"))
    told = secateur.compare(model("llama"), recipes, **options)
    [row] = told.summary["rows"]
    assert row["card"] and row["not_measured"] is None and row["card"]["speed"]["energy"] == ["package-0"]
    scores = {each["task"]: each["value"] for each in row["card"]["kick"]["scores"]}
    with (out / "compare.csv").open(newline="") as file:
        [line] = csv.DictReader(file)
    assert {task: float(line[f"kick:{task}"]) for task in scores} == scores and len(scores) == 6
    said = shown(told.summary)
    assert "kick: closed book" in said and "facts.jsonl" in said
    # finished, and as it is; then fewer results stay
    before = command.snapshot(out)
    secateur.compare(model("llama"), recipes, **options)
    assert command.snapshot(out) == before and (out / row["result"] / "config.json").is_file()
    [row] = secateur.compare(model("llama"), recipes, **options, keep="none").summary["rows"]
    assert row["result"] is None and [path.name for path in (out / "runs/half").iterdir()] == ["secateur.json"]
    before = command.snapshot(out)
    secateur.compare(model("llama"), recipes, **options, keep="none")
    assert command.snapshot(out) == before and measured == ["again"]
    facts.write_text(json.dumps(asked | {"question": "who ran"}) + "\n")
    with pytest.raises(secateur.RequestError, match="another comparison, which differs in facts"):
        secateur.compare(model("llama"), recipes, **options)


def test_scores_have_columns_for_all_rows(model: Make, text: Path, quick: dict) -> None:
    card = evaluate(
        model("llama"), model("llama"), text=text, windows=1, speed=False, divergent=Continuations(2, 4, 3)
    ).to_dict()  # fmt: skip
    score = {
        "name": "piqa",
        "metric": "acc",
        "value": 0.25,
        "stderr": 0.1,
        "reference": 0.75,
        "n": 4,
        "source": {"definition": "x"},
    }
    card["tasks"] = [score]
    achieved = {"parameters": 1, "multiply_adds": 1, "bytes": 1, "zeros": 0}
    told = {
        "status": "done",
        "error": None,
        "seed": 0,
        "card": card,
        "achieved": achieved,
        "seconds": 1.0,
        "cautions": [],
    }
    failed = {"status": "failed", "error": "why", "seed": 0, "run": "y"}
    rows = [row_of("asked", [told], "perplexity"), row_of("failed", [failed], "perplexity")]
    summary = {
        "model": "m", "rows": rows, "fronts": {}, "budget": None, "protocol": {"quality": "perplexity"},
        "reference": {"parameters": 2, "bytes": 2},
    }  # fmt: skip
    said = shown(summary)
    assert "piqa acc" in said and "0.2500 ± 0.1000" in said and "0.7500" in said and "divergent tokens" in said
    write_csv(text.parent / "x.csv", summary)
    with (text.parent / "x.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["task:piqa:acc"] == "0.25" and first["divergent_share"] == "0.0"
    assert first["tokens_before_divergent"] == "3.0" and second["task:piqa:acc"] == "" and second["error"] == "why"


def test_recipes_that_want_other_things_measured_are_told_what_cures_it() -> None:
    some = {"plain": steps({"magnitude": {}}), "kick": steps({"magnitude": {}}, evaluate={"kick": True, "limit": 2})}
    found = [Entry(name, recipe) for name, recipe in some.items()]
    with pytest.raises(secateur.RequestError, match=r"\(limit, kick\); say --limit, --kick for all, or write the same"):
        measured_alike(found, {})
    assert len({str(each.recipe.evaluate) for each in measured_alike(found, {"kick": True, "limit": 2})}) == 1


def test_a_task_that_cannot_be_asked_is_refused_before_anything_is_done(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, begun = tmp_path / "piqa.jsonl", list[str]()
    data.write_text(json.dumps({"goal": "run", "sol1": "a", "sol2": "b"}) + "\n")
    monkeypatch.setattr(running, "compress", lambda *_, **__: begun.append("run"))
    with pytest.raises(secateur.RequestError, match="label"):
        secateur.compare(
            model("llama"), {"a": steps({"magnitude": {}})}, output=tmp_path / "out", tasks=[f"piqa={data}"]
        )  # fmt: skip
    assert not begun and not (tmp_path / "out").exists()


def test_a_comparison_knows_the_data_of_its_tasks(model: Make, tmp_path: Path) -> None:
    data, prints = tmp_path / "piqa.jsonl", list[str]()
    for goal in ("run", "walk"):
        data.write_text(json.dumps({"goal": goal, "sol1": "a", "sol2": "b", "label": 0}) + "\n")
        told = task_data([f"piqa={data}"], trust_remote_code=False)
        prints.append(json.dumps(told))
    assert prints[0] != prints[1] and "lm-eval" in prints[0]


@pytest.mark.every
def test_where_speed_has_no_room_the_row_says_so(model: Make, text: Path, quick: dict, tmp_path: Path) -> None:
    source = open_model(model("llama"))
    recipes = {"half": steps({"random_units": {"ratio": 0.5}})}
    room = 2 * 4 * source.anatomy.parameters - 4
    told = secateur.compare(
        model("llama"), recipes, output=tmp_path / "out", text=text, max_memory=room, **quick
    )  # fmt: skip
    [row] = told.summary["rows"]
    assert row["card"] and row["card"]["speed"] is None and "above --max-memory" in row["not_measured"]
    assert "Not measured: speed" in shown(told.summary)


@pytest.mark.every
def test_zeros_are_those_that_are_written(model: Make, quick: dict, tmp_path: Path) -> None:
    """Whatever later steps did to the matrices that an earlier one zeroed weights in, and wherever they lie by then."""
    recipes = {
        "both": steps({"magnitude": {"pattern": 0.2}}, {"magnitude": {"pattern": 0.3}}),
        "then cut": steps({"magnitude": {"pattern": 0.5}}, {"magnitude_units": {"ratios": [0.4] * tiny.BLOCKS}}),
        "then dropped": steps({"magnitude": {"pattern": 0.3, "targets": "attention"}}, {"layer_drop": {"remove": 1}}),
    }
    told = secateur.compare(
        model("llama"), recipes, output=tmp_path / "out", budget="parameters=0.8", **{**quick, "evaluate": False}
    )
    rows = rows_of(told)
    for name, row in rows.items():
        module, seen = _load(tmp_path / "out" / row["result"]), "self_attn" if name == "then dropped" else "layers"
        weights = [p for key, p in module.named_parameters() if p.ndim == 2 and seen in key]
        zeros = sum(p.numel() - int(p.count_nonzero()) for p in weights)
        assert row["achieved"]["zeros"] == zeros > 0, name
        receipt = json.loads((tmp_path / "out" / row["receipt"]).read_text())
        assert receipt["zeros"] == {"zeros": zeros, "of": sum(p.numel() for p in weights)}, name
    for name in ("both", "then cut"):
        assert rows[name]["budget"]["measure"] == "zeros"
        assert rows[name]["budget"]["reached"] == rows[name]["achieved"]["zeros"]


@pytest.mark.every
def test_results_that_are_on_no_front_may_go(model: Make, quick: dict, tmp_path: Path) -> None:
    recipes = {"half": steps({"random_units": {"ratio": 0.5}}), "zeros": steps({"magnitude": {"pattern": 0.9}})}
    for keep, left in (("front", {"half"}), ("none", set())):
        out = tmp_path / keep
        told = secateur.compare(model("llama"), recipes, output=out, keep=keep, **{**quick, "pairs": 0})
        rows = rows_of(told)
        assert {name for name in recipes if list((out / "runs" / name).glob("*.safetensors"))} == left
        assert {name for name, row in rows.items() if row["result"]} == left
        assert all((out / row["receipt"]).is_file() for row in rows.values())
        assert rows["half"]["fronts"] and not rows["zeros"]["fronts"]
        assert rows["half"]["quality"]["measure"] == "kl"


@pytest.mark.every
def test_several_seeds_make_one_row(model: Make, quick: dict, tmp_path: Path) -> None:
    recipes = {"random": steps({"random_units": {}})}
    seeds = {"seeds": (1, 2, 3), **quick, "pairs": 0}
    summary = secateur.compare(model("llama"), recipes, output=tmp_path / "out", **seeds).summary
    [row] = summary["rows"]
    kls = [each["card"]["divergence"]["kl"] for each in row["seeds"]]
    assert len(set(kls)) == 3
    assert row["quality"]["median"] == sorted(kls)[1] == row["card"]["divergence"]["kl"]
    assert (row["quality"]["lower"], row["quality"]["upper"]) == (min(kls), max(kls))
    assert [each["recipe"]["seed"] for each in row["seeds"]] == [1, 2, 3]
    assert "random" in shown(summary) and "median (range)" in shown(summary)
    assert (tmp_path / "out" / "runs" / "random" / "seed-1" / "config.json").is_file()


def test_when_nothing_succeeds_the_command_fails(model: Make, quick: dict, tmp_path: Path) -> None:
    told = command.secateur(
        "compare", model("llama"), "--method", "reap", "--output", tmp_path / "out", "--quiet", "--samples", 2
    )
    assert told.code == 1 and "none of 1 recipes gave a result" in told.err and "no block" in told.err
    [row] = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["status"] == "refused"


def test_a_model_with_a_broken_weight_is_refused_before_anything_stays(tmp_path: Path, quick: dict) -> None:
    module = tiny.make("llama")
    with torch.no_grad():
        module.lm_head.weight[0, 0] = float("nan")
    module.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(secateur.RequestError, match="lm_head"):
        secateur.compare(tmp_path / "model", {"a": steps({"random_units": {}})}, output=tmp_path / "new/out", **quick)
    assert not (tmp_path / "new").exists()


# run by tests/forked.py, which gives `clean`
PROGRAM = """
import os
from pathlib import Path

import secateur, secateur.comparison.run, secateur.evaluation.measure
from secateur.evaluation.memory import Memory

used = Memory(peak=2, baseline=1, tokens=8, dtype="float32")
secateur.evaluation.measure.memory = lambda *_, **__: used
compress = secateur.comparison.run.compress

def noted(*arguments, **given):
    with Path({output!r}).with_name("who").open("a") as file:
        file.write(os.environ["RANK"] + " of " + os.environ["WORLD_SIZE"] + ": " + given["output"].name + chr(10))
    return compress(*arguments, **given)

secateur.comparison.run.compress = noted
recipes = {{name: secateur.Recipe.parse(recipe) for name, recipe in {recipes}.items()}}
secateur.compare({model!r}, recipes, output={output!r}, windows=1, pairs=1, clean=clean)
"""


@pytest.mark.every
def test_two_processes_share_the_runs_out(model: Make, calibration: Path, quick: dict, tmp_path: Path) -> None:
    from test_distributed import forked

    learned = {"data": str(calibration), "samples": 6, "length": 16, "held_out": 2}
    recipes: dict[str, dict[str, Any]] = {
        "flap": {"steps": [{"flap": {}}], "calibration": learned},
        "random": {"steps": [{"random_units": {}}]},
        "experts": {"steps": [{"reap": {}}], "calibration": learned},
    }
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(recipes=recipes, model=str(model("llama")), output=str(tmp_path / "two")))
    ended = forked(program)
    assert ended.returncode == 0, ended.stderr
    assert sorted((tmp_path / "who").read_text().splitlines()) == ["0 of 2: experts", "0 of 2: flap", "1 of 2: random"]
    alone = {name: Recipe.parse(recipe) for name, recipe in recipes.items()}
    secateur.compare(model("llama"), alone, output=tmp_path / "one", **quick)
    one, two = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one["rows"], two["rows"], strict=True):
        for key in ("name", "status", "error", "achieved"):
            assert first[key] == second[key]
        if first["card"]:
            assert first["card"]["divergence"] == second["card"]["divergence"]
            assert second["card"]["speed"]["pairs"] == 1
    assert outcomes.promised(tmp_path / "one" / "runs") == outcomes.promised(tmp_path / "two" / "runs")
    assert not (tmp_path / "two" / ".secateur").exists()

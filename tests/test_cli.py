"""The command line: what it prints, and what it does not do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gguf_file
import outcomes
import tiny
from command import compress, secateur, snapshot
from secateur import RequestError, cli, forecast, registry, run
from secateur.network.source import open_model
from secateur.recipe import Evaluate
from secateur.workspace import Workspace

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("shared_clean")


def _forecast(said: str) -> dict[str, str]:
    return {key: value for line in said.splitlines() for key, _, value in [line.partition(": ")]}


def test_a_dry_run_writes_nothing_and_says_so(model: Make, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    told = compress(model("llama"), tmp_path / "out", "--dry-run", "--set", "ratio=0.4")
    assert told.code == 0 and told.err == ""
    assert snapshot(tmp_path) == before
    said = _forecast(told.out)
    assert said["would cut"] == "feed-forward neurons 160 → 96 in 3 blocks"
    assert str(tmp_path / "out") in said["would write"]
    assert {"disk needed", "memory needed", "time"} <= said.keys()
    assert told.out.rstrip().endswith("nothing was written.")


@pytest.mark.parametrize(
    ("method", "setting"), [("adapt_pruner", "overall=0.3"), ("bonsai", "uniform=false"), ("minitron", "target=0.8")]
)
def test_a_dry_run_says_what_it_cannot_foretell(method: str, setting: str, model: Make, tmp_path: Path) -> None:
    told = compress(
        model("llama"), tmp_path / "out", "--dry-run", "--set", setting, "--calibration", "self", "--samples", 2,
        "--length", 8, method=method,
    )  # fmt: skip
    assert told.code == 0 and f"what {method} cuts, so these are upper bounds" in told.out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("gpt2", {}),
        ("phi3", {"dtype": torch.bfloat16}),
        ("opt", {"shard_size": "300KB"}),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"dtype": "float16"}])
def test_the_numbers_of_a_dry_run_are_right(
    name: str, options: dict, arguments: dict, model: Make, tmp_path: Path
) -> None:
    recipe = run.Recipe.parse({"steps": [{"random_units": {"ratio": 0.2}}, {"magnitude_units": {"ratio": 0.25}}]})
    given = {"recipe": recipe, "output": tmp_path / "out", **arguments}
    said = forecast.dry_run(model(name, **options), **given)
    run.compress(model(name, **options), evaluate=False, **given)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert said["parameters"] == outcomes.parameters(tiny.make(name))
    assert said["parameters_after"] == outcomes.parameters(result)
    assert set(map(str, said["units"]["neurons"].values())) == {"{'kept': 96, 'of': 160}"}
    files = list((tmp_path / "out").glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert said["bytes_written"] == sum(tensor.nbytes for tensor in tensors)
    headers = sum(file.stat().st_size for file in files) - said["bytes_written"]
    assert headers < 200 * len(tensors), "what files hold beside the weights is nothing in a model of real size"


def test_a_dry_run_counts_what_lies_on_disk_before_the_end(
    model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = run.Recipe.parse({"steps": [{"zipf_surgeon": {"ratio": 0.2}}, {"magnitude_units": {"ratio": 0.25}}]})
    given = {"recipe": recipe, "output": tmp_path / "out"}
    said = forecast.dry_run(model("llama"), **given)["disk_needed"]
    taken, finish = [], Workspace.finish

    def look(workspace: Workspace, receipt: dict) -> None:
        weighed = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.parent.name != "secateur"]
        taken.append(sum(tensor.nbytes for path in weighed for tensor in load_file(path).values()))
        finish(workspace, receipt)

    monkeypatch.setattr(Workspace, "finish", look)
    run.compress(model("llama"), evaluate=False, **given)
    [needed] = taken
    assert needed <= said < 1.35 * needed, "an upper bound: the width that the source has is counted everywhere"


def test_a_dry_run_of_what_must_be_converted(tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "small.gguf")
    before = snapshot(tmp_path)
    told = compress(tmp_path / "small.gguf", tmp_path / "out", "--dry-run")
    assert told.code == 0, told.err
    assert "not known before" in told.out and snapshot(tmp_path) == before
    said = forecast.dry_run(
        tmp_path / "small.gguf", recipe=run.Recipe.parse({"steps": ["random_units"]}), output=tmp_path / "o"
    )
    run.compress(tmp_path / "small.gguf", "random_units", output=tmp_path / "out", evaluate=False)
    tensors = [t for file in (tmp_path / "out").glob("*.safetensors") for t in load_file(file).values()]
    assert said["bytes_written"] == sum(tensor.nbytes for tensor in tensors)


def test_a_dry_run_with_one_ratio_for_each_layer(model: Make, tmp_path: Path) -> None:
    settings = ("--set", "ratios=[0.2, 0.2, 0.2]", "--set", "episodes=1", "--dry-run")
    told = compress(model("llama"), tmp_path / "out", *settings, method="prunenet")
    assert told.code == 0, told.err
    assert "160 → 128" in told.out


LEARNED = {"samples": 40, "length": 64, "held_out": 5}  # hidden states as large as the model


@pytest.fixture
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "ids.json"
    drawn = torch.randint(3, tiny.VOCABULARY, (45, 64), generator=torch.Generator().manual_seed(0))
    path.write_text(json.dumps(drawn.tolist()))
    return path


@pytest.mark.parametrize("method", ["magnitude", "wanda", "pruner_zero", "alphapruning"])
def test_a_dry_run_of_a_method_that_only_writes_zeros(method: str, model: Make, ids: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    settings = ("--set", "pattern=0.37", "--set", "targets=attention")
    calibration = ("--calibration", ids) if method in ("wanda", "pruner_zero") else ()
    told = compress(model("llama"), tmp_path / "out", "--dry-run", *settings, *calibration, method=method)
    assert told.code == 0 and told.err == ""
    assert snapshot(tmp_path) == before
    said = _forecast(told.out)
    # 12 matrices, each to the nearest weight
    assert said["would zero"] == (
        f"{6 * 1516 + 6 * 758:,} of 36,864 weights (37.01%) in 12 matrices; zeros alone make nothing smaller or faster"
    )
    assert "would cut" not in said and said["parameters"] == "170,432, as many as before"
    assert ("gradients" in said["time"]) == (method == "pruner_zero")
    assert told.out.rstrip().endswith("nothing was written.")


def test_a_dry_run_says_that_the_model_would_write_its_own_text(model: Make, tmp_path: Path) -> None:
    told = compress(model("llama"), tmp_path / "out", "--dry-run", "--length", 9, method="wanda")
    assert "the writing of the calibration text" in _forecast(told.out)["time"]


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
@pytest.mark.parametrize(
    ("step", "source", "settings"),
    [
        ("sparsegpt", "llama", {}),
        pytest.param("wanda", "llama", {"dtype": "bfloat16", "inputs": "dense"}, marks=pytest.mark.every),
        pytest.param("pruner_zero", "mixtral", {}, marks=pytest.mark.every),
        pytest.param("magnitude", "gpt2", None, marks=pytest.mark.every),
    ],
)
def test_a_dry_run_knows_what_lies_on_disk_while_it_calibrates(
    step: str, source: str, settings: dict | None, shard_bytes: int, model: Make, ids: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    learned = {} if settings is None else {"calibration": {"data": str(ids), **LEARNED, **settings}}
    given = {"recipe": run.Recipe.parse({"steps": [step], **learned}), "output": tmp_path / "out"}
    said = forecast.dry_run(model(source), **given)
    sizes, rename = [], Path.replace

    def look(self: Path, target: Path) -> Path:
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        weighed = [path for path in files if {".safetensors", ".states"} & set(path.suffixes)]
        sizes.append(sum(path.stat().st_size for path in weighed))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", look)
    result = run.compress(model(source), evaluate=False, shard_bytes=shard_bytes, **given)
    # headers of files are nothing in a model of real size
    assert 0.95 * max(sizes) <= said["disk_needed"] <= 1.6 * max(sizes)
    matrices = result.receipt["decisions"][0]["matrices"].values()
    assert said["zeros"] == [
        {
            "removed": sum(e["removed"] for e in matrices),
            "of": sum(e["of"] for e in matrices),
            "matrices": len(matrices),
        }
    ]


def test_a_dry_run_that_tries_a_block(model: Make, ids: Path, tmp_path: Path) -> None:
    """The first one, with one batch and with two, wherever the matrices are; nothing of that is left."""
    for step in (
        "wanda",
        "pruner_zero",
        {"magnitude": {"targets": "*layers.2.*"}},
        {"wanda": {"targets": "*layers.2.*"}},
    ):
        recipe = run.Recipe.parse({"steps": [step], "calibration": {"data": str(ids), "samples": 300}})
        said = forecast.dry_run(model("llama"), recipe=recipe, output=tmp_path / "out")
        assert 0 < said["seconds"] < 100 and not (tmp_path / "out").exists()


def test_calibration_options_change_only_what_they_name(model: Make, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"steps: [wanda]\ncalibration: {{data: {ids}, samples: 9, length: 20, held_out: 3, order: first}}\n"
    )
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--samples", 4)
    assert compress(model("llama"), tmp_path / "out", *arguments, method=None).code == 0
    receipt = json.loads((tmp_path / "out" / "secateur.json").read_text())
    said = receipt["recipe"]["calibration"]
    assert (said["data"], said["samples"], said["length"], said["held_out"]) == (str(ids), 4, 20, 3)
    assert said["order"] == "first"
    notes = receipt["decisions"][0]["notes"]["calibration"]
    assert (notes["tokens"], notes["held_out_tokens"], notes["data"]) == (80, 60, "ids.json")


@pytest.mark.parametrize("state", ["foreign", "another run's"])
def test_a_dry_run_refuses_what_the_run_would_refuse(state: str, model: Make, tmp_path: Path) -> None:
    if state == "foreign":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
    else:
        compress(model("llama"), tmp_path / "out", "--seed", 3)
    told = compress(model("llama"), tmp_path / "out", "--dry-run")
    assert told.code == 2 and str(tmp_path / "out") in told.err


def test_what_a_run_prints(model: Make, tmp_path: Path) -> None:
    arguments = ("compress", model("llama"), "--method", "random_units", "--no-evaluate", "--output")
    told = secateur(*arguments, tmp_path / "one")
    assert told.code == 0
    assert "128 of 160 in each of 3 blocks, 20.0% removed" in told.out
    assert "reload check: loaded by plain transformers in a clean process" in told.out
    assert str(tmp_path / "one") in told.out
    assert [line for line in told.err.splitlines() if not line.startswith(("WARNING", "INFO"))] == [
        "reading …", "writing …",
    ]  # fmt: skip
    assert secateur(*arguments, tmp_path / "two", "--quiet").err == ""


def test_what_a_run_measures(model: Make, tmp_path: Path) -> None:
    """The card of a whole run, on a text of one's own."""
    (tmp_path / "text.txt").write_text("there and back again, and there once more. " * 40)
    (tmp_path / "recipe.yaml").write_text(
        f"steps: [random_units]\nevaluate: {{text: {tmp_path / 'text.txt'}, window: 64, windows: 2}}\n"
    )
    told = secateur(
        "compress", model("llama"), "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out", "--quiet"
    )
    assert told.code == 0, told.err
    assert "perplexity" in told.out and "not measured" not in told.out
    card = json.loads((tmp_path / "out" / "secateur.json").read_text())["card"]
    assert "skipped" not in card
    assert "perplexity" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("measured", ["{window: 64, text: nowhere.txt}", "true", "false"])
def test_options_of_measuring_change_only_what_they_name(
    measured: str, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").touch()
    (tmp_path / "recipe.yaml").write_text(f"steps: [random_units]\nevaluate: {measured}\n")
    given: list[Any] = []
    monkeypatch.setattr(run, "compress", lambda *_, recipe, **__: given.append(recipe.evaluate) or run.Result(None))
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--text", tmp_path / "text.txt", "--windows", 3)
    assert secateur("compress", model("llama"), "--output", tmp_path / "out", "--quiet", *arguments).code == 0
    window = 64 if "window" in measured else None
    assert given == [Evaluate(text=tmp_path / "text.txt", window=window, windows=3)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_sentence(error: Exception, model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("secateur.network.source.open_model", fail)
    told = secateur("inspect", model("llama"))
    assert told.code == 1 and told.err == "error: there is not enough memory; remove the cause and try again.\n"


def test_another_error_of_the_runtime_is_not_hidden(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("secateur.network.source.open_model", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        secateur("inspect", model("llama"))


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "mamba"])
def test_inspect(name: str, model: Make) -> None:
    said = json.loads(secateur("inspect", model(name), "--json").out)
    source = open_model(model(name))
    assert said["class"] == type(source.skeleton).__name__ and len(said["blocks"]) == tiny.BLOCKS
    assert said["parameters"] == outcomes.parameters(tiny.make(name))
    assert said["stored_bytes"] == {"float32": source.bytes}
    if name == "llama":
        inner = said["blocks"][1]["feed_forward"]
        assert inner["units"] == tiny.UNITS and inner["down"]["parameter"] == "model.layers.1.mlp.down_proj.weight"
    table = secateur("inspect", model(name)).out
    assert "0–2" in table and said["blocks"][0]["kind"] in table


def test_methods() -> None:
    cards = json.loads(secateur("methods", "--json").out)
    assert [card["name"] for card in cards] == list(registry.methods())
    one = json.loads(secateur("methods", "prunenet", "--json").out)
    assert one in cards and one["paper"] == "arXiv:2501.15296" and one["decides"] == "learned"
    assert one["parameters"]["ratio"]["default"] == 0.2
    listed, shown = secateur("methods").out, secateur("methods", "prunenet").out
    assert all(card["name"] in listed for card in cards)
    assert all(parameter in shown for parameter in one["parameters"])


def test_log_level(model: Make) -> None:
    told = secateur("inspect", model("llama"), "--log-level", "loud")
    assert told.code == 2 and told.err == "error: --log-level is debug, info, warning or error.\n"
    assert secateur("methods", "--log-level", "loud").code == 2
    for command in (("inspect", model("llama")), ("methods",)):
        assert secateur(*command, "--log-level", "ERROR", "--quiet").code == 0


def test_as_a_program(tmp_path: Path) -> None:
    """Started as people start it: exit code, one line, no traceback."""
    command = [sys.executable, "-m", "secateur", "inspect", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "nowhere" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "3"], "--limit says how many questions are asked, and none are; add --tasks, --kick or --facts"),
        (["--prompts", "8"], "--prompts would change nothing without --divergent"),
        (
            ["--continuation", "8", "--prompt-length", "4"],
            "--prompt-length and --continuation would change nothing without --divergent",
        ),
        (["--pairs", "10", "--no-speed"], "--pairs would change nothing beside --no-speed"),
        (
            ["--prefill", "64", "--batch", "2", "--no-speed"],
            "--prefill and --batch would change nothing beside --no-speed",
        ),
        (["--decode", "0", "--no-speed"], "--decode would change nothing beside --no-speed"),
        (["--windows", "2"], "--windows would change nothing where nothing is read; add --text or --reference"),
        (["--window", "64"], "--window would change nothing where nothing is read"),
        (["--seed", "0", "--text", "t", "--no-speed"], "--seed would change nothing with --text and --no-speed"),
        (["--divergent"], "name the model it was made from with --reference"),
        (["--kick"], "name it with --reference"),
        (["--facts", "f.jsonl"], "name it with --reference"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("words")
    told = secateur("evaluate", model("llama"), "--json", "card.json", *arguments)
    assert told.code == 2 and said in " ".join(told.err.split()), told
    assert told.err.count("error:") == 1 and not (tmp_path / "card.json").exists()


def test_options_that_are_used_are_not_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    """A value that is the default may be said; what one option makes of use is not refused."""
    for place in ("evaluate", "compare"):
        used = [
            "--reference",
            model("llama"),
            "--seed",
            3,
            "--windows",
            1,
            "--no-speed",
            "--divergent",
            "--prompts",
            64,
        ]
        if place == "compare":
            used = [
                "--method",
                "magnitude",
                "--windows",
                1,
                "--budget",
                "x",
                "--tolerance",
                0.01,
                "--facts",
                "f",
                "--limit",
                1,
            ]
        told = secateur(place, tmp_path / "nowhere", *used)
        assert told.code == 2 and "change nothing" not in told.err and "questions" not in told.err


def test_compress_refuses_what_measuring_alone_reads(model: Callable[..., Path], tmp_path: Path) -> None:
    told = compress(model("llama"), tmp_path / "out", "--windows", 2)
    assert told.code == 2 and "--windows would change nothing beside --no-evaluate" in told.err
    assert not (tmp_path / "out").exists()


def test_shared_options_are_declared_once() -> None:
    """The same name takes the same, and says the same of it, in every command that has it; but for what is meant by it."""
    from typer.main import get_command

    own = {
        "seed", "output", "model", "recipe", "method", "set_", "pairs", "tokens", "to", "json_", "dtype", "decode",
    }  # fmt: skip
    seen: dict[str, set[str]] = {}
    for each in get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        for parameter in each.params:
            if parameter.name not in own:
                seen.setdefault(parameter.name, set()).add(f"{parameter.opts} {parameter.help}")
    assert not {name: said for name, said in seen.items() if len(said) > 1}


def test_a_limit_of_questions_that_nothing_asks_is_refused_in_recipes() -> None:
    with pytest.raises(RequestError, match="none are"):
        Evaluate(limit=3).check(trust_remote_code=False)
    Evaluate(limit=3, kick=True).check(trust_remote_code=False)

"""Several processes (torchrun, gloo) write the bytes of one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outcomes
import secateur
import tiny
from secateur.calibration import propagation
from secateur.network.verify import CleanProcess, prompt
from test_calibration import draw

Make = Callable[..., Path]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Runs several in one group of processes, because starting one takes longer than the run; each block gets its own shard.
PROGRAM = """
import os, signal, sys, torch, secateur
from secateur.context import process_group, processes
from secateur.network.verify import CleanProcess

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

with process_group(), CleanProcess() as clean:
    assert processes()[1] == 2
    for method, parameters, output in {runs}:
        secateur.compress({source!r}, method, parameters, output=output, evaluate=False, shard_bytes=1, clean=clean)
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *map(str, arguments)], env=ONE_THREAD, capture_output=True, text=True, timeout=170
    )


def forked(program: Path) -> subprocess.CompletedProcess[str]:
    """The same by torchrun's own agent, in a third of the time; see forked.py."""
    command = [sys.executable, str(Path(__file__).with_name("forked.py")), str(program)]
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=170)


@pytest.fixture
def alone(model: Make, clean: CleanProcess, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The promised bytes that one process of one thread writes."""

    def run(method: str, parameters: dict[str, Any], **options: Any) -> dict[str, str]:
        output = tmp_path / f"alone-{method}-{len(list(tmp_path.iterdir()))}"
        secateur.compress(model("llama"), method, parameters, output=output, evaluate=False, clean=clean, **options)
        return outcomes.promised(output)

    return run


def test_two_processes_write_the_bytes_of_one(model: Make, alone: Callable, tmp_path: Path) -> None:
    runs = [
        ("random_units", {}, str(tmp_path / "random")),
        ("prunenet", {"episodes": 3}, str(tmp_path / "policy")),
        ("prunenet", {"episodes": 2, "mode": "reference"}, str(tmp_path / "published")),
    ]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(runs=runs, source=str(model("llama"))))
    ended = torchrun(program)
    assert ended.returncode == 0, ended.stderr
    for method, parameters, output in runs:
        assert outcomes.promised(Path(output)) == alone(method, parameters, shard_bytes=1), (method, parameters)
        assert not (Path(output) / ".secateur").exists()


@pytest.mark.every
def test_the_same_command_works_in_two_processes(model: Make, alone: Callable, tmp_path: Path) -> None:
    command = ("compress", model("llama"), "--method", "prunenet", "--set", "episodes=2", "--no-evaluate", "--output")
    ended = torchrun("-m", "secateur", *command, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("reload check: ") == 1, "one process speaks for all"
    assert outcomes.promised(tmp_path / "out") == alone("prunenet", {"episodes": 2})


@pytest.mark.every
def test_a_wrong_request_is_told_once(model: Make, tmp_path: Path) -> None:
    """Found by every process alike, before anything is shared out."""
    command = ("compress", model("bloom"), "--method", "random_units", "--quiet", "--output", tmp_path / "out")
    ended = torchrun("-m", "secateur", *command)
    assert ended.returncode != 0
    assert ended.stderr.count("no entry that sets its feed-forward width") == 1, ended.stderr
    assert "src/secateur" not in ended.stderr, "no traceback of ours"
    assert not (tmp_path / "out").exists()


@pytest.mark.every
def test_what_two_began_one_may_end(model: Make, alone: Callable, clean: CleanProcess, tmp_path: Path) -> None:
    """The second process is killed before its second shard appears; one process alone goes on."""
    program = tmp_path / "program.py"
    runs = [("random_units", {}, str(tmp_path / "out"))]
    text = PROGRAM.format(runs=runs, source=str(model("llama")))
    strike = (
        "import secateur.files as files\n"
        "files._flush = lambda path: die() if 'model-00004' in str(path) and processes()[0] == 1 else None\n"
    )
    program.write_text(text.replace("with process_group", strike + "with process_group"))
    ended = torchrun(program)
    assert ended.returncode != 0
    assert not (tmp_path / "out" / "secateur.json").exists()
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3)
    }
    secateur.compress(
        model("llama"), "random_units", output=tmp_path / "out", evaluate=False, clean=clean, shard_bytes=1
    )
    assert outcomes.promised(tmp_path / "out") == alone("random_units", {}, shard_bytes=1)


# Methods that learn from text: the tokens are shared out, half to each process; one process adds its halves last too.
CALIBRATED = """
import os, signal, sys, torch, secateur
from secateur.context import process_group, processes
from secateur.network.verify import CleanProcess

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

with process_group(), CleanProcess() as clean:
    for source, recipe, output in {runs}:
        recipe = secateur.Recipe.parse(recipe)
        secateur.compress(source, recipe=recipe, output=output, evaluate=False, shard_bytes=1, clean=clean)
"""


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe as plain data; sequences of two lengths, so that there are several batches to share out."""
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([each.tolist() for each in draw([16] * 24 + [9] * 12)]))
    said = {"data": str(path), "samples": 30, "length": 16, "held_out": 6}
    return lambda step, **settings: {"steps": [step], "calibration": {**said, **settings}}


def masks_equal(one: Path, other: Path) -> float:
    """The fraction of entries in which the masks of two results are the same."""
    first, second = secateur.read_masks(one), secateur.read_masks(other)
    assert set(first) == set(second)
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(mask.numel() for mask in first.values())


ERK = {"magnitude": {"allocation": "erk"}}


@pytest.mark.parametrize(
    "tried",
    [
        {"llama": ["sparsegpt"]},
        pytest.param(
            {"llama": ["wanda", ERK, "pruner_zero"], "mixtral": ["wanda", "sparsegpt"]}, marks=pytest.mark.every
        ),
        pytest.param({"llama": ["apt", "admm", "dsnot"], "mixtral": ["moe_pruner"]}, marks=pytest.mark.every),
    ],
    ids=["one", "plain", "solving"],
)
def test_two_processes_calibrate_like_one(
    tried: dict[str, list], model: Make, calibrated: Callable, clean: CleanProcess, tmp_path: Path
) -> None:
    runs = [
        (str(model(name)), calibrated(step), str(tmp_path / f"{name}-{number}"))
        for name, steps in tried.items()
        for number, step in enumerate(steps)
    ]
    program = tmp_path / "program.py"
    program.write_text(CALIBRATED.format(runs=runs))
    ended = torchrun(program)
    assert ended.returncode == 0, ended.stderr
    for source, recipe, output in runs:
        alone = tmp_path / "alone" / Path(output).name
        plan = secateur.Recipe.parse(recipe)
        secateur.compress(source, recipe=plan, output=alone, evaluate=False, clean=clean, shard_bytes=1)
        if plan.steps[0].method == "magnitude":
            assert outcomes.promised(Path(output)) == outcomes.promised(alone)
            continue
        if plan.steps[0].method != "pruner_zero":  # gradients are summed in another order
            assert outcomes.promised(Path(output)) == outcomes.promised(alone), output
        assert masks_equal(Path(output), alone) >= 0.999, output
        there, here = (
            json.loads((path / "secateur.json").read_text())["decisions"][0] for path in (Path(output), alone)
        )
        assert there["notes"]["calibration"] == here["notes"]["calibration"]
        for name, entry in here["matrices"].items():
            told = there["matrices"][name]
            assert told["removed"] == entry["removed"] and told["updated"] == entry["updated"]
            assert told["calibration_error"] == pytest.approx(entry["calibration_error"], rel=0.1), (
                "some rows stand for all"
            )
        words = [prompt(tiny.VOCABULARY)]
        ours, theirs = clean.logits(alone, words), clean.logits(Path(output), words)
        assert (ours - theirs).abs().max() < 0.02 * ours.abs().max(), output
        assert not (Path(output) / ".secateur").exists()


@pytest.mark.every
@pytest.mark.parametrize("samples", [30, 3])
def test_two_processes_turn_a_stream_like_one(
    samples: int, model: Make, calibrated: Callable, clean: CleanProcess, tmp_path: Path
) -> None:
    """Place by place, also where one of them has no token."""
    recipe = calibrated({"slicegpt": {"ratio": 0.25}}, samples=samples, held_out=0, order="first")
    source, program, alone = model("llama"), tmp_path / "program.py", tmp_path / "alone"
    program.write_text(CALIBRATED.format(runs=[(str(source), recipe, str(tmp_path / "out"))]))
    ended = torchrun(program)
    assert ended.returncode == 0, ended.stderr
    secateur.compress(source, recipe=secateur.Recipe.parse(recipe), output=alone, evaluate=False, clean=clean)
    ours, theirs = (
        clean.logits(path, [prompt(tiny.VOCABULARY)], trust_remote_code=True) for path in (alone, tmp_path / "out")
    )
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.every
def test_fewer_batches_than_processes(model: Make, calibrated: Callable, clean: CleanProcess, tmp_path: Path) -> None:
    """One process has no token at all: what is learned is the same to the bit."""
    recipe = calibrated("sparsegpt", samples=3, held_out=0, order="first")
    runs = [(str(model(name)), recipe, str(tmp_path / name)) for name in ("llama", "mixtral")]
    (tmp_path / "program.py").write_text(CALIBRATED.format(runs=runs))
    ended = torchrun(tmp_path / "program.py")
    assert ended.returncode == 0, ended.stderr
    for source, _, output in runs:
        alone = tmp_path / f"alone-{Path(output).name}"
        plan = secateur.Recipe.parse(recipe)
        secateur.compress(source, recipe=plan, output=alone, evaluate=False, clean=clean, shard_bytes=1)
        assert outcomes.promised(Path(output)) == outcomes.promised(alone)


def _begin_alone(source: Path, recipe: dict[str, Any], output: Path, at: int) -> None:
    plan = secateur.Recipe.parse(recipe)
    with pytest.MonkeyPatch.context() as patch:
        outcomes.kill_at_rename(patch, at)
        with pytest.raises(outcomes.Killed):
            secateur.compress(source, recipe=plan, output=output, evaluate=False, shard_bytes=1)


def test_going_on_with_another_number_of_processes_is_refused(
    model: Make, calibrated: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens would be shared out in another way than the hidden states that lie there."""
    recipe, output = calibrated("wanda"), tmp_path / "out"
    _begin_alone(model("llama"), recipe, output, at=17)
    before = outcomes.promised(output)
    monkeypatch.setattr(propagation, "processes", lambda: (0, 2))
    plan = secateur.Recipe.parse(recipe)
    with pytest.raises(secateur.RequestError, match=r"another number of processes; .* --restart"):
        secateur.compress(model("llama"), recipe=plan, output=output, evaluate=False, shard_bytes=1)
    assert outcomes.promised(output) == before


@pytest.mark.every
@pytest.mark.parametrize("began", [1, 2])
def test_two_for_one_and_one_for_two(began: int, model: Make, calibrated: Callable, tmp_path: Path) -> None:
    recipe, output, program = calibrated("wanda"), tmp_path / "out", tmp_path / "program.py"
    text = CALIBRATED.format(runs=[(str(model("llama")), recipe, str(output))])
    if began == 1:
        _begin_alone(model("llama"), recipe, output, at=17)
        program.write_text(text)
        ended = torchrun(program)
        assert ended.returncode != 0 and "another number of processes" in ended.stderr
        return
    strike = (
        "import secateur.files as files\nfiles._flush = lambda path: die() if 'model-00003' in str(path) else None\n"
    )
    program.write_text(text.replace("with process_group", strike + "with process_group"))
    ended = torchrun(program)
    assert ended.returncode != 0 and list(output.glob("*.safetensors"))
    plan = secateur.Recipe.parse(recipe)
    with pytest.raises(secateur.RequestError, match="another number of processes"):
        secateur.compress(model("llama"), recipe=plan, output=output, evaluate=False, shard_bytes=1)
    program.write_text(text)
    ended = torchrun(program)
    assert ended.returncode == 0, ended.stderr
    assert not (output / ".secateur").exists()


@pytest.mark.every
def test_a_calibration_text_that_is_too_short_is_told_by_one(model: Make, tmp_path: Path) -> None:
    """Found by the first process alone, when the others already wait for it."""
    (tmp_path / "ids.json").write_text("[[5, 6, 7]]")
    options = ("--calibration", tmp_path / "ids.json", "--quiet", "--output", tmp_path / "out")
    ended = torchrun("-m", "secateur", "compress", model("llama"), "--method", "wanda", *options)
    assert ended.returncode != 0
    assert ended.stderr.count("holds 1 sequences") == 1, ended.stderr
    assert "src/secateur" not in ended.stderr, "no traceback of ours"
    assert not (tmp_path / "out").exists()

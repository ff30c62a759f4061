"""Killed anywhere while it calibrates and prunes, the same command goes on and writes the bytes of an undisturbed run."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import command
import outcomes
import secateur
import tiny
from secateur.calibration import propagation, statistics
from secateur.network.verify import CleanProcess
from test_calibration import draw

Make = Callable[..., Path]
EACH, ONE = 1, 10**9  # bytes of a shard: one for each block, one for all
RUNS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "sparsegpt": ("sparsegpt", {}, EACH),
    "sparsegpt, one shard": ("sparsegpt", {}, ONE),
    "wanda": ("wanda", {}, EACH),
    "wanda, one shard": ("wanda", {}, ONE),
    "dense inputs": ("wanda", {"inputs": "dense"}, EACH),
    "sequential": ("sparsegpt", {"sequential": True}, EACH),
    "own text": ("wanda", {"data": "self", "length": 8}, EACH),
    "gradients and an allocation": ({"alphapruning": {"apply": "pruner_zero"}}, {}, EACH),
    "no data": ("magnitude", {}, ONE),
    "two steps": ([{"wanda": {"pattern": 0.3}}, {"sparsegpt": {}}], {}, ONE),
}


def marked(*names: str) -> list[Any]:
    """Cases for the rest of the matrix."""
    return [pytest.param(name, marks=pytest.mark.every) for name in names]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "ids.json"
    path.write_text(json.dumps([each.tolist() for each in draw([16] * 5 + [7] * 3)]))
    return path


@pytest.fixture
def run(model: Make, clean: CleanProcess, ids: Path) -> Callable[..., secateur.Result]:
    """Does one of RUNS to the tiny llama."""

    def compress(output: Path, name: str = "sparsegpt", **options: Any) -> secateur.Result:
        steps, settings, size = RUNS[name]
        settings = {"data": str(ids), "samples": 4, "length": 16, "held_out": 2, **settings}
        recipe = secateur.Recipe.parse(
            {"steps": steps if isinstance(steps, list) else [steps], "calibration": settings}
        )
        given = {"recipe": recipe, "evaluate": False, "shard_bytes": size, "clean": clean, **options}
        return secateur.compress(model("llama"), output=output, **given)

    return compress


@pytest.fixture
def undisturbed(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The promised bytes of a run that nothing disturbs."""
    made: dict[str, dict[str, str]] = {}

    def get(name: str = "sparsegpt") -> dict[str, str]:
        if name not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "out"
            run(output, name)
            made[name] = outcomes.promised(output)
        return made[name]

    return get


def _die_at_rename(
    number: int, name: str, run: Callable, expected: dict[str, str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Kills a run at that rename and lets the next one finish; says whether there was such a rename."""
    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, number)
        try:
            run(output, name)
            struck = False
        except outcomes.Killed:
            run(output, name)
            struck = True
    assert outcomes.promised(output) == expected, f"after a kill at rename {number}"
    assert not (output / ".secateur").exists() and not list(output.rglob("*.partial"))
    shutil.rmtree(output)
    return struck


@pytest.mark.parametrize("name", marked(*RUNS))
def test_a_kill_at_each_rename(
    name: str, run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while _die_at_rename(number, name, run, undisturbed(name), tmp_path / str(number), monkeypatch):
        number += 1
    assert number > 15, "every file of a run appears by a rename"


@pytest.mark.parametrize("number", [5, 9])  # between the blocks of a shard, and between its tensors and their masks
def test_a_kill_at_some_renames(
    number: int, run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sparsegpt, one shard"
    assert _die_at_rename(number, name, run, undisturbed(name), tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("name", ["sparsegpt", *marked("sparsegpt, one shard", "dense inputs", "sequential")])
def test_blocks_that_are_done_are_not_done_again(
    name: str, run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the last block is under way: only that one is passed through again, and nothing is captured anew."""
    passed: list[int] = []
    module = propagation.Propagation.module

    def look(self: propagation.Propagation, block: int) -> Any:
        passed.append(block)
        if block == tiny.BLOCKS - 1 and not going_on:
            raise outcomes.Killed
        return module(self, block)

    going_on = False
    with monkeypatch.context() as patch:
        patch.setattr(propagation.Propagation, "module", look)
        with pytest.raises(outcomes.Killed):
            run(tmp_path / "out", name)
        assert set(passed) == set(range(tiny.BLOCKS))
        files = {path.name for path in (tmp_path / "out" / ".secateur").rglob("*.states")}
        assert files == {f"{tiny.BLOCKS - 1}.states"}, "what is not needed any more is gone"
        passed.clear()
        going_on = True
        run(tmp_path / "out", name)
    assert set(passed) == {tiny.BLOCKS - 1}
    assert outcomes.promised(tmp_path / "out") == undisturbed(name)


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [0, 5])
def test_a_disk_that_is_full_of_hidden_states(
    number: int, run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones, and those behind a block."""
    written, count = propagation._raw, iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(propagation, "_raw", lambda s: _no_space() if next(count) == number else written(s))
        with pytest.raises(secateur.RunError, match=r"disk is full: [01]\.states .*same command") as failure:
            run(tmp_path / "out")
    assert failure.value.exit_code == 1
    assert not list((tmp_path / "out").rglob("*.partial")), "it takes no space that others could use"
    run(tmp_path / "out")
    assert outcomes.promised(tmp_path / "out") == undisturbed()


def test_what_failed_on_the_way_is_gone_on_with(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that were not finite in the second block, from a device that fails; the first block's work is kept."""
    add, count = statistics._add_gram, iter(range(1000))

    def fail(gram: torch.Tensor, inputs: torch.Tensor) -> None:
        add(gram, torch.full_like(inputs, torch.inf) if next(count) > 8 else inputs)

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_add_gram", fail)
        with pytest.raises(secateur.RunError, match=r"inputs of model\.layers\.1\..* not finite"):
            run(tmp_path / "out")
    run(tmp_path / "out")
    assert outcomes.promised(tmp_path / "out") == undisturbed()


def _begin(run: Callable, output: Path, monkeypatch: pytest.MonkeyPatch, at: int = 9, **options: Any) -> None:
    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, at)
        with pytest.raises(outcomes.Killed):
            run(output, **options)


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_other_calibration_is_another_run(
    state: str, run: Callable, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings, or other text under the same name."""
    output, text = tmp_path / "out", tmp_path / "ids.json"
    shutil.copy(ids, text)

    def recipe(**settings: Any) -> secateur.Recipe:
        said = {"data": str(text), "samples": 4, "length": 16, "held_out": 2, **settings}
        return secateur.Recipe.parse({"steps": ["sparsegpt"], "calibration": said})

    if state == "begun":
        _begin(run, output, monkeypatch, recipe=recipe())
    else:
        run(output, recipe=recipe())
    before = command.snapshot(output)
    for settings in ({"samples": 3}, {"length": 7}, {"held_out": 1}, {"order": "first"}, {"inputs": "dense"},
                     {"dtype": "bfloat16"}, {"data": "self"}):  # fmt: skip
        with pytest.raises(secateur.RequestError, match="calibration") as refusal:
            run(output, recipe=recipe(**settings))
        assert state in str(refusal.value) and "--restart" in str(refusal.value)
    text.write_text(text.read_text().replace("1", "2"))
    with pytest.raises(secateur.RequestError, match="calibration"):
        run(output, recipe=recipe())
    assert command.snapshot(output) == before
    shutil.copy(ids, text)
    run(output, recipe=recipe())
    assert (output / "secateur.json").exists()


def test_calibration_does_not_count_where_nothing_learns(run: Callable, ids: Path, tmp_path: Path) -> None:
    recipes = [
        secateur.Recipe.parse({"steps": ["magnitude"], "calibration": {"data": str(ids), "samples": n}}) for n in (3, 4)
    ]
    run(tmp_path / "out", recipe=recipes[0])
    before = command.snapshot(tmp_path)
    run(tmp_path / "out", recipe=recipes[1])
    assert command.snapshot(tmp_path) == before, "the same run, and finished"


def test_hidden_states_that_were_cut_short(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    _begin(run, output, monkeypatch, at=12)
    needed = min((output / ".secateur").rglob("*.states"))
    needed.write_bytes(needed.read_bytes()[:-100])
    with pytest.raises(secateur.RunError, match=r"\.states is cut short; start again with --restart"):
        run(output)


def test_what_was_removed_meanwhile_is_told(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is gone cannot be made again when its hidden states are gone too; a new start can."""
    output, finish = tmp_path / "out", secateur.stage.Stage._finish

    def die(*_: Any) -> None:
        raise outcomes.Killed

    monkeypatch.setattr(secateur.stage.Stage, "_finish", die)
    with pytest.raises(outcomes.Killed):
        run(output)
    (output / "model-00002-of-00004.safetensors").unlink()
    monkeypatch.setattr(secateur.stage.Stage, "_finish", finish)
    with pytest.raises(secateur.RunError, match=r"model-00002-of-00004\.safetensors .* was removed meanwhile"):
        run(output)
    run(output, restart=True)
    assert outcomes.promised(output) == undisturbed()

"""Killed anywhere, the same command goes on and writes the bytes of an undisturbed run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import command
import outcomes
import secateur
from secateur import registry
from secateur.files import write_tensors
from secateur.network.verify import CleanProcess
from secateur.registry import Context, Cut, Units

Make = Callable[..., Path]
TWO_STEPS = "seed: 3\nsteps: [random_units: {ratio: 0.2}, magnitude_units: {ratio: 0.25}]"
RUNS: dict[str, dict[str, Any]] = {
    "random_units": {"method": "random_units"},
    "prunenet": {"method": "prunenet", "parameters": {"episodes": 2}},
    "zipf_surgeon": {"method": "zipf_surgeon"},
    "published": {"method": "prunenet", "parameters": {"episodes": 2, "mode": "reference"}},
    "two steps": {"recipe": secateur.Recipe.parse({"steps": [{"random_units": {}}, {"magnitude_units": {}}]})},
}


@pytest.fixture
def run(model: Make, clean: CleanProcess) -> Callable[..., secateur.Result]:
    """Compresses the tiny llama, each block into a shard of its own."""

    def compress(output: Path, source: Path | None = None, **options: Any) -> secateur.Result:
        given = {"evaluate": False, "shard_bytes": 1, "clean": clean, **options}
        if "recipe" not in given:
            given = {"method": "random_units", **given}
        return secateur.compress(source or model("llama"), output=output, **given)

    return compress


@pytest.fixture
def undisturbed(run: Callable[..., secateur.Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """The promised bytes of a run that nothing disturbs."""
    made: dict[str, dict[str, str]] = {}

    def get(name: str) -> dict[str, str]:
        if name not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "out"
            run(output, **RUNS[name])
            made[name] = outcomes.promised(output)
        return made[name]

    return get


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "random_units" else pytest.mark.every) for name in RUNS]
)
def test_a_kill_at_each_rename(
    name: str, run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, number, finished = undisturbed(name), 0, False
    while not finished:
        with monkeypatch.context() as patch:
            outcomes.kill_at_rename(patch, number)
            try:
                run(tmp_path / str(number), **RUNS[name])
                finished = True
            except outcomes.Killed:
                run(tmp_path / str(number), **RUNS[name])
        assert outcomes.promised(tmp_path / str(number)) == expected, f"after a kill at rename {number}"
        assert not (tmp_path / str(number) / ".secateur").exists()
        assert not list((tmp_path / str(number)).rglob("*.partial"))
        shutil.rmtree(tmp_path / str(number))
        number += 1
    assert number > 12, "every file of a run appears by a rename"


def test_a_run_killed_at_every_rename_in_turn(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt gets a few files further (the small ones at the end are one piece of work); it must arrive."""
    for _attempt in range(9):
        with monkeypatch.context() as patch:
            outcomes.kill_at_rename(patch, 12)
            try:
                run(tmp_path / "out", **RUNS["prunenet"])
                break
            except outcomes.Killed:
                continue
    else:
        pytest.fail("the run never arrives: something finished is done again and again")
    assert outcomes.promised(tmp_path / "out") == undisturbed("prunenet")


# SIGKILL in a process of its own. Where it strikes: the function that is replaced by the end of everything.
STRIKES = {
    "reading": "import secateur.network.source as m; m.sha256 = die",
    "statistics": "import secateur.files as m; m._flush = lambda path: die() if 'grams/1' in str(path) else None",
    "training": "import secateur.methods.structure.prunenet as m; m.StableLearner.update = die",
    "writing a shard": "import secateur.files as m; m._flush = lambda path: die() if 'model-00002' in str(path) else None",
    "finishing": "import secateur.stage as m; m.write_config = die",
    "converting": "import transformers as t; t.PreTrainedModel.save_pretrained = die",
}


@pytest.mark.parametrize(
    "where",
    [pytest.param(w, marks=() if w in ("training", "writing a shard") else pytest.mark.every) for w in STRIKES],
)
def test_sigkill(where: str, run: Callable, model: Make, tmp_path: Path, undisturbed: Callable) -> None:
    name = {"training": "prunenet", "statistics": "zipf_surgeon"}.get(where, "random_units")
    source = model("llama")
    if where == "converting":
        source = tmp_path / "bin"
        shutil.copytree(model("llama"), source, ignore=shutil.ignore_patterns("*.safetensors"))
        import tiny

        torch.save(tiny.make("llama").state_dict(), source / "pytorch_model.bin")
        run(tmp_path / "straight", source)
    program = (
        "import os, signal, torch, secateur\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"torch.set_num_threads(1)\n{STRIKES[where]}\n"
        f"secateur.compress({str(source)!r}, {RUNS[name]['method']!r}, {RUNS[name].get('parameters')!r}, "
        f"output={str(tmp_path / 'out')!r}, evaluate=False, shard_bytes=1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not (tmp_path / "out" / "secateur.json").exists()

    run(tmp_path / "out", source, **RUNS[name])
    expected = outcomes.promised(tmp_path / "straight") if where == "converting" else undisturbed(name)
    assert outcomes.promised(tmp_path / "out") == expected


def _begin(run: Callable, output: Path, monkeypatch: pytest.MonkeyPatch, at: int = 7, **options: Any) -> None:
    """Leaves a run that was killed half way."""
    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, at)
        with pytest.raises(outcomes.Killed):
            run(output, **options)
    assert list(output.glob("*.safetensors")) or at < 5


def test_a_journal_line_cut_short(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(run, tmp_path / "out", monkeypatch)
    [journal] = (tmp_path / "out").rglob("journal-*.jsonl")
    content = journal.read_bytes()
    assert content.count(b"\n") > 1
    journal.write_bytes(content[:-25])
    run(tmp_path / "out")
    assert outcomes.promised(tmp_path / "out") == undisturbed("random_units")


def test_a_shard_that_is_gone_is_written_again(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(run, tmp_path / "out", monkeypatch)
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    run(tmp_path / "out")
    assert outcomes.promised(tmp_path / "out") == undisturbed("random_units")


def _full_of_python(self: Path, target: Path) -> Path:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _full_of_safetensors(*_: Any, **__: Any) -> None:
    # as it says it: its own error, with the operating system's number in the text
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("how", ["python", "safetensors", "journal"])
def test_a_full_disk(
    how: str, run: Callable, model: Make, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        if how == "python":
            rename, count = Path.replace, iter(range(1000))
            patch.setattr(Path, "replace", lambda s, t: _full_of_python(s, t) if next(count) == 6 else rename(s, t))
        elif how == "journal":
            patch.setattr(os, "fsync", _fsync_fails_on("journal-0"))
        else:
            write, count = secateur.files.save_file, iter(range(1000))
            patch.setattr(
                secateur.files,
                "save_file",
                lambda *a, **o: _full_of_safetensors() if next(count) == 3 else write(*a, **o),
            )
        with pytest.raises(secateur.RunError) as failure:
            run(output)
    assert "disk is full" in str(failure.value) and "same command" in str(failure.value)
    assert failure.value.exit_code == 1
    assert (output / ".secateur" / "run.json").exists(), "what was done is kept"
    run(output)
    assert outcomes.promised(output) == undisturbed("random_units")


def _fsync_fails_on(part: str) -> Callable[[int], None]:
    fsync = os.fsync

    def replaced(descriptor: int) -> None:
        if part in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    return replaced


def test_a_full_disk_is_told_on_the_command_line(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secateur.files, "save_file", _full_of_safetensors)
    told = command.compress(model("llama"), tmp_path / "out")
    assert told.code == 1
    assert told.err.startswith("error: the disk is full") and told.err.count("\n") == 1


@pytest.fixture
def broken_method() -> Iterator[dict[str, bool]]:
    """A method whose new output weights of block 1 are not numbers while `broken`."""
    state = {"broken": True}

    @registry.method(
        "broken_units", kind="structure", paper="", claim="none", when="after training", speedup="universal",
        criterion="position", schedule="one-shot",
    )  # fmt: skip
    def broken_units(units: Units, context: Context) -> Cut:
        """Keeps the first neurons."""
        kept = torch.arange(units.keep)
        down = units.output[:, kept].clone()
        if state["broken"] and units.block == 1:
            down[3, 5] = float("nan")
        return Cut(kept, down)

    yield state
    del registry._registry["broken_units"]


def test_a_value_that_is_no_number(broken_method: dict[str, bool], run: Callable, model: Make, tmp_path: Path) -> None:
    told = command.compress(model("llama"), tmp_path / "out", method="broken_units")
    assert told.code == 1
    assert "block 1" in told.err and "non-finite" in told.err and told.err.count("\n") == 1
    with pytest.raises(secateur.RunError, match="block 1"):
        run(tmp_path / "other", method="broken_units")
    broken_method["broken"] = False
    run(tmp_path / "other", method="broken_units")
    assert (tmp_path / "other" / "secateur.json").exists(), "the remedy found, the same command goes on"


def test_a_value_too_large_for_the_dtype(run: Callable, model: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(model("llama"), tmp_path / "large")
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    with pytest.raises(secateur.RunError, match=r"model\.norm\.weight"):
        run(tmp_path / "out", tmp_path / "large", dtype="float16")


@pytest.mark.usefixtures("shared_clean")
def test_a_finished_run_is_left_alone(model: Make, tmp_path: Path) -> None:
    assert command.compress(model("llama"), tmp_path / "out").code == 0
    before = command.snapshot(tmp_path)
    told = command.compress(model("llama"), tmp_path / "out")
    assert told.code == 0 and told.err == ""
    assert command.snapshot(tmp_path) == before


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_another_run_in_the_same_directory(
    state: str, run: Callable, model: Make, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _begin(run, output, monkeypatch) if state == "begun" else run(output)
    before = command.snapshot(tmp_path)
    for arguments, named in (
        ({"seed": 1}, "seed"),
        ({"parameters": {"ratio": 0.4}}, "0.4"),
        ({"method": "magnitude_units"}, "magnitude_units"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"shard_bytes": 2}, "shard_bytes"),
        ({"source": model("llama", seed=1)}, "source"),
    ):
        with pytest.raises(secateur.RequestError, match=named) as refusal:
            run(output, **arguments)
        assert state in str(refusal.value) and "--restart" in str(refusal.value)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(secateur.RequestError, match=r"threads \(1 there, 2 now\)"):
            run(output)
    finally:
        torch.set_num_threads(threads)
    assert command.snapshot(tmp_path) == before
    run(output, restart=True)
    assert outcomes.promised(output) == undisturbed("random_units")


def test_restart_starts_over(
    run: Callable, undisturbed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a finished run of more shards and another method; and it may be killed while it clears the directory."""
    output = tmp_path / "out"
    run(output, **RUNS["prunenet"])
    with monkeypatch.context() as patch:
        outcomes.kill_at_rename(patch, 3)
        with pytest.raises(outcomes.Killed):
            run(output, restart=True)
    run(output)
    assert outcomes.promised(output) == undisturbed("random_units")


def test_a_restart_whose_request_is_wrong_gives_back_what_was_there(
    run: Callable, tmp_path: Path, model: Callable[..., Path]
) -> None:
    output = tmp_path / "out"
    run(output)
    (output / "notes.txt").write_text("mine")
    before = outcomes.promised(output), (output / "secateur.json").read_text()
    write_tensors(
        tmp_path / "policy.safetensors", {"v": torch.ones(7), "c": torch.zeros(()), "standardised": torch.ones(())}
    )
    with pytest.raises(secateur.RequestError, match="hidden size"):
        run(output, method="prunenet", parameters={"policy": tmp_path / "policy.safetensors"}, restart=True)
    assert (outcomes.promised(output), (output / "secateur.json").read_text()) == before
    assert not (output / ".secateur").exists()

    run(output, restart=True, seed=5)
    assert (output / "notes.txt").read_text() == "mine", "a restart removes only what a run wrote"


def test_a_source_that_changed_meanwhile(
    run: Callable, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model("llama"), source)
    _begin(run, output, monkeypatch, source=source)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        times = (source / name).stat()
        os.utime(source / name, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        with pytest.raises(secateur.RequestError, match="source"):
            run(output, source)
        os.utime(source / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(output, source)


def test_a_kill_in_the_second_step(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TWO_STEPS)
    run(tmp_path / "straight", recipe=recipe)
    kept = json.loads((tmp_path / "straight" / "secateur.json").read_text())["decisions"]
    assert [step["units"]["neurons"]["0"] for step in kept] == [{"kept": 128, "of": 160}, {"kept": 96, "of": 128}]
    with monkeypatch.context() as patch:
        rename = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if target == tmp_path / "out" / "model-00002-of-00004.safetensors":
                raise outcomes.Killed
            return rename(self, target)

        patch.setattr(Path, "replace", replace)
        with pytest.raises(outcomes.Killed):
            run(tmp_path / "out", recipe=recipe)
    first = tmp_path / "out" / ".secateur" / "model-0"
    assert (first / "config.json").exists(), "the first step is done"
    before = command.snapshot(first)["model-00001-of-00004.safetensors"]

    seen = {}
    finish = secateur.workspace.Workspace.finish

    def look(self: Any, receipt: Any) -> None:
        seen.update(command.snapshot(first))
        finish(self, receipt)

    monkeypatch.setattr(secateur.workspace.Workspace, "finish", look)
    run(tmp_path / "out", recipe=recipe)
    assert seen["model-00001-of-00004.safetensors"] == before, "and not done again"
    assert outcomes.promised(tmp_path / "out") == outcomes.promised(tmp_path / "straight")

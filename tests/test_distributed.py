"""Several processes (torchrun, gloo) write the bytes of one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outcome
import secateur
from secateur.network.verify import CleanProcess

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


@pytest.fixture
def alone(model: Make, clean: CleanProcess, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The promised bytes that one process of one thread writes."""

    def run(method: str, parameters: dict[str, Any], **options: Any) -> dict[str, str]:
        output = tmp_path / f"alone-{method}-{len(list(tmp_path.iterdir()))}"
        secateur.compress(model("llama"), method, parameters, output=output, evaluate=False, clean=clean, **options)
        return outcome.promised(output)

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
        assert outcome.promised(Path(output)) == alone(method, parameters, shard_bytes=1), (method, parameters)
        assert not (Path(output) / ".secateur").exists()


@pytest.mark.every
def test_the_same_command_works_in_two_processes(model: Make, alone: Callable, tmp_path: Path) -> None:
    command = ("compress", model("llama"), "--method", "prunenet", "--set", "episodes=2", "--no-evaluate", "--output")
    ended = torchrun("-m", "secateur", *command, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("reload check: ") == 1, "one process speaks for all"
    assert outcome.promised(tmp_path / "out") == alone("prunenet", {"episodes": 2})


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
    assert outcome.promised(tmp_path / "out") == alone("random_units", {}, shard_bytes=1)

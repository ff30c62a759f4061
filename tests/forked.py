"""Runs a program in two processes as torchrun does, by its own agent, but forked from one that has imported everything:
importing takes each process longer than what a test lets it do.

    python forked.py PROGRAM

PROGRAM is Python; `clean` in it is one clean process for both.
"""

import fcntl
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import secateur  # noqa: F401 (imported for the program)
from secateur.network.verify import CleanProcess

transformers.LlamaForCausalLM  # noqa: B018 (imported when it is named)


class Shared(CleanProcess):
    """Asked by one process at a time, each of which reads the answer to its own question."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock

    def ask(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        with self._lock.open("w") as file:  # opened anew: an inherited one would lock nobody out
            fcntl.flock(file, fcntl.LOCK_EX)
            return super().ask(*arguments, **options)


def run(program: str, clean: CleanProcess) -> None:
    torch.set_num_threads(1)
    exec(compile(Path(program).read_text(), program, "exec"), {"__name__": "__main__", "clean": clean})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Shared(Path(folder) / "lock") as clean:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id="forked", max_restarts=0, start_method="fork",
        )  # fmt: skip
        elastic_launch(config, run)(sys.argv[1], clean)

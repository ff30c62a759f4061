"""The reload check: what was written is opened as a stranger would open it, and must compute what we compute."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import RunError
from secateur.files import human, read_tensors
from secateur.network.source import Source
from secateur.network.stream import Fetch, streamed_logits

TOKENS = 32
# Both sides compute in float32 with the same weights, one cut, one silenced; what is left is the order of sums.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verified:
    """How a result was checked: by a clean process or streamed, and the largest difference of its logits."""

    how: str
    difference: float
    tokens: int = TOKENS


def prompt(vocabulary: int) -> list[int]:
    """Fixed token ids, spread over the vocabulary."""
    return [(7919 * i + 13) % vocabulary for i in range(TOKENS)]


class CleanProcess:
    """A Python process in which Secateur cannot be imported; it loads models one after another."""

    def __enter__(self) -> "CleanProcess":
        program = Path(__file__).with_name("clean_load.py")
        # -P: the folder of the program stays off the import path, where our file names would shadow other modules
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={name: value for name, value in os.environ.items() if name not in _TORCHRUN},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, location: Path, ids: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
        """Loads the model at `location` and runs it on `ids`; options as clean_load.py names them. Raises RunError."""
        request = {
            "location": str(location), "ids": ids, "dtype": "float32", "threads": torch.get_num_threads(),
            "trust_remote_code": False, **options,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError(f"the clean process that loads {location} ended early, probably for want of memory.")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise RunError(f"{location} does not load with plain transformers: {result['error']}")
        return result

    def logits(self, location: Path, ids: Sequence[Sequence[int]], **options: Any) -> Tensor:
        """(batch, tokens, vocabulary) float32 logits of the model at `location`, loaded with plain transformers."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "logits.safetensors"
            self.ask(location, ids, logits=str(file), **options)
            return read_tensors(file)[0]["logits"]


# A child of a distributed run must not think that it is one of its processes.
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}


def verify(
    result: Source,
    source: Source,
    expected: Fetch,
    max_memory: int,
    clean: CleanProcess | None = None,
    tokens: Tensor | None = None,
) -> Verified:
    """Compares what is on the disk with what was meant to be there.

    Args:
        result: the directory just written.
        source: what the last step started from; it is run uncut.
        expected: the source's parameters, with what was cut silenced.
        max_memory: bytes that a whole model may take; above it the result is streamed instead of loaded at once.
        clean: an open clean process to use, instead of starting one.
        tokens: the source's id of each token of the result, where they are not the same: the source reads these, and of its
            logits these are compared.

    Raises RunError when the logits differ, are not finite, or the result does not load.
    """
    ids = [prompt(result.anatomy.vocabulary)]
    in_float32 = 4 * sum(parameter.numel() for parameter in result.skeleton.parameters())
    asked = torch.tensor(ids)
    ours = streamed_logits(source.skeleton, source.anatomy, expected, asked if tokens is None else tokens[asked])
    ours = ours if tokens is None else ours[..., tokens]
    assert result.directory is not None
    if in_float32 > max_memory:
        how = f"headers, shapes and streamed logits (in float32 it takes {human(in_float32)}, above --max-memory)"
        theirs = streamed_logits(result.skeleton, result.anatomy, stored(result), asked)
    else:
        how = "loaded by plain transformers in a clean process"
        with nullcontext(clean) if clean else CleanProcess() as process:
            theirs = process.logits(result.directory, ids, trust_remote_code=result.trust_remote_code)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    if not difference <= TOLERANCE:  # also true for a difference that is not a number
        raise RunError(
            f"{result.directory} loads, but its logits differ from those of the run by {difference:.2g} (allowed "
            f"{TOLERANCE:g}): do not use it. Start again with --restart, and report it if it happens again."
        )
    return Verified(how, difference)


def stored(source: Source) -> Fetch:
    """Parameters as a source stores them, in float32."""

    def fetch(names: Sequence[str]) -> Mapping[str, Tensor]:
        # one at a time, because a file stays mapped as long as a tensor of it lives
        return {name: source.parameter(name).float() for name in names}

    return fetch

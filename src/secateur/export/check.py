"""Whether an exported model computes what the model computes: tried in a clean process, compared in numbers."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import RequestError
from secateur.files import read_tensors
from secateur.network.verify import _TORCHRUN

# letters of other scripts, digits, spaces and line breaks: what tokenizers split in ways of their own
WORDS = "The quick brown fox, 12345 times!  Größe: naïve cafés\n\n\tprint('x==1') it's 7.5% — done"


@dataclass(frozen=True)
class Tried:
    """What one loader did with one model.

    Args:
        error: why it could not, "" where it could; missing: the package that is not installed.
        logits: (tokens, vocabulary) of the tokens asked for. scores: (steps, vocabulary) log-probabilities of greedy
            steps, NaN where not told.
        written: the tokens of greedy generation. ids: of the words asked for.
        speed: tokens a second.
    """

    error: str = ""
    missing: str = ""
    version: str = ""
    note: str = ""
    logits: Tensor | None = None
    scores: Tensor | None = None
    written: tuple[int, ...] = ()
    ids: tuple[int, ...] | None = None
    speed: float | None = None


def try_loader(
    loader: str,
    location: Path,
    ids: Sequence[int],
    *,
    words: str | None = None,
    tokens: int = 8,
    trust: bool = False,
    seconds: float = 900,
) -> Tried:
    """Opens `location` with a loader in a clean process; crashes and hangs of it are answers too.

    loader: as `clean_run.LOADERS` names them. words: a text to be split into tokens. tokens: how many are generated.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.safetensors"
        request = {
            "loader": loader, "location": str(location), "ids": list(ids), "words": words, "tokens": tokens,
            "threads": torch.get_num_threads(), "answer": str(file), "trust": trust,
        }  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
        if loader == "secateur":
            environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        try:
            # -P: the folder of the program stays off the import path, where our file names would shadow other modules
            done = subprocess.run(
                [sys.executable, "-P", str(Path(__file__).with_name("clean_run.py"))],
                input=json.dumps(request), capture_output=True, text=True, timeout=seconds, env=environment,
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Tried(error=f"no answer within {seconds:.0f} s")
        if not done.stdout.strip():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
            return Tried(error=f"the process ended with {done.returncode}: {' '.join(said[-2:])[:300]}")
        told: dict[str, Any] = json.loads(done.stdout)
        if "error" in told:
            said = [line.strip() for line in done.stderr.splitlines() if "llama_model_load: error" in line]
            return Tried(error=" ".join([told["error"], *said[:1]]), version=told.get("version", ""))
        numbers = read_tensors(file)[0] if file.exists() else {}
    plain = {name: told[name] for name in ("missing", "version", "note", "speed") if name in told}
    split = tuple(told["ids"]) if "ids" in told else None
    return Tried(
        **plain,
        logits=numbers.get("logits"),
        scores=numbers.get("scores"),
        written=tuple(told.get("written", ())),
        ids=split,
    )


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors of logits, relative to the largest logit or 1."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def score_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of log-probabilities, where they are told, relative to the spread of the logits or 1.

    ours: (steps, vocabulary) logits. theirs: (steps, ≤ vocabulary) log-probabilities, NaN where not told.
    """
    scores = ours.log_softmax(-1)[:, : theirs.shape[1]]
    told = ~theirs.isnan()
    return float((scores - theirs)[told].abs().max() / ours.abs().max().clamp(min=1))


def need(package: str, extra: str, what: str) -> None:
    """Raises RequestError where a package that an export needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise RequestError(f"{what} needs the package {package}: pip install 'secateur[{extra}]', and try again.")

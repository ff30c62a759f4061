"""What a model takes: bytes on disk, and the peak resident memory of a clean process that loads and runs it."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from secateur.errors import RunError
from secateur.network.locate import Place, locate


class Memory(BaseModel):
    """peak: highest resident memory in bytes of a process that loads the model with plain transformers on the CPU and
    reads `tokens` tokens at once. baseline: what that process held before loading (torch and transformers)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak: int
    baseline: int
    tokens: int
    dtype: str


def weight_files(place: Place) -> tuple[Path, ...]:
    """The files that transformers would load: what an index names, else the single file, safetensors before `.bin`."""
    if place.file is not None:
        return (place.file,)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = place.directory / f"{name}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return tuple(place.directory / shard for shard in sorted(shards))
        if (place.directory / name).is_file():
            return (place.directory / name,)
    return tuple(sorted(place.directory.glob("*.safetensors")))


def bytes_on_disk(spec: str | Path) -> int:
    """Bytes of the weight files of MODEL, nothing else."""
    return sum(file.stat().st_size for file in weight_files(locate(str(spec))))


def memory(spec: str | Path, *, tokens: int = 512, dtype: str = "float32", trust_remote_code: bool = False) -> Memory:
    """Measures the peak resident memory of MODEL in a clean child process; see `Memory`.

    tokens: read at once, fewer if the model has fewer positions. The child computes with as many threads as this
    process. Raises RunError with the child's last words when it fails.
    """
    place = locate(str(spec))
    request = {
        "location": str(place.directory),
        "gguf": place.file.name if place.file else None,
        "tokens": tokens,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "trust_remote_code": trust_remote_code,
    }
    program = Path(__file__).with_name("memory_process.py")
    # -P: the folder of the program stays off the import path, where `memory` or `speed` would shadow other modules.
    command = [sys.executable, "-P", str(program), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed, probably for want of memory"])[-1]
        raise RunError(f"The clean process that loads {spec} ended with code {done.returncode}: {last}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Memory(peak=answer["peak"], baseline=answer["baseline"], tokens=answer["tokens"], dtype=dtype)

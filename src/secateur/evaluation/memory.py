"""What a model takes: bytes on disk, and the peak resident memory of a clean process that loads and runs it."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from secateur.network.locate import Place, locate
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess

DECODED = 16  # tokens written behind those that are read


class Memory(BaseModel):
    """peak: highest resident memory in bytes of a process that loads the model with plain transformers on the CPU and
    reads `tokens` tokens at once. baseline: what that process held before loading (torch and transformers).

    loading, prefill, decode: the highest of each phase alone, all that was there before it included: loading, reading those
    tokens, and going on with `decoded` more behind them, one by one. None where the system cannot tell phases apart (it can
    on Linux), and for decoding where the model keeps no cache or has no positions left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak: int
    baseline: int
    tokens: int
    dtype: str
    loading: int | None = None
    prefill: int | None = None
    decode: int | None = None
    decoded: int = 0


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
    process. Raises RunError with its reason when it fails.
    """
    source = open_model(spec, trust_remote_code=trust_remote_code)
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    count = min(tokens, positions or tokens)
    room = DECODED if positions is None else min(DECODED, positions - count)
    ids = [[token % config.vocab_size for token in range(count)]]
    file = source.place.file
    with CleanProcess() as process:
        answer = process.ask(
            source.place.directory,
            ids,
            dtype=dtype,
            gguf=file and file.name,
            trust_remote_code=source.trust_remote_code,
            decode=room,
        )
    phases = answer["phases"]
    return Memory(
        peak=answer["peak"],
        baseline=answer["baseline"],
        tokens=count,
        dtype=dtype,
        **phases,
        decoded=room if "decode" in phases else 0,
    )

"""Time and memory against the number of layers and the width: linear in layers, flat in memory.

    python benchmarks/scaling.py

Random checkpoints, PruneNet with 5 episodes at ratio 0.2, one process each; the reload check is streamed and counted.
"""

import tempfile
from pathlib import Path

from transformers import LlamaConfig

from common import compress, random_checkpoint, show
from secateur.files import human

SHAPES = [(1024, 4096, layers) for layers in (4, 8, 16, 32, 64, 128)] + [(512, 2048, 8), (2048, 8192, 8)]


def main() -> None:
    rows = []
    for hidden, width, layers in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(
                hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, vocab_size=8192,
                num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
            )  # fmt: skip
            source = random_checkpoint(Path(folder) / "model", config)
            watched, receipt = compress(
                source, Path(folder) / "out", "--method", "prunenet", "--no-evaluate", "--set", "episodes=5",
                "--max-memory", "1MB",
            )  # fmt: skip
            step = receipt["timings"]["step 0: prunenet"]
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            rows.append(
                (hidden, width, layers, human(size), f"{step:.1f} s", f"{step / layers:.2f} s",
                 f"{watched.seconds:.1f} s", human(watched.peak))
            )  # fmt: skip
    columns = ("hidden", "width", "layers", "source", "step", "step per layer", "whole command", "peak memory")
    show("PruneNet: time and memory against layers and width", columns, rows)


if __name__ == "__main__":
    main()

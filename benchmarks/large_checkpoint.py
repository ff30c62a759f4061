"""Compresses a checkpoint of LLaMA-2-7B's shapes (bfloat16, sharded, random weights) with PruneNet on this machine.

    python benchmarks/large_checkpoint.py [--folder DIR] [--episodes 20] [--ratio 0.3] [--reward fast]

Needs 24 GB of disk. Prints time (the reload check apart) and the highest resident memory of the process tree.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from transformers import LlamaConfig

from common import compress, random_checkpoint, show
from secateur.files import human

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies or is made; default a temporary one")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--reward", default="fast")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    source = random_checkpoint(folder / "llama-2-7b-shapes", LlamaConfig(**LLAMA_2_7B))
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    settings = {"ratio": options.ratio, "episodes": options.episodes, "reward": options.reward}
    watched, receipt = compress(
        source, output, "--method", "prunenet", "--no-evaluate",
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    )  # fmt: skip
    timings = receipt["timings"]
    check = timings["reload check"]
    show(
        f"PruneNet on LLaMA-2-7B's shapes: {settings}, {receipt['threads']} threads",
        ("what", "measured"),
        [
            ("source", human(sum(f.stat().st_size for f in source.glob("*.safetensors")))),
            ("result", human(sum(f.stat().st_size for f in output.glob("*.safetensors")))),
            *((name, f"{seconds:.0f} s") for name, seconds in timings.items()),
            ("whole command without the reload check", f"{(watched.seconds - check) / 60:.1f} min"),
            ("peak memory of the process tree", human(watched.peak)),
            ("reload check", f"{receipt['reload_check']['how']}: {receipt['reload_check']['largest_difference']:.1g}"),
        ],
    )
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

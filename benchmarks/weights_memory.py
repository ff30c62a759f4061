"""Memory of Wanda on blocks of LLaMA-2-7B's shapes: what is resident above the imports, against what has to be.

    python benchmarks/weights_memory.py [--dtype bfloat16] [--blocks 4] [--samples 8] [--length 512]

A bfloat16 checkpoint of four blocks with embedding and head, random weights (2.1 GB of disk, and as much for the result),
calibrated on random token ids. What has to be: one block in the dtype of its passes, the hidden states of all tokens
before and after it (both lie in files), and the statistics. Goal: at most 1.3 times that. Resident memory is that of the
whole process tree, pages of files included, sampled; the reload check is streamed too, so that no model is ever held.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig

from common import Watched, compress, random_checkpoint, show, watch, write_ids
from large_checkpoint import LLAMA_2_7B
from secateur.calibration.collector import ROWS
from secateur.files import human, write_json
from secateur.network.source import open_model

GOAL = 1.3
INTERVAL = 0.01
IMPORTS = """
import secateur.cli, secateur.run, secateur.registry
from transformers import LlamaForCausalLM
secateur.registry.methods()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of passes through blocks")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths, to try the script")
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies or is made; default a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    widths = {name: LLAMA_2_7B[name] // options.shrink for name in ("hidden_size", "intermediate_size")}
    config = LlamaConfig(**{**LLAMA_2_7B, **widths, "num_hidden_layers": options.blocks})
    source = random_checkpoint(folder / f"{options.blocks}-blocks-{config.hidden_size}", config)
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    held_out = -(-options.samples // 8)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(config.vocab_size, (options.samples + held_out, options.length), generator=generator)
    calibration = {
        "data": str(write_ids(folder / "ids.json", sequences)), "samples": options.samples, "length": options.length,
        "held_out": held_out, "dtype": options.dtype,
    }  # fmt: skip
    recipe = folder / "recipe.yaml"
    write_json(recipe, {"steps": [{options.method: {}}], "calibration": calibration})  # JSON is YAML

    imports = watch([sys.executable, "-c", IMPORTS], INTERVAL)
    watched, receipt = compress(
        source, output, "--recipe", str(recipe), "--no-evaluate", "--quiet", "--max-memory", "1MB", interval=INTERVAL
    )

    parts = needed(source, sequences.numel(), getattr(torch, options.dtype))
    floor, above = sum(parts.values()), watched.peak - imports.peak
    kept = 2 * 4 * ROWS * sum(columns(source))
    rows = [
        ("one block", human(parts["block"])),
        ("hidden states before and after it", human(parts["hidden"])),
        ("statistics", human(parts["statistics"])),
        ("has to be", human(floor)),
        ("imports alone", human(imports.peak)),
        ("highest resident, process tree", human(watched.peak)),
        ("highest resident, the process by the kernel's count", human(watched.own)),
        *((f"highest while {name}", human(peak)) for name, peak in phases(watched, receipt).items()),
        ("above the imports", human(above)),
        (f"above the imports / has to be (goal {GOAL})", f"{above / floor:.2f}"),
        ("inputs kept to report errors, at most, not counted above", human(kept)),
        *((f"seconds, {name}", f"{seconds:.0f}") for name, seconds in receipt["timings"].items()),
    ]
    title = f"{options.method} on {options.blocks} blocks of LLaMA-2-7B's shapes"
    if options.shrink > 1:
        title += f" with widths / {options.shrink}"
    show(
        f"{title}, {options.samples} (+{held_out} held out) x {options.length} tokens, {options.dtype} passes, "
        f"{receipt['threads']} threads",
        ("what", "measured"),
        rows,
    )
    if options.folder is None:
        shutil.rmtree(folder)


def needed(source: Path, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that no such method can do without while it holds one block."""
    opened = open_model(source)
    block = opened.anatomy.blocks[0]
    weights = sum(opened.skeleton.get_parameter(name).numel() for name in block.parameters)
    return {
        "block": weights * dtype.itemsize,
        "hidden": 2 * tokens * opened.anatomy.hidden * dtype.itemsize,
        "statistics": sum(columns(source)) * torch.float64.itemsize,
    }


def columns(source: Path) -> list[int]:
    """Widths of the inputs of a LLaMA block: of q, k and v, of o, of gate and up, of down."""
    config = open_model(source).config
    return [config.hidden_size] * 3 + [config.intermediate_size]


def phases(watched: Watched, receipt: dict) -> dict[str, int]:
    """The highest resident memory of each part of the run; the receipt's clock ends with the command."""
    begun, highest = watched.seconds - receipt["seconds"], {}
    for name, seconds in receipt["timings"].items():
        inside = [total for at, total in watched.samples if begun <= at < begun + seconds]
        if inside:
            highest[name] = max(inside)
        begun += seconds
    return highest


if __name__ == "__main__":
    main()

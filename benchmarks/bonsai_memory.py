"""Memory of Bonsai on SmolLM2-135M against that of inference, and of LLM-Pruner, which needs gradients.

    python benchmarks/bonsai_memory.py [--length 512] [--submodels 4] [--samples 2] [--dtype float32]

Inference is a clean process that loads the model with plain transformers, in the dtype of its files, and reads one sequence.
All numbers are the kernel's high-water mark of resident memory above what the same imports alone hold. The result is checked
by streaming (--max-memory 1MB), so that no other whole model is counted. Goal: Bonsai at most 1.1 times inference.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from common import compress, plain_model, show, watch, write_ids
from secateur.evaluation.memory import memory
from secateur.files import human, write_json
from secateur.network.source import load, open_model
from weights_memory import IMPORTS

GOAL = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--submodels", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the files")
    parser.add_argument("--model", type=Path, help="a model directory in that dtype instead of SmolLM2-135M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.model or plain_model(folder / "model")
        if options.dtype == "bfloat16" and not options.model:
            load(source, "bfloat16")[0].save_pretrained(source)
        vocabulary = open_model(source).anatomy.vocabulary
        drawn = torch.randint(vocabulary, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
        data = {"data": str(write_ids(folder / "ids.json", drawn)), "samples": options.samples, "held_out": 0}
        imports = watch([sys.executable, "-c", IMPORTS], 0.05)
        plain = memory(source, tokens=options.length, dtype=options.dtype)
        inference = plain.peak - plain.baseline
        print(human(inference), flush=True)
        rows = [("inference of one sequence", human(inference), "1.00", "")]
        sub_models = {"submodels": options.submodels, "sequences": options.samples, "per_round": 0.1}
        for method, given in (("bonsai", sub_models), ("llm_pruner", {})):
            step = {method: {"ratio": 0.2, **given}}
            write_json(folder / "recipe.yaml", {"steps": [step], "calibration": {**data, "length": options.length}})
            shutil.rmtree(folder / "out", ignore_errors=True)
            watched, _ = compress(
                source, folder / "out", "--recipe", str(folder / "recipe.yaml"), "--no-evaluate", "--quiet",
                "--max-memory", "1MB",
            )  # fmt: skip
            above = watched.own - imports.own
            rows.append((method, human(above), f"{above / inference:.2f}", f"{watched.seconds:.0f}"))
    show(
        f"{options.model or 'SmolLM2-135M'}, {options.dtype}, {options.samples} x {options.length} tokens; goal {GOAL}",
        ("what", "resident above imports", "/ inference", "seconds"),
        rows,
    )


if __name__ == "__main__":
    main()

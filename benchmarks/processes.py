"""Whether two processes prune as one does: masks, perplexity and time of SmolLM2-135M, calibrated by one and by two.

    python benchmarks/processes.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        [--methods wanda sparsegpt] [--pattern 0.5] [--samples 32] [--length 512] [--windows 8]

Both are commands, the second under torchrun with two gloo processes on one thread each; the first has one thread too. Goals:
at least 99.9 % of the masks' entries the same, and perplexities within 0.2 % of each other.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import secateur
from common import SMOLLM2, measure, show, text_ids, watch

ALONE = [sys.executable, "-m"]
SHARED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    text = text_ids(options.text)
    given = ["--calibration", str(options.calibration), "--samples", str(options.samples)]
    given += ["--length", str(options.length), "--set", f"pattern={options.pattern}", "--no-evaluate", "--quiet"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            outputs, took = [], []
            for name, launcher in (("one", ALONE), ("two", SHARED)):
                outputs.append(Path(folder) / f"{method}-{name}")
                command = [*launcher, "secateur", "compress", SMOLLM2, "--method", method, *given]
                took.append(watch([*command, "--output", str(outputs[-1])]).seconds)
            first, second = (secateur.read_masks(output) for output in outputs)
            same = sum(int((first[name] == second[name]).sum()) for name in first)
            share = same / sum(mask.numel() for mask in first.values())
            one, two = (measure(output, text, options.windows) for output in outputs)
            cells = (f"{share:.6f}", f"{one:.3f}", f"{two:.3f}", f"{two / one - 1:+.3%}", f"{took[0] / took[1]:.2f}")
            rows.append((method, *cells))
            print(*rows[-1], flush=True)
    show(
        f"{SMOLLM2} at {options.pattern}, {options.samples} x {options.length} tokens, first {options.windows} windows of "
        f"{options.text.name}",
        ("method", "mask entries alike", "perplexity, one", "two", "difference", "time of one / of two"),
        rows,
    )


if __name__ == "__main__":
    main()

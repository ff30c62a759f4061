"""SparseGPT: ours against llmcompressor's, interleaved, on SmolLM2-135M in float32, with the same token ids.

    python benchmarks/sparsegpt_peer.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        --peer-python PEER/bin/python [--pairs 2] [--method wanda] [--patterns 0.5 2:4] [--sequential]

The peer lives in an environment of its own (`pip install llmcompressor`); without --peer-python only ours runs. The first
pair is calibrated on the first windows of the text, the next on those that follow; perplexity, in float32 by our own code
for all, on the first windows of 1024 tokens. Seconds, memory and perplexity are medians over the pairs. Compression: our
receipt's step, which reads the model's weights, prunes and writes the result; the peer's oneshot(), which has the model in
memory and leaves it there. Whole command: imports, loading, saving and, in ours alone, the reload check; that check takes a
second process, which the tree's memory counts.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import compress, measure, plain_model, show, text_ids, watch, write_ids
from secateur.files import human, write_json

PEER = "llmcompressor"
OURS = {"ours, float32": {}, "ours, bfloat16 passes": {"dtype": "bfloat16"}}
COLUMNS = ("who", "compression", "peer / it", "whole command", "peak of process", "of its tree", "perplexity")


@dataclass(frozen=True)
class Taken:
    """One run: seconds of the compression and of the command, memory of the process and of its tree, who ran."""

    step: float
    command: float
    own: int
    tree: int
    about: Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, help="the interpreter of an environment with llmcompressor")
    parser.add_argument("--peer-batch", type=int, default=1, help="its batch_size; 1 is its own default")
    parser.add_argument("--method", choices=("sparsegpt", "wanda"), default="sparsegpt")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--sequential", action="store_true", help="also ours matrix by matrix, each seeing those before"
    )
    parser.add_argument("--model", type=Path, help="another model directory, in float32")
    parser.add_argument("--folder", type=Path, help="where models are written; default a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or plain_model(folder / "model")
    windows, text = text_ids(options.calibration, model).ids.split(options.length), text_ids(options.text, model)
    given = [
        write_ids(folder / f"ids-{pair}.json", windows[pair * options.samples : (pair + 1) * options.samples])
        for pair in range(options.pairs)
    ]
    variants = OURS | ({f"{name}, sequential": {**at, "sequential": True} for name, at in OURS.items()}
                       if options.sequential else {})  # fmt: skip
    names = [*variants, PEER] if options.peer_python else [*variants]
    for pattern in options.patterns:
        taken: dict[str, list[Taken]] = {name: [] for name in names}
        quality: dict[str, list[float]] = {name: [] for name in names}
        for pair in range(options.pairs):
            # in turn from either end, so that whatever warms up or slows down meets all alike
            for name in names[:: -1 if pair % 2 else 1]:
                output = folder / "out"
                shutil.rmtree(output, ignore_errors=True)
                if name == PEER:
                    one = theirs(options, model, given[pair], pattern, output)
                else:
                    one = ours(options, model, given[pair], pattern, output, variants[name])
                taken[name].append(one)
                quality[name].append(measure(output, text, options.windows))
                print(f"{pattern}, {name}: {one.step:.1f} s, {one.command:.1f} s with the rest, {human(one.own)}, "
                      f"{human(one.tree)} with children, perplexity {quality[name][-1]:.3f}", flush=True)  # fmt: skip
        table(options, pattern, taken, quality, measure(model, text, options.windows))
    if options.folder is None:
        shutil.rmtree(folder)


def ours(
    options: argparse.Namespace, model: Path, ids: Path, pattern: str, output: Path, calibration: Mapping[str, Any]
) -> Taken:
    recipe = output.with_name("recipe.yaml")
    samples = {"data": str(ids), "samples": options.samples, "length": options.length, "held_out": 0, "order": "first"}
    steps = [{options.method: {"pattern": pattern}}]
    write_json(recipe, {"steps": steps, "calibration": {**samples, **calibration}})  # JSON is YAML
    watched, receipt = compress(model, output, "--recipe", str(recipe), "--no-evaluate", "--quiet")
    about = {"threads": receipt["threads"], **receipt["versions"]}
    return Taken(receipt["timings"][f"step 0: {options.method}"], watched.seconds, watched.own, watched.peak, about)


def theirs(options: argparse.Namespace, model: Path, ids: Path, pattern: str, output: Path) -> Taken:
    program, report = Path(__file__).with_name("peer_llmcompressor.py"), output.with_name("peer.json")
    watched = watch([
        str(options.peer_python), str(program), str(model), str(ids), "--method", options.method, "--pattern", pattern,
        "--batch", str(options.peer_batch), "--report", str(report), "--save", str(output),
    ])  # fmt: skip
    said = json.loads(report.read_text())
    about = {"threads": said["threads"], **said["versions"]}
    return Taken(said["seconds"], watched.seconds, watched.own, watched.peak, about)


def table(
    options: argparse.Namespace,
    pattern: str,
    taken: Mapping[str, list[Taken]],
    quality: Mapping[str, list[float]],
    dense: float,
) -> None:
    middle = {
        name: [median(getattr(run, key) for run in runs) for key in ("step", "command", "own", "tree")]
        for name, runs in taken.items()
    }
    rows = [
        (
            name,
            f"{step:.1f} s",
            f"{middle[PEER][0] / step:.2f}x" if PEER in middle else "",
            f"{command:.1f} s",
            human(own),
            human(tree),
            f"{median(quality[name]):.2f} ({min(quality[name]):.2f} to {max(quality[name]):.2f})",
        )
        for name, (step, command, own, tree) in middle.items()
    ]
    show(
        f"{options.method} at {pattern}: {options.samples} x {options.length} calibration tokens, {options.pairs} pairs, "
        f"first {options.windows} windows of {options.text.name}; dense {dense:.3f}",
        COLUMNS,
        rows,
    )
    for name in (next(iter(taken)), *(name for name in taken if name == PEER)):
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in taken[name][0].about.items())}")


if __name__ == "__main__":
    main()

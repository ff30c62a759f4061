"""Which one-shot pruning of weights keeps SmolLM2-135M best: perplexity, layer errors and seconds, over calibration seeds.

    python benchmarks/weights_quality.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        [--seeds 3] [--patterns 0.5 2:4] [--only SparseGPT wanda ...]
    python benchmarks/weights_quality.py ... --allocations [--patterns 0.7]

Float32; a seed draws the calibration windows. Perplexity on the first windows of 1024 tokens (--window). Errors: what a
matrix's output changes by, squared, relative to it, the mean over all matrices, on rows of the calibration tokens and of
held-out ones, in the pruned network's own inputs. With --allocations: Wanda with the same number of weights divided in
several ways, AlphaPruning's the other way round among them, which should be worst if its reasons hold.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import secateur
from common import SMOLLM2, remembered, show, text_ids, write_ids
from secateur.evaluation import perplexity
from secateur.methods.allocation.alphapruning import alphapruning
from secateur.network.source import load
from secateur.recipe import Recipe
from secateur.registry import Allocation, Context, Matrices, methods
from secateur.registry import method as register

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "Wanda": ("wanda", {}),
    "Pruner-Zero": ("pruner_zero", {}),
    "DSnoT on Wanda's mask": ("dsnot", {"mask": "wanda"}),
    "DSnoT on SparseGPT's mask": ("dsnot", {"mask": "sparsegpt"}),
    "SparseGPT": ("sparsegpt", {}),
    "ADMM": ("admm", {}),
    "APT": ("apt", {}),
    "APT, fast": ("apt", {"schedule": "fast"}),
    "SparseGPT's mask, ADMM's update": ("admm", {"mask": "sparsegpt"}),
    "SparseGPT's mask, APT's update": ("apt", {"mask": "sparsegpt"}),
    "SparseGPT's mask, dense refit": ("dense_refit", {"mask": "sparsegpt"}),
}
ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wanda, uniform": ("wanda", {}),
    "Wanda, ERK": ("wanda", {"allocation": "erk"}),
    "Wanda, PQ index": ("wanda", {"allocation": "pq_index"}),
    "Wanda, AlphaPruning": ("wanda", {"allocation": {"alphapruning": {"epsilon": 0.2}}}),
    "Wanda, divergent tokens": ("wanda", {"allocation": "divergent_tokens"}),
    "Wanda, AlphaPruning reversed": ("wanda", {"allocation": {"alphapruning_reversed": {"epsilon": 0.2}}}),
}


@register(
    "alphapruning_reversed", kind="allocation", paper="arXiv:2410.10912", claim="none: a control", when="after training",
    speedup="specific", criterion="spectrum", schedule="one-shot",
)  # fmt: skip
def alphapruning_reversed(network: Matrices, context: Context, *, epsilon: float = 0.3) -> Allocation:
    """Takes from each matrix as much more than its even share as AlphaPruning takes less.

    Args:
        epsilon: as AlphaPruning's.
    """
    found = alphapruning(network, context, epsilon=epsilon).remove
    even = network.remove / sum(network.sizes)
    shares = [round(2 * even * size) - count for size, count in zip(network.sizes, found.values(), strict=True)]
    shares[-1] += network.remove - sum(shares)
    return Allocation(dict(zip(found, shares, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--patterns", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--only", nargs="+", help="names of rows, or of methods")
    parser.add_argument("--allocations", action="store_true")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--journal", type=Path, help="where each run's figures are kept, to go on later")
    options = parser.parse_args()
    module, _ = load(options.model)
    text = text_ids(options.text, options.model)
    dense = perplexity(module, text, window=options.window, windows=options.windows).perplexity
    variants = ALLOCATIONS if options.allocations else METHODS
    chosen = {
        name: (method, given)
        for name, (method, given) in variants.items()
        if method in methods() and (not options.only or {name, method} & set(options.only))
    }
    with tempfile.TemporaryDirectory() as folder:
        ids = write_ids(Path(folder) / "ids.json", [text_ids(options.calibration, options.model).ids])
        for pattern in options.patterns or (["0.7"] if options.allocations else ["0.5", "2:4"]):
            rows = []
            for name, (method, given) in chosen.items():
                runs = []
                for seed in range(1 if method == "magnitude" else options.seeds):
                    step = {method: {"pattern": pattern, **given}}
                    key = json.dumps(
                        [options.model, step, seed, options.samples, options.length, options.windows, options.window]
                    )
                    compute = partial(run, module, text, ids, options, seed, step)
                    runs.append(remembered(options.journal, key, compute))
                    print(f"{pattern}, {name}, seed {seed}: " + told(runs[-1:], ", "), flush=True)
                rows.append((name, len(runs), *told(runs).split("|")))
            show(
                f"{options.model} at {pattern}, {options.samples} x {options.length} calibration tokens, first "
                f"{options.windows} windows of {options.text.name}; dense {dense:.3f}; medians and ranges",
                ("method", "seeds", "perplexity", "error %", "held-out error %", "seconds"),
                rows,
            )


def run(
    module: torch.nn.Module, text: Any, ids: Path, options: argparse.Namespace, seed: int, step: Mapping[str, Any]
) -> tuple[float, float | None, float | None, float]:
    """Perplexity, the two mean errors (None where nothing was calibrated) and seconds."""
    calibration = {"data": str(ids), "samples": options.samples, "length": options.length}
    recipe = Recipe.parse({"steps": [step], "seed": seed, "calibration": calibration})
    began = time.perf_counter()
    result = secateur.compress(module, recipe=recipe)
    seconds = time.perf_counter() - began
    [said] = result.receipt["decisions"]
    assert result.model is not None
    found = perplexity(result.model, text, window=options.window, windows=options.windows).perplexity
    return found, said.get("mean calibration error"), said.get("mean held out error"), seconds


def told(runs: list[tuple[float, float | None, float | None, float]], between: str = "|") -> str:
    """Median and range of each figure."""
    parts = []
    for values, scale, form in zip(
        zip(*runs, strict=True), (1, 100, 100, 1), (".2f", ".3f", ".3f", ".1f"), strict=True
    ):
        known = [value * scale for value in values if value is not None]
        spread = f" ({min(known):{form}} to {max(known):{form}})" if len(known) > 1 else ""
        parts.append(f"{median(known):{form}}{spread}" if known else "-")
    return between.join(parts)


if __name__ == "__main__":
    main()

"""What removing units costs SmolLM2-135M: perplexity and divergence of every method at equal ratios.

    python benchmarks/units_quality.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        [--ratios 0.1 0.2 0.3] [--axis neurons] [--seeds 3] [--only unit_surgeon ...] [--own]

Float32; a seed draws the calibration windows, or the numbers of a method that draws. Perplexity and KL to the dense model on
the first windows of 1024 tokens. Errors: what the output of the cut layers changes by, squared, relative to it, on
calibration and on held-out tokens. --own calibrates on text that the model writes itself: no outside text is used then.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import secateur
from common import SMOLLM2, show, text_ids, write_ids
from secateur.evaluation import compare
from secateur.evaluation.remembered import Remembered
from secateur.network.source import load
from secateur.recipe import Recipe
from secateur.registry import find

RATIO = "the ratio"  # stands for it where a method calls it otherwise
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random_units", {}),
    "largest norms": ("magnitude_units", {"norm": "all"}),
    "folding": ("fold", {}),
    "folding, Ward": ("fold", {"cluster": "ward"}),
    "TransAct": ("transact", {}),
    "FLAP": ("flap", {}),
    "activation x weight": ("wanda_units", {}),
    "activation x weight, LIAR": ("liar", {"by": "wanda_units"}),
    "FLAP's search": ("flap", {"allocation": "flap_search"}),
    "activation x weight, equal errors": ("wanda_units", {"allocation": "equal_error"}),
    "LLM-Pruner": ("llm_pruner", {}),
    "LLM-Pruner, LIAR": ("liar", {"by": "llm_pruner"}),
    "Minitron": ("minitron", {}),
    "Adapt-Pruner, 10 steps": ("adapt_pruner", {"overall": RATIO}),
    "Bonsai": ("bonsai", {}),
    "COMP-style": ("comp", {}),
    "Zipf surgeon (ours)": ("zipf_surgeon", {}),
    "unit surgeon (ours)": ("unit_surgeon", {}),
    "unit surgeon (ours), alphapruning": ("unit_surgeon", {"allocation": "alphapruning"}),
    "channels: Minitron": ("minitron", {"axis": ["channels"], "multiple_of": 8}),
}
DRAWN = {"random_units", "zipf_surgeon"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--axis", nargs="+", default=["neurons"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="names of rows, or of methods")
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    module, _ = load(SMOLLM2)
    text, dense = text_ids(options.text), Remembered(module)
    with tempfile.TemporaryDirectory() as folder:
        ids = write_ids(Path(folder) / "ids.json", [text_ids(options.calibration).ids])
        data = "self" if options.own else str(ids)
        for ratio in options.ratios:
            rows = []
            for name, (method, given) in METHODS.items():
                wanted = not options.only or {name, method} & set(options.only)
                if not wanted or not set(given.get("axis", options.axis)) <= set(find(method).axes):
                    continue
                settings = (
                    {"axis": options.axis, **given} if "axis" in find(method).schema.model_fields else dict(given)
                )
                named = [key for key, value in settings.items() if value == RATIO] or ["ratio"]
                step = {method: {**settings, named[0]: ratio}}
                learns = Recipe.parse({"steps": [step]}).calibrated
                runs = []
                for seed in range(options.seeds if learns or method in DRAWN else 1):
                    calibration = {"data": data, "samples": options.samples, "length": options.length}
                    recipe = {"steps": [step], "seed": seed, **({"calibration": calibration} if learns else {})}
                    runs.append(run(module, dense, text, options.windows, Recipe.parse(recipe)))
                    print(
                        f"{ratio}, {name}, seed {seed}: " + ", ".join(told([value]) for value in runs[-1]), flush=True
                    )
                rows.append((name, len(runs), *map(told, zip(*runs, strict=True))))
            show(
                f"{SMOLLM2}, {ratio} of {' and '.join(options.axis)}, {options.samples} x {options.length} tokens of "
                f"{'its own' if options.own else options.calibration.name}, first {options.windows} windows of "
                f"{options.text.name}; medians (ranges)",
                ("method", "runs", "perplexity", "/ dense", "KL, nats", "error", "held-out error", "seconds"),
                rows,
            )


def run(
    module: torch.nn.Module, dense: torch.nn.Module, text: Any, windows: int, recipe: Recipe
) -> tuple[float | None, ...]:
    """Perplexity, its ratio to the dense one, KL, the two mean errors (None where nothing was calibrated), seconds."""
    began = time.perf_counter()
    result = secateur.compress(module, recipe=recipe)
    seconds = time.perf_counter() - began
    [said] = result.receipt["decisions"]
    assert result.model is not None
    with torch.inference_mode():
        found = compare(result.model, dense, text, window=1024, windows=windows)
    ratio = found.model.perplexity / found.reference.perplexity
    errors = (said.get("mean calibration error"), said.get("mean held out error"))
    return found.model.perplexity, ratio, found.divergence.kl, *errors, seconds


def told(values: Any) -> str:
    """Median and range."""
    known = [value for value in values if value is not None]
    spread = f" ({min(known):.3g} to {max(known):.3g})" if len(known) > 1 else ""
    return f"{median(known):.4g}{spread}" if known else "-"


if __name__ == "__main__":
    main()

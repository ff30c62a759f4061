"""What removing units costs SmolLM2-135M: perplexity and divergence of every method at equal ratios.

    python benchmarks/units_quality.py --calibration wikitext2/validation.txt --text wikitext2/test.txt \\
        [--ratios 0.1 0.2 0.3] [--axis neurons] [--seeds 3] [--only unit_surgeon ...] [--own] [--journal FILE]
    python benchmarks/units_quality.py ... --other-axes

Float32; a seed draws the calibration windows, or the numbers of a method that draws. Perplexity and KL to the dense model on
the first windows of 1024 tokens. Errors: what the output of the cut layers changes by, squared, relative to it, on
calibration and on held-out tokens. Prefill: 512 tokens at once, in turns with the dense model, how much faster; of the first
seed. Memory: the highest resident while compressing, above the model that is there before. --own calibrates on text that the
model writes itself: no outside text is used then. --other-axes: what else can be cut, each to as many parameters in all as a
ratio of the neurons leaves. --journal: where each run's figures are kept, so that a table can go on later.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import secateur
from common import SMOLLM2, MemoryPeak, remembered, show, text_ids, write_ids
from secateur.comparison.budget import Budget, fit
from secateur.evaluation import compare, parameters, speed
from secateur.evaluation.remembered import Remembered
from secateur.network.source import load, open_model
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
}
OTHER_AXES: dict[str, tuple[str, dict[str, Any]]] = {
    "neurons: activation x weight": ("wanda_units", {"axis": ["neurons"]}),
    "neurons: unit surgeon (ours)": ("unit_surgeon", {"axis": ["neurons"]}),
    "neurons and heads: unit surgeon (ours)": ("unit_surgeon", {"axis": ["neurons", "heads"]}),
    "heads: activation x weight": ("wanda_units", {"axis": ["heads"]}),
    "heads: unit surgeon (ours)": ("unit_surgeon", {"axis": ["heads"]}),
    "channels: Minitron": ("minitron", {"axis": ["channels"], "multiple_of": 8}),
    "channels: SliceGPT": ("slicegpt", {"multiple_of": 9}),
    "channels: one rotation": ("slicegpt", {"rotation": "one", "multiple_of": 9}),
    "blocks: ShortGPT": ("block_influence", {}),
    "blocks: perplexity": ("layer_drop", {"metric": "perplexity"}),
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
    parser.add_argument("--other-axes", action="store_true")
    parser.add_argument("--journal", type=Path)
    options = parser.parse_args()
    module, _ = load(SMOLLM2)
    text, dense = text_ids(options.text), Remembered(module)
    with tempfile.TemporaryDirectory() as folder:
        ids = write_ids(Path(folder) / "ids.json", [text_ids(options.calibration).ids])
        data = "self" if options.own else str(ids)
        for ratio in options.ratios:
            rows = []
            cut = "the neurons' parameters" if options.other_axes else " and ".join(options.axis)
            for name, (method, given) in (OTHER_AXES if options.other_axes else METHODS).items():
                wanted = not options.only or {name, method} & set(options.only)
                if not wanted or (not options.other_axes and not set(options.axis) <= set(find(method).axes)):
                    continue
                if options.other_axes:
                    step = {method: {**given, **as_many(module, method, given, ratio)}}
                else:
                    fields = find(method).schema.model_fields
                    settings = {"axis": options.axis, **given} if "axis" in fields else dict(given)
                    named = [key for key, value in settings.items() if value == RATIO] or ["ratio"]
                    step = {method: {**settings, named[0]: ratio}}
                learns = Recipe.parse({"steps": [step]}).calibrated
                runs = []
                for seed in range(options.seeds if learns or method in DRAWN else 1):
                    calibration = {"data": data, "samples": options.samples, "length": options.length}
                    recipe = {"steps": [step], "seed": seed, **({"calibration": calibration} if learns else {})}
                    key = json.dumps(
                        [recipe | {"calibration": None}, learns, options.own, options.samples, options.length]
                    )
                    compute = partial(run, module, dense, text, options.windows, Recipe.parse(recipe), seed == 0)
                    runs.append(remembered(options.journal, key, compute))
                    print(
                        f"{ratio}, {name}, seed {seed}: " + ", ".join(told([value]) for value in runs[-1]), flush=True
                    )
                rows.append((name, len(runs), *map(told, zip(*runs, strict=True))))
            show(
                f"{SMOLLM2}, {ratio} of {cut}, {options.samples} x {options.length} tokens of "
                f"{'its own' if options.own else options.calibration.name}, first {options.windows} windows of "
                f"{options.text.name}; medians (ranges)",
                ("method", "runs", *FIGURES),
                rows,
            )


def as_many(module: torch.nn.Module, method: str, given: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Settings, beside those `given`, with which a method leaves as many parameters as `ratio` of all neurons would."""
    network = open_model(module).anatomy
    block = network.blocks[0]
    neurons = block.group("neurons")
    assert neurons is not None
    shapes = [(part, module.get_parameter(part.parameter).shape) for part in neurons.slices]
    unit = sum(shape.numel() // shape[part.dim] * part.width for part, shape in shapes)
    gone = round(ratio * neurons.count) * unit * len(network.blocks)
    if "target" in find(method).schema.model_fields and method != "minitron":
        return {"target": network.parameters - gone}
    if "remove" in find(method).schema.model_fields:
        return {"remove": round(gone / sum(module.get_parameter(name).numel() for name in block.parameters))}
    share = 1 - gone / network.parameters
    plan = Recipe.parse({"steps": [{method: given}]})
    return {
        "ratio": fit(open_model(module), plan, Budget.parse(f"parameters={share}")).recipe.steps[0].parameters["ratio"]
    }


FIGURES = (
    "perplexity", "/ dense", "KL, nats", "error", "held-out error", "parameters", "prefill", "MB", "seconds",
)  # fmt: skip


def run(
    module: torch.nn.Module, dense: torch.nn.Module, text: Any, windows: int, recipe: Recipe, timed: bool
) -> tuple[float | None, ...]:
    """FIGURES: the two mean errors are None where nothing was calibrated, the gain in speed where it was not timed."""
    peak, began = MemoryPeak(), time.perf_counter()
    peak.begin()
    if recipe.steps[0].method == "slicegpt":  # turns no live module
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "out"
            result = secateur.compress(SMOLLM2, recipe=recipe, output=output, dtype="float32", evaluate=False)
            seconds = time.perf_counter() - began
            model, _ = load(output)
    else:
        result = secateur.compress(module, recipe=recipe)
        seconds = time.perf_counter() - began
        assert result.model is not None
        model = result.model
    memory = peak.above() / 1e6
    [said] = result.receipt["decisions"]
    with torch.inference_mode():
        found = compare(model, dense, text, window=1024, windows=windows)
    ratio = found.model.perplexity / found.reference.perplexity
    errors = (said.get("mean calibration error"), said.get("mean held out error"))
    gain = speed(model, module, decode=0, pairs=5).prefill.gain.median if timed else None
    left = parameters(model) / parameters(module)
    return found.model.perplexity, ratio, found.divergence.kl, *errors, left, gain, memory, seconds


def told(values: Any) -> str:
    """Median and range."""
    known = [value for value in values if value is not None]
    spread = f" ({min(known):.3g} to {max(known):.3g})" if len(known) > 1 else ""
    return f"{median(known):.4g}{spread}" if known else "-"


if __name__ == "__main__":
    main()

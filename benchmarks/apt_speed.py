"""APT's exact solution: time on SmolLM2-135M against SparseGPT's, and on single matrices against the plain formula.

    python benchmarks/apt_speed.py --calibration wikitext2/validation.txt [--pairs 2] [--only model]

Whole model: the receipt's step of two commands, run in turn, which reads the weights, calibrates, prunes and writes. Single
matrices: gate and down projection of one block with the moments of their dense inputs, everything else left out: SparseGPT's
sweep, APT as a whole (mask and weights), and for the mask that APT found the plain formula, one linear system for each row.
Losses are the damped calibration losses that all three minimise, of that mask where it is given.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import SMOLLM2, compress, plain_model, show, text_ids, write_ids
from secateur.calibration.statistics import Gram, Sums
from secateur.context import Context
from secateur.files import human, write_json
from secateur.methods.weights.apt import apt
from secateur.methods.weights.sparsegpt import sparsegpt
from secateur.network.source import load
from secateur.network.views import Weight
from secateur.tensor.patterns import Budget, Pattern

GOAL = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block", type=int, default=8, help="whose matrices are solved alone")
    parser.add_argument("--only", choices=("model", "matrix"))
    options = parser.parse_args()
    windows = text_ids(options.calibration).ids.split(options.length)[: options.samples]
    if options.only != "model":
        single(options, list(windows))
    if options.only != "matrix":
        with tempfile.TemporaryDirectory() as folder:
            whole(options, list(windows), Path(folder))


def whole(options: argparse.Namespace, windows: list[Tensor], folder: Path) -> None:
    model, ids, recipe = plain_model(folder / "model"), write_ids(folder / "ids.json", windows), folder / "recipe.yaml"
    calibration = {"data": str(ids), "samples": len(windows), "length": options.length, "held_out": 0, "order": "first"}
    rows = []
    for pattern in options.patterns:
        took: dict[str, list[tuple[float, int]]] = {"sparsegpt": [], "apt": []}
        for pair in range(options.pairs):
            for name in list(took)[:: -1 if pair % 2 else 1]:
                write_json(recipe, {"steps": [{name: {"pattern": pattern}}], "calibration": calibration})
                shutil.rmtree(folder / "out", ignore_errors=True)
                watched, receipt = compress(model, folder / "out", "--recipe", str(recipe), "--no-evaluate", "--quiet")
                took[name].append((receipt["timings"][f"step 0: {name}"], watched.own))
                print(f"{pattern}, {name}: {took[name][-1][0]:.1f} s", flush=True)
        seconds = {name: [one for one, _ in runs] for name, runs in took.items()}
        ratios = [a / s for a, s in zip(seconds["apt"], seconds["sparsegpt"], strict=True)]
        rows += [
            (pattern, name, f"{median(seconds[name]):.1f} s", human(max(own for _, own in took[name])),
             f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if name == "apt" else "")
            for name in took
        ]  # fmt: skip
    show(
        f"{SMOLLM2}, {len(windows)} x {options.length} tokens, {options.pairs} pairs, {torch.get_num_threads()} threads",
        ("pattern", "method", "step", "peak of the process", f"of SparseGPT's time (goal {GOAL:g})"),
        rows,
    )


@torch.no_grad()
def single(options: argparse.Namespace, windows: list[Tensor]) -> None:
    module, _ = load(SMOLLM2)
    feed_forward = module.model.layers[options.block].mlp
    rows = []
    for name in ("gate_proj", "down_proj"):
        layer = getattr(feed_forward, name)
        sums = Sums({"gram"}, layer.in_features)
        hook = layer.register_forward_pre_hook(lambda _, given, sums=sums: sums.add(given[0]))
        for window in windows:
            module(input_ids=window[None], use_cache=False)
        hook.remove()
        sums.finish()
        dense = layer.weight.float()
        for pattern in options.patterns:
            parsed = Pattern.parse(pattern)
            given = (
                Weight(name, options.block, None, tuple(dense.shape), lambda d=dense: d),
                Budget.uniform(parsed, tuple(dense.shape)),
            )
            # each time a new one, so that no factor is left over from before
            swept, by_sweep = timed(sparsegpt, given[0], Gram.of(sums), given[1], Context())
            found, by_apt = timed(apt, given[0], Gram.of(sums), given[1], Context())
            damped = Gram.of(sums).damped().matrix
            best, by_formula = timed(plain, dense, damped, found.kept)
            losses = [loss(dense, new, damped) for new in (swept.matrix, found.matrix, best)]
            rows.append(
                (
                    f"{name} {tuple(dense.shape)}", pattern, f"{by_sweep:.2f} s", f"{by_apt:.2f} s", f"{by_formula:.1f} s",
                    f"{by_apt / by_sweep:.1f}x", f"{by_formula / by_apt:.0f}x",
                    *(f"{one / losses[0]:.4f}" for one in losses[1:]),
                )
            )  # fmt: skip
    show(
        f"block {options.block} of {SMOLLM2}, {len(windows)} x {options.length} tokens, {torch.get_num_threads()} threads",
        ("matrix", "pattern", "sweep", "apt", "formula", "apt / sweep", "formula / apt", "loss, apt / sweep",
         "formula / sweep"),
        rows,
    )  # fmt: skip


def plain(dense: Tensor, matrix: Tensor, kept: Tensor) -> Tensor:
    """The published solution, row by row: what stays solves H_KK w = H_K: w_dense."""
    found = torch.zeros_like(dense)
    for row, stays in enumerate(kept):
        system = matrix[stays]
        found[row, stays] = torch.linalg.solve(system[:, stays], system @ dense[row])
    return found


def loss(dense: Tensor, new: Tensor, matrix: Tensor) -> float:
    change = (new - dense).double()
    return float(((change @ matrix.double()) * change).sum())


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(*given), time.perf_counter() - began


if __name__ == "__main__":
    main()

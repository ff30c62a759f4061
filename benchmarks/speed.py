"""Does half of an axis really make it faster? Prefill of SmolLM2-135M cut to a half, against the original, interleaved.

    python benchmarks/speed.py [--pairs 20] [--axes neurons heads queries channels blocks]

The gain that time could show is that of the multiply-adds, attention and head counted; both are printed. What is cut matters
not to speed, so units go by their weights, channels by random tokens, and the last blocks. Goal: at least 0.75 of it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import secateur
from common import SMOLLM2, show, write_ids
from secateur.recipe import Recipe

GOAL = 0.75
AXES: dict[str, dict[str, Any]] = {
    "neurons": {"magnitude_units": {"ratio": 0.5}},
    "heads": {"magnitude_units": {"ratio": 0.5, "axis": "heads"}},
    "queries": {"magnitude_units": {"ratio": 0.5, "axis": "queries"}},
    "neurons and heads": {"magnitude_units": {"ratio": 0.5, "axis": ["neurons", "heads"]}},
    "channels": {"minitron": {"ratio": 0.5, "axis": ["channels"]}},
    "blocks": {"layer_drop": {"ratio": 0.5, "metric": "reverse"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        drawn = torch.randint(49152, (2, 128), generator=torch.Generator().manual_seed(0))
        calibration = {"data": str(write_ids(Path(folder) / "ids.json", drawn)), "samples": 1, "length": 128}
        for axis in options.axes:
            said: dict[str, Any] = {"steps": [AXES[axis]]}
            if Recipe.parse(said).calibrated:
                said["calibration"] = {**calibration, "held_out": 0}
            output = Path(folder) / axis
            secateur.compress(SMOLLM2, recipe=Recipe.parse(said), output=output, evaluate=False)
            card = secateur.evaluate(output, SMOLLM2, windows=1, pairs=options.pairs, prefill=512, decode=0)
            assert card.speed is not None and card.speed.prefill.gain is not None and card.expected_gain is not None
            assert card.reference is not None
            gain, left = card.speed.prefill.gain, card.model.parameters / card.reference.parameters
            measured = f"{gain.median:.3f} ({gain.lower:.3f} to {gain.upper:.3f})"
            share = f"{gain.median / card.expected_gain:.2f}"
            rows.append((axis, f"{left:.3f}", f"{card.expected_gain:.3f}", measured, share))
            print(*rows[-1], flush=True)
    show(
        f"SmolLM2-135M, a half of an axis gone, prefill of 512 tokens, {options.pairs} interleaved pairs; goal {GOAL}",
        (
            "axis",
            "parameters left",
            "gain by multiply-adds",
            "measured: median (quartiles)",
            "measured / by multiply-adds",
        ),
        rows,
    )


if __name__ == "__main__":
    main()

"""Does half the feed-forward really run faster? Prefill of SmolLM2-135M at ratio 0.5 against the original, interleaved.

    python benchmarks/speed.py [--pairs 20]

The gain that time could show is that of the multiply-adds, attention and head counted; both are printed.
"""

import argparse
import tempfile
from pathlib import Path

import secateur
from common import SMOLLM2, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "half"
        secateur.compress(SMOLLM2, "magnitude_units", {"ratio": 0.5}, output=output, evaluate=False)
        card = secateur.evaluate(output, SMOLLM2, windows=1, pairs=options.pairs, prefill=512)
    assert card.speed is not None and card.speed.prefill.gain is not None and card.expected_gain is not None
    gain = card.speed.prefill.gain
    show(
        f"SmolLM2-135M at ratio 0.5, prefill of {card.speed.prefill.tokens} tokens, {options.pairs} interleaved pairs",
        ("what", "gain"),
        [
            ("by multiply-adds", f"{card.expected_gain:.3f}"),
            ("measured, median", f"{gain.median:.3f}"),
            ("measured, quartiles", f"{gain.lower:.3f} to {gain.upper:.3f}"),
            ("measured / by multiply-adds", f"{gain.median / card.expected_gain:.2f}"),
        ],
    )


if __name__ == "__main__":
    main()

"""KS distance, perplexity and divergence side by side: what PruneNet's reward says, and what the model then does.

    python benchmarks/quality.py --text FILE [--ratio 0.2] [--seeds 5] [--windows 8] [--only METHOD ...]

SmolLM2-135M, float32, windows of 1024 tokens without overlap. KS: mean over layers of the Kolmogorov-Smirnov distance
between the singular values of the first feed-forward matrix and those of the rows that stay.
"""

import argparse
from pathlib import Path
from statistics import median

import torch

import secateur
from common import SMOLLM2, show
from secateur.evaluation import compare, read_text, tokenize
from secateur.evaluation.remembered import Remembered
from secateur.network.source import load, open_model
from secateur.tensor.spectra import ks_distance, singular_values

VARIANTS: dict[str, tuple[str, dict]] = {
    "uniform random": ("random_units", {}),
    "largest row norm": ("magnitude_units", {}),
    "PruneNet, reference": ("prunenet", {"mode": "reference"}),
    "PruneNet, stable": ("prunenet", {"mode": "stable"}),
    "Zipf surgeon (ours)": ("zipf_surgeon", {}),
}
DETERMINISTIC = {"magnitude_units"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", action="append", help="a method; repeat for several")
    options = parser.parse_args()
    module, tokenizer = load(SMOLLM2)
    tokens = tokenize(read_text(options.text), tokenizer, options.text.name)
    source = open_model(module)
    spectra, remembered = {}, Remembered(module)
    rows = []
    dense = None
    for name, (method, parameters) in VARIANTS.items():
        if options.only and method not in options.only:
            continue
        seen: list[tuple[float, float, float, float]] = []
        for seed in range(1 if method in DETERMINISTIC else options.seeds):
            result = secateur.compress(module, method, {"ratio": options.ratio, **parameters}, seed=seed)
            distances = []
            for block in source.anatomy.blocks:
                inner = block.feed_forward
                if block.index not in spectra:
                    spectra[block.index] = singular_values(module.get_parameter(inner.first.parameter).detach())
                # the rows that stay are in the cut module as they were
                kept = result.model.get_parameter(inner.first.parameter).detach()
                distances.append(ks_distance(spectra[block.index], singular_values(kept)))
            with torch.inference_mode():
                compared = compare(result.model, remembered, tokens, window=1024, windows=options.windows)
            dense = compared.reference.perplexity
            shift = compared.divergence
            seen.append((sum(distances) / len(distances), compared.model.perplexity, shift.kl, shift.agreement))
            print(f"{name}, seed {seed}: KS {seen[-1][0]:.4f}, perplexity {seen[-1][1]:.1f}", flush=True)
        columns = list(zip(*seen, strict=True))
        spread = [f"{median(c):.4g} ({min(c):.4g} to {max(c):.4g})" if len(c) > 1 else f"{c[0]:.4g}" for c in columns]
        rows.append((name, len(seen), *spread))
    show(
        f"SmolLM2-135M, ratio {options.ratio}, first {options.windows} windows of {options.text.name}; dense {dense:.3f}",
        ("units kept by", "seeds", "KS, median (range)", "perplexity", "KL to dense", "top-1 agreement"),
        rows,
    )


if __name__ == "__main__":
    main()

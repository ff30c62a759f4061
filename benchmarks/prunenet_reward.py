"""PruneNet's reward: exact against svdvals, fast against exact, on SmolLM2-135M and on one layer of LLaMA-2-7B's shape.

    python benchmarks/prunenet_reward.py            # about 10 minutes
    python benchmarks/prunenet_reward.py --small    # without the large layer

Selections come from the policies that training meets: uniform draws, draws biased by the rows' norms (four strengths,
both signs) and draws of policies trained for 5, 20 and 60 episodes. No real 7B layer is at hand; the large one has the
singular-value profile and the row norms of a real SmolLM2 layer, stretched to 11008 x 4096, in bfloat16.
"""

import argparse
import time

import torch
from scipy.stats import ks_2samp, spearmanr
from torch import Tensor

from common import SMOLLM2, show
from secateur.context import Context
from secateur.methods.structure.prunenet import prunenet
from secateur.network.source import load, open_model
from secateur.network.views import Network
from secateur.network.widths import round_width
from secateur.tensor.policy import StandardRows, gumbel_top_k
from secateur.tensor.spectra import ks_distance, singular_values
from secateur.tensor.spectral_distance import SpectralDistance

RATIO = 0.3
STRENGTHS = (-1.0, -0.3, 0.3, 1.0, 3.0)


class Kept(Context):
    """A context that remembers the artifact instead of writing it."""

    policy: Tensor

    def artifact(self, name: str, tensors, meta=None) -> None:
        self.policy = tensors["v"]


def logits(weight: Tensor, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits of every policy on weight (m, h)."""
    norms = weight.norm(dim=1)
    norms = (norms - norms.mean()) / norms.std()
    found = {"uniform": torch.zeros_like(norms)}
    found |= {f"norm x {strength:g}": strength * norms for strength in STRENGTHS}
    return found | {name: StandardRows(weight).scores(v) for name, v in trained.items()}


def report(title: str, rows: list[tuple[int, str, float, float]]) -> None:
    """rows: layer, policy, exact, fast. Prints errors per policy, and rank correlations pooled and within layers."""
    exact, fast = (torch.tensor([row[column] for row in rows]) for column in (2, 3))

    def line(name: str, chosen: list[int]) -> tuple[str, ...]:
        error = (fast - exact)[chosen]
        rank = spearmanr(exact[chosen], fast[chosen])[0] if exact[chosen].unique().numel() > 1 else float("nan")
        return (
            name, str(len(chosen)), f"{exact[chosen].mean():.4f}", f"{error.abs().mean():.5f}",
            f"{error.mean():+.5f}", f"{error.abs().max():.5f}", f"{rank:.3f}",
        )  # fmt: skip

    everything = list(range(len(rows)))
    lines = [
        line(name, [index for index in everything if rows[index][1] == name])
        for name in dict.fromkeys(row[1] for row in rows)
    ]
    lines.append(line("all, pooled", everything))
    within, uniform = [], []
    for layer in sorted({row[0] for row in rows}):
        of_layer = [index for index in everything if rows[index][0] == layer]
        within.append(spearmanr(exact[of_layer], fast[of_layer])[0])
        draws = [index for index in of_layer if rows[index][1] == "uniform"]
        if exact[draws].unique().numel() > 1 and fast[draws].unique().numel() > 1:
            uniform.append(spearmanr(exact[draws], fast[draws])[0])
    show(title, ("policy", "selections", "mean KS", "mean |dKS|", "bias", "max |dKS|", "rank corr."), lines)
    print(f"rank correlation inside a layer, all policies: mean {sum(within) / len(within):.3f}, min {min(within):.3f}")
    if uniform:
        print(f"rank correlation inside a layer, uniform draws alone: mean {sum(uniform) / len(uniform):.3f}")


def small(draws: int) -> None:
    model, _ = load(SMOLLM2)
    network = Network(open_model(model))
    trained = {}
    for episodes in (5, 20, 60):
        context = Kept()
        began = time.perf_counter()
        prunenet(network, context, ratio=RATIO, episodes=episodes)
        trained[f"trained {episodes}"] = context.policy
        ks = context.notes["ks"]["per layer"]
        seconds = time.perf_counter() - began
        print(
            f"stable mode, {episodes} episodes, {seconds:.0f} s: mean KS of its plan {sum(ks) / len(ks):.4f}",
            flush=True,
        )
    wrong, worst, rows = 0, 0.0, []
    exact, fast = SpectralDistance(len(network)), SpectralDistance(len(network), fast=True)
    for layer, units in enumerate(network):
        weight = units.first
        width, whole = round_width(units.count, RATIO, 32), torch.linalg.svdvals(weight)
        for name, z in logits(weight, trained).items():
            for draw in range(draws):
                kept = gumbel_top_k(z, width, Context(7).generator(name, layer, draw)).sort().values
                distance = exact(layer, weight, kept)
                rows.append((layer, name, distance, fast(layer, weight, kept)))
                plain = ks_2samp(whole.numpy(), torch.linalg.svdvals(weight[kept]).numpy()).statistic
                wrong, worst = wrong + (abs(plain - distance) > 1e-4), max(worst, abs(plain - distance))
    print(f"exact against svdvals: {len(rows)} selections, {wrong} differ by more than 1e-4, largest {worst:.1e}")
    report("fast against exact, SmolLM2-135M, all 30 layers", rows)


def large_layer() -> Tensor:
    """(11008, 4096), bfloat16: the spectrum and the row norms of SmolLM2's layer 15, stretched."""
    model, _ = load(SMOLLM2)
    real = Network(open_model(model))[15].first
    generator = torch.Generator().manual_seed(0)
    values = torch.nn.functional.interpolate(singular_values(real)[None, None].float(), 4096, mode="linear")[0, 0]
    norms = torch.nn.functional.interpolate(real.norm(dim=1).sort().values[None, None], 11008, mode="linear")[0, 0]
    norms = norms[torch.randperm(11008, generator=generator)]
    weight = torch.randn(11008, 4096, generator=generator) * values
    return (weight * (norms / weight.norm(dim=1))[:, None]).bfloat16()


def large(draws: int) -> None:
    weight = large_layer().float()
    width, generator = round_width(11008, RATIO, 32), torch.Generator().manual_seed(1)
    trained = {"direction": torch.randn(4096, generator=generator) / 64}
    fast, rows, times = SpectralDistance(32, fast=True), [], {"exact": [], "fast": []}
    whole = singular_values(weight)
    for draw in range(draws):
        for name, z in logits(weight, trained).items():
            kept = gumbel_top_k(z, width, Context(7).generator(name, draw)).sort().values
            if not rows:
                fast(0, weight, kept)  # the first evaluation is exact and finds the node
            began = time.perf_counter()
            distance = ks_distance(whole, singular_values(weight[kept]))
            middle = time.perf_counter()
            rows.append((0, name, distance, fast(0, weight, kept)))
            times["exact"].append(middle - began)
            times["fast"].append(time.perf_counter() - middle)
    report("fast against exact, one layer 11008 x 4096", rows)
    for name, seconds in times.items():
        print(f"{name}: median {sorted(seconds)[len(seconds) // 2]:.2f} s, best {min(seconds):.2f} s a reward")
    kept = gumbel_top_k(torch.zeros(11008), width, torch.Generator().manual_seed(2)).sort().values
    plain = ks_2samp(torch.linalg.svdvals(weight).numpy(), torch.linalg.svdvals(weight[kept]).numpy()).statistic
    distance = ks_distance(whole, singular_values(weight[kept]))
    print(f"exact against svdvals, one selection: {distance:.6f} and {plain:.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    if not options.large:
        small(options.draws)
    if not options.small:
        large(options.draws)

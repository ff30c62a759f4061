"""PruneNet's training: ours against the plain published procedure, same layers, same episodes, in one run.

    python benchmarks/prunenet_speed.py --layer            # one layer of LLaMA-2-7B's shape, 1 episode
    python benchmarks/prunenet_speed.py --model            # the whole SmolLM2-135M, 6 episodes

The plain procedure is written from the paper's description: the policy as two linear maps with autograd, torch.svd with
vectors of both matrices, a deep copy of the model each episode, the rows of gate, up and down sliced, a fresh forward
and an AdamW step for each layer. Timed: everything from the loaded weights to the choice of neurons, spectra of the
whole matrices included.
"""

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace

import torch
from scipy.stats import ks_2samp
from torch import nn

from common import SMOLLM2, show
from secateur.context import Context
from secateur.methods.structure.prunenet import prunenet
from secateur.network.source import load, open_model
from secateur.network.views import Network

RATIO = 0.3
ROUND = 1  # the published width


class PlainPolicy(nn.Module):
    def __init__(self, units: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, units)
        self.r = nn.Parameter(torch.rand(units, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        alpha = torch.sigmoid((self.linear(weight) @ self.r)[:, 0])
        u = torch.rand(len(alpha))
        return torch.sigmoid(u.log() - (1 - u).log() + alpha.log() - (1 - alpha).log())


def plain(model: nn.Module, layers: Callable[[nn.Module], list[nn.Module]], episodes: int) -> None:
    """The published procedure. layers: the feed-forward modules of a model, with gate_proj, up_proj and down_proj."""
    whole = [torch.svd(layer.gate_proj.weight.data)[1] for layer in layers(model)]
    units, hidden = layers(model)[0].gate_proj.weight.shape
    policy = PlainPolicy(units, hidden)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    count = int((1 - RATIO) * units)
    for _ in range(episodes):
        fresh, pool = deepcopy(model), []
        for index, layer in enumerate(layers(fresh)):
            weight = layer.gate_proj.weight.data.clone()
            with torch.no_grad():
                kept = torch.multinomial(policy(weight).nan_to_num(0.5), count).sort().values
            layer.gate_proj.weight.data = layer.gate_proj.weight.data[kept]
            layer.up_proj.weight.data = layer.up_proj.weight.data[kept]
            layer.down_proj.weight.data = layer.down_proj.weight.data[:, kept]
            part = torch.svd(layer.gate_proj.weight.data)[1]
            pool.append((weight, kept, 0.99**index / ks_2samp(whole[index].numpy(), part.numpy()).statistic))
        for weight, kept, reward in pool:
            optimizer.zero_grad()
            loss = -policy(weight)[kept].log().sum() * reward
            loss.backward()
            if all(bool(parameter.grad.isfinite().all()) for parameter in policy.parameters()):
                optimizer.step()
    for layer in layers(model):
        with torch.no_grad():
            torch.multinomial(policy(layer.gate_proj.weight.data).nan_to_num(0.5), count)


def compare(title: str, plainly: Callable[[], None], network: object, episodes: int) -> None:
    def ours(**options: object) -> Callable[[], None]:
        return lambda: prunenet(network, Context(), ratio=RATIO, multiple_of=ROUND, episodes=episodes, **options)

    runs = {
        "plain published procedure": plainly,
        "ours, reference, exact reward": ours(mode="reference"),
        "ours, reference, fast reward": ours(mode="reference", reward="fast"),
        "ours, stable, exact reward": ours(mode="stable"),
        "ours, stable, fast reward": ours(mode="stable", reward="fast"),
    }
    seconds, work = {}, {}
    for name, run in runs.items():
        began, used = time.perf_counter(), time.process_time()
        run()
        seconds[name], work[name] = time.perf_counter() - began, time.process_time() - used
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    base = next(iter(seconds.values())), next(iter(work.values()))
    rows = [
        (name, f"{took:.1f} s", f"{base[0] / took:.1f}x", f"{work[name]:.1f} s", f"{base[1] / work[name]:.1f}x")
        for name, took in seconds.items()
    ]
    show(f"{title}, {episodes} episodes, {torch.get_num_threads()} threads",
         ("procedure", "wall clock", "ratio", "processor time", "ratio"), rows)  # fmt: skip


def one_layer(episodes: int) -> None:
    units, hidden = 11008, 4096
    generator = torch.Generator().manual_seed(0)
    layer = nn.Module()
    for name, shape in {"gate_proj": (hidden, units), "up_proj": (hidden, units), "down_proj": (units, hidden)}.items():
        setattr(layer, name, nn.Linear(*shape, bias=False))
    scale = torch.randn(units, 1, generator=generator).mul(0.4).exp() * torch.logspace(-1.5, -2.5, hidden)
    layer.gate_proj.weight.data = torch.randn(units, hidden, generator=generator) * scale
    view = SimpleNamespace(block=0, count=units, hidden=hidden, first=layer.gate_proj.weight.data)
    compare("one layer 11008 x 4096", lambda: plain(layer, lambda model: [model], episodes), [view], episodes)


def whole_model(episodes: int) -> None:
    model, _ = load(SMOLLM2)
    plainly = lambda: plain(model, lambda found: [layer.mlp for layer in found.model.layers], episodes)  # noqa: E731
    compare("SmolLM2-135M, 30 layers", plainly, Network(open_model(model)), episodes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--episodes", type=int)
    options = parser.parse_args()
    if options.model or not options.layer:
        whole_model(options.episodes or 6)
    if options.layer or not options.model:
        one_layer(options.episodes or 1)

"""PruneNet on small invented networks: what it learns, repeats, resumes, shares out and refuses."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.methods.structure.prunenet import prunenet
from secateur.network.widths import round_width
from secateur.registry import Plan
from secateur.tensor.spectra import ks_distance, singular_values


@dataclass
class Layer:
    block: int
    first: torch.Tensor

    @property
    def count(self) -> int:
        return self.first.shape[0]

    @property
    def hidden(self) -> int:
        return self.first.shape[1]


def network(layers: int = 4, units: int = 96, hidden: int = 24, scale: float = 1.0) -> Any:
    """Rows of very different length along a common direction: choosing them well matters to the spectrum."""
    generator = torch.Generator().manual_seed(11)
    result = []
    for index in range(layers):
        length = torch.randn(units, 1, generator=generator).exp()
        weight = length * torch.randn(units, hidden, generator=generator) + length * torch.linspace(-1, 1, hidden)
        result.append(Layer(index + 2, scale * weight))
    return result


def same(one: Plan, other: Plan) -> bool:
    return one.cuts.keys() == other.cuts.keys() and all(
        torch.equal(one.cuts[block].kept, other.cuts[block].kept) for block in one.cuts
    )


MODES = [
    {"mode": "stable", "episodes": 4},
    {"mode": "stable", "episodes": 4, "reward": "fast"},
    {"mode": "reference", "episodes": 3, "learning_rate": 1e-4},
]


@pytest.mark.parametrize("options", MODES)
def test_same_seed_same_plan(options: dict[str, Any]) -> None:
    layers = network(scale=0.02)
    context = Context(seed=1)
    plan = prunenet(layers, context, ratio=0.3, **options)
    assert same(plan, prunenet(layers, Context(seed=1), ratio=0.3, **options))
    assert not same(plan, prunenet(layers, Context(seed=2), ratio=0.3, **options))
    assert list(plan.cuts) == [(block, "neurons") for block in (2, 3, 4, 5)]
    for cut in plan.cuts.values():
        assert len(cut.kept) == round_width(96, 0.3, 32) == 64
        assert torch.equal(cut.kept, cut.kept.unique())
    assert context.notes["ks"]["reward"] == options.get("reward", "exact")


@pytest.mark.parametrize("options", MODES)
def test_noted_distances_are_those_of_the_plan(options: dict[str, Any]) -> None:
    layers, context = network(scale=0.02), Context()
    plan = prunenet(layers, context, **options)
    for layer, noted in zip(layers, context.notes["ks"]["per layer"], strict=True):
        exact = ks_distance(
            singular_values(layer.first), singular_values(layer.first[plan.cuts[layer.block, "neurons"].kept])
        )
        assert noted <= exact + 1e-9
        assert noted == pytest.approx(exact, abs=0.1 if options.get("reward") == "fast" else 1e-9)


class KilledError(Exception):
    pass


class Mortal(Context):
    """Dies right after the given number of saved episodes."""

    saves = -1

    def save(self, name: str, *rest: Any) -> None:
        super().save(name, *rest)
        self.saves -= 1
        if self.saves == 0:
            raise KilledError


@pytest.mark.parametrize("options", MODES)
def test_resuming_after_each_episode_gives_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    layers = network(scale=0.02)
    undisturbed = Context(state=tmp_path / "state", artifacts=tmp_path / "out")
    plan = prunenet(layers, undisturbed, **options)
    policy = (tmp_path / "out" / "policy.safetensors").read_bytes()
    for saves in range(1, options["episodes"] + 1):
        folder = tmp_path / str(saves)
        mortal = Mortal(state=folder / "state", artifacts=folder / "out")
        mortal.saves = saves
        with pytest.raises(KilledError):
            prunenet(layers, mortal, **options)
        context = Context(state=folder / "state", artifacts=folder / "out")
        assert same(plan, prunenet(layers, context, **options))
        assert (folder / "out" / "policy.safetensors").read_bytes() == policy
        assert context.notes == undisturbed.notes


class Bus:
    """What two simulated processes say to each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.said: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> dict[int, Any]:
        self.said[rank] = value
        self.barrier.wait()
        everything = dict(self.said)
        self.barrier.wait()
        return everything


class Partner(Context):
    """One of two processes, simulated by threads; remembers how many layers it did."""

    def __init__(self, rank: int, bus: Bus, **rest: Any) -> None:
        super().__init__(**rest)
        self.rank, self.world, self.bus = rank, 2, bus

    def gather(self, results: Any) -> dict[int, Any]:
        parts = self.bus.exchange(self.rank, dict(results)).values()
        return dict(sorted((key, value) for part in parts for key, value in part.items()))

    def broadcast(self, tensor: torch.Tensor, owner: int = 0) -> torch.Tensor:
        return self.bus.exchange(self.rank, tensor)[owner].clone()


@pytest.mark.parametrize("options", MODES)
def test_two_processes_make_the_plan_of_one(options: dict[str, Any], tmp_path: Path) -> None:
    alone = Context(artifacts=tmp_path / "alone")
    expected = prunenet(network(layers=5, scale=0.02), alone, **options)
    bus, plans = Bus(), {}

    def work(rank: int) -> None:
        context = Partner(rank, bus, artifacts=tmp_path / "pair")
        plans[rank] = prunenet(network(layers=5, scale=0.02), context, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(plans[0], expected)
    assert same(plans[1], expected)
    for name in ("policy.safetensors", "policy.json"):
        assert (tmp_path / "pair" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def mean_distance(layers: Any, plan: Plan) -> float:
    pairs = [(layer.first, layer.first[plan.cuts[layer.block, "neurons"].kept]) for layer in layers]
    return sum(ks_distance(singular_values(whole), singular_values(part)) for whole, part in pairs) / len(pairs)


def test_stable_mode_learns() -> None:
    layers = network(layers=3, units=120, hidden=20)
    trained = mean_distance(layers, prunenet(layers, Context(), ratio=0.4, episodes=80))
    untrained = [
        mean_distance(layers, prunenet(layers, Context(seed=seed), ratio=0.4, mode="reference", episodes=0))
        for seed in range(5)
    ]
    assert trained < min(untrained)


def test_ratio_zero_cuts_nothing() -> None:
    assert prunenet(network(), Context(), ratio=0.0) == Plan({})


def test_ratios_per_layer() -> None:
    plan = prunenet(network(), Context(), ratios=[0.0, 0.25, 0.5, 0.1], multiple_of=1, episodes=2)
    assert {block: len(cut.kept) for (block, _), cut in plan.cuts.items()} == {3: 72, 4: 48, 5: 86}


@pytest.mark.parametrize("mode", ["stable", "reference"])
def test_a_policy_serves_other_ratios_and_widths(mode: str, tmp_path: Path) -> None:
    trained = Context(artifacts=tmp_path)
    plan = prunenet(network(scale=0.02), trained, ratio=0.25, mode=mode, episodes=2, learning_rate=1e-4)
    path = tmp_path / "policy.safetensors"
    assert same(prunenet(network(scale=0.02), Context(), ratio=0.25, mode=mode, policy=path), plan)
    more = prunenet(network(scale=0.02), Context(), ratio=0.5, mode=mode, policy=path)
    assert {len(cut.kept) for cut in more.cuts.values()} == {round_width(96, 0.5, 32)}
    if mode == "stable":  # deterministic, so what stays at a higher ratio stays at a lower one
        assert all(torch.isin(more.cuts[block].kept, plan.cuts[block].kept).all() for block in plan.cuts)
    wider = prunenet(network(units=160), Context(), ratio=0.2, policy=path)
    assert {len(cut.kept) for cut in wider.cuts.values()} == {128}
    with pytest.raises(RequestError, match="hidden size 24, but the network has 30"):
        prunenet(network(hidden=30), Context(), policy=path)


def test_a_file_that_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.safetensors").write_text("no tensors")
    for name in ("policy.safetensors", "missing.safetensors"):
        with pytest.raises(RequestError, match=name):
            prunenet(network(), Context(), policy=tmp_path / name)


def test_saturation_of_the_published_procedure_is_counted() -> None:
    # The first updates succeed; a huge learning rate then drives sigmoid to exactly 1.
    context = Context()
    prunenet(network(scale=0.02), context, mode="reference", episodes=4, learning_rate=3.0)
    skipped = [entry["skipped"] for entry in context.notes["training"]]
    assert 0 < sum(skipped) < 16
    assert skipped[-1] == 4
    assert context.notes["skipped updates"].startswith(f"{sum(skipped)} of 16")


def test_a_run_without_any_update_fails() -> None:
    with pytest.raises(RunError, match="mode=stable"):
        prunenet(network(scale=1e5), Context(), mode="reference", episodes=2)


@pytest.mark.parametrize(
    "options", [{"ratios": [0.1]}, {"ratio": 0.999}, {"ratio": 1.0}, {"ratio": 0.2, "multiple_of": 0}]
)
def test_impossible_requests(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        prunenet(network(), Context(), **options)


def test_reference_mode_needs_equal_widths() -> None:
    layers = network(layers=2) + network(layers=1, units=60)
    with pytest.raises(RequestError, match="equal width"):
        prunenet(layers, Context(), mode="reference", episodes=1)


@pytest.mark.parametrize("options", MODES)
def test_layers_side_by_side_give_what_layers_in_turn_give(options: dict[str, Any], tmp_path: Path) -> None:
    """Narrow layers are computed one to a thread, so the number of threads decides how many at once and no digit."""
    plans, states = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            state = tmp_path / str(threads)
            plans.append(prunenet(network(scale=0.02), Context(seed=1, state=state), ratio=0.3, **options))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        states.append((state / "training.safetensors").read_bytes())
    assert same(*plans)
    assert states[0] == states[1]

"""Methods that divide a budget among matrices: exact sums, order, uniform where nothing tells matrices apart."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.errors import RequestError
from secateur.methods.allocation.alphapruning import alphapruning
from secateur.methods.allocation.erk import erk
from secateur.methods.allocation.global_threshold import global_threshold
from secateur.methods.allocation.pq_index import pq_index_allocation
from secateur.registry import Matrices, Weight
from secateur.tensor.patterns import keep_overall


def _network(tensors: list[torch.Tensor], fraction: float, per_block: int = 2, tile: int = 1) -> Matrices:
    def maker(index: int, tensor: torch.Tensor) -> Callable[[], Weight]:
        shape = (tensor.shape[0], tensor.shape[1])
        return lambda: Weight(f"m{index}", index // per_block, None, shape, lambda: tensor)

    sizes = [tensor.numel() // tile for tensor in tensors]
    return Matrices([maker(*pair) for pair in enumerate(tensors)], round(fraction * sum(sizes)), sizes)


def _context() -> Any:
    notes: dict[str, Any] = {}
    return SimpleNamespace(notes=notes, note=notes.__setitem__)


def _spectrum(alpha: float, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose squared singular values are the quantiles of a power law λ^−α."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q[:rows]
    quantiles = (torch.arange(rows) + 0.5) / rows
    return 0.01 * left @ ((1 - quantiles).pow(-0.5 / (alpha - 1)).unsqueeze(1) * right)


@pytest.mark.parametrize("estimator", ["peak", "mid"])
def test_alphapruning_spares_heavy_tails(estimator: Any) -> None:
    tensors = [_spectrum(alpha, 40, 60, seed) for seed, alpha in enumerate([2.0, 2.0, 5.0, 5.0, 3.5, 3.5])]
    context = _context()
    remove = alphapruning(_network(tensors, 0.5), context, epsilon=0.3, estimator=estimator).remove
    assert list(remove) == [f"m{index}" for index in range(6)]
    assert sum(remove.values()) == 7200
    alphas = [context.notes["alpha"][str(block)] for block in range(3)]
    assert alphas[0] < alphas[2] < alphas[1]
    relative = [1 - 0.3 + 0.6 * (alpha - alphas[0]) / (alphas[1] - alphas[0]) for alpha in alphas]
    for index, count in enumerate(remove.values()):
        assert count == pytest.approx(7200 * relative[index // 2] / (2 * sum(relative)), abs=2)
    json.dumps(context.notes)


def test_alphapruning_clamps_and_gives_the_rest_to_the_others() -> None:
    tensors = [_spectrum(alpha, 40, 60, seed) for seed, alpha in enumerate([2.0, 2.0, 5.0, 5.0])]
    remove = alphapruning(_network(tensors, 0.8), _context(), epsilon=0.5).remove
    # 0.8 scaled by 1.5 is above what one may lose
    assert remove == {"m0": 1464, "m1": 1464, "m2": 2376, "m3": 2376}
    with pytest.raises(RequestError, match=r"limit=0\.7"):
        alphapruning(_network(tensors, 0.8), _context(), limit=0.7)


def test_alphapruning_is_uniform_where_all_alphas_are_equal_or_there_are_none() -> None:
    same = _spectrum(3.0, 40, 60, 0)
    for tensors in ([same, same, same.clone(), same], [torch.zeros(40, 60)] * 4, [torch.eye(40, 60)] * 4):
        assert set(alphapruning(_network(tensors, 0.5), _context()).remove.values()) == {1200}


def test_alphapruning_sees_past_matrices_without_a_tail() -> None:
    tensors = [_spectrum(2.0, 40, 60, 0), torch.zeros(40, 60), _spectrum(5.0, 40, 60, 1), torch.eye(40, 60)]
    context = _context()
    remove = alphapruning(_network(tensors, 0.5), context).remove
    assert remove["m0"] == remove["m1"] < remove["m2"] == remove["m3"]
    assert all(math.isfinite(alpha) for alpha in context.notes["alpha"].values())


def test_pq_index_takes_more_from_what_is_far_from_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 50, generator=generator)
    tensors = [normal.sign() * (2 + 0.1 * normal), normal, normal.abs() ** 3]
    context = _context()
    remove = pq_index_allocation(_network(tensors, 0.3), context).remove
    assert sum(remove.values()) == 1800
    assert 0 < remove["m0"] < remove["m1"] < remove["m2"]
    told = context.notes["pq index"]
    # the counts are proportional to what the bounds leave
    free = [2000 - told[name]["must stay"] for name in remove]
    assert list(remove.values()) == pytest.approx([1800 * part / sum(free) for part in free], abs=1)
    assert told["m1"]["must stay"] == pytest.approx(0.847 * 2000, rel=0.02)
    json.dumps(context.notes)


def test_pq_index_is_uniform_on_flat_weights_and_refuses_what_it_cannot_do() -> None:
    flat = torch.ones(10, 10)
    assert set(pq_index_allocation(_network([flat, -2 * flat], 0.5), _context()).remove.values()) == {50}
    # one matrix alone has something to lose, and not as much as is asked for
    spiked = torch.zeros(10, 10)
    spiked[0] = 1.0
    with pytest.raises(RequestError, match="at most 99"):
        pq_index_allocation(_network([flat, spiked], 0.6), _context())


def test_erk_by_hand_and_in_tiles() -> None:
    tensors = [torch.zeros(100, 100), torch.zeros(100, 400)]
    # densities 0.02 : 0.0125, so 200 : 500 kept weights
    assert erk(_network(tensors, 0.9), power=1.0).remove == {"m0": 10_000 - 1429, "m1": 40_000 - 3571}
    assert erk(_network(tensors, 0.9), power=0.0).remove == {"m0": 9000, "m1": 36_000}
    assert erk(_network(tensors, 0.9, tile=100)).remove == {"m0": 100 - 14, "m1": 400 - 36}


def test_global_threshold_is_magnitude_pruning_without_layers() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(20, 30, generator=generator) * scale for scale in (1.0, 0.1, 3.0)]
    together = torch.cat([tensor.flatten() for tensor in tensors]).abs()
    kept = keep_overall(together, round(0.5 * 1800)).split(600)
    remove = global_threshold(_network(tensors, 0.5)).remove
    assert list(remove.values()) == [int((~part).sum()) for part in kept]
    assert remove["m1"] > remove["m0"] > remove["m2"]

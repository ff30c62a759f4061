"""Sums over tokens: parts add up to the whole, in every form that a method may ask for."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import watched
from secateur.calibration import statistics
from secateur.calibration.statistics import GatedNorms, Gram, InputNorms, Moments, Statistics, Sums


def _sums(wanted: set[str], inputs: Sequence[Tensor], gates: Sequence[Tensor]) -> Sums:
    sums = Sums(wanted, inputs[0].shape[1])
    for x, g in zip(inputs, gates, strict=True):
        sums.add(x, g)
    return sums


@pytest.mark.parametrize("columns", [1, 3, 37, 64])  # fewer than one panel, several, and a narrow last one
@pytest.mark.parametrize("wanted", [{"gram", "sum", "gated"}, {"squares", "sum", "gated"}])
def test_merged_halves_are_the_whole(wanted: set[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PANEL", 16)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, columns, generator=generator) * scale + 1 for scale in (0.1, 1, 30, 2)]
    gates = [torch.rand(40, generator=generator) for _ in inputs]
    whole, first, second = (_sums(wanted, inputs[a:b], gates[a:b]) for a, b in ((0, 4), (0, 2), (2, 4)))
    first.merge(second)
    for sums in (whole, first):
        sums.finish()
    assert whole.tokens == first.tokens == 160
    direct = watched.sums(torch.cat(inputs), torch.cat(gates))
    for sums in (whole, first):
        views = Statistics(sums)
        assert watched.relative(views.view(InputNorms).squares, direct["squares"]) < 1e-6
        assert watched.relative(views.view(GatedNorms).squares, direct["gated"]) < 1e-6
        assert watched.relative(views.view(Moments).mean, direct["mean"]) < 1e-6
        if "gram" in wanted:
            assert watched.relative(views.view(Gram).matrix, direct["gram"]) < 1e-6
            assert views.view(Gram) is views.view(Gram), "what is derived from it is derived once"
    for name, part in whole.parts.items():
        assert watched.relative(first.parts[name], part) < 1e-6


def test_dead_inputs_are_told_apart_from_those_never_seen() -> None:
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    inputs[:, [1, 4]] = 0
    for wanted in ({"gram"}, {"squares"}):
        seen = Statistics(_sums(wanted, [inputs], [torch.ones(20)]))
        assert (seen.tokens, seen.dead) == (20, 2)
        assert Statistics(Sums(wanted, 6)).tokens == 0


def test_a_mean_far_from_zero_leaves_no_negative_variance() -> None:
    inputs = 1000 + 1e-4 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    for wanted in ({"gram", "sum"}, {"squares", "sum"}):
        moments = Statistics(_sums(wanted, [inputs], [torch.ones(500)])).view(Moments)
        assert (
            bool((moments.variance >= 0).all()) and watched.relative(moments.mean, inputs.double().mean(dim=0)) < 1e-6
        )

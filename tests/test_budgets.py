"""Budgets: whole numbers that sum to the budget, clamping, Erdős–Rényi densities, one threshold for all."""

import random

import pytest
import torch

from secateur.tensor.budgets import erdos_renyi_counts, lowest_counts, scaled_counts
from secateur.tensor.patterns import keep_overall


def test_counts_sum_to_the_budget_and_stay_below_the_limit() -> None:
    draw, clamped = random.Random(0), 0
    for _ in range(300):
        number = draw.randint(1, 9)
        sizes = [draw.choice([1, 7, 64, 1000, 10**9 + 7]) for _ in range(number)]
        relative = [draw.random() ** 4 + 1e-3 for _ in range(number)]
        limit = draw.choice([1.0, 0.9, 0.29])
        caps = [int(limit * size + 1e-6) for size in sizes]
        total = draw.randint(0, sum(caps))
        counts = scaled_counts(relative, sizes, total, limit)
        assert sum(counts) == total
        assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))
        # one factor for all that are below their limit
        free = [i for i in range(number) if counts[i] < caps[i] and sizes[i] > 10**6]
        factors = [counts[i] / (relative[i] * sizes[i]) for i in free]
        assert not factors or max(factors) - min(factors) < 1e-5 * max(factors) + 1e-5
        clamped += any(count == cap > 0 for count, cap in zip(counts, caps, strict=True))
    assert clamped > 30


def test_rounding_goes_to_the_largest_remainder_and_among_equals_to_the_first() -> None:
    assert scaled_counts([1, 1, 1], [10, 10, 10], 10) == [4, 3, 3]
    # dues 1.25, 2.5, 6.25
    assert scaled_counts([0.125, 0.25, 0.625], [100, 100, 100], 10) == [1, 3, 6]


def test_equal_sizes_keep_the_order_of_the_sparsities() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in (1, 13, 50, 333, 480):
        relative = torch.rand(12, generator=generator).tolist()
        counts = scaled_counts(relative, [41] * 12, total)
        ranked = [counts[index] for index in sorted(range(12), key=lambda index: relative[index])]
        assert ranked == sorted(ranked)


def test_what_the_limit_cuts_off_goes_to_the_others() -> None:
    # 0.8 scaled by (1 ± 0.3): the first would be 1.04 of its size
    assert scaled_counts([1.3, 1.0, 0.7], [100, 100, 100], 240) == [100, 82, 58]
    assert scaled_counts([1.3, 1.0, 0.7], [100, 100, 100], 240, limit=0.9) == [90, 88, 62]
    assert scaled_counts([1.0, 1.0], [100, 100], 58, limit=0.29) == [29, 29]  # though 0.29 * 100 < 29 in floats


def test_zero_leaves_a_matrix_alone_and_scale_does_not_matter() -> None:
    assert scaled_counts([0.0, 0.5, 0.25], [50, 40, 40], 30) == [0, 20, 10]
    assert scaled_counts([0.0, 6.0, 3.0], [50, 40, 40], 30) == [0, 20, 10]
    assert scaled_counts([0.0, 0.0], [50, 40], 0) == [0, 0]
    assert scaled_counts([0.0, 1.0], [0, 40], 40) == [0, 40]


@pytest.mark.parametrize(
    ("relative", "total", "limit", "words"),
    [
        ([0.0, 1.0], 11, 1.0, "at most 10"),
        ([1.0, 1.0], 19, 0.9, "at most 18"),
        ([1.0, 1.0], -1, 1.0, "-1 are to go"),
        ([-0.1, 1.0], 3, 1.0, "not negative"),
        ([float("nan"), 1.0], 3, 1.0, "finite"),
        ([float("inf"), 1.0], 3, 1.0, "finite"),
    ],
)
def test_what_cannot_be_divided_is_said(relative: list[float], total: int, limit: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scaled_counts(relative, [10, 10], total, limit)


def test_erdos_renyi_densities_by_hand() -> None:
    shapes = [(100, 100), (100, 400), (10, 1000)]
    sizes = [10_000, 40_000, 10_000]
    # Σ dims are 200, 500, 1010; 1710 kept weights are one for each
    counts = erdos_renyi_counts(shapes, sum(sizes) - 1710)
    assert counts == [9800, 39_500, 8990]
    # 17100 kept: the third would keep 10100 of 10000, so it stays whole and 7100 are shared as 2 : 5
    counts = erdos_renyi_counts(shapes, sum(sizes) - 17_100)
    assert counts == [10_000 - 2029, 40_000 - 5071, 0]
    assert sum(counts) == sum(sizes) - 17_100


def test_erdos_renyi_counts_kernels_and_power_zero_is_uniform() -> None:
    assert erdos_renyi_counts([(8, 4, 3, 3), (8, 8)], 288 + 64 - 34) == [288 - 18, 64 - 16]
    assert erdos_renyi_counts([(10, 10), (10, 30)], 200, power=0) == [50, 150]
    # in tiles of 5 x 10: densities ∝ 0.2 and 0.1 of 2 and 8 tiles
    assert erdos_renyi_counts([(10, 10), (20, 20)], 7, sizes=[2, 8]) == [1, 6]
    with pytest.raises(ValueError, match="hold 100"):
        erdos_renyi_counts([(10, 10)], 101)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_threshold_for_all_is_that_of_everything_laid_end_to_end(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((20, 30), (7,), (5, 4, 3), (64, 33))]
    tensors[1][:3] = 0.0
    tensors[3][:2] = -0.0  # as near to 0 as 0 itself
    tensors.append(tensors[0] / 4)  # ties across tensors, many in 16 bits
    together = torch.cat([tensor.float().flatten() for tensor in tensors])
    for remove in (0, 1, 60, 68, 70, 1000, 1001, len(together) - 1, len(together)):
        counts = lowest_counts(lambda: iter(tensors), remove)
        kept = keep_overall(together.abs(), remove)
        expected = [int((~part).sum()) for part in kept.split([tensor.numel() for tensor in tensors])]
        assert counts == expected
        parts = [
            keep_overall(tensor.float().abs(), count).flatten() for tensor, count in zip(tensors, counts, strict=True)
        ]
        assert torch.equal(torch.cat(parts), kept)


def test_one_threshold_over_extremes_of_float32() -> None:
    values = torch.tensor([1e-45, 0.0, 3e38, float("inf"), 1e-38, 1.0, 1.0000001, 1.0])
    for remove in range(len(values) + 1):
        expected = int((~keep_overall(values, remove))[:4].sum())
        assert lowest_counts(lambda: [values[:4], values[4:]], remove) == [expected, remove - expected]


def test_one_threshold_cannot_remove_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="hold 5"):
        lowest_counts(lambda: [torch.ones(2), torch.ones(3)], 6)

"""Clusters by inner products: against brute force, scipy, and what no single move may better."""

import itertools

import pytest
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from secateur.tensor.clustering import (
    cluster_means,
    cluster_sums,
    k_means,
    norms_lost,
    representatives,
    scatter,
    ward,
)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=drawn(seed))


def by_hand(x: Tensor, labels: Tensor) -> float:
    return sum(
        float((x[labels == c].double() - x[labels == c].double().mean(0)).square().sum()) for c in labels.unique()
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two labellings are one partition."""
    return torch.equal(one[:, None] == one, other[:, None] == other)


@pytest.mark.parametrize("seed", range(4))
def test_several_starts_find_the_best_of_all_partitions(seed: int) -> None:
    x, count = points(8, 2, seed), 3
    every = (torch.tensor(labels) for labels in itertools.product(range(count), repeat=len(x)))
    best = min(by_hand(x, labels) for labels in every if len(labels.unique()) == count)
    assert by_hand(x, k_means(x @ x.T, count, drawn(), 20)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("count", [1, 10, *(pytest.param(n, marks=pytest.mark.every) for n in (48, 59))])
def test_no_single_move_and_no_random_clustering_is_better(count: int) -> None:
    x = points(60, 7)
    gram = x @ x.T
    labels = k_means(gram, count, drawn(), 2)
    found = by_hand(x, labels)
    assert scatter(gram, labels) == pytest.approx(found, rel=1e-5)
    assert torch.equal(labels.unique(), torch.arange(count)), "none is empty"
    for seed in range(50):
        filled = torch.cat([torch.arange(count), torch.randint(count, (60 - count,), generator=drawn(seed))])
        assert by_hand(x, filled) >= found
    for point in range(60):
        for cluster in range(count):
            moved = labels.clone()
            moved[point] = cluster
            assert by_hand(x, moved) >= found * (1 - 1e-4) or len(moved.unique()) < count


def test_more_starts_are_never_worse_and_a_seed_says_all() -> None:
    x = points(60, 7)
    gram = x @ x.T
    one, ten = (k_means(gram, 20, drawn(), starts) for starts in (1, 10))
    assert scatter(gram, ten) < scatter(gram, one)
    assert torch.equal(ten, k_means(gram, 20, drawn(), 10))


def test_as_many_clusters_as_points() -> None:
    x = points(9, 3)
    assert torch.equal(k_means(x @ x.T, 9, drawn()), torch.arange(9))
    assert same(ward(x @ x.T, 9), torch.arange(9))


def test_equal_points_are_found() -> None:
    order = torch.randperm(40, generator=drawn())
    x = points(20, 100).repeat(2, 1)[order]
    for labels in (k_means(x @ x.T, 20, drawn()), ward(x @ x.T, 20)):
        assert same(labels, order % 20)


def test_fewer_different_points_than_clusters() -> None:
    x = points(3, 5).repeat(4, 1)
    for labels in (k_means(x @ x.T, 7, drawn()), ward(x @ x.T, 7)):
        assert torch.equal(labels.unique(), torch.arange(7)) and by_hand(x, labels) < 1e-8


@pytest.mark.parametrize("count", [1, 2, 17, 40, 59])
def test_ward_as_scipy(count: int) -> None:
    x = points(60, 7)
    wanted = torch.from_numpy(cut_tree(linkage(x.double().numpy(), "ward"), n_clusters=count)[:, 0]).long()
    assert same(ward(x @ x.T, count), wanted)


def test_too_many_and_too_few_clusters() -> None:
    for count in (0, 4):
        for cluster in (lambda g, k: k_means(g, k, drawn()), ward):
            with pytest.raises(ValueError, match="3 points cannot make"):
                cluster(torch.eye(3), count)


def test_who_stands_for_a_cluster() -> None:
    x = points(60, 7)
    labels = k_means(x @ x.T, 12, drawn())
    for cluster, chosen in enumerate(representatives(x @ x.T, labels).tolist()):
        members = (labels == cluster).nonzero()[:, 0]
        distances = (x[members] - x[members].mean(0)).norm(dim=1)
        assert chosen == members[0 if len(members) == 2 else int(distances.argmin())], "of two the first"


def test_means_and_sums() -> None:
    x, labels = points(6, 4).view(6, 2, 2), torch.tensor([0, 2, 1, 2, 2, 1])
    assert torch.allclose(cluster_sums(x, labels, 3)[2], x[1] + x[3] + x[4])
    assert torch.allclose(cluster_means(x, labels, 3)[1], (x[2] + x[5]) / 2)


def test_the_length_that_averaging_takes() -> None:
    """Closed forms: √(N / (1 + (N − 1) E)) for N rows of mean cosine E."""
    orthogonal, row = torch.eye(4) * 3, points(1, 5)
    assert norms_lost(orthogonal, torch.zeros(4, dtype=torch.int64), 1).item() == pytest.approx(2.0), "E = 0: √N"
    assert norms_lost(row.repeat(4, 1), torch.zeros(4, dtype=torch.int64), 1).item() == pytest.approx(1.0), "E = 1"
    angle = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert norms_lost(angle, torch.zeros(2, dtype=torch.int64), 1).item() == pytest.approx((2 / 1.6) ** 0.5)
    opposed = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    assert norms_lost(opposed, torch.tensor([0, 0, 1, 1]), 2).tolist() == pytest.approx([2**0.5, 1.0]), "never more"

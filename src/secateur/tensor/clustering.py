"""Clusters of points that are known by their inner products alone: k-means by Hartigan's exchanges, and Ward's tree.

Distances to the mean of any set of points follow from the Gram matrix G = X Xᵀ, ‖x_i − μ_c‖² = G_ii − 2 Σ_{j∈c} G_ij / N_c +
Σ_{j,l∈c} G_jl / N_c². So G is computed once, n² d multiplications for n points of d numbers, and the rest does not know d: a
pass over all points and clusters is n k additions where it would be n k d. Memory: G and its sums by cluster, n (n + k).

Hartigan's exchange and not Lloyd's assignment, because here there are nearly as many clusters as points: the mean of a pair
lies half way, so each of the two stays with it though either were nearer to a third point. Hartigan counts what the means
become: moving i from a to b changes the objective by N_b/(N_b+1) ‖x_i − μ_b‖² − N_a/(N_a−1) ‖x_i − μ_a‖² (Hartigan 1975;
Telgarsky and Vattani 2010). Seeds are those of k-means++ (Arthur and Vassilvitskii 2007).
"""

import torch
from torch import Tensor

CHUNK = 1 << 24  # distances held at once
SWEEPS = 100  # far more than are needed; float rounding must not go round in circles
_NOISE = 1e-6  # of a point's own square: what float32 cannot tell from nothing


def k_means(gram: Tensor, count: int, generator: torch.Generator, starts: int = 10) -> Tensor:
    """(n,) labels 0 … count − 1, none of them empty: the best of several starts.

    Args:
        gram: (n, n) inner products of the points.
        generator: draws the seeds.

    Raises ValueError when there are fewer points than clusters, or no cluster.
    """
    _check(gram, count)
    if count == len(gram):
        return torch.arange(count)
    found = [_exchange(gram, _seeded(gram, count, generator), count) for _ in range(starts)]
    return min(found, key=lambda labels: scatter(gram, labels))  # among equals the first


def scatter(gram: Tensor, labels: Tensor) -> float:
    """Σ_i ‖x_i − mean of its cluster‖²: the objective of k-means."""
    sums = _sums(gram, labels, int(labels.max()) + 1)
    sizes = labels.bincount().to(gram)
    inside = torch.zeros_like(sizes).index_add(0, labels, sums.gather(1, labels[:, None])[:, 0])
    return float(gram.diagonal().sum(dtype=torch.float64) - (inside / sizes).sum(dtype=torch.float64))


def ward(gram: Tensor, count: int) -> Tensor:
    """(n,) labels 0 … count − 1: clusters merged two by two, always those whose merging adds least to `scatter` (Ward 1963).

    By chains of nearest neighbours, n merges of O(n) each, in whatever order they are met; sorted by their cost they are
    those of the greedy procedure.

    Raises ValueError when there are fewer points than clusters, or no cluster.
    """
    _check(gram, count)
    points = len(gram)
    norms = gram.diagonal()
    costs = (norms[:, None] + norms - 2 * gram).clamp(min=0).fill_diagonal_(torch.inf)
    sizes = torch.ones(points, dtype=gram.dtype)
    left = [True] * points
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(merges) < points - 1:
        if not chain:
            chain = [left.index(True)]
        top, before = chain[-1], chain[-2] if len(chain) > 1 else None
        nearest = int(costs[top].argmin())
        if before is not None and costs[top, before] <= costs[top, nearest]:  # ties must not lead on for ever
            chain = chain[:-2]
            cost = float(costs[top, before])
            merges.append((cost, top, before))
            new = (sizes[top] + sizes) * costs[top] + (sizes[before] + sizes) * costs[before] - sizes * cost
            new /= sizes[top] + sizes[before] + sizes
            new[[top, before]] = torch.inf
            costs[top], costs[:, top] = new, new
            costs[before], costs[:, before] = torch.inf, torch.inf
            sizes[top] += sizes[before]
            left[before] = False
        else:
            chain.append(nearest)
    parents = list(range(points))

    def root(point: int) -> int:
        while parents[point] != point:
            parents[point] = point = parents[parents[point]]
        return point

    for _, one, other in sorted(merges, key=lambda merge: merge[0])[: points - count]:
        parents[root(one)] = root(other)
    return torch.tensor([root(point) for point in range(points)]).unique(return_inverse=True)[1]


def representatives(gram: Tensor, labels: Tensor) -> Tensor:
    """(k,) the point nearest to the mean of each cluster, among equals the first."""
    count = int(labels.max()) + 1
    sizes = labels.bincount().to(gram)
    own = _sums(gram, labels, count).gather(1, labels[:, None])[:, 0] / sizes[labels]
    # what all points of a cluster share, the square of its mean, changes no order
    distances = (gram.diagonal() - 2 * own).tolist()
    nearest: dict[int, int] = {}
    for point, label in enumerate(labels.tolist()):
        best = nearest.setdefault(label, point)
        # of two points both are equally near; rounding must not decide between them
        if distances[point] < distances[best] - _NOISE * abs(distances[best]):
            nearest[label] = point
    return torch.tensor([nearest[label] for label in range(count)])


def cluster_sums(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """(count, ...) sums over the clusters of (n, ...) rows."""
    return rows.new_zeros(count, *rows.shape[1:]).index_add_(0, labels, rows)


def cluster_means(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """(count, ...) means over the clusters of (n, ...) rows."""
    sizes = labels.bincount(minlength=count).to(rows)
    return cluster_sums(rows, labels, count) / sizes.view(-1, *[1] * (rows.dim() - 1))


def norms_lost(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """(count,) by how much the mean of a cluster of (n, d) rows is shorter than they are: √(mean ‖x‖²) / ‖mean x‖.

    Of N rows of one length with mean cosine E between two of them it is √(N / (1 + (N − 1) E)): 1 where they point one
    way, √N where they are orthogonal. Where they point against each other the mean is noise, and √N is the most.
    """
    sizes = labels.bincount(minlength=count).to(rows)
    squares = cluster_means(rows.square().sum(1), labels, count)
    means = cluster_means(rows, labels, count).square().sum(1)
    return torch.where(squares > 0, (squares / means).sqrt(), torch.ones_like(squares)).minimum(sizes.sqrt())


def _check(gram: Tensor, count: int) -> None:
    if not 1 <= count <= len(gram):
        raise ValueError(f"{len(gram)} points cannot make {count} clusters")


def _sums(gram: Tensor, labels: Tensor, count: int) -> Tensor:
    """(n, count) Σ_{j∈c} G_ij."""
    return gram.new_zeros(len(gram), count).index_add_(1, labels, gram)


def _seeded(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n,) labels by the nearest of `count` points drawn one by one, each by its square distance to those before it."""
    points, norms = len(gram), gram.diagonal()
    chosen = torch.zeros(points, dtype=torch.bool)
    labels = torch.zeros(points, dtype=torch.int64)
    closest = torch.full((points,), torch.inf, dtype=gram.dtype)
    weights, seeds = torch.ones(points), torch.empty(count, dtype=torch.int64)
    for place in range(count):
        if not bool(weights.sum() > 0):  # fewer different points than clusters
            weights = (~chosen).float()
        seed = int(torch.multinomial(weights, 1, generator=generator))
        chosen[seed], seeds[place] = True, seed
        distances = (norms + norms[seed] - 2 * gram[seed]).clamp(min=0)
        labels = torch.where(distances < closest, place, labels)
        closest = closest.minimum(distances)
        weights = closest.float().masked_fill(chosen, 0)
    labels[seeds] = torch.arange(count)  # also those that equal an earlier one, so that no cluster is empty
    return labels


def _exchange(gram: Tensor, labels: Tensor, count: int) -> Tensor:
    """Moves single points from cluster to cluster as long as that lowers the objective."""
    labels, norms = labels.clone(), gram.diagonal()
    for _ in range(SWEEPS):
        # summed anew in every sweep: what moves leave behind in rounding does not add up
        sums, sizes = _sums(gram, labels, count), labels.bincount(minlength=count).to(gram)
        inside = torch.zeros_like(sizes).index_add_(0, labels, sums.gather(1, labels[:, None])[:, 0])
        state = (labels, norms, sums, sizes, inside)
        everyone = torch.arange(len(gram)).split(max(1, CHUNK // count))
        hopeful = torch.cat([points[_gains(points, *state)[0] > 0] for points in everyone])
        moved = 0
        for point in hopeful.tolist():
            gains, best = _gains(torch.tensor([point]), *state)
            if float(gains) <= 0:  # another move came before
                continue
            old, new, row = int(labels[point]), int(best), gram[point]
            inside[old] += norms[point] - 2 * sums[point, old]
            inside[new] += norms[point] + 2 * sums[point, new]
            sums[:, old] -= row
            sums[:, new] += row
            sizes[old] -= 1
            sizes[new] += 1
            labels[point] = new
            moved += 1
        if not moved:
            break
    return labels


def _gains(
    points: Tensor, labels: Tensor, norms: Tensor, sums: Tensor, sizes: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """What the best move of each of (p,) points gains, and the cluster that it leads to."""
    own = labels[points][:, None]
    size = sizes[own]
    distances = (inside / sizes - 2 * sums[points]) / sizes + norms[points][:, None]
    # what is alone in its cluster has nothing to gain, and its cluster must not become empty
    leaving = torch.where(size > 1, size / (size - 1) * distances.gather(1, own), -torch.inf)
    joining, best = (sizes / (sizes + 1) * distances).scatter_(1, own, torch.inf).min(1)
    return leaving[:, 0] - joining - _NOISE * norms[points], best

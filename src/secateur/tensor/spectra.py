"""Singular values of row selections W[S], and how far their distribution lies from that of W.

Facts used, for W (m, h), any set S of rows and n = |S| ≥ h:

- σ(W)² are the eigenvalues of the Gram matrix WᵀW (h, h), so no singular vectors and nothing (m, m) is ever needed.
- Gram(W) = Gram(W[S]) + Gram(W[rest]): the Gram matrix of what is kept follows from the whole one by subtracting that
  of what is removed ("down-dating"), which is cheaper when fewer rows are removed than kept.
- Interlacing: Gram(W[S]) ⪯ Gram(W), hence σᵢ(W[S]) ≤ σᵢ(W) for every i. The distribution functions are therefore
  ordered, F_S(x) ≥ F(x) for every x, and the Kolmogorov–Smirnov distance is one-sided: max over x of F_S(x) - F(x).
- Sylvester's law of inertia: the number of eigenvalues of G below x is the number of negative eigenvalues of G - xI,
  and an L D Lᵀ factorisation shows it in D without computing one eigenvalue. F_S at one x costs one factorisation.
"""

import torch
from torch import Tensor

WIDE = 1024  # above this many columns speed decides about precision, below it exactness costs next to nothing


def smaller_side(weight: Tensor) -> Tensor:
    """Returns weight (n, h), transposed when n < h: its Gram matrix over the last dimension is then the small one."""
    return weight if weight.shape[0] >= weight.shape[1] else weight.T


def gram(weight: Tensor, block: int = 1024) -> Tensor:
    """Returns weightᵀ·weight (h, h) of weight (n, h), on and below the diagonal blocks; above them it is zero.

    Only the lower blocks are computed (half of the multiplications); every reader here reads the lower triangle.
    A bfloat16 weight is multiplied in bfloat16 (products accumulate in float32, each entry is rounded once) and the
    result is float32; otherwise the result has the weight's dtype.
    """
    size = weight.shape[1]
    out = torch.zeros(size, size, dtype=torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype)
    for start in range(0, size, block):
        stop = min(start + block, size)
        out[start:stop, :stop] = weight[:, start:stop].T @ weight[:, :stop]
    return out


def gram_of_kept(weight: Tensor, kept: Tensor, whole: Tensor | None = None) -> Tensor:
    """Returns the Gram matrix (h, h; lower triangle) of weight[kept], for weight (m, h) and sorted indices kept (k,).

    whole: gram(weight), if it is at hand: then the removed rows are subtracted from it when they are fewer.
    """
    removed = weight.shape[0] - len(kept)
    if whole is None or removed >= len(kept):
        return gram(weight[kept])
    gone = torch.ones(weight.shape[0], dtype=torch.bool)
    gone[kept] = False
    return whole - gram(weight[gone])


def exact_dtype(size: int) -> torch.dtype:
    """Returns the dtype for exact spectra of a Gram matrix with `size` rows: float64 up to WIDE, else float32.

    Squaring halves the digits: σᵢ² carries an absolute error of about eps·σ₁², and when it exceeds the gap between two
    values they swap, which moves the KS distance by a step of 1/size.
    """
    return torch.float64 if size <= WIDE else torch.float32


def single_suffices(values: Tensor) -> bool:
    """Says whether float32 resolves the squares of these singular values (n,), ascending: then nothing is gained by 64.

    The error, a few eps·σ₁², must stay far below the typical gap in the middle half of the squares. True of real layers
    without an outlying first direction; then 210 of 210 selections of SmolLM2 had exactly LAPACK's distance.
    """
    squares = values.square()
    low, high = len(values) // 4, 3 * len(values) // 4
    gap = (squares[high] - squares[low]) / max(high - low, 1)
    return bool(4 * torch.finfo(torch.float32).eps * squares[-1] < 0.05 * gap)


def singular_values_of_gram(matrix: Tensor) -> Tensor:
    """Returns √eigenvalues, ascending, float64 (n,), of a Gram matrix (n, n) of which the lower triangle is read."""
    return torch.linalg.eigvalsh(matrix, UPLO="L").double().clamp_min(0).sqrt()


def singular_values(weight: Tensor) -> Tensor:
    """Returns the min(n, h) singular values of weight (n, h), ascending, float64."""
    tall = smaller_side(weight)
    return singular_values_of_gram(gram(tall.to(exact_dtype(tall.shape[1]))))


def ks_distance(a: Tensor, b: Tensor) -> float:
    """Returns the two-sample Kolmogorov–Smirnov statistic max |F_a(x) - F_b(x)| of samples a (n,) and b (k,).

    Exact (it is attained at a sample point, from the right). When a and b are the singular values of W and of W[S]
    with |S| ≥ h, interlacing makes F_b ≥ F_a everywhere and the absolute value is that of F_b - F_a.
    """
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    below_a = torch.searchsorted(a, points, right=True).double() / len(a)
    below_b = torch.searchsorted(b, points, right=True).double() / len(b)
    return float((below_a - below_b).abs().max())


def count_below(matrix: Tensor, x: float, block: int = 128) -> int:
    """Returns how many eigenvalues of the symmetric matrix (n, n; lower triangle read) are below x.

    Sylvester's law of inertia on a factorisation of matrix - xI. Up to WIDE rows it is LAPACK's L D Lᵀ with
    Bunch–Kaufman pivoting, whose 2x2 pivots have one negative eigenvalue each. LAPACK's runs far below the speed of a
    matrix product, so wider ones are eliminated block by block, see _negatives_by_blocks.
    """
    shifted = matrix.clone()
    shifted.diagonal().sub_(x)
    return _negatives(shifted) if len(shifted) <= WIDE else _negatives_by_blocks(shifted, block)


def _negatives_by_blocks(matrix: Tensor, block: int, threshold: float = 0.01) -> int:
    """Returns the number of negative eigenvalues of matrix (n, n; lower triangle read), which is overwritten.

    A diagonal block D = V w Vᵀ is rotated to its eigenvectors and eliminated: its negative w count. Directions with
    |w| below threshold·max|w| would divide by almost nothing and drown the rest in rounding (measured: 75 counts of
    4096 wrong), so they are put off: they wait, coupled to all later columns, and are counted together at the end,
    when they number a few per block.
    """
    size, count = len(matrix), 0
    waiting = matrix.new_zeros(0, 0)  # the directions put off, among themselves (q, q)
    coupling = matrix.new_zeros(0, size)  # and with the columns (q, n)
    for start in range(0, size, block):
        stop = min(start + block, size)
        values, vectors = torch.linalg.eigh(matrix[start:stop, start:stop], UPLO="L")
        good = values.abs() > threshold * values.abs().max()
        count += int((values[good] < 0).sum())
        below, across = matrix[stop:, start:stop] @ vectors, coupling[:, start:stop] @ vectors
        eliminated, bad = below[:, good], ~good
        scaled = eliminated / values[good]
        for top in range(stop, size, 1024):  # the lower blocks of the Schur complement, as in gram
            end = min(top + 1024, size)
            later = eliminated[: end - stop].T
            matrix[top:end, stop:end].addmm_(scaled[top - stop : end - stop], later, alpha=-1)
        reduced = across[:, good] / values[good]
        coupling[:, stop:] -= reduced @ eliminated.T
        waiting = waiting - reduced @ across[:, good].T
        new = matrix.new_zeros(int(bad.sum()), size)
        new[:, stop:] = below[:, bad].T
        coupling = torch.cat([coupling, new])
        side = across[:, bad]
        waiting = torch.cat([torch.cat([waiting, side], 1), torch.cat([side.T, values[bad].diag()], 1)])
    return count + int((torch.linalg.eigvalsh(waiting) < 0).sum())


def _negatives(matrix: Tensor) -> int:
    """Returns the number of negative eigenvalues of a symmetric matrix (n, n; lower triangle read)."""
    factor = torch.linalg.ldl_factor_ex(matrix)
    paired = factor.pivots < 0
    return int((factor.LD.diagonal()[~paired] < 0).sum()) + int(paired.sum()) // 2


def fast_dtype(size: int) -> torch.dtype:
    """Returns the dtype for counting on Gram matrices with `size` rows: bfloat16 where the processor multiplies it.

    Rounding to bfloat16 moves single counts, not their total (measured: one of 4096), and halves the time.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if size > WIDE and native else torch.float32


def ks_nodes(values: Tensor, kept_values: Tensor, count: int) -> Tensor:
    """Returns `count` singular values x (float64) at which |F_S - F| is large and which lie apart; the first is where.

    values, kept_values: singular values of W and of one W[S]. The place of the maximum belongs to the layer far more
    than to the selection, so these nodes serve every other selection of the same width.
    """
    values, kept_values = values.sort().values, kept_values.sort().values
    # x just above the i-th kept value and just below the next whole one: the middle keeps rounding away from both.
    position = torch.searchsorted(values, kept_values, right=True)
    following = torch.minimum(values[position.clamp_max(len(values) - 1)], torch.cat([kept_values[1:], values[-1:]]))
    following = torch.where(following > kept_values, following, kept_values * (1 + 1e-6))
    rank = torch.arange(1, len(kept_values) + 1, dtype=torch.float64) / len(kept_values)
    gap = (rank - position / len(values)).abs()
    chosen: list[int] = []
    apart = len(kept_values) / 50
    for index in gap.argsort(descending=True, stable=True).tolist():
        if all(abs(index - other) >= apart for other in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    return (kept_values[chosen] + following[chosen]) / 2


def ks_distance_at(nodes: Tensor, values: Tensor, matrix: Tensor, kept: int) -> float:
    """Returns max over the nodes x of |F_S(x) - F(x)|: a lower bound of the KS distance, by counting alone.

    nodes: (c,) singular values from ks_nodes. values: all singular values of W (n,), ascending. matrix: Gram matrix of
    W[S] (its smaller side). kept: number of singular values of W[S].
    """
    zeros = matrix.shape[0] - kept
    gaps = [
        (count_below(matrix, float(x) ** 2) - zeros) / kept - int(torch.searchsorted(values, x)) / len(values)
        for x in nodes
    ]
    return max(abs(gap) for gap in gaps)

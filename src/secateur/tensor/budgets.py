"""Dividing a budget among matrices: whole numbers that sum to it exactly, with no float sum that decides.

A budget is a number of weights (or tiles) to remove. What comes in as a fraction of each matrix leaves as counts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

CHUNK = 1 << 22  # weights looked at together, so that the integers made of them stay a few tens of megabytes


def scaled_counts(
    relative: Sequence[float | Fraction], sizes: Sequence[int], total: int, limit: float = 1.0
) -> list[int]:
    """Counts in proportion to relative_l · size_l that sum to `total`, none above limit · size_l.

    A matrix that reaches the limit stays there and the others are scaled up. This is the c with Σ min(c · relative_l ·
    size_l, ⌊limit · size_l⌋) = total, found in one pass over the matrices in the order in which they reach their limit.
    Rounding is by largest remainder, among equals by index. All in rational numbers: matrices of equal size keep the
    order of their relative sparsities.

    Args:
        relative: (n,) what each matrix is to lose, on any scale, ≥ 0; 0 leaves a matrix alone.
        sizes: (n,) how much each matrix holds.
        total: how much goes in all.
        limit: largest fraction that a single matrix may lose, 0 ≤ limit ≤ 1.

    Raises ValueError where a number is negative or not finite, or where the matrices may not lose so much.
    """
    if not all(0 <= value < float("inf") for value in relative):
        raise ValueError(f"relative sparsities are finite and not negative; found {min(relative)} to {max(relative)}")
    # the small addend: 0.29 · 100 is 28.999… in floats, and means 29
    caps = [int(limit * size + 1e-6) for size in sizes]
    dues = [Fraction(value) * size for value, size in zip(relative, sizes, strict=True)]
    order = sorted(
        (index for index, due in enumerate(dues) if due), key=lambda index: (caps[index] / dues[index], index)
    )
    most = sum(caps[index] for index in order)
    if not 0 <= total <= most:
        raise ValueError(f"{total} are to go, but the matrices that may lose something can lose at most {most}")
    left, weight = Fraction(total), sum(dues, Fraction(0))
    result = [Fraction(0)] * len(sizes)
    for place, index in enumerate(order):
        if caps[index] * weight > left * dues[index]:
            for other in order[place:]:
                result[other] = dues[other] * left / weight
            break
        result[index] = Fraction(caps[index])
        left, weight = left - caps[index], weight - dues[index]
    counts = [int(due) for due in result]
    remainders = sorted(range(len(counts)), key=lambda index: (counts[index] - result[index], index))
    for index in remainders[: total - sum(counts)]:
        counts[index] += 1
    return counts


def erdos_renyi_counts(
    shapes: Sequence[Sequence[int]], remove: int, power: float = 1.0, sizes: Sequence[int] | None = None
) -> list[int]:
    """How many weights each matrix loses so that `remove` go in all and densities are of Erdős–Rényi(-Kernel) kind.

    density_l = min(1, ε · (Σ dims / Π dims)^power), with ε for the budget (Mocanu and others 2018, arXiv:1707.04780; with
    kernel dimensions Evci and others 2020, arXiv:1911.11134; both recalled). A matrix whose density reaches 1 is left
    whole and the others take its part: the same division as scaled_counts, of what is kept.

    Args:
        shapes: of each matrix: (outputs, inputs), or (outputs, inputs, height, width).
        remove: how many weights go in all.
        power: 0 is uniform.
        sizes: how many each matrix holds of what is counted, such as tiles; by default weights.

    Raises ValueError when more is to go than there is.
    """
    weights = [_product(shape) for shape in shapes]
    sizes = weights if sizes is None else sizes
    if not 0 <= remove <= sum(sizes):
        raise ValueError(f"{remove} are to go, but the matrices hold {sum(sizes)}")
    density = [Fraction(sum(shape), weight) for shape, weight in zip(shapes, weights, strict=True)]
    relative = density if power == 1 else [float(value) ** power for value in density]
    kept = scaled_counts(relative, sizes, sum(sizes) - remove)
    return [size - count for size, count in zip(sizes, kept, strict=True)]


def lowest_counts(read: Callable[[], Iterable[Tensor]], remove: int) -> list[int]:
    """How many of the `remove` lowest |w| of all tensors lie in each; among equals the first go, tensor by tensor.

    Together with keep_overall on each tensor this is keep_overall on all of them laid end to end, but only one is held
    at a time. The bit pattern of a float32 that is not negative grows with its value, so the threshold is selected by
    radix: a pass over the upper 16 of its 31 bits, one over the lower 15, one to count what lies below it.

    Args:
        read: gives the tensors, of any shape, in the same order whenever it is called; it is called three times. What
            they hold is exact in float32, or is rounded to it.
        remove: how many go in all.

    Raises ValueError when more is to go than there is.
    """
    if not remove:
        return [0 for _ in read()]
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for tensor in read():
        for bits in _magnitude_bits(tensor):
            upper += torch.bincount(bits >> 15, minlength=1 << 16).cpu()
    if not 0 <= remove <= int(upper.sum()):
        raise ValueError(f"{remove} are to go, but the tensors hold {int(upper.sum())}")
    high, left = _place(upper, remove)
    lower = torch.zeros(1 << 15, dtype=torch.int64)
    for tensor in read():
        for bits in _magnitude_bits(tensor):
            inside = bits[(bits >> 15) == high] & 0x7FFF
            lower += torch.bincount(inside, minlength=1 << 15).cpu()
    low, ties = _place(lower, left)
    threshold = high << 15 | low
    counts = []
    for tensor in read():
        below = equal = 0
        for bits in _magnitude_bits(tensor):
            below += int((bits < threshold).sum())
            equal += int((bits == threshold).sum())
        taken = min(equal, ties)
        ties -= taken
        counts.append(below + taken)
    return counts


def _place(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the count-th lowest lies, and which of that bin it is, counted from 1."""
    running = histogram.cumsum(0)
    place = int(torch.searchsorted(running, count))
    return place, count - int(running[place] - histogram[place])


def _magnitude_bits(tensor: Tensor) -> Iterator[Tensor]:
    """Bit patterns of |w| as int32, a chunk at a time."""
    for part in tensor.reshape(-1).split(CHUNK):
        yield part.float().abs().view(torch.int32)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result

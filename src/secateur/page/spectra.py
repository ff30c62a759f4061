"""Singular values of a few matrices before and after a run."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.figures import at
from secateur.network.matrices import MatrixRef, matrices, view
from secateur.network.source import Source
from secateur.tensor.spectra import ks_distance, singular_values

POINTS = 80
"""Of each curve that is drawn."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, descending.

    name: the matrix's in the original. before, after: its shape. curves: what is drawn of both, (rank / number of values,
    value). distance: Kolmogorov–Smirnov distance of the two distributions. energy: sum of squares after over that before.
    """

    name: str
    block: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    curves: tuple[list[tuple[float, float]], list[tuple[float, float]]]
    distance: float
    energy: float


def spectra(
    receipt: Mapping[str, Any],
    original: Source,
    result: Source,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Spectrum]:
    """The output matrices of attention and feed-forward in the first, middle and last block of the result, one by one.

    Units that go take columns of these with them, and layers that lose single weights have these too. seconds: no further
    matrix is begun after so long. Blocks are those that the result has left, each beside the one that it was.
    """
    came_from = blocks_left(receipt, len(original.anatomy.blocks))
    refs, was = (matrices(source.skeleton, source.anatomy) for source in (result, original))
    count, begun = len(refs), clock()
    for block in sorted({0, count // 2, count - 1}):
        before = {
            ref.name.removeprefix(original.anatomy.blocks[came_from[block]].path): ref for ref in was[came_from[block]]
        }
        for ref in _shown(result, block, refs[block]):
            other = before.get(ref.name.removeprefix(result.anatomy.blocks[block].path))
            if other is None:
                continue
            if clock() - begun > seconds:
                return
            whole, left = _matrix(original, other), _matrix(result, ref)
            yield compared(other.name, other.block, whole, left)


def compared(name: str, block: int, whole: Tensor, left: Tensor) -> Spectrum:
    """The spectra of a matrix before and after, both (rows, columns)."""
    values = [singular_values(matrix).flip(0) for matrix in (whole, left)]
    squares = [float(each.square().sum()) for each in values]
    return Spectrum(
        name,
        block,
        (_shape(whole), _shape(left)),
        (curve(values[0]), curve(values[1])),
        ks_distance(values[0], values[1]),
        squares[1] / squares[0] if squares[0] else 0.0,
    )


def curve(values: Tensor) -> list[tuple[float, float]]:
    """At most POINTS places of descending singular values (n,), the first and the last among them."""
    count = len(values)
    places = sorted({round(place * (count - 1) / (POINTS - 1)) for place in range(POINTS)})
    return [((place + 1) / count, float(values[place])) for place in places]


def blocks_left(receipt: Mapping[str, Any], count: int) -> list[int]:
    """Which block of the original each block of the result was."""
    left = list(range(count))
    for decision in at(receipt, ("decisions",)):
        found = decision.get("blocks")
        if found and "part" not in found:  # without a part alone, a block keeps its number
            left = [left[index] for index in found["kept"]]
    return left


def _shown(source: Source, block: int, refs: Sequence[MatrixRef]) -> list[MatrixRef]:
    """The matrices that read units: the output of attention, of the feed-forward layer, or of the first expert."""
    found = source.anatomy.blocks[block]
    outputs = [
        *(found.attention.o if found.attention else ()),
        *([found.feed_forward.down.parameter] if found.feed_forward else ()),
    ]
    shown = [ref for ref in refs if ref.parameter in outputs]
    # the last of an expert's matrices is its output
    experts = [ref for ref in refs if ref.role == "expert" and ref.expert in (0, None)]
    return (shown + experts[-1:] or list(refs[-1:]))[:2]


def _matrix(source: Source, ref: MatrixRef) -> Tensor:
    return view(ref, source.parameter(ref.parameter)).to(torch.float32)


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]

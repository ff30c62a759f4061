"""Orthogonal directions of a space: by how much of the data's energy they hold, or drawn at random."""

import torch
from torch import Tensor


def principal_directions(moment: Tensor) -> Tensor:
    """The eigenvectors of a second moment as columns, those with the most energy first.

    moment: (h, h) symmetric; computed in float64. Signs are chosen so that the largest entry of each is positive.
    """
    _, vectors = torch.linalg.eigh(moment.double())
    return _signed(vectors.flip(1))


def random_directions(size: int, generator: torch.Generator) -> Tensor:
    """(h, h) an orthogonal matrix, uniformly drawn, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def _signed(vectors: Tensor) -> Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()

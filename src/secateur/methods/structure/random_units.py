"""Uniform random neurons: the baseline that every criterion must beat."""

import torch

from secateur.network.widths import round_width
from secateur.registry import Context, Cut, Ratio, Units, method


@method(
    "random_units",
    kind="structure",
    paper="",
    claim="none: the baseline every criterion is compared with",
    when="after training",
    speedup="universal",
)
def random_units(units: Units, context: Context, *, ratio: Ratio = 0.2, multiple_of: int = 32) -> Cut:
    """Keeps feed-forward neurons drawn uniformly without replacement.

    Args:
        ratio: fraction of the neurons removed, 0 ≤ ratio < 1.
        multiple_of: the kept width is rounded to a multiple of this where the ratio allows it.
    """
    width = round_width(units.count, ratio, multiple_of)
    order = torch.randperm(units.count, generator=context.generator("units", units.block))
    return Cut(order[:width].sort().values)

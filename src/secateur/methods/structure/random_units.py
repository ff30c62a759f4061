"""Uniform random units: the baseline that every criterion must beat."""

import torch

from secateur.network.anatomy import AXES
from secateur.registry import Context, Cut, Units, method


@method(
    "random_units",
    kind="structure",
    paper="",
    claim="none: the baseline every criterion is compared with",
    when="after training",
    speedup="universal",
    criterion="random",
    schedule="one-shot",
    axes=(*AXES, "channels"),
)
def random_units(units: Units, context: Context) -> Cut:
    """Keeps units drawn uniformly without replacement."""
    address = (
        ("units", units.block) if units.axis == "neurons" else units.address
    )  # so that old recipes draw as they did
    order = torch.randperm(units.count, generator=context.generator(*address))
    return units.best(-order.argsort().double())  # a unit's place in the order decides

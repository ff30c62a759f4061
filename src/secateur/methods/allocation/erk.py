"""ERK: Erdős–Rényi densities, by which a large matrix loses a larger share than a small one.

Density ∝ (outputs + inputs) / (outputs · inputs): Mocanu and others, arXiv:1707.04780; with kernels ("ERK") Evci and
others, "Rigging the Lottery", ICML 2020, arXiv:1911.11134. Both recalled. The matrices here have no kernel dimensions,
where ERK and ER are the same.
"""

from typing import Annotated

from pydantic import Field

from secateur.registry import Allocation, Matrices, method
from secateur.tensor.budgets import erdos_renyi_counts


@method(
    "erk",
    kind="allocation",
    paper="arXiv:1911.11134",
    claim="dynamic sparse training with these densities is more accurate than with uniform ones (recalled)",
    when="after training",
    speedup="specific",
    criterion="shape",
    schedule="one-shot",
)
def erk(network: Matrices, *, power: Annotated[float, Field(ge=0)] = 1.0) -> Allocation:
    """Keeps a share of each matrix in proportion to (outputs + inputs) / (outputs x inputs); needs neither data nor
    weights.

    A matrix that would keep more than all is left whole, and the others take its part.

    Args:
        power: of that quotient; 0 is uniform.
    """
    shapes = {weight.name: (weight.rows, weight.columns) for weight in network}
    counts = erdos_renyi_counts(list(shapes.values()), network.remove, power, network.sizes)
    return Allocation(dict(zip(shapes, counts, strict=True)))

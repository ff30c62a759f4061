"""FLAP's adaptive structure search: scores are standardised in every layer and compared over all of them.

"Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983. Read in its code:
scores become (score − mean) / standard deviation in every layer and module; all of a network, a head counted as 512 / 3
neurons (4 · 128 · hidden parameters beside 3 · hidden), are sorted together, and the threshold is where those above it hold
as nearly as possible the wanted share ("AL-AM"; "AL-MM" has one threshold for heads and one for neurons). Scores are taken
in the dense network.

OURS: any criterion that scores units, not fluctuation alone; a unit counts its real number of parameters (or multiply-adds);
a head's score is standardised as it is, where the code standardises the squared scores of its columns and then takes their
mean; a block keeps one unit at least and loses no more than `limit`; widths are rounded to `multiple_of` and keep their sum.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from secateur.errors import RequestError
from secateur.network.scores import ScoredUnits
from secateur.registry import Allocation, UnitScores, method
from secateur.tensor.thresholds import cheapest_counts


@method(
    "flap_search",
    kind="allocation",
    paper="arXiv:2312.11983",
    claim="better than the same ratio for every layer (FLAP's ablation, recalled)",
    when="after training",
    speedup="universal",
    criterion="another method's",
    schedule="one-shot",
)
def flap_search(
    network: UnitScores, *, joint: bool = True, limit: Annotated[float, Field(gt=0, le=1)] = 0.99
) -> Allocation:
    """Lets a block lose what it holds of the network's lowest scores, once those of every block are standardised.

    Args:
        joint: heads and neurons share one threshold; otherwise each kind has its own, and its own part of the budget.
        limit: largest fraction of a block's units that goes.
    """
    prices = {each.name: _standardised(each.scores).sort().values for each in network}
    return one_threshold(network, prices, joint, limit, "flap_search")


def _standardised(scores: Tensor) -> Tensor:
    """(score − mean) / standard deviation; 0 where all are equal and nothing tells them apart."""
    centred = scores.double() - scores.double().mean()
    spread = centred.square().sum().div(max(len(scores) - 1, 1)).sqrt()
    return centred / spread if spread > 1e-12 * scores.abs().max() else centred * 0


def one_threshold(network: UnitScores, prices: dict[str, Tensor], joint: bool, limit: float, method: str) -> Allocation:
    """The cheapest units of all go; `prices` are those of each block's units in the order in which they go."""
    kinds = {each.axis for each in network}
    groups: list[tuple[list[ScoredUnits], int]] = [(list(network), network.remove)]
    if not joint and len(kinds) > 1:
        whole = sum((each.count - each.keep) * each.cost for each in network)
        parts = [[each for each in network if each.axis == kind] for kind in sorted(kinds)]
        groups = [
            (part, round(network.remove * sum((e.count - e.keep) * e.cost for e in part) / max(whole, 1)))
            for part in parts
        ]
    remove: dict[str, int] = {}
    for part, total in groups:
        try:
            counts = cheapest_counts([prices[each.name] for each in part], [each.cost for each in part], total, limit)
        except ValueError as error:
            raise RequestError(f"{method} with limit={limit:g}: {error}; raise the limit or remove less.") from error
        remove |= {each.name: count for each, count in zip(part, counts, strict=True)}
    return Allocation(remove)

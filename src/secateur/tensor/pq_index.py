"""PQ Index: how far from flat a set of weights is, and how many of them it says must stay.

Diao and others, "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv:2302.05601.
"""

import torch
from torch import Tensor

CHUNK = 1 << 22  # weights turned to float64 at once


def pq_index(
    weight: Tensor, p: float = 0.5, q: float = 1.0, kept: Tensor | None = None, per_row: bool = False
) -> Tensor:
    """I = 1 − (mean |w|^p)^(1/p) / (mean |w|^q)^(1/q): 0 when all |w| are equal, towards 1 when few carry all.

    Does not depend on the scale of w, nor on how often w is repeated. It is 0 where nothing is kept, as in the published
    code, and where only zeros are. Compared with that code (float32) on 7840 masked rows: equal to 1e-6.

    Args:
        weight: of any shape; (r, …) with per_row.
        p, q: norms that are compared, 0 < p < q.
        kept: bool like `weight`: only these are counted. A removed weight is not a zero weight.
        per_row: one index for each row (the paper's scope "neuron").

    Returns: float64, () or (r,).
    """
    _check(p, q)
    rows = weight.reshape(len(weight) if per_row else 1, -1)
    inside = None if kept is None else kept.reshape(rows.shape)
    count = (
        rows.new_full((len(rows),), rows.shape[1], dtype=torch.float64) if inside is None else inside.sum(1).double()
    )
    sums = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
    width = max(1, CHUNK // len(rows))
    for start in range(0, rows.shape[1], width):
        values = rows[:, start : start + width].double().abs()
        if inside is not None:
            values = values.where(inside[:, start : start + width], 0.0)
        sums += torch.stack([values.pow(power).sum(dim=1) for power in (p, q)])
    low, high = ((total / count.clamp_min(1)).pow(1 / power) for total, power in zip(sums, (p, q), strict=True))
    index = torch.where(high > 0, 1 - low / high, 0.0).clamp_min(0)  # rounding may leave -1e-16
    return index if per_row else index[0]


def retained_bound(index: Tensor, count: Tensor | int, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """m = ⌈d (1+η)^(−q/(q−p)) (1−I)^(pq/(q−p))⌉: how many of d weights must stay so that the rest matters little.

    With η = 0 it is k when k of the d weights are equal and the rest zero. Of 15680 bounds of masked rows one differs
    from the published code's, which rounds up in float32.

    Args:
        index: I, from pq_index.
        count: d, how many weights the index was computed from.
        eta: how much of the q-norm what is removed may carry; larger keeps fewer.

    Returns: int64, shape of `index`.
    """
    _check(p, q)
    index = torch.as_tensor(index, dtype=torch.float64)
    bound = count * (1 + eta) ** (-q / (q - p)) * (1 - index).clamp_min(0).pow(p * q / (q - p))
    # where the bound is a whole number, rounding must not carry it to the next
    return torch.ceil(bound * (1 - 1e-9)).long()


def removable(bound: Tensor, count: Tensor | int, gamma: float = 1.0, beta: float = 0.9) -> Tensor:
    """⌊d · clip(γ (1 − m/d), 0, β)⌋: how many of d weights one round of the paper's pruning (SAP) removes; int64."""
    count = torch.as_tensor(count).double()
    allowed = torch.minimum((gamma * (count - bound)).clamp_min(0), beta * count)
    return torch.floor(allowed + 1e-6).long()  # 0.29 · 100 is 28.999… in floats, and means 29


def _check(p: float, q: float) -> None:
    if not 0 < p < q:
        raise ValueError(f"the PQ Index needs 0 < p < q, found p={p:g} and q={q:g}")

"""SparseGPT's sweep: columns from first to last, every row's error passed on to the columns that are still to come."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.tensor.hessian import Damped
from secateur.tensor.patterns import Budget, keep_blocks, keep_n_of_m, keep_overall

LEAF = 16
"""Columns that are worked off one by one before a matrix product passes their errors on. Matters to speed alone."""


class Selection(NamedTuple):
    """Which weights stay, decided `step` columns at a time.

    choose(scores, start) gives the (r, b) mask of the columns start … start + b, from what removing each weight alone
    would cost (r, b), all earlier columns being done. Every b is `step`, but for the last where `step` does not divide d.
    """

    step: int
    choose: Callable[[Tensor, int], Tensor]


class Swept(NamedTuple):
    """weight: (r, d) new matrix, 0 where not kept. kept: (r, d) bool. loss: (r,) ½ Δ H Δᵀ of each row."""

    weight: Tensor
    kept: Tensor
    loss: Tensor


def by_budget(budget: Budget, block: int = 128) -> Selection:
    """The budget's pattern. A plain fraction and tiles lose their share of every `block` columns, rows competing; N:M is
    chosen group by group. Counts are exact.
    """
    pattern, columns = budget.pattern, budget.shape[1]
    if pattern.kept is not None and pattern.of is not None:
        kept, of = pattern.kept, pattern.of
        return Selection(of, lambda scores, start: keep_n_of_m(scores, kept, of))
    tile = pattern.block
    step = min(columns, max(block // tile[1], 1) * tile[1] if tile else block)
    sizes = [min(step, columns - start) for start in range(0, columns, step)]
    remove = budget.columns(sizes)

    def choose(scores: Tensor, start: int) -> Tensor:
        count = remove[start // step]
        return keep_blocks(scores, tile, count) if tile else keep_overall(scores, count)

    return Selection(step, choose)


def sweep(
    weight: Tensor,
    hessian: Damped,
    selection: Selection | Tensor,
    quantize: Callable[[Tensor, int], Tensor] | None = None,
) -> Swept:
    """Removes, and rounds, weights column by column with Optimal Brain Surgeon's update of the columns after.

    Source: SparseGPT (arXiv:2301.00774) and, for `quantize`, GPTQ (arXiv:2210.17323). With U upper triangular and
    Uᵀ U = H⁻¹: the score of a weight is w² / U_ii², the error of column i is e_i = (w_i − ŵ_i) / U_ii, and
    w_j −= e_i U_ij for all j > i. The loss Σ e_i² / 2 equals ½ Δ H Δᵀ for Δ = w₀ − ŵ exactly.

    The same is computed here without an inverse. From Δ = E U and R = U⁻¹ follows, with H = R Rᵀ,

        w_j = w₀_j + Σ_{i<j} Δ_i R_ij / R_jj,

    so only that sum over the columns done is carried along. It is accumulated by halves: when the first half of a range of
    columns is done, one matrix product adds its part to the second half. Only within LEAF columns are there matrix-vector
    products. Columns are held as rows, so that all of this is contiguous, and whatever need not be known on the way is
    computed at the end for all columns: among small matrices the number of calls is what takes the time.

    Args:
        weight: (r, d), not changed. Its dtype is the one that is computed in.
        hessian: of the d inputs. Weights of dead inputs are set to 0 first, at no loss.
        selection: how to find which weights stay, see `by_budget`, or the (r, d) mask itself.
        quantize: quantize(values, column) gives the (r,) values that a column's kept weights take instead of `values`,
            (r,), such as Grid.nearest.
    """
    rows, columns = weight.shape
    scale = hessian.backward.diagonal().to(weight.dtype).unsqueeze(1)  # 1 / U_ii
    unit = (hessian.backward.T.to(weight.dtype) / scale).contiguous()  # R_ij / R_jj in row j: ones on the diagonal
    change = weight.T.clone(memory_format=torch.contiguous_format)  # w₀ of columns to come, Δ of those done
    change[hessian.dead] = 0
    passed = torch.zeros_like(change)  # w₀ − w, what columns before have passed on
    values = None if quantize is None else torch.empty_like(change)  # w₀ − Δ would not hit the grid exactly
    if isinstance(selection, Tensor):
        kept, choose, step = selection.T.contiguous(), None, columns
    else:
        kept, choose, step = torch.empty_like(change, dtype=torch.bool), selection.choose, selection.step
    # of groups that are chosen one by one all at once: there are many and each is tiny
    inverses = _diagonal_inverses(unit, step).unbind() if choose is not None and step <= LEAF else None

    def visit(start: int, stop: int, known: bool) -> None:
        here, width = slice(start, stop), stop - start
        if choose is not None and not known and width <= step:
            # the weights as they are while no column from here on has an error: Δ R = 0 there
            own = inverses[start // step] if inverses is not None and width == step else _inverse(unit[here, here])
            scores = torch.addmm(change[here], own, passed[here], alpha=-1).mul_(scale[here]).square_()
            kept[here] = choose(scores.T, start).T
            known = True
        if known and width <= LEAF:
            finish(here)
            return
        size = LEAF if known else step
        middle = start + (width // size + 1) // 2 * size
        visit(start, middle, known)
        passed[middle:stop].addmm_(unit[middle:stop, start:middle], change[start:middle], alpha=-1)
        visit(middle, stop, known)

    def finish(here: slice) -> None:
        done, rates = change[here], unit[here, here].unbind()
        for place, (stays, own, before) in enumerate(
            zip(kept[here].unbind(), done.unbind(), passed[here].unbind(), strict=True)
        ):
            if place:
                before.addmv_(done[:place].T, rates[place][:place], alpha=-1)
            if values is None or quantize is None:
                # a kept weight changes by what was passed on, a removed one by all of itself
                torch.where(stays, before, own, out=own)
            else:
                value = torch.where(stays, quantize(own - before, here.start + place), 0)
                values[here.start + place] = value
                own.sub_(value)

    visit(0, columns, choose is None)
    if values is None:
        values = torch.sub(weight.T, change)
        values[hessian.dead] = 0
    loss = change.sub_(passed).mul_(scale).square_().sum(0).mul_(0.5)
    return Swept(values.T.contiguous(), kept.T.contiguous(), loss)


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of (…, n, n) lower triangular matrices with ones on the diagonal."""
    identity = torch.eye(lower.shape[-1]).to(lower).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


def _diagonal_inverses(lower: Tensor, step: int) -> Tensor:
    """(d // step, step, step) the inverses of the blocks on the diagonal of (d, d) `lower`, as `_inverse` takes them."""
    count = len(lower) // step
    return _inverse(lower.as_strided((count, step, step), (step * (len(lower) + 1), len(lower), 1)))

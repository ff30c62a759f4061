"""The best values of the weights that stay: for every row the minimiser of ½ (w − ŵ) H (w − ŵ)ᵀ under its mask.

The multiple removal problem of APT (arXiv:2410.15567), stated in its abstract; the algebra is re-derived. With P the
weights of a row that go and K those that stay, the same solution is, from one side and from the other,

    ŵ_K = w H_:K H_KK⁻¹        and        ŵ = w − w_P (H⁻¹_PP)⁻¹ H⁻¹_P:, with loss ½ w_P (H⁻¹_PP)⁻¹ w_Pᵀ.

Masks differ from row to row, so rows share no factor. `solve_directly` factors one matrix for each mask; `solve_by_steps`
works on all rows at once with matrix products, and says how far above the optimum each row can be at most.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """weight: (r, d) new matrix, 0 where not kept. loss: (r,) ½ Δ H Δᵀ. excess: (r,) how much lower it could be at most."""

    weight: Tensor
    loss: Tensor
    excess: Tensor


def solve_directly(weight: Tensor, hessian: Tensor, inverse: Tensor, kept: Tensor) -> Solved:
    """One Cholesky factorisation for each mask that occurs, of the smaller of H_KK and H⁻¹_PP.

    2/3 Σ min(|P|, |K|)³ operations over the masks. LAPACK factors one matrix after another even if given many at once, so
    they are not batched: gathering rows, then columns, of one matrix is several times faster, and nothing is padded.

    Args:
        weight: (r, d), not changed. Its dtype is the one that is computed in.
        hessian: (d, d) H, positive definite.
        inverse: (d, d) H⁻¹.
        kept: (r, d) bool. Rows that keep everything come back bit for bit.

    What cannot be factored is solved again in float64. Raises torch.linalg.LinAlgError where that fails too.
    """
    result = torch.where(kept, weight, 0)
    # tiles have one mask for many rows
    masks, member = kept.unique(dim=0, return_inverse=True)
    order = member.argsort(stable=True).split(member.bincount(minlength=len(masks)).tolist())
    for mask, rows in zip(masks, order, strict=True):
        stays, goes = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        if not len(stays) or not len(goes):
            continue
        dense, found = weight[rows], None
        if len(stays) <= len(goes):
            found = _divide(dense @ hessian[:, stays], hessian, stays)
        elif (share := _divide(dense[:, goes], inverse, goes)) is not None:
            found = dense[:, stays] - share @ inverse[goes][:, stays]
        if found is None:
            exact = hessian.double()
            found = _divide(dense.double() @ exact[:, stays], exact, stays)
        if found is None:
            raise torch.linalg.LinAlgError("the Hessian of the weights that stay is not positive definite, in float64")
        result[rows[:, None], stays] = found.to(weight.dtype)
    change = weight - result
    loss = (change @ hessian).mul_(change).sum(1) / 2
    return Solved(result, loss, torch.zeros_like(loss))


def _divide(right: Tensor, matrix: Tensor, places: Tensor) -> Tensor | None:
    """right (n, m) times the inverse of the (m, m) submatrix at `places`; None where it cannot be factored."""
    factor, failed = torch.linalg.cholesky_ex(matrix.index_select(0, places).index_select(1, places))
    return None if failed else torch.cholesky_solve(right.T, factor).T


def solve_by_steps(
    weight: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    kept: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    steps: int = 100,
    memory: int = 2**29,
) -> Solved:
    """Conjugate gradients on all rows at once, each with its own mask and its own preconditioner, see `Surrogate`.

    A step is one product of (r, d) with (d, d). The loss of a row never ends above that of `start`. A row is done on
    proof: with g the residual on K, the loss exceeds the optimum by ½ g H_KK⁻¹ gᵀ ≤ ½ g H⁻¹ gᵀ, since H⁻¹_KK is H_KK⁻¹
    and something positive. That bound is `excess`; it is computed when the preconditioner's estimate of it is small enough.

    Args:
        weight, hessian, inverse, kept: as in `solve_directly`.
        start: (r, d) to start from, such as another method's solution for this mask; default the dense weights, masked.
        tolerance: `excess` comes down to this fraction of the loss in every row, or, where next to nothing is lost, to
            1e-3 rounding units of ½ w H wᵀ.
        steps: after which rows that are not there are solved directly.
        memory: bytes that the preconditioners of the rows worked on together may take.
    """
    surrogate = Surrogate(hessian, inverse)
    rows = max(1, memory // surrogate.row_bytes)
    parts = [
        _solve_rows(weight[here], hessian, inverse, kept[here], None if start is None else start[here], surrogate, tolerance, steps)
        for here in (slice(first, first + rows) for first in range(0, len(weight), rows))
    ]  # fmt: skip
    return Solved(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _solve_rows(
    weight: Tensor,
    hessian: Tensor,
    inverse: Tensor,
    kept: Tensor,
    start: Tensor | None,
    surrogate: "Surrogate",
    tolerance: float,
    steps: int,
) -> Solved:
    begun = torch.where(kept, weight if start is None else start, 0)
    descent = Descent(weight, hessian, kept, Preconditioner(surrogate, kept), begun.clone())
    before = descent.loss.clone()
    least = (weight @ hessian).mul_(weight).sum(1) * (5e-4 * torch.finfo(weight.dtype).eps)
    wanted = tolerance
    for step in range(steps + 1):
        if step == steps or bool((descent.estimate <= (wanted * descent.loss).maximum(least)).all()):
            # from the matrix itself: what is carried along drifts from it by rounding
            change = weight - descent.matrix
            residual = change @ hessian
            loss = change.mul_(residual).sum(1) / 2
            residual *= kept
            excess = (residual @ inverse).mul_(residual).sum(1) / 2
            missed = excess > (tolerance * loss).maximum(least)
            if step == steps or not bool(missed.any()):
                break
            wanted /= 4
        descent.step()
    # by rounding, where the start was the optimum; and bit for bit where nothing goes
    stay = (loss > before)[:, None]
    result = torch.where(kept.all(1, keepdim=True), weight, torch.where(stay, begun, descent.matrix))
    loss = loss.minimum(before)
    if bool(missed.any()):
        direct = solve_directly(weight[missed], hessian, inverse, kept[missed])
        result[missed], loss[missed], excess[missed] = direct
    return Solved(result, loss, excess)


class Descent:
    """Preconditioned conjugate gradients for the rows of `matrix`, from where it is now. It is changed in place.

    Args:
        weight: (r, d) dense weights.
        hessian: (d, d).
        kept: (r, d) bool.
        preconditioner: for `kept`.
        matrix: (r, d), 0 where not kept.

    loss: (r,) of `matrix`. estimate: (r,) of how much lower it could be, ½ g M g for the residual g and the preconditioner
    M ≈ H_KK⁻¹; found to be 0.4 to 1.6 times the truth from the second step on.
    """

    def __init__(
        self, weight: Tensor, hessian: Tensor, kept: Tensor, preconditioner: "Preconditioner", matrix: Tensor
    ) -> None:
        self.matrix = matrix
        self._hessian, self._kept, self._preconditioner = hessian, kept, preconditioner
        change = weight - matrix
        self._residual = change @ hessian
        self.loss = change.mul_(self._residual).sum(1) / 2
        self._residual *= kept
        self._direction = preconditioner(self._residual)
        self.estimate = (self._residual * self._direction).sum(1) / 2

    def step(self) -> None:
        ahead = (self._direction @ self._hessian).mul_(self._kept)
        curvature = (self._direction * ahead).sum(1)
        length = torch.where(curvature > 0, 2 * self.estimate / curvature, 0)
        self.matrix.addcmul_(length[:, None], self._direction)
        self._residual.addcmul_(length[:, None], ahead, value=-1)
        self.loss -= length * self.estimate
        steepest = self._preconditioner(self._residual)
        estimate = (self._residual * steepest).sum(1) / 2
        turn = torch.where(self.estimate > 0, estimate / self.estimate, 0)
        self._direction = steepest.addcmul_(turn[:, None], self._direction)
        self.estimate = estimate


class Surrogate:
    """H as C⁻¹ (D + F Fᵀ) C⁻¹, approximately: C and D diagonal, F narrow.

    Restricted to any set of columns this is inverted by way of a matrix as small as F is narrow (Woodbury), so it can stand
    in for H_KK⁻¹ with thousands of different K. The inputs of a language model have a few strong directions in common and
    little else, which is this form: conjugate gradients need 5 to 15 steps with it where they need 30 to 60 with diag H.

    C² = diag H⁻¹: in this scale every input has the same variance given all others. F is a Nyström approximation from a
    fixed random sketch that H was applied to once. Its width √(2 d) is where setting up costs one product with H.

    Source: ours, from textbook parts.

    Args:
        hessian: (d, d).
        inverse: (d, d), of which the diagonal is read.
    """

    def __init__(self, hessian: Tensor, inverse: Tensor) -> None:
        columns = len(hessian)
        rank = min(columns, int((2 * columns) ** 0.5) + 1)
        scale = inverse.diagonal().sqrt()
        sketch = torch.randn(columns, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(hessian)

        def apply(right: Tensor) -> Tensor:
            return hessian @ (right * scale[:, None]) * scale[:, None]

        sketch = torch.linalg.qr(apply(sketch)).Q
        image = apply(sketch)
        core = sketch.T @ image
        core.diagonal().add_(10 * torch.finfo(core.dtype).eps * core.diagonal().sum())
        narrow = torch.linalg.solve_triangular(torch.linalg.cholesky((core + core.T) / 2), image.T, upper=False).T
        # D: 1 is what is left of an input that nothing in common explains; rounding must not take it all
        rest = (hessian.diagonal() * scale.square() - narrow.square().sum(1)).clamp_min(1e-3)
        self.first, self.second = torch.tril_indices(rank, rank, device=hessian.device)
        self.parts = narrow[:, self.first] * narrow[:, self.second] / rest[:, None]
        """(d, rank (rank + 1) / 2): each input's part in Fᵀ D⁻¹ F, so that it is one product for the masks of all rows."""
        self.diagonal = scale.square() / rest
        self.factor = narrow * (scale / rest)[:, None]

    @property
    def row_bytes(self) -> int:
        """What the preconditioner of one row takes."""
        return 2 * self.factor.shape[1] * (self.factor.shape[1] + 1) * self.factor.element_size()


class Preconditioner:
    """The surrogate of H_KK⁻¹ for every row's K, applied to (r, d).

    Args:
        surrogate: of H.
        kept: (r, d) bool. It is not copied: whoever takes weights away from it calls `drop`.
    """

    def __init__(self, surrogate: Surrogate, kept: Tensor) -> None:
        self._surrogate, self._kept = surrogate, kept
        self._sums = kept.to(surrogate.parts.dtype) @ surrogate.parts
        self._refactor()

    def drop(self, gone: Tensor, start: int) -> None:
        """gone: (r, b) 1 for what has gone from the columns start … start + b since the last time, 0 for the rest."""
        self._sums.addmm_(gone, self._surrogate.parts[start : start + gone.shape[1]], alpha=-1)
        self._refactor()

    def _refactor(self) -> None:
        surrogate, rank = self._surrogate, self._surrogate.factor.shape[1]
        core = self._sums.new_empty(len(self._sums), rank, rank)
        core[:, surrogate.first, surrogate.second] = self._sums
        core.diagonal(dim1=1, dim2=2).add_(1)
        self._factor = torch.linalg.cholesky(core)

    def __call__(self, residual: Tensor) -> Tensor:
        """residual: (r, d), 0 where not kept; so is the result."""
        surrogate = self._surrogate
        common = torch.cholesky_solve((residual @ surrogate.factor)[:, :, None], self._factor)[:, :, 0]
        return (common @ surrogate.factor.T).mul_(self._kept).neg_().addcmul_(residual, surrogate.diagonal)

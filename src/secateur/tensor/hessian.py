"""From a Gram matrix to what layer-wise solvers use: the damped Hessian, its triangular factors and its inverse.

For one row w of a layer and inputs x, the squared error of the outputs is δ G δᵀ with G = Σ x xᵀ and δ = w − ŵ. Its
scale matters to no mask and no update, because the damping is relative: G may be a sum or a mean over tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Damping = Literal["mean", "each"]


@dataclass(frozen=True, eq=False)
class Damped:
    """A damped Hessian H that is known to be positive definite. Factors are computed when first asked for, then kept.

    Args:
        matrix: (d, d) H, symmetric; float64 where float32 did not do, see `damp`.
        backward: (d, d) upper triangular R with R Rᵀ = H, the Cholesky factor from the last input to the first.
        energy: (d,) the diagonal before damping.
        fraction: the damping that was used.
        retries: how many attempts failed before; 0 as a rule. A method says so in the report where it is not 0.
    """

    matrix: Tensor
    backward: Tensor
    energy: Tensor
    fraction: float
    retries: int

    @property
    def dtype(self) -> torch.dtype:
        """What H and its factors are held in."""
        return self.matrix.dtype

    @property
    def dead(self) -> Tensor:
        """(d,) True for inputs that were always 0. H is 1 on their diagonal and 0 beside it; their weights act on nothing,
        and solvers set them to 0.
        """
        return self.energy == 0

    @cached_property
    def factor(self) -> Tensor:
        """(d, d) lower triangular L with L Lᵀ = H."""
        return torch.linalg.cholesky(self.matrix)

    @cached_property
    def inverse(self) -> Tensor:
        """(d, d) H⁻¹."""
        return torch.cholesky_inverse(self.backward.flip(0, 1)).flip(0, 1)

    @cached_property
    def upper(self) -> Tensor:
        """(d, d) upper triangular U with Uᵀ U = H⁻¹, the factor that SparseGPT and GPTQ write their sweep with.

        U = R⁻¹, which spares the detour over the Cholesky factor of the inverse and its loss of digits.
        """
        identity = torch.eye(len(self.matrix), dtype=self.dtype, device=self.matrix.device)
        return torch.linalg.solve_triangular(self.backward, identity, upper=True)


def damp(gram: Tensor, fraction: float = 0.01, mode: Damping = "mean") -> Damped:
    """Adds to the diagonal of a Gram matrix until it can be factored.

    Source: SparseGPT (arXiv:2301.00774) and ADMM pruning (arXiv:2401.02938), as in their published code, but for what
    happens when the factorisation fails (there: an error) and for inputs that are always 0: they have no part in the
    mean diagonal here. Where the precision of `gram` does not do, float64 is tried, then 10, 100 and 1000 times the
    damping in float64.

    Args:
        gram: (d, d) sum or mean of x xᵀ; it is symmetrised. Not changed.
        fraction: of the damping, ≥ 0.
        mode: "mean" adds `fraction` of the mean diagonal to every entry of the diagonal (SparseGPT). "each" adds
            `fraction` of itself to each entry, which is damping on the correlation matrix (ADMM), so that a few inputs
            of large energy do not decide how the others are damped.

    Raises torch.linalg.LinAlgError where `gram` is not finite or not positive definite with any of these dampings.
    """
    if not bool(torch.isfinite(gram).all()):
        raise torch.linalg.LinAlgError(
            "the Gram matrix of the inputs holds infinities or NaN; no damping and no further samples cure that"
        )
    matrix = (gram + gram.T) / 2
    energy = matrix.diagonal().clone()
    dead = energy == 0
    if bool(dead.any()):
        # the square of a tiny input can underflow where its products with others do not
        matrix[dead] = 0
        matrix[:, dead] = 0
    living = energy[~dead]
    step = energy if mode == "each" else living.mean() if len(living) else energy.new_zeros(())
    attempts = [(torch.float64, fraction * factor) for factor in (1, 10, 100, 1000)]
    if gram.dtype != torch.float64:
        attempts.insert(0, (gram.dtype, fraction))
    for retries, (dtype, damping) in enumerate(attempts):
        matrix = matrix.to(dtype)
        matrix.diagonal().copy_((energy.to(dtype) + damping * step.to(dtype)).masked_fill(dead, 1))
        factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            return Damped(matrix, factor.flip(0, 1), energy.to(dtype), damping, retries)
    raise torch.linalg.LinAlgError(
        f"the Gram matrix of the inputs is not positive definite, even in float64 with a damping of {damping:g}; "
        "use a larger damping or more calibration tokens"
    )

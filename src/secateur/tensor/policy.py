"""The PruneNet policy (arXiv:2501.15296) as tensors: scores, samples, log-probabilities and their exact gradients.

Published: z = (W Aᵀ + b) r and α = sigmoid(z), with A (m, h), b (m,), r (m, 1) shared by all layers W (m, h). Nothing
nonlinear stands between the two maps, so z = W v + c with v = Aᵀ r (h,) and c = b·r. Scoring therefore costs m·h
instead of m²·h, and with δ = ∂loss/∂z the gradients of the full parametrisation follow from one vector:

    g = Wᵀ δ (h,)     ∂A = r gᵀ     ∂b = r Σδ     ∂r = A g + b Σδ

No m × m product is ever formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """The collapsed policy: all that scoring needs; it fits every layer of hidden size h, whatever its width m.

    v: (h,). c: (). standardised: the scores are taken on rows brought to mean 0 and deviation 1.
    """

    v: Tensor
    c: Tensor
    standardised: bool = False

    def scores(self, weight: Tensor) -> Tensor:
        """Returns the logits z (m,) of weight (m, h); α = sigmoid(z) is the published score of a row."""
        return (StandardRows(weight).scores(self.v) if self.standardised else weight @ self.v) + self.c

    def tensors(self) -> dict[str, Tensor]:
        """Returns the policy as tensors for a file: "v", "c" and "standardised" (bool)."""
        return {"v": self.v, "c": self.c, "standardised": torch.tensor(self.standardised)}


@dataclass(frozen=True)
class FullPolicy:
    """The published parametrisation. a: (m, h), b: (m,), r: (m, 1), float32, updated in place by an optimiser."""

    a: Tensor
    b: Tensor
    r: Tensor

    @classmethod
    def start(cls, units: int, hidden: int, generator: torch.Generator) -> "FullPolicy":
        """Returns the published initial state: torch.nn.Linear's default for A and b, U[0, 1) for r."""
        bound = hidden**-0.5
        a = torch.empty(units, hidden).uniform_(-bound, bound, generator=generator)
        b = torch.empty(units).uniform_(-bound, bound, generator=generator)
        return cls(a, b, torch.rand(units, 1, generator=generator))

    def named(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b, "r": self.r}

    def collapse(self) -> Policy:
        return Policy(self.a.T @ self.r[:, 0], self.b @ self.r[:, 0])

    def gradients(self, pulled: Tensor, total: Tensor) -> dict[str, Tensor]:
        """Returns the gradients of a, b and r, exactly those of the uncollapsed module.

        pulled: Wᵀ δ (h,). total: Σδ ().
        """
        r = self.r[:, 0]
        return {
            "a": torch.outer(r, pulled),
            "b": r * total,
            "r": (self.a @ pulled + self.b * total)[:, None],
        }


class StandardRows:
    """weight (m, h) with every row at mean 0 and deviation 1 (a constant row becomes zero), without a copy of it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # Not torch.var_mean, which is far slower. The difference cancels only for rows of nearly one value: taken as 0.
        square = torch.linalg.vector_norm(weight, dim=1).square() / weight.shape[1]
        self._mean = weight.mean(dim=1)
        variance = square - self._mean.square()
        self._inverse = torch.where(variance > 1e-5 * square, variance.rsqrt(), 0.0)

    def scores(self, v: Tensor) -> Tensor:
        """Returns X v (m,) for v (h,)."""
        return (self._weight @ v - self._mean * v.sum()) * self._inverse

    def pull(self, delta: Tensor) -> Tensor:
        """Returns Xᵀ delta (h,) for delta (m,)."""
        scaled = delta * self._inverse
        return self._weight.T @ scaled - self._mean @ scaled


def uniform(size: int, generator: torch.Generator) -> Tensor:
    """Returns u (size,) in the open interval (0, 1): at 0, which torch.rand can give, log u would be infinite."""
    return torch.rand(size, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)


def relaxed_bernoulli(z: Tensor, u: Tensor) -> Tensor:
    """Returns o = sigmoid(logit u + logit α), α = sigmoid(z), (m,), written as published.

    The logit is taken of α and not replaced by z, on purpose: where sigmoid rounds to 1 (z > 17 in float32) the
    published logit is infinite and its gradient undefined, a failure that the reference mode must show.
    """
    alpha = torch.sigmoid(z)
    return torch.sigmoid(torch.log(u) - torch.log(1 - u) + torch.log(alpha) - torch.log(1 - alpha))


def published_loss(z: Tensor, u: Tensor, kept: Tensor, reward: float) -> tuple[Tensor, Tensor]:
    """Returns loss = -reward · Σ over kept of log o, (), and δ = ∂loss/∂z, (m,), both by the published chain.

    Autograd runs on m numbers only. Either result may be non-finite, see relaxed_bernoulli.
    """
    leaf = z.detach().requires_grad_()
    loss = -1 * torch.log(relaxed_bernoulli(leaf, u))[kept].sum() * reward
    (delta,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), delta


def published_draw(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` sorted rows by a multinomial draw without replacement from relaxed samples o of logits z (m,).

    Raises FloatingPointError where o is not finite or zero everywhere.
    """
    chances = relaxed_bernoulli(z, uniform(len(z), generator))
    if not bool(chances.isfinite().all()) or not bool(chances.sum() > 0):
        raise FloatingPointError("the relaxed Bernoulli samples are not finite or all zero")
    return torch.multinomial(chances, count, replacement=False, generator=generator).sort().values


def top_k(z: Tensor, count: int) -> Tensor:
    """Returns the `count` sorted indices of the largest z (m,); the first ones among equals."""
    return z.argsort(descending=True, stable=True)[:count].sort().values


def gumbel_top_k(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` indices drawn one after the other without replacement with odds exp(z), in the order drawn."""
    gumbel = -torch.log(-torch.log(uniform(len(z), generator).clamp_max(1 - 2**-24)))
    return torch.argsort(z + gumbel, descending=True, stable=True)[:count]


def drawn_direction(z: Tensor, order: Tensor) -> Tensor:
    """Returns ∂/∂z of log P(order), (m,), float32, for the ordered draw that gumbel_top_k makes (Plackett–Luce).

    log P = Σⱼ (z[orderⱼ] - log Zⱼ), Zⱼ = Σ of exp z over the rows not drawn before j. Row i therefore gets [i drawn]
    minus exp(zᵢ)·Σ of 1/Zⱼ over the draws j that it was there for. In logarithms, so that no z overflows; float64,
    because a learned policy spreads Zⱼ over many orders of magnitude.
    """
    z = z.double()
    left = torch.ones_like(z, dtype=torch.bool)
    left[order] = False
    log_sums = torch.cat([z[left], z[order].flip(0)]).logcumsumexp(0)[-len(order) :].flip(0)  # log Zⱼ
    presence = (-log_sums).logcumsumexp(0)  # log Σ of 1/Z over the draws up to j
    direction = -torch.exp(z + presence[-1])
    direction[order] = 1 - torch.exp(z[order] + presence)
    return direction.float()

"""Linear surrogates from few, wide observations: elastic net solved by FISTA, penalties by rank agreement."""

from collections.abc import Sequence

import torch
from torch import Tensor


def elastic_net(inputs: Tensor, targets: Tensor, ridge: float, lasso: float, steps: int = 300) -> tuple[Tensor, float]:
    """Minimises ‖y − X θ − b‖² / 2n + ridge · s ‖θ‖² / 2 + lasso · t ‖θ‖₁ over θ and b.

    s is the largest eigenvalue of the centred XᵀX / n, and t the smallest weight at which all of θ would be zero without a
    ridge, so both settings mean the same whatever the units of X and y. Without lasso the solution is exact, by the n × n
    system of the dual; otherwise by FISTA (Beck and Teboulle 2009) from zero.

    Args:
        inputs: (n, d) X.
        targets: (n,) y.

    Returns: (d,) θ and b, in float64.
    """
    x, y = inputs.double(), targets.double()
    means, mean = x.mean(0), y.mean()
    x, y, count = x - means, y - mean, len(x)
    kernel = x @ x.T / count
    scale = float(torch.linalg.eigvalsh(kernel)[-1])
    if scale <= 0:  # all observations are alike
        return torch.zeros_like(means), float(mean)
    damping = ridge * scale
    if not lasso:
        # what is added keeps the kernel of centred observations, which is singular, from dividing by zero
        system = kernel + max(damping, 1e-12 * scale) * torch.eye(count, dtype=x.dtype)
        theta = x.T @ torch.linalg.solve(system, y) / count
    else:
        threshold = lasso * float((x.T @ y).abs().max()) / count
        step = 1 / (scale + damping)
        theta, ahead, momentum = torch.zeros_like(means), torch.zeros_like(means), 1.0
        for _ in range(steps):
            gradient = x.T @ (x @ ahead - y) / count + damping * ahead
            moved = ahead - step * gradient
            new = moved.sign() * (moved.abs() - step * threshold).clamp(min=0)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / following * (new - theta)
            theta, momentum = new, following
    return theta, float(mean - means @ theta)


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Kendall's τ-b of two (n,) rankings, by all pairs: 1 for one order, −1 for opposite ones, 0 where one is constant."""
    upper = torch.triu(torch.ones(len(first), len(first), dtype=torch.bool), 1)
    a, b = ((each[:, None] - each[None]).sign()[upper].double() for each in (first, second))
    norm = float(a.square().sum() * b.square().sum()) ** 0.5
    return float((a * b).sum()) / norm if norm else 0.0


def best_setting(
    inputs: Tensor, targets: Tensor, settings: Sequence[tuple[float, float]], folds: Sequence[Tensor]
) -> tuple[tuple[float, float], float]:
    """The (ridge, lasso) whose predictions order held-out observations best, the first among equals, and its mean τ.

    Args:
        inputs, targets: as `elastic_net` takes them.
        folds: indices of the observations that are held out together, in turn.
    """
    told = []
    for ridge, lasso in settings:
        agreement = []
        for fold in folds:
            rest = torch.ones(len(inputs), dtype=torch.bool)
            rest[fold] = False
            theta, bias = elastic_net(inputs[rest], targets[rest], ridge, lasso)
            agreement.append(kendall_tau(inputs[fold].double() @ theta + bias, targets[fold].double()))
        told.append(sum(agreement) / len(agreement))
    best = max(range(len(settings)), key=lambda index: told[index])
    return settings[best], told[best]

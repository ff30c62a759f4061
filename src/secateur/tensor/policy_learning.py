"""Two ways of learning a PruneNet policy from rewards: the published one, and ours that does not overflow.

A learner draws rows of a layer, is told what they earned, and changes its policy. It holds O(h) numbers (ours) or the
full parametrisation (published), never a layer. Its state is tensors and plain data, and goes on from them bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

from secateur.tensor.policy import (
    FullPolicy,
    Policy,
    StandardRows,
    drawn_direction,
    gumbel_top_k,
    published_draw,
    published_loss,
    uniform,
)

BASELINE_RATE = 0.2  # weight of the newest reward in a layer's running mean


class StableLearner:
    """Policy gradient on z = X v / √h, X the standardised rows; not published: ours.

    hidden: h. learning_rate: of Adam on v (h,), which starts at 0, that is at uniform sampling.
    """

    def __init__(self, hidden: int, learning_rate: float) -> None:
        self._scale = hidden**-0.5  # entries of v near 1 give logits near 1
        self._v = {"v": torch.zeros(hidden)}
        self._optimizer = torch.optim.Adam(self._v.values(), lr=learning_rate)
        self._baselines: dict[int, float] = {}

    def draw(self, weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns `count` sorted rows of weight (m, h), and ∂ log P(draw) / ∂v (h,) at the policy that drew them."""
        rows = StandardRows(weight)
        z = rows.scores(self._v["v"]) * self._scale
        order = gumbel_top_k(z, count, generator)
        return order.sort().values, rows.pull(drawn_direction(z, order)) * self._scale

    def update(self, earned: dict[int, tuple[float, Tensor]], discount: float) -> None:
        """Takes one step for each layer in order. earned: {layer: (reward, direction that draw returned)} of an episode.

        A layer's advantage is its reward minus its running mean (layers differ far more than selections do), brought
        to root mean square 1 over the episode. The first episode only sets the means.
        """
        advantages = {layer: reward - self._baselines.get(layer, reward) for layer, (reward, _) in earned.items()}
        size = (sum(advantage**2 for advantage in advantages.values()) / len(advantages)) ** 0.5
        for layer, (reward, direction) in earned.items():
            self._baselines[layer] = reward - (1 - BASELINE_RATE) * advantages[layer]
            if size > 0:
                self._v["v"].grad = direction * -(discount**layer * advantages[layer] / size)
                self._optimizer.step()

    def result(self) -> tuple[Policy, dict[str, Tensor]]:
        """Returns the policy of the last episode, and the tensors of its file."""
        policy = Policy(self._v["v"] * self._scale, torch.zeros(()), standardised=True)
        return policy, policy.tensors()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._v | _optimizer_state(self._optimizer, self._v), {"baselines": self._baselines}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        _restore(self._optimizer, self._v, tensors)
        self._baselines = {int(layer): mean for layer, mean in meta["baselines"].items()}


class PublishedLearner:
    """The published policy gradient: loss = -discounted reward · Σ log o, AdamW on A, b and r, best episode kept.

    units, hidden: m and h of every layer. learning_rate: of AdamW (torch's default weight decay, as published).
    """

    def __init__(self, units: int, hidden: int, learning_rate: float, generator: torch.Generator) -> None:
        self._full = FullPolicy.start(units, hidden, generator)
        self._named = self._full.named()
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=learning_rate, fused=True)
        self._best = {name: tensor.clone() for name, tensor in self._named.items()}
        self._best_score = 0.0
        self._collapsed = self._full.collapse()

    def draw(self, weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns `count` sorted rows of weight (m, h), and nothing more that is needed (an empty tensor)."""
        return published_draw(self._collapsed.scores(weight), count, generator), torch.empty(0)

    def message(self, weight: Tensor, kept: Tensor, reward: float, generator: torch.Generator) -> Tensor:
        """Returns all that the gradients of A, b, r depend on, Wᵀδ and Σδ, as one tensor (h + 1,); fresh forward."""
        z = self._collapsed.scores(weight)
        _, delta = published_loss(z, uniform(len(z), generator), kept, reward)
        return torch.cat([weight.T @ delta, delta.sum()[None]])

    def step(self, message: Tensor) -> bool:
        """Takes an AdamW step; returns False and changes nothing where a gradient is not finite."""
        gradients = self._full.gradients(message[:-1], message[-1])
        # that of A is an outer product: its largest entry is the product of the largest, found without reading it all
        largest = self._full.r.abs().max() * message[:-1].abs().max()
        if not all(bool(part.isfinite().all()) for part in (largest, gradients["b"], gradients["r"])):
            return False
        for name, parameter in self._named.items():
            parameter.grad = gradients[name]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._collapsed = self._full.collapse()
        return True

    def remember(self, score: float) -> None:
        """Ends an episode whose rewards sum to `score`: the best one's policy, after its updates, is the result."""
        if score > self._best_score:
            self._best_score = score
            self._best = {name: tensor.clone() for name, tensor in self._named.items()}

    def result(self) -> tuple[Policy, dict[str, Tensor]]:
        """Returns the collapsed policy of the best episode, and the tensors of its file, the full ones included."""
        policy = FullPolicy(**self._best).collapse()
        return policy, policy.tensors() | self._best

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        return self._named | best | _optimizer_state(self._optimizer, self._named), {"best": self._best_score}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        _restore(self._optimizer, self._named, tensors)
        self._collapsed = self._full.collapse()
        self._best = {name: tensors[f"best.{name}"] for name in self._named}
        self._best_score = meta["best"]


def _optimizer_state(optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state of the named parameters as flat tensors, "optimizer.name.key"."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
    }


def _restore(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Puts parameters and optimiser back as they were saved."""
    for name, parameter in named.items():
        parameter.copy_(tensors[name])
        prefix = f"optimizer.{name}."
        if found := {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}:
            optimizer.state[parameter] = found

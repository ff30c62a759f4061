"""Bonsai: units go whose absence a regression over random sub-models blames least, by forward passes alone.

Dery and others, "Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes", arXiv:2402.05406. In each round
the units of a module with the lowest prior, mean |W_out,j| · rms(x_j), are candidates; sub-models lack random ones of them,
each beside its complement, which lacks the other candidates; a linear model of what the sub-models score gives every
candidate a weight θ, and those with the lowest go, until a round has removed its share. Whatever can be scored can guide it,
and memory is that of inference: the model as it is stored, units silenced in passing.

The paper takes 200 sub-models for each round of 5 %, a prior of 32 sequences, and removes units wherever θ is lowest
(uniform=false). Defaults here are for a laptop. From its code: a mask lacks int(p n) + 1 units of n, and candidates are
those and as many again for the complement; the probability to be lacking falls with the prior; scores are negative
perplexities on one set of sequences in a round.

OURS: with uniform, every block loses the same number, so that any library loads the result, and θ orders the units within
each block; the penalised regression is solved exactly or by FISTA where the code takes fifty epochs of Adam, and its
penalties are chosen, as there, by Kendall's τ on held-out sub-models in five folds, but of whole pairs, because a complement
tells the other's score; equal θ are ordered by the prior; a unit of attention is what shares keys and values. Where every
mask lacks the same number in a module, no regression can tell how much the module as a whole matters, and its weights say
only which of its units matter more: so, where blocks may differ, `vary` draws that number for each mask. There, too, a mask
lacks as many units as its round is to remove where those are more than int(p n) + 1: a round removes p of what there was,
and of what is left that becomes more and more, until all candidates had to go whatever their θ, and not even they sufficed.
"""

from dataclasses import dataclass, field
from itertools import product
from math import ceil, floor
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.context import Advance
from secateur.errors import RequestError
from secateur.network.anatomy import Axis
from secateur.network.widths import round_width
from secateur.registry import Axes, Context, Cut, Evaluator, Network, Plan, Ratio, Units, method
from secateur.tensor.regression import best_setting, elastic_net
from secateur.tensor.submodels import candidates, draw_pair, lowest, lowest_within

FOLDS = 5
SETTINGS = tuple(product((1.0, 0.1, 0.01, 0.001), (0.0, 0.01, 0.1)))  # ridge and lasso, the strongest ridge first


class _Wishes(NamedTuple):
    """Of a round: how many pairs of sub-models, sequences of each, sequences of the prior, what is scored, and whether masks
    lack different numbers.
    """

    pairs: int
    sequences: int
    prior_sequences: int
    metric: str
    vary: bool


@dataclass
class _Module:
    """The units of one kind in one block.

    Args:
        goes: how many it is to lose in all; None where the method finds it.
        columns: (count · width,) mean size of the weights of each column of the output matrix.
        alive: (count,) bool.
        prior: (count,) of this round.
        found: (c,) the candidates of this round.
    """

    units: Units
    goes: int | None
    columns: Tensor
    alive: Tensor
    prior: Tensor
    found: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def pair(self, lacking: int, vary: bool, generator: torch.Generator) -> Tensor:
        """(2, c) a pair of sub-models, by candidates that they have."""
        if vary:
            fewest = max(len(self.found) - self.left + 1, 0)  # both have a unit left
            lacking = int(torch.randint(fewest, len(self.found) - fewest + 1, (), generator=generator))
        return draw_pair(self.prior[self.found], float(self.prior[self.alive].max()), lacking, generator)

    @property
    def key(self) -> tuple[int, Axis]:
        return self.units.block, self.units.axis

    @property
    def left(self) -> int:
        return int(self.alive.sum())


@method(
    "bonsai",
    kind="structure",
    paper="arXiv:2402.05406",
    claim="forward passes alone give better structured pruning than gradients, on one GPU that can only run the model",
    when="after training",
    speedup="universal",
    criterion="loss",
    schedule="iterative",
    comparison=("layer", "global"),
    axes=("heads", "neurons"),
)
def bonsai(
    network: Network[Units],
    evaluator: Evaluator,
    context: Context,
    *,
    ratio: Ratio = 0.2,
    axis: Axes = ["neurons"],  # noqa: B006 (a schema's default, never changed)
    uniform: bool = True,
    vary: bool = True,
    per_round: Annotated[float, Field(gt=0, le=1)] = 0.05,
    submodels: Annotated[int, Field(ge=4)] = 40,
    sequences: Annotated[int, Field(ge=1)] = 2,
    prior_sequences: Annotated[int, Field(ge=1)] = 8,
    metric: Literal["perplexity", "loss"] = "perplexity",
    multiple_of: Annotated[int, Field(ge=1)] = 32,
) -> Plan:
    """Removes the units that random sub-models miss least, in rounds, by forward passes alone.

    Args:
        ratio: fraction of the units removed in every block; where uniform is false, of the parameters of all units.
        axis: which units: neurons, or heads that share keys and values, or a list of both.
        uniform: every block loses the same number of units; otherwise they go wherever they are missed least, and blocks
            differ.
        vary: where uniform is false, a mask lacks any number of a module's candidates; otherwise half of them, as published.
        per_round: fraction removed in each round.
        submodels: tried in each round, rounded up to pairs of complements; 200 in the paper.
        sequences: calibration sequences that a sub-model reads, drawn anew for each round.
        prior_sequences: calibration sequences of the prior, drawn anew for each round; 32 in the paper.
        metric: what a sub-model scores: minus its perplexity as published, or minus its loss.
        multiple_of: where uniform, kept neurons are rounded to the nearest multiple of this where the ratio allows it.
    """
    modules = []
    for units in network:
        columns, alive = units.output.abs().mean(0), torch.ones(units.count, dtype=torch.bool)
        goes = None
        if uniform:
            goes = units.count - round_width(units.count, ratio, multiple_of if units.axis == "neurons" else 1)
        modules.append(_Module(units, goes, columns, alive, torch.zeros(units.count)))
    whole = sum(each.units.count * each.units.size for each in modules)
    if not uniform and (most := sum((each.units.count - 1) * each.units.size for each in modules)) < ratio * whole:
        raise RequestError(
            f"bonsai: ratio={ratio} cannot go, because one unit stays in every block; at most "
            f"{floor(1e4 * most / whole) / 1e4} can."
        )
    share = max((ratio if each.goes is None else each.goes / each.units.count for each in modules), default=0.0)
    rounds = ceil(share / per_round - 1e-9)
    wishes = _Wishes(-(-submodels // 2), sequences, prior_sequences, metric, vary and not uniform)
    search = _Search(modules, evaluator, context, wishes)
    search.restore()
    with context.progress("trying sub-models", rounds * 2 * wishes.pairs) as bar:
        bar.advance(len(search.history) * 2 * wishes.pairs + len(search.losses))
        while (number := len(search.history)) < rounds:
            goal = round(whole * min(ratio, per_round * (number + 1)))
            if uniform:
                due = [each.goes or 0 for each in modules]
                lacking = [goes * (number + 1) // rounds - goes * number // rounds for goes in due]
            else:
                lacking = _lacking(modules, goal, per_round)
            theta, said = search.round(number, lacking, bar)
            if uniform:
                for each, values, count in zip(modules, theta, lacking, strict=True):
                    each.alive[each.found[lowest(values, each.prior[each.found], count)]] = False
            else:
                _remove_anywhere(modules, torch.cat(theta), goal)
            search.finish({**said, "units left": sum(each.left for each in modules)})
    context.note("rounds", search.history)
    return Plan({each.key: Cut(each.alive.nonzero()[:, 0]) for each in modules if not each.alive.all()})


def _missing(modules: list[_Module], goal: int) -> int:
    """How many parameters have yet to go until `goal` are gone."""
    return goal - sum((each.units.count - each.left) * each.units.size for each in modules)


def _lacking(modules: list[_Module], goal: int, portion: float) -> list[int]:
    """How many units of each module a mask lacks: that portion of those left, as published, or more: what is missing to the
    goal, so that candidates, twice as many, hold it and leave a choice however few units are left.
    """
    may_go = sum((each.left - 1) * each.units.size for each in modules)
    portion = max(portion, _missing(modules, goal) / max(may_go, 1))
    return [min(int(portion * each.left) + 1, each.left - 1) for each in modules]


def _remove_anywhere(modules: list[_Module], theta: Tensor, goal: int) -> None:
    """Removes the candidates with the lowest θ until `goal` parameters are gone in all rounds together."""
    homes = [index for index, each in enumerate(modules) for _ in each.found]
    sizes = [modules[home].units.size for home in homes]
    prior = torch.cat([each.prior[each.found] for each in modules])
    units = torch.cat([each.found for each in modules])
    for index in lowest_within(
        theta, prior, sizes, homes, [each.left - 1 for each in modules], _missing(modules, goal)
    ):
        modules[homes[index]].alive[units[index]] = False


@dataclass
class _Search:
    """The rounds, with what a killed run needs to go on: history of those that are done, losses of the one that is not."""

    modules: list[_Module]
    evaluator: Evaluator
    context: Context
    wishes: _Wishes
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def restore(self) -> None:
        if (saved := self.context.load("rounds")) is not None:
            tensors, told = saved
            self.history, self.losses = told["history"], told["losses"]
            for index, each in enumerate(self.modules):
                each.alive, each.prior = tensors[f"alive.{index}"], tensors[f"prior.{index}"]

    def finish(self, said: dict[str, Any]) -> None:
        """The round is done."""
        self.history, self.losses = [*self.history, said], []
        self._save()

    def round(self, number: int, lacking: list[int], bar: Advance) -> tuple[list[Tensor], dict[str, Any]]:
        """Tries sub-models that lack so many units of each module, and fits θ.

        Returns: θ of each module's candidates, and what the receipt tells.
        """
        modules, context, wishes = self.modules, self.context, self.wishes
        silent = {each.key: (~each.alive).nonzero()[:, 0] for each in modules}
        order = torch.randperm(self.evaluator.count, generator=context.generator("sequences", number)).tolist()
        if not self.losses:
            # asked by one process for all, because what is drawn depends on it
            seen = {0: self.evaluator.sizes(silent, order[: wishes.prior_sequences])} if context.rank == 0 else {}
            sizes = context.gather(seen)[0]
            for each in modules:
                each.prior = each.units.per_unit(each.columns * sizes[each.key]).mean(1)
        for each, count in zip(modules, lacking, strict=True):
            each.found = candidates(each.prior, each.alive, 2 * count)

        def pair(index: int) -> Tensor:
            drawn = context.generator("masks", number, index)
            return torch.cat(
                [each.pair(count, wishes.vary, drawn) for each, count in zip(modules, lacking, strict=True)], dim=1
            )

        def loss(present: Tensor) -> float:
            parts = zip(modules, present.split([len(each.found) for each in modules]), strict=True)
            lacks = {each.key: torch.cat([silent[each.key], each.found[~part]]) for each, part in parts}
            return self.evaluator.loss(lacks, order[: wishes.sequences])

        masks = torch.cat([pair(index) for index in range(wishes.pairs)])
        while len(self.losses) < len(masks):
            # one for each process at a time, and what is known is kept
            chunk = masks[len(self.losses) : len(self.losses) + context.world]
            tried = context.gather({index: loss(chunk[index]) for index in context.mine(len(chunk))})
            self.losses += tried.values()
            self._save()
            bar.advance(len(chunk))
        theta, said = self._fit(number, masks)
        return list(theta.split([len(each.found) for each in modules])), said

    def _fit(self, number: int, masks: Tensor) -> tuple[Tensor, dict[str, Any]]:
        losses = torch.tensor(self.losses, dtype=torch.float64)
        targets = -losses.exp() if self.wishes.metric == "perplexity" else -losses
        # by pairs: a complement says nearly what the other scores, so its score would give the held-out one away
        shuffled = torch.randperm(self.wishes.pairs, generator=self.context.generator("folds", number))
        folds = [torch.cat([2 * fold, 2 * fold + 1]) for fold in shuffled.tensor_split(min(FOLDS, self.wishes.pairs))]
        (ridge, lasso), tau = best_setting(masks, targets, SETTINGS, folds)
        said = {"tau": tau, "ridge": ridge, "lasso": lasso, "mean loss": float(losses.mean())}
        return elastic_net(masks, targets, ridge, lasso)[0], said

    def _save(self) -> None:
        tensors = {f"alive.{index}": each.alive for index, each in enumerate(self.modules)}
        tensors |= {f"prior.{index}": each.prior for index, each in enumerate(self.modules)}
        self.context.save("rounds", tensors, {"history": self.history, "losses": self.losses})

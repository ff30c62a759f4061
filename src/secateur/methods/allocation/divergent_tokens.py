"""Divergent tokens as a budget: every matrix loses as much as makes greedy text leave the dense network's equally soon.

Deiseroth and others, "Divergent Token Metrics: Measuring degradation to prune away LLM components, and optimize
quantization", NAACL 2024, arXiv:2311.01544, prune each component as far as the first divergent token allows. Which levels
and thresholds they try was not found. OURS, proposed: each matrix alone is tried in the dense network, at levels of
sparsity; its price is the part of the text that is lost (`measure`), in between linear, never falling; and the threshold is
the one price for all at which exactly the budget goes. Only levels beside the one that a matrix comes to lie at are tried,
which finds the same as trying all where prices rise. With `threshold` no matrix goes beyond the last level at which it stays
below that, though less than the budget goes. Errors of matrices together are not the sum of those alone: the receipt tells
what all of them do together.

In trials weights go by the method that prunes, with what the dense network says of inputs; one that needs more than sums
of columns (a Hessian, gradients) is stood for by magnitude within rows. A bit-width for each matrix would be searched for
alike, as soon as a method quantizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.errors import RequestError
from secateur.evaluation.divergent import Continuations
from secateur.registry import Allocation, Context, DivergenceTrials, Matrices, method
from secateur.tensor.budgets import scaled_counts
from secateur.tensor.one_price import Curve, one_price_shares

Level = Annotated[float, Field(gt=0, le=1)]
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


@method(
    "divergent_tokens",
    kind="allocation",
    paper="arXiv:2311.01544",
    claim="a quarter of Llama-2's attention components can be pruned beyond 90 % (abstract)",
    when="after training",
    speedup="specific",
    criterion="divergence",
    schedule="one-shot",
    refuses=lambda given: (
        f"levels={given['levels']} do not rise; give each once, the smallest first."
        if sorted(set(given["levels"])) != given["levels"]
        else None
    ),
)
def divergent_tokens(
    network: Matrices,
    trials: DivergenceTrials,
    context: Context,
    *,
    measure: Literal["first", "corrected"] = "first",
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None,
    levels: Annotated[list[Level], Field(min_length=1)] = LEVELS,
    prompts: Annotated[int, Field(ge=1)] = 16,
    prompt: Annotated[int, Field(ge=1)] = 16,
    continuation: Annotated[int, Field(ge=1)] = 32,
) -> Allocation:
    """Gives each matrix the sparsity at which greedy text diverges as soon, when it alone is pruned, as for every other.

    Args:
        measure: the price of a sparsity: the part of the continuations behind their first divergent token, or the part of
            their tokens that would have to be corrected, which tells small prices apart with fewer prompts.
        threshold: largest price of a matrix, 0 to 1; then less may go than `pattern` asks for. Default: as the budget takes.
        levels: sparsities that may be tried; the last is the largest that a matrix gets.
        prompts: continuations of the dense network that are compared; cut from the calibration sequences.
        prompt: tokens of each prompt.
        continuation: tokens that the dense network goes on with, greedily.
    """
    shapes = {weight.name: weight.rows * weight.columns for weight in network}
    tokens = trials.write(Continuations(prompts, prompt, continuation))
    search = _Search(list(shapes), network.sizes, [0.0, *levels], measure, trials, context)
    caps = [len(levels)] * len(shapes)
    if threshold is not None:
        caps = search.within(threshold)
    largest = [Fraction(str(search.levels[cap])) for cap in caps]
    short = ""
    try:
        shares, price = search.at_one_price(network.remove, caps)
        counts = scaled_counts(shares, network.sizes, network.remove, max(levels))
    except ValueError as error:
        if threshold is None:
            raise RequestError(
                f"divergent_tokens with levels up to {max(levels):g}: {error}; give higher levels or remove less."
            ) from error
        # whole weights, never one more than was tried
        counts = [int(share * size) for share, size in zip(largest, network.sizes, strict=True)]
        price = Fraction(threshold)
        short = (
            f"divergent_tokens: with threshold={threshold:g} only {sum(counts) / sum(network.sizes):.2%} of the weights go, "
            f"not the {network.remove / sum(network.sizes):.2%} that the pattern asks for."
        )
    remove = dict(zip(shapes, counts, strict=True))
    together = trials.removing({name: count for name, count in remove.items() if count})
    context.note(
        "divergent tokens",
        {
            "tokens": tokens,
            "price": round(float(price), 6),
            "together": {"first": round(together.first, 6), "corrected": round(together.corrected, 6)},
            "alone": search.told(),
        },
    )
    return Allocation(remove, short)


@dataclass
class _Search:
    """Which matrix was tried at which level, and what it showed.

    levels: 0 first. prices: (matrices, levels) NaN where it was not tried; nothing is lost at level 0.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    levels: Sequence[float]
    measure: str
    trials: DivergenceTrials
    context: Context
    prices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.prices = torch.full((len(self.names), len(self.levels)), torch.nan, dtype=torch.float64)
        self.prices[:, 0] = 0.0
        saved = self.context.load("prices")
        # apart from what this run has asked, or a search that goes on would decide by more than the undisturbed one
        self._before = saved[0]["prices"] if saved is not None else torch.full_like(self.prices, torch.nan)

    def at_one_price(self, total: int, caps: Sequence[int]) -> tuple[list[Fraction], Fraction]:
        """The share that each matrix loses, and the price of them all. Raises ValueError where the levels up to `caps` do
        not reach so far.
        """
        start = min(
            (place for place, level in enumerate(self.levels) if level * sum(self.sizes) >= total),
            default=len(self.levels) - 1,
        )
        # whether they reach so far needs no trial
        one_price_shares([self._flat(cap) for cap in caps], self.sizes, total)
        self._try([(index, min(start, cap)) for index, cap in enumerate(caps)])
        while True:
            curves = [self._curve(index, cap) for index, cap in enumerate(caps)]
            shares, price = one_price_shares(curves, self.sizes, total)
            beside = []
            for index, (share, cap) in enumerate(zip(shares, caps, strict=True)):
                lower = max(place for place, level in enumerate(self.levels) if Fraction(str(level)) <= share)
                beside += [(index, place) for place in (lower, min(lower + 1, cap)) if not self._known(index, place)]
            if not beside:
                return shares, price
            self._try(beside)

    def within(self, threshold: float) -> list[int]:
        """The last level of each matrix whose price is at most `threshold`, by halving: prices are taken not to fall."""
        low, high = [0] * len(self.names), [len(self.levels)] * len(self.names)
        while wanted := [
            (index, (low[index] + high[index]) // 2) for index in range(len(low)) if high[index] - low[index] > 1
        ]:
            self._try([each for each in wanted if not self._known(*each)])
            for index, place in wanted:
                side = low if float(self.prices[index, place]) <= threshold else high
                side[index] = place
        return low

    def told(self) -> dict[str, dict[str, float]]:
        """For the receipt: the price of each level that was tried, by matrix."""
        return {
            name: {
                f"{level:g}": round(price, 6)
                for level, price in zip(self.levels[1:], row[1:], strict=True)
                if price == price
            }
            for name, row in zip(self.names, self.prices.tolist(), strict=True)
        }

    def _known(self, index: int, place: int) -> bool:
        return not bool(self.prices[index, place].isnan())

    def _flat(self, cap: int) -> Curve:
        return [(Fraction(0), Fraction(0)), (Fraction(str(self.levels[cap])), Fraction(0))]

    def _curve(self, index: int, cap: int) -> Curve:
        """What is known of a matrix up to a level; where that one was not tried, its price is the largest there is."""
        row = self.prices[index, : cap + 1].clone()
        if row[-1].isnan():
            row[-1] = 1.0
        places = [place for place, price in enumerate(row.tolist()) if price == price]
        prices = row[places].cummax(0).values.tolist()
        return [
            (Fraction(str(self.levels[place])), Fraction(price)) for place, price in zip(places, prices, strict=True)
        ]

    def _try(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Tries matrices at levels; processes share them, and what is known is kept."""
        for each in wanted:
            if not self._known(*each):
                self.prices[each] = self._before[each]
        new, world = [each for each in dict.fromkeys(wanted) if not self._known(*each)], self.context.world
        with self.context.progress("trying sparsities", len(new)) as bar:
            for start in range(0, len(new), world):
                chunk = new[start : start + world]
                found = self.context.gather(
                    {place: self._price(*chunk[place]) for place in self.context.mine(len(chunk))}
                )
                for place, price in found.items():
                    self.prices[chunk[place]] = price
                known = torch.where(self.prices.isnan(), self._before, self.prices)
                self.context.save("prices", {"prices": known})
                bar.advance(len(chunk))

    def _price(self, index: int, place: int) -> float:
        count = int(self.levels[place] * self.sizes[index] + 1e-6)  # 0.29 of 100 is 29
        tried = self.trials.removing({self.names[index]: count})
        return tried.first if self.measure == "first" else tried.corrected

"""The same budget for every recipe: what a step must be told so that the whole model comes out at one size.

Sizes are foretold exactly, from shapes, as a dry run does. Nothing is known of methods by name: what can be told is a
parameter of a known meaning, the fraction or number that the engine counts by.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from secateur.contract import Ratio, count_of
from secateur.errors import RequestError
from secateur.forecast import foretold, rows_removed
from secateur.network.source import Source
from secateur.recipe import Recipe, Step
from secateur.tensor.patterns import Pattern
from secateur.unit_budgets import counted

Measure = Literal["parameters", "multiply_adds", "bytes"]
MEASURES: tuple[Measure, ...] = typing.get_args(Measure)
TOLERANCE = 0.01
_STEPS = 10_000  # ratios are tried in ten-thousandths
_NEAR = 1e-4  # as good as exact: nobody looks for a nearer size than by a hundredth of a per cent
_UNFORETOLD = "what it comes to is not known before the run"
_ZEROS = (
    "it only zeroes weights, so the result is no smaller: compared at as many zeros as the others have parameters less"
)


@dataclass(frozen=True)
class Budget:
    """What every result is to count.

    measure: parameters, multiply-adds (of reading as many tokens as the card says) or bytes of the weight files. amount:
    how many, or below 1 which fraction of what the model has; bytes are compared with those that the uncut model takes as
    the result is written. tolerance: by which fraction of it a result may miss it.
    """

    measure: Measure
    amount: float
    tolerance: float = TOLERANCE

    @classmethod
    def parse(cls, text: str, tolerance: float = TOLERANCE) -> "Budget":
        """From MEASURE=NUMBER as a person writes it, such as parameters=0.8 or parameters=100M. Raises RequestError."""
        name, equals, value = text.partition("=")
        measure = name.strip().replace("-", "_")
        if not equals or measure not in MEASURES:
            raise RequestError(
                f"--budget {text} is not of the form {'|'.join(MEASURES)}=NUMBER, such as parameters=0.8."
            )
        try:
            amount = float(value)
            amount = amount if 0 < amount < 1 else float(count_of(value))
        except ValueError:
            try:
                amount = float(count_of(value.strip()))
            except ValueError:
                raise RequestError(
                    f'--budget {text}: give a fraction of the model\'s {measure} that stays (0.8), or a number ("100M").'
                ) from None
        if not 0 <= tolerance < 1:
            raise RequestError(f"--tolerance {tolerance} is not a fraction; write 0.01 for one per cent.")
        return cls(cast(Measure, measure), amount, tolerance)

    def wanted(self, whole: int) -> int:
        """How many that is, of the `whole` that there are. Raises RequestError where it is more."""
        wanted = round(self.amount * whole) if self.amount < 1 else int(self.amount)
        if wanted > whole:
            raise RequestError(
                f"--budget asks for {wanted:,} {self.measure.replace('_', '-')}, but the model has {whole:,}; ask for fewer."
            )
        return wanted

    def told(self) -> dict[str, Any]:
        """In plain data."""
        return {"measure": self.measure, "asked": self.amount, "tolerance": self.tolerance}


@dataclass(frozen=True)
class Fitted:
    """A recipe that is to meet a budget.

    measure, wanted: what is looked at when it is done, and how much of it there is to be: zeros, where a recipe only makes
    those. note: what a reader must know of how it was told; "" for nothing.
    """

    recipe: Recipe
    measure: Measure | Literal["zeros"]
    wanted: int
    note: str = ""

    def reached(self, achieved: dict[str, Any], tolerance: float) -> dict[str, Any]:
        """What a finished run says of it. achieved: what was counted on its result."""
        found = achieved.get(self.measure)
        missed = found / self.wanted - 1 if found is not None and self.wanted else None
        return {
            "measure": self.measure, "wanted": self.wanted, "reached": found, "missed": missed,
            "within": missed is not None and abs(missed) <= tolerance, "note": self.note,
        }  # fmt: skip


def whole(source: Source, recipe: Recipe, measure: Measure) -> int:
    """What the uncut model counts, written as this recipe writes."""
    if measure == "bytes":
        return int(foretold(source, recipe.model_copy(update={"steps": ()}), 0)["bytes_written"])
    return counted(source, measure)


def fit(source: Source, recipe: Recipe, budget: Budget) -> Fitted:
    """The recipe with one of its steps told to meet the budget: the last that makes the model smaller, or zeroes weights.

    Where widths cannot be foretold, because blocks come out as the method finds, the step is told what would do if they
    came out alike. Raises RequestError where the recipe cannot be done, or no cut of that step reaches the budget.
    """
    total = whole(source, recipe, budget.measure)
    wanted = budget.wanted(total)
    smaller = [index for index, step in enumerate(recipe.steps) if _way(step) in ("target", "remove", "ratio")]
    zeroing = [index for index, step in enumerate(recipe.steps) if _way(step) == "pattern"]
    rows = rows_removed(source, recipe, "cpu")

    def size(tried: Recipe) -> int | None:
        said = foretold(source, tried, rows)
        if budget.measure == "multiply_adds":
            return said["multiply_adds"]["after"] if said["multiply_adds"] else None
        return int(said["parameters_after" if budget.measure == "parameters" else "bytes_written"])

    if smaller:
        index, near = smaller[-1], _Near(wanted, budget.tolerance, size)
        if _way(recipe.steps[index]) == "target":
            of: Literal["parameters", "multiply_adds"]
            of = "multiply_adds" if budget.measure == "multiply_adds" else "parameters"
            fitted, note = _by_target(recipe, index, near, total / counted(source, of), of)
        else:
            fitted, note = _by_trying(recipe, index, near, len(source.anatomy.blocks))
        return Fitted(fitted, budget.measure, wanted, note)
    if zeroing:
        zeros = round((1 - wanted / total) * source.anatomy.parameters)
        return Fitted(_with_zeros(source, recipe, zeroing[-1], zeros), "zeros", zeros, _ZEROS)
    foretold(source, recipe, rows)  # what cannot be done is refused here too
    methods = ", ".join(step.method for step in recipe.steps)
    return Fitted(recipe, budget.measure, wanted, f"{methods} takes no ratio or target, so it runs as it was given")


def _way(step: Step) -> str | None:
    """By what a step can be told how much goes: a target, a number of blocks, a ratio, or a pattern; None by nothing."""
    given, scope = step.parameters, step.registered.scope
    if given.get("ratios"):
        return None
    if scope == "units":
        return "target"
    if scope == "blocks":
        return "remove"
    if scope == "weight":
        return "pattern" if Pattern.parse(given["pattern"]).fraction is not None else None
    return "ratio" if scope == "network" and _ratio(step) else None


def _ratio(step: Step) -> str | None:
    """The one parameter that says which fraction of all units goes."""
    hints = typing.get_type_hints(step.registered.function, include_extras=True)
    named = [name for name, hint in hints.items() if hint == Ratio]
    return "ratio" if "ratio" in named else named[0] if len(named) == 1 else None


def _told(recipe: Recipe, index: int, **settings: Any) -> Recipe:
    """The recipe with other parameters in one step."""
    step = recipe.steps[index]
    method, parameters = step.method, {**step.parameters, **settings}
    told = Step(method=method, parameters=step.registered.validate(parameters))
    return recipe.model_copy(update={"steps": (*recipe.steps[:index], told, *recipe.steps[index + 1 :])})


def _by_target(recipe: Recipe, index: int, near: "_Near", scale: float, of: str) -> tuple[Recipe, str]:
    """A step that takes a target. What other steps add or take is told it too, by what the whole then comes to.

    scale: what one of `of` counts in the budget's own measure: bytes of a parameter, otherwise 1.
    """
    target, best, before = near.wanted / scale, None, None
    for _ in range(3):
        told = _told(recipe, index, of=of, target=max(1, round(target)))
        found = near.size(told)
        if found is None or found == before:  # an earlier step's share is not known before the run
            return best[1] if best else told, _UNFORETOLD
        if best is None or abs(found - near.wanted) < best[0]:
            best = abs(found - near.wanted), told
        if abs(found - near.wanted) <= near.tolerance * near.wanted:
            break
        target += (near.wanted - found) / scale
        before = found
    assert best is not None, "one was tried"
    return best[1], ""


def _by_trying(recipe: Recipe, index: int, near: "_Near", blocks: int) -> tuple[Recipe, str]:
    """A step that takes a number of blocks or a ratio: the one whose foretold size is nearest, found by halving."""
    step = recipe.steps[index]
    free = {key: None for key in ("target",) if key in step.parameters}
    counts = _way(step) == "remove"

    def told(tried: int) -> Recipe:
        if counts:
            return _told(recipe, index, remove=tried)
        return _told(recipe, index, **{str(_ratio(step)): tried / _STEPS}, **free)

    def alike(tried: int) -> Recipe:
        parameters = {**step.parameters, **free, "ratio": tried / _STEPS, "uniform": True}
        steps = (*recipe.steps[:index], step.model_copy(update={"parameters": parameters}), *recipe.steps[index + 1 :])
        return recipe.model_copy(update={"steps": steps})

    foreseen, note = told, ""
    whole = near.size(told(0))
    if whole is None:
        return recipe, _UNFORETOLD
    if not counts and whole == near.tried(told(_STEPS // 2)):
        foreseen, note = (
            alike,
            "its widths follow from the run, so it is told what would do if all blocks came out alike",
        )
    sizes: dict[int, int] = {0: whole}
    # at `low` at least as much is left as wanted; at `high` less, or nothing
    low, high, halve = 0, blocks if counts else _STEPS, False
    while high - low > 1 and min(abs(found - near.wanted) for found in sizes.values()) > _NEAR * near.wanted:
        # sizes fall almost evenly: mostly the place on the line between both ends is near, and every other time the middle
        # is taken, so that steps in between cost no more than halving twice
        share = 0.5 if halve else (sizes[low] - near.wanted) / max(sizes[low] - sizes.get(high, 0), 1)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        # numbers of heads that no configuration can say are refused, as is what leaves nothing: the next place is taken
        tries = ((tried, near.tried(foreseen(tried))) for tried in _around(middle, low, high))
        middle, found = next(((tried, found) for tried, found in tries if found is not None), (middle, None))
        if found is None:
            break
        sizes[middle] = found
        low, high = (middle, high) if found >= near.wanted else (low, middle)
        halve = not halve
    return told(min(sizes, key=lambda tried: abs(sizes[tried] - near.wanted))), note


def _around(middle: int, low: int, high: int) -> Iterator[int]:
    """Places between both ends, the nearest to `middle` first: all of few, a good number of many."""
    stride = max(1, (high - low) // 37)  # an odd number of parts, so that widths that repeat are not all missed
    places = {middle, *range(middle % stride, high, stride)}
    yield from sorted((place for place in places if low < place < high), key=lambda place: abs(place - middle))


@dataclass(frozen=True)
class _Near:
    """How large a recipe's result is to be, and how large it will be.

    size: what a recipe comes to, None where that is not known before the run.
    """

    wanted: int
    tolerance: float
    size: Callable[[Recipe], int | None]

    def tried(self, recipe: Recipe) -> int | None:
        """What a recipe comes to; None also where it cannot be done, because nothing would be left."""
        try:
            return self.size(recipe)
        except RequestError:
            return None


def _with_zeros(source: Source, recipe: Recipe, index: int, zeros: int) -> Recipe:
    """The recipe with so many zeros in the matrices of one step. Raises RequestError where these have fewer weights."""
    step = recipe.steps[index]
    [said] = foretold(source, recipe.model_copy(update={"steps": (step,)}), 0)["zeros"]
    if zeros >= said["of"]:
        raise RequestError(
            f"{step.method} would have to zero {zeros:,} weights to meet the budget, but its matrices hold {said['of']:,}; "
            "ask for less, or name more matrices with `targets`."
        )
    pattern = Pattern.parse(step.parameters["pattern"])
    return _told(recipe, index, pattern=str(Pattern(fraction=zeros / said["of"], block=pattern.block)))

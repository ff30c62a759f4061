"""The contract between methods and the engine: what a method may ask for, by type, and what the engine adds to each scope.

A new statistic or scope is one line in `NEEDS` and its provider in an engine. What all methods of a scope take stands in
`COMMON`; the method gets what follows from it. A method that plans a whole network takes `ratio`, `ratios` and `multiple_of`
itself, in the same sense: from them the engine foretells widths for a dry run, and refuses an impossible one before anything
is read. One that cuts by other rules gives its parameters other names. `axis` says there too which units are cut, and
`uniform: false` that blocks are to differ as the method finds, so that no width is foretold.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.calibration.activations import Activations
from secateur.calibration.divergence_trials import DivergenceTrials
from secateur.calibration.evaluator import Evaluator
from secateur.calibration.flow import Flow, LossWithout
from secateur.calibration.gradients import BlockGradients
from secateur.calibration.routing import Routing
from secateur.calibration.silenced_flow import SilencedFlow
from secateur.calibration.sliced_stream import SlicedStream
from secateur.calibration.statistics import (
    CrossGram,
    GatedNorms,
    Gradients,
    Gram,
    HeldOutInputs,
    InputNorms,
    Moments,
)
from secateur.calibration.stream_moment import StreamMoment
from secateur.calibration.synthetic import SyntheticGram
from secateur.calibration.token_counts import TokenCounts
from secateur.calibration.unit_gradients import UnitGradients
from secateur.context import Context
from secateur.network.anatomy import Axis, CutAxis
from secateur.network.blocks import Blocks, Kept
from secateur.network.scores import ErrorCurves, UnitScores
from secateur.network.views import Allocation, Cut, Mask, Matrices, Network, Plan, Units, Update, Weight
from secateur.network.vocabulary import KeptTokens, Vocabulary
from secateur.tensor.patterns import Budget, Pattern

Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of the units removed, 0 ≤ ratio < 1."""


def _other(*scopes: str) -> Callable[[Any], Any]:
    """Validates the name of another method of one of these scopes, alone or with parameters: {name: {parameter: value}}."""

    def validate(value: Any) -> Any:
        if value is None or (value == "uniform" and "widths" in scopes):
            return None
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value.values())) or {}, dict):
            raise ValueError("must be the name of a method, or {name: {parameter: value}}")
        from secateur.registry import find  # which is made of what stands here

        [(name, parameters)] = value.items()
        found = find(str(name))
        if "widths" in scopes and DivergenceTrials in found.needs.values():
            raise ValueError(
                f"{name} tries what single weights are worth; for units name equal_error, flap_search or alphapruning"
            )
        if found.scope not in scopes:
            wanted = {"matrices": "an allocation", "units": "a method that chooses units block by block"}.get(
                scopes[0], "a method that zeroes single weights"
            )
            raise ValueError(f"must name {wanted}; {name} is of kind {found.kind}")
        # what the engine decides is decided once, by the step itself
        common = COMMON.get(found.scope, {})
        if taken := [key for key in parameters or {} if key in common]:
            raise ValueError(f"takes no {taken[0]} for {name}: what the step itself says counts for both")
        return {name: {key: entry for key, entry in found.validate(parameters or {}).items() if key not in common}}

    return validate


MaskFrom = Annotated[Any, "mask", BeforeValidator(_other("weight"))]
"""Another method whose mask is used: the engine runs it on the same matrix first and hands in the (r, d) mask, or None."""

UnitsFrom = Annotated[Any, "units", BeforeValidator(_other("units"))]
"""Another method whose choice of units is used: the engine asks it first and hands in the (k,) indices kept, or None."""


def count_of(value: Any) -> Any:
    """A number of parameters or multiply-adds as a person writes it: 100000000, 100e6, "100M", "1.5B"."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) *([kmgbt]?)", str(value).lower().replace("_", ""))
    powers = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
    if match is None or (count := round(float(match[1]) * 10 ** powers[match[2]])) < 1:
        raise ValueError('must be a positive number, such as 100e6 or "100M"')
    return count


_PatternText = Annotated[str, BeforeValidator(lambda value: str(Pattern.parse(value)))]
Targets = Annotated[list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Target = Annotated[int | None, BeforeValidator(count_of)]
"""A number of parameters, written as a person would, or None."""
Axes = Annotated[
    list[Axis], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""Kinds of units, one or a list."""
CutAxes = Annotated[
    list[CutAxis], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""The same, channels of the stream among them."""

# Parameters that the engine adds to every method of a scope, and decides by: {scope: {name: (type, default, help)}}.
COMMON: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "units": {
        "ratio": (Ratio, 0.2, "fraction removed, 0 ≤ ratio < 1: of the units in every block, or as `of` says"),
        "of": (
            Literal["units", "parameters", "multiply_adds"],
            "units",
            "what `ratio` is a fraction of: the units of every block, or all parameters or multiply-adds of the model; the "
            "nearest that can be reached with one ratio for all blocks is taken",
        ),
        "target": (
            Target,
            None,
            'how many parameters (multiply-adds where `of` says so) the model is to have, such as 100e6 or "100M"; counts '
            "before `ratio`",
        ),
        "axis": (
            CutAxes,
            ["neurons"],
            "which units: neurons of the feed-forward layer (of a mixture those inside every expert, each its own, and "
            "inside shared experts), heads of attention (those that share keys and values go together), queries (single "
            "query heads, as many of each that share keys and values), head_dims (dimensions inside heads, in the twos that "
            "positions turn), expert_neurons (those inside routed experts alone), experts of a mixture, channels of the "
            "residual stream, or a list of them",
        ),
        "ratios": (list[Ratio] | None, None, "one ratio for each block, instead of `ratio`"),
        "multiple_of": (
            Annotated[int, Field(ge=1)],
            32,
            "the neurons and channels kept are rounded to the nearest multiple of this where the ratio allows it, channels "
            "also to what the configuration can say; 1 for none",
        ),
        "allocation": (
            Annotated[Any, BeforeValidator(_other("matrices", "widths"))],
            None,
            "a method that divides the budget among the blocks, such as flap_search or alphapruning: blocks then differ in "
            "width, and the result needs trust_remote_code; default uniform",
        ),
    },
    "weight": {
        "pattern": (
            _PatternText,
            "0.5",
            "what each matrix loses: a fraction (0.5), N kept of M (2:4), or a fraction in whole tiles (0.5/16x16)",
        ),
        "targets": (
            Targets,
            None,
            "matrices to prune: names with * in them, or attention, feed_forward, expert, mixer; default all in the blocks",
        ),
        "allocation": (
            Annotated[Any, BeforeValidator(_other("matrices"))],
            None,
            "a method that divides the budget among the matrices, such as alphapruning; default the same fraction for each",
        ),
    },
}
COMMON["matrices"] = {
    **{name: COMMON["weight"][name] for name in ("pattern", "targets")},
    "apply": (MaskFrom, "magnitude", "the method that prunes with this allocation"),
}

COMMON["widths"] = {
    **{name: entry for name, entry in COMMON["units"].items() if name not in ("ratios", "allocation")},
    "apply": (UnitsFrom, "wanda_units", "the method that cuts with this allocation, and whose scores are compared"),
}

COMMON["blocks"] = {
    "ratio": (
        Ratio,
        0.2,
        "fraction of the blocks removed (of those with the part, where only a `part` goes), rounded half up to a whole "
        "number; one at least stays",
    ),
    "remove": (Annotated[int, Field(ge=0)] | None, None, "how many blocks are removed; counts before ratio"),
    "protect": (list[int] | None, None, "indices of blocks that stay whatever their score, from 0; default none"),
    "part": (
        Literal["block", "attention", "feed_forward"],
        "block",
        "what goes of a block: all of it, or only its attention or feed-forward, and the rest stays (needs a file of code)",
    ),
}

Kind = Literal[
    "structure", "weights", "factors", "quantization", "allocation", "training", "recovery", "inference", "communication",
    "data", "analysis",
]  # fmt: skip


TEXT = "calibration text"
"""What methods that learn from text say of their data, where they need no gradients."""
_GRADIENTS = f"{TEXT}, gradients"
_DRAWN = "drawn tokens (Zipf's law over the vocabulary), no text"
_AS_CRITERION = "what its criterion reads"
# Whether text must be given where a need says that it reads this; both where that hangs on another method.
_READS_TEXT = {"": (False,), TEXT: (True,), _GRADIENTS: (True,), _DRAWN: (False,), _AS_CRITERION: (False, True)}


@dataclass(frozen=True)
class Need:
    """What asking for a type means: how often the method is called, and what it must return one of.

    beside: other types, without one of which it may not be asked for; that one says of what this one is.
    """

    scope: Literal["network", "units", "weight", "matrices", "widths", "blocks", "vocabulary", "any"]
    returns: tuple[type, ...]
    what: str
    data: str = ""
    beside: tuple[type, ...] = ()

    @property
    def reads_text(self) -> tuple[bool, ...]:
        """Whether text must be given: (True,), (False,), or both where that hangs on another method."""
        return _READS_TEXT[self.data]

    @property
    def differentiates(self) -> bool:
        """Whether it takes a backward pass."""
        return self.data == _GRADIENTS


_READERS = (Weight, Units)  # what reads inputs: a matrix, or the matrix behind units
NEEDS: dict[type, Need] = {
    Network: Need("network", (Plan,), "the whole network's matrices, read lazily"),
    Units: Need("units", (Cut,), "the units of one kind in one block"),
    Weight: Need("weight", (Mask, Update), "one matrix"),
    Matrices: Need("matrices", (Allocation,), "every matrix that is to be pruned, read lazily"),
    UnitScores: Need("widths", (Allocation,), "the scores of all units of the network", _AS_CRITERION),
    ErrorCurves: Need(
        "any",
        (),
        "what each block's output would lose, unit by unit, beside the hidden states",
        TEXT,
        beside=(UnitScores,),
    ),
    Blocks: Need("blocks", (Kept,), "the blocks in order, each read lazily, and how many of them are to go"),
    Flow: Need("any", (), "how much each block changes the hidden states", TEXT, beside=(Blocks,)),
    LossWithout: Need("any", (), "the loss without each block", TEXT, beside=(Blocks,)),
    BlockGradients: Need(
        "any",
        (),
        "how much the loss reacts to each block's weights (the whole model in memory)",
        _GRADIENTS,
        beside=(Blocks,),
    ),
    SilencedFlow: Need(
        "any",
        (),
        "how much each block changes the hidden states while given units are silent (the whole model in memory)",
        TEXT,
        beside=(Network,),
    ),
    Activations: Need(
        "any", (), "how strongly neurons, heads and channels respond in the dense network", TEXT, beside=(Network,)
    ),
    StreamMoment: Need("any", (), "which directions of the residual stream are used", TEXT, beside=(Network,)),
    SlicedStream: Need(
        "any",
        (),
        "which directions of the residual stream are used in front of each norm, behind what is sliced already",
        TEXT,
        beside=(Network,),
    ),
    Vocabulary: Need("vocabulary", (KeptTokens,), "the tokens of the model, and what each of them writes"),
    TokenCounts: Need("any", (), "how often each token occurs in the whole text", TEXT, beside=(Vocabulary,)),
    Budget: Need("any", (), "how many weights the matrix loses, in which pattern", beside=(Weight,)),
    InputNorms: Need("any", (), "mean square of each input of the matrix", TEXT, beside=_READERS),
    GatedNorms: Need("any", (), "the same, each token counted by its expert's gate", TEXT, beside=(Weight,)),
    Moments: Need("any", (), "mean and variance of each input of the matrix", TEXT, beside=_READERS),
    Gram: Need("any", (), "second moment of the inputs of the matrix", TEXT, beside=_READERS),
    CrossGram: Need(
        "any", (), "inputs in the dense network against those behind compressed layers", TEXT, beside=_READERS
    ),
    HeldOutInputs: Need("any", (), "some inputs of the matrix on held-out tokens, to judge by", TEXT, beside=(Units,)),
    Gradients: Need(
        "any", (), "squared gradients of the loss (the whole model in memory)", _GRADIENTS, beside=(Weight,)
    ),
    Evaluator: Need(
        "any",
        (),
        "the loss with any units silent (forward passes, the whole model in memory as it is stored)",
        TEXT,
        beside=(Network,),
    ),
    DivergenceTrials: Need(
        "any",
        (),
        "how soon greedy text leaves the dense network's when matrices lose weights (the whole model in memory)",
        TEXT,
        beside=(Matrices,),
    ),
    UnitGradients: Need(
        "any",
        (),
        "Taylor terms of the loss for each unit (the whole model in memory)",
        _GRADIENTS,
        beside=(Units,),
    ),
    Routing: Need(
        "any",
        (),
        "which tokens go to which experts, with what gates, and how large what they give is",
        TEXT,
        beside=(Network,),
    ),
    SyntheticGram: Need(
        "any",
        (),
        "second moment of the layer's neurons on tokens drawn by Zipf's law over the vocabulary's order",
        _DRAWN,
        beside=(Units,),
    ),
    Context: Need("any", (), "random streams, resumable state, artifacts, sharing of work"),
}

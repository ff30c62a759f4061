"""Where every method stands on the axes of two surveys, so that methods can be compared and found.

Survey A is "A Survey on Deep Neural Network Pruning" (arXiv:2308.06767), survey B "Model Compression and Efficient
Inference for Large Language Models" (arXiv:2402.09748). Neither was read in full: of A the axes are known, part of its
contrast pairs and the granularities of its companion list, of B what its abstract separates. Proposed, and not theirs, is
the form: an axis is a set of values, because a method is often several things; `gradients`, `supervision`, `tuning`,
`task`, `artefact` and `runtime` are axes at all; values have names of this project. Of the contrast pairs of A,
initialised and pre-trained weights, and static and dynamic, say nothing that `when` does not, and are not repeated.

What a signature says is derived here and written nowhere else; `method` in `secateur.registry` takes the rest.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from secateur.calibration.evaluator import Evaluator
from secateur.calibration.flow import LossWithout
from secateur.contract import NEEDS, Kind
from secateur.errors import RequestError, suggest
from secateur.network.anatomy import CutAxis

if TYPE_CHECKING:
    from secateur.registry import Method

Family = Literal["pruning", "quantization", "low rank", "distillation", "compact architecture", "dynamic"]
When = Literal["before training", "early in training", "during training", "after training", "at inference"]
Speedup = Literal["universal", "specific", "none"]
Criterion = Literal[
    "random", "position", "shape", "magnitude", "spectrum", "activation", "similarity", "reconstruction", "saliency", "loss",
    "divergence", "frequency", "characters", "another method's", "reinforcement learning",
]  # fmt: skip
Comparison = Literal["layer", "global"]
Schedule = Literal["one-shot", "iterative"]
Tuning = Literal["adapters", "full"]

# What is trained to decide; all other criteria are fixed.
_LEARNED: tuple[Criterion, ...] = ("reinforcement learning",)
_FAMILIES: dict[str, Family] = {
    "structure": "pruning", "weights": "pruning", "allocation": "pruning", "factors": "low rank",
    "quantization": "quantization",
}  # fmt: skip
_COMPARISONS: dict[str, Comparison] = {
    "units": "layer", "weight": "layer", "matrices": "global", "widths": "global", "blocks": "global",
    "vocabulary": "global",
}  # fmt: skip
_READS_LOSS = (Evaluator, LossWithout)


@dataclass(frozen=True)
class SurveyAxis:
    """One axis: whose it is ("A", "B" or "own"), what it asks, and what may be answered."""

    survey: str
    what: str
    values: tuple[str, ...]


AXES: dict[str, SurveyAxis] = {
    "kind": SurveyAxis("own", "which part of this project it belongs to", get_args(Kind)),
    "family": SurveyAxis("B", "which family of compression", get_args(Family)),
    "granularity": SurveyAxis("A", "what goes or changes", ("weights", *get_args(CutAxis), "blocks", "tokens")),
    "speedup": SurveyAxis(
        "A", "universal: smaller dense matrices; specific: needs kernels or hardware of its own", get_args(Speedup)
    ),
    "when": SurveyAxis("A", "when it is applied", get_args(When)),
    "criterion": SurveyAxis("A", "what it looks at to decide", get_args(Criterion)),
    "decides": SurveyAxis("A", "by a fixed criterion, or by something learned", ("criterion", "learned")),
    "comparison": SurveyAxis(
        "A", "what a part competes with: others of its layer, or those of the whole network", get_args(Comparison)
    ),
    "schedule": SurveyAxis(
        "A",
        "one-shot: the network is measured once; iterative: what is left is measured again before more goes",
        get_args(Schedule),
    ),
    "data": SurveyAxis("A", "what it must be given to read", ("none", "text")),
    "gradients": SurveyAxis("A", "whether it needs a backward pass, and so the whole model in memory", ("no", "yes")),
    "supervision": SurveyAxis("A", "whether it reads the loss of the next token", ("none", "next token")),
    "fuses": SurveyAxis("A", "what else it does in the same step", ("none", *get_args(Family))),
    "tuning": SurveyAxis(
        "B", "what is tuned: nothing, statistics of text only, adapters, all weights",
        ("none", "calibration", *get_args(Tuning)),
    ),
    "task": SurveyAxis("B", "agnostic, or for one language or text", ("agnostic", "specific")),
    "artefact": SurveyAxis("B", "what is written: dense matrices, or zeros in them", ("dense", "sparse")),
    "runtime": SurveyAxis(
        "B", "what loads the result as the defaults make it: plain transformers, or with the code beside it",
        ("plain", "code"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a method says of itself in its decorator, because no signature tells it; see `secateur.registry.method`."""

    when: str
    speedup: str
    criterion: str | tuple[str, ...]
    schedule: str
    comparison: str | tuple[str, ...] = ()
    fuses: tuple[str, ...] = ()
    family: str | None = None
    tuning: str | None = None
    uneven: bool = False


def classify(
    name: str, kind: str, scope: str, axes: Iterable[str], needs: Mapping[str, type], only: Collection[str], said: Said
) -> dict[str, tuple[str, ...]]:
    """The values of one method on every axis of `AXES`, as {axis: values}.

    axes: units that it can cut. needs: what it asks for. only: which of these under some parameters alone. Raises TypeError
    where something is missing, not among an axis's values, or said although it is derived.
    """
    text = _whether({key: NEEDS[need].reads_text for key, need in needs.items()}, only)
    gradients = _whether({key: (NEEDS[need].differentiates,) for key, need in needs.items()}, only)
    loss = _whether({key: (NEEDS[need].differentiates or need in _READS_LOSS,) for key, need in needs.items()}, only)
    tuned = tuple("calibration" if reads else "none" for reads in text)
    criterion = _tuple(said.criterion)
    granularity = {
        "weight": ("weights",), "matrices": ("weights",), "blocks": ("blocks",), "vocabulary": ("tokens",)
    }.get(scope, tuple(axes))  # fmt: skip
    found: dict[str, tuple[str, ...]] = {
        "kind": (kind,),
        "family": _derived(name, "family", _FAMILIES.get(kind), said.family),
        "granularity": granularity,
        "speedup": (said.speedup,),
        "when": (said.when,),
        "criterion": criterion,
        "decides": tuple({"learned" if each in _LEARNED else "criterion": None for each in criterion}),
        "comparison": _derived(name, "comparison", _COMPARISONS.get(scope), said.comparison),
        "schedule": (said.schedule,),
        "data": tuple("text" if reads else "none" for reads in text),
        "gradients": tuple("yes" if each else "no" for each in gradients),
        "supervision": tuple("next token" if each else "none" for each in loss),
        "fuses": said.fuses or ("none",),
        "tuning": (said.tuning,) if said.tuning else tuned,
        "task": ("specific" if scope == "vocabulary" else "agnostic",),
        "artefact": ("sparse" if scope in ("weight", "matrices") else "dense",),
        "runtime": ("code" if said.uneven or scope == "widths" else "plain",),
    }
    for axis, values in found.items():
        if not values:
            raise TypeError(f"{name}: `{axis}` is not said; it takes {', '.join(AXES[axis].values)}")
        for value in values:
            if value not in AXES[axis].values:
                raise TypeError(f"{name}: {axis}='{value}' is none of {', '.join(AXES[axis].values)}")
    return found


def _whether(answers: Mapping[str, tuple[bool, ...]], only: Collection[str]) -> tuple[bool, ...]:
    """Whether a property holds of a method: (True,) or (False,), both where it hangs on parameters."""
    if any(answer == (True,) and key not in only for key, answer in answers.items()):
        return (True,)
    return (False, True) if any(True in answer for answer in answers.values()) else (False,)


def _derived(name: str, axis: str, derived: str | None, said: Any) -> tuple[str, ...]:
    """What is derived, else what is said; TypeError where both are there, because nothing is written twice."""
    if derived and said:
        raise TypeError(f"{name}: `{axis}` follows from its kind and signature ({derived}); leave it out")
    return (derived,) if derived else _tuple(said)


def _tuple(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,) if value else ()


def matching(methods: Iterable["Method"], wanted: Mapping[str, Iterable[str]]) -> list["Method"]:
    """The methods that have, on every axis of `wanted`, one at least of the values asked for.

    Case does not count, and a hyphen is as good as a space. Raises RequestError for a value that an axis does not have.
    """
    asked = {axis: {_value(axis, value) for value in values} for axis, values in wanted.items() if values}
    return [method for method in methods if all(values & set(method.taxonomy[axis]) for axis, values in asked.items())]


def _value(axis: str, given: str) -> str:
    known = {_plain(value): value for value in AXES[axis].values}
    if _plain(given) not in known:
        raise RequestError(
            f"--{axis} {given}: no method can be that.{suggest(_plain(given), known)} "
            f"It takes: {', '.join(AXES[axis].values)}."
        )
    return known[_plain(given)]


def _plain(value: str) -> str:
    return value.strip().lower().replace("-", " ").replace("_", " ")

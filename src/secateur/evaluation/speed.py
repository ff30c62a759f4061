"""Tokens a second, measured against a reference in turns so that both meet the same machine."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.arithmetic import multiply_adds
from secateur.evaluation.energy import Meter
from secateur.evaluation.forward import (
    check_length,
    device_of,
    dtype_of,
    evaluating,
    has_cache,
    logits_of,
    maximum_positions,
    step,
    synchronize,
    text_config,
)

PREFILL = 512


class Spread(BaseModel):
    """Median and quartiles of repeated measurements, which are kept in the order they were taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread":
        """The spread of at least one sample; quartiles are interpolated linearly."""
        values = tuple(samples)
        points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        median, lower, upper = torch.quantile(torch.tensor(values, dtype=torch.float64), points).tolist()
        return cls(median=median, lower=lower, upper=upper, samples=values)


class Pace(BaseModel):
    """One phase. tokens: of one sequence. model, reference: tokens a second, of all sequences of the batch together. gain:
    t_reference / t_model - 1 within each pair.

    multiply_adds, reference_multiply_adds: of the whole phase, counted from the shapes. expected_gain: what their quotient
    promises. joules, reference_joules: for each token, of the whole machine; None where it shows no counters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    model: Spread
    reference: Spread | None
    gain: Spread | None
    multiply_adds: int | None = None
    reference_multiply_adds: int | None = None
    joules: Spread | None = None
    reference_joules: Spread | None = None

    @property
    def expected_gain(self) -> float | None:
        if not self.multiply_adds or self.reference_multiply_adds is None:
            return None
        return self.reference_multiply_adds / self.multiply_adds - 1


class Speed(BaseModel):
    """Both phases in one setting.

    prefill: reading `tokens` tokens at once, logits of all of them. decode: one token after the other behind those,
    with a key-value cache; None for a model without one. batch: sequences that go through together. order: whose turn it
    was, as measured. threads: of the CPU. energy: what the joules were counted of; empty where the machine shows none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: Pace
    decode: Pace | None
    pairs: int
    order: tuple[str, ...]
    dtype: str
    device: str
    threads: int
    batch: int = 1
    energy: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What one turn took: seconds of prefill and of decoding, and joules where there is a meter."""

    seconds: tuple[float, float]
    joules: tuple[float, float] | None


def speed(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    prefill: int | None = None,
    batch: int = 1,
    **options: Any,
) -> Speed:
    """`speeds` of one setting; other options and errors as there."""
    [found] = speeds(model, reference, prefill=None if prefill is None else [prefill], batch=[batch], **options)
    return found


def speeds(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    prefill: Sequence[int] | None = None,
    batch: Sequence[int] = (1,),
    decode: int = 32,
    pairs: int = 10,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    meter: Meter | None = None,
    progress: Progress = silent,
) -> tuple[Speed, ...]:
    """Measures prefill and decoding, the model and its reference in turns: reference, model; model, reference; ...

    A turn reads `prefill` tokens of each sequence and then decodes `decode` more; both models read the same seeded random
    tokens, since speed must not hang on what they would have written. One turn of each comes first and is not counted. Every
    setting, a length with a batch, has its turns in each round, so that all of them meet the same machine.

    prefill: tokens, one or several numbers; by default 512 or what the positions of both models allow. batch: sequences at
    once, one or several. decode: tokens, 0 to leave decoding out. pairs: how many turns each model has in each setting.
    clock: seconds. meter: of energy. Raises RequestError when the models differ in dtype or device, or are asked for more
    positions than they have.

    Returns: one for each length and batch, batches of a length together.
    """
    both = {"reference": reference, "model": model} if reference is not None else {"model": model}
    if pairs < 1 or decode < 0 or min([1, *(prefill or ())]) < 1 or min(batch, default=0) < 1:
        lengths = " or ".join(map(str, prefill or [PREFILL]))
        raise RequestError(
            f"{pairs} pairs of {lengths} + {decode} tokens, {' or '.join(map(str, batch)) or 'no'} at once, cannot be "
            "measured; at least 1 pair of 1 + 0 tokens, 1 at once."
        )
    if reference is not None:
        _check_alike(model, reference)
    caches = all(has_cache(each) for each in both.values())
    decode = decode if caches else 0
    if not prefill:
        rooms = ((maximum_positions(each) or PREFILL + decode) - decode for each in both.values())
        prefill = [max(1, min([PREFILL, *rooms]))]
    for each in both.values():
        check_length(each, max(prefill) + decode, "A measurement of speed")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(_vocabulary(each) for each in both.values())
    drawn = torch.randint(vocabulary, (max(batch), max(prefill) + decode), generator=generator).to(device_of(model))
    settings = [(length, count) for length in dict.fromkeys(prefill) for count in dict.fromkeys(batch)]

    orders: dict[tuple[int, int], list[str]] = {setting: [] for setting in settings}
    turns: dict[tuple[int, int], dict[str, list[Turn]]] = {s: {name: [] for name in both} for s in settings}
    with evaluating(*both.values()), progress("speed", (pairs + 1) * len(both) * len(settings)) as bar:
        for length, count in settings:
            for each in both.values():
                _turn(each, drawn[:count, : length + decode], length, clock, meter)
                bar.advance()
        for pair in range(pairs):
            for length, count in settings:
                for name in both if pair % 2 == 0 else reversed(both):
                    ids = drawn[:count, : length + decode]
                    turns[length, count][name].append(_turn(both[name], ids, length, clock, meter))
                    orders[length, count].append(name)
                    bar.advance()
    return tuple(
        Speed(
            prefill=_pace(both, turns[length, count], 0, length, count, 0),
            decode=_pace(both, turns[length, count], 1, decode, count, length) if decode else None,
            pairs=pairs,
            order=tuple(orders[length, count]),
            dtype=dtype_of(model),
            device=str(device_of(model)),
            threads=torch.get_num_threads(),
            batch=count,
            energy=meter.names if meter else (),
        )
        for length, count in settings
    )


def _check_alike(model: nn.Module, reference: nn.Module) -> None:
    for what, ours, theirs in (
        ("dtype", dtype_of(model), dtype_of(reference)),
        ("device", str(device_of(model)), str(device_of(reference))),
    ):
        if ours != theirs:
            raise RequestError(
                f"The model's {what} is {ours} and its reference's is {theirs}: their speeds do not compare; "
                f"load both with the same {what}."
            )


def _vocabulary(model: nn.Module) -> int:
    """How many token ids `model` reads."""
    size = getattr(text_config(model), "vocab_size", None)
    if isinstance(size, int):
        return size
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise RequestError(
            "The model has neither a vocabulary size in its config nor an embedding; it reads no tokens."
        )
    return embedding.num_embeddings


def _turn(model: nn.Module, ids: Tensor, prefill: int, clock: Callable[[], float], meter: Meter | None = None) -> Turn:
    """Reads the first `prefill` tokens of `ids` (batch, tokens), and then the others one by one."""
    device = device_of(model)

    def now() -> tuple[float, tuple[int, ...]]:
        synchronize(device)
        return clock(), meter.read() if meter else ()

    start = now()
    if prefill == ids.shape[1]:
        logits_of(model, ids)
        read = end = now()
    else:
        _, cache = step(model, ids[:, :prefill], None)
        read = now()
        for position in range(prefill, ids.shape[1]):
            _, cache = step(model, ids[:, position : position + 1], cache)
        end = now()
    spent = (meter.joules(start[1], read[1]), meter.joules(read[1], end[1])) if meter else None
    return Turn((read[0] - start[0], end[0] - read[0]), spent)


def _pace(
    models: Mapping[str, nn.Module],
    turns: Mapping[str, Sequence[Turn]],
    phase: int,
    tokens: int,
    batch: int,
    context: int,
) -> Pace:
    """What the turns of both say of one phase, in which `tokens` tokens came behind `context` others."""
    times = {name: [turn.seconds[phase] for turn in each] for name, each in turns.items()}
    ours, theirs = times["model"], times.get("reference")
    read = tokens * batch
    joules = {
        name: Spread.of(turn.joules[phase] / read for turn in each if turn.joules)
        for name, each in turns.items()
        if all(turn.joules for turn in each)
    }
    # read one by one or at once, a token sees the same keys
    work = {
        name: batch * (multiply_adds(model, context + tokens) - (multiply_adds(model, context) if context else 0))
        for name, model in models.items()
    }
    return Pace(
        tokens=tokens,
        model=Spread.of(read / taken for taken in ours),
        reference=Spread.of(read / taken for taken in theirs) if theirs else None,
        gain=Spread.of(before / after - 1 for before, after in zip(theirs, ours, strict=True)) if theirs else None,
        multiply_adds=work["model"],
        reference_multiply_adds=work.get("reference"),
        joules=joules.get("model"),
        reference_joules=joules.get("reference"),
    )

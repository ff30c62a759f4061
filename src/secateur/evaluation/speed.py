"""Tokens a second, measured against a reference in turns so that both meet the same machine."""

import time
from collections.abc import Callable, Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
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
    """One phase. model, reference: tokens a second. gain: t_reference / t_model - 1 within each pair."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    model: Spread
    reference: Spread | None
    gain: Spread | None


class Speed(BaseModel):
    """Both phases with batch 1.

    prefill: reading `tokens` tokens at once, logits of all of them. decode: one token after the other behind those,
    with a key-value cache; None for a model without one. order: whose turn it was, as measured. threads: of the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: Pace
    decode: Pace | None
    pairs: int
    order: tuple[str, ...]
    dtype: str
    device: str
    threads: int


def speed(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    prefill: int | None = None,
    decode: int = 32,
    pairs: int = 10,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> Speed:
    """Measures prefill and decoding, the model and its reference in turns: reference, model; model, reference; ...

    A turn reads `prefill` tokens and then decodes `decode` more; both models read the same seeded random tokens, since
    speed must not hang on what they would have written. One turn of each comes first and is not counted.

    prefill: tokens, by default 512 or what the positions of both models allow. decode: tokens, 0 to leave decoding out.
    pairs: how many turns each model has. clock: seconds. Raises RequestError when the models differ in dtype or device,
    or are asked for more positions than they have.
    """
    both = {"reference": reference, "model": model} if reference is not None else {"model": model}
    if pairs < 1 or decode < 0 or (prefill is not None and prefill < 1):
        raise RequestError(
            f"{pairs} pairs of {prefill} + {decode} tokens cannot be measured; at least 1 pair of 1 + 0."
        )
    if reference is not None:
        _check_alike(model, reference)
    caches = all(has_cache(each) for each in both.values())
    decode = decode if caches else 0
    if prefill is None:
        prefill = max(
            1, min([PREFILL, *((maximum_positions(each) or PREFILL + decode) - decode for each in both.values())])
        )
    for each in both.values():
        check_length(each, prefill + decode, "A measurement of speed")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(_vocabulary(each) for each in both.values())
    ids = torch.randint(vocabulary, (1, prefill + decode), generator=generator).to(device_of(model))

    order: list[str] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    with evaluating(*both.values()), progress("speed", (pairs + 1) * len(both)) as bar:
        for each in both.values():
            _turn(each, ids, prefill, clock)
            bar.advance()
        for pair in range(pairs):
            for name in both if pair % 2 == 0 else reversed(both):
                seconds[name].append(_turn(both[name], ids, prefill, clock))
                order.append(name)
                bar.advance()
    return Speed(
        prefill=_pace(prefill, seconds, 0),
        decode=_pace(decode, seconds, 1) if decode else None,
        pairs=pairs,
        order=tuple(order),
        dtype=dtype_of(model),
        device=str(device_of(model)),
        threads=torch.get_num_threads(),
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


def _turn(model: nn.Module, ids: Tensor, prefill: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of reading the first `prefill` tokens of `ids` (1, tokens), and of the others one by one."""
    device = device_of(model)
    synchronize(device)
    start = clock()
    if prefill == ids.shape[1]:
        logits_of(model, ids)
        synchronize(device)
        return clock() - start, 0.0
    _, cache = step(model, ids[:, :prefill], None)
    synchronize(device)
    read = clock()
    for position in range(prefill, ids.shape[1]):
        _, cache = step(model, ids[:, position : position + 1], cache)
    synchronize(device)
    return read - start, clock() - read


def _pace(tokens: int, seconds: dict[str, list[tuple[float, float]]], phase: int) -> Pace:
    times = {name: [turn[phase] for turn in turns] for name, turns in seconds.items()}
    ours, theirs = times["model"], times.get("reference")
    return Pace(
        tokens=tokens,
        model=Spread.of(tokens / taken for taken in ours),
        reference=Spread.of(tokens / taken for taken in theirs) if theirs else None,
        gain=Spread.of(before / after - 1 for before, after in zip(theirs, ours, strict=True)) if theirs else None,
    )

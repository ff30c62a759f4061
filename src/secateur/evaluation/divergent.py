"""Divergent tokens: how far a model's greedy text goes along with its reference's.

Deiseroth and others, "Divergent Token Metrics: Measuring degradation to prune away LLM components, and optimize
quantization", NAACL 2024, arXiv:2311.01544. Definitions are those of its abstract and of ports; its formulas were not seen.

The first divergent token needs no generation by the model: as long as both agree, the model reads what the reference has
written, so one pass over the reference's text finds the first place where the model would go on otherwise. Behind it the two
read different texts; the share of divergent tokens compares what each writes, place by place, and needs generation.

Ties. Two tokens whose logits differ by no more than rounding have no order: the order of sums, and so a cache or the size of
a batch, would decide. A token of the reference counts as the model's own choice when its logit lies within `tolerance` times
the largest logit (by size) of the model's highest one, in the pass as in generation; how often that decided is reported as
`ties`. A model against itself therefore never diverges, however its reference text was computed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.forward import (
    check_length,
    dtype_of,
    evaluating,
    finite,
    has_cache,
    logits_of,
    step,
    text_config,
)
from secateur.evaluation.perplexity import as_tokens
from secateur.evaluation.text import Tokens
from secateur.tensor.survival import restricted_mean, survival_curve, survival_quantile

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BATCH = 16  # prompts that are gone on from together
LOGITS = 1 << 26  # logits held at once where a text is read in one pass


class Continuations(NamedTuple):
    """What is written: so many prompts, tokens of each, and tokens that each is gone on with."""

    prompts: int = 64
    prompt: int = 32
    continuation: int = 64


class DivergentTokens(BaseModel):
    """How a model's greedy continuations of prompts differ from its reference's.

    quantiles: of the number of tokens before the first divergent one, by share ("0.5" is the median); None where that many
    never diverged, so that it lies beyond the window. mean: of the same, each counted up to the window at most, so no more
    than `continuation`. censored: share of the continuations that never diverged. share: divergent tokens of all compared,
    each model reading its own text. corrected: the same with the model reading the reference's text: how often it would have
    to be put right. survival: (tokens, share of the continuations that have not diverged after so many), by Kaplan and Meier
    where some end early. ties: share of tokens of the reference that count as the model's only within `tolerance`.
    tokens: compared; a continuation ends with the reference's end-of-text token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantiles: dict[str, int | None]
    mean: float
    censored: float
    share: float
    corrected: float
    survival: tuple[tuple[int, float], ...]
    ties: float
    tolerance: float
    prompts: int
    prompt: int
    continuation: int
    tokens: int
    text: str | None
    sha256: str | None
    dtype: str

    def sentence(self) -> str:
        """What was measured, in words."""
        digest = f" (sha256 {self.sha256[:12]})" if self.sha256 else ""
        return (
            f"{self.prompts} prompts of {self.prompt} tokens from {self.text or 'token ids'}{digest}, each gone on with "
            f"{self.continuation} tokens at most, greedily, {self.tokens:,} in all; {100 * self.censored:.1f} % never "
            "diverged; logits within "
            f"{self.tolerance:g} of the largest are tied, which decided {100 * self.ties:.2f} % of the tokens; {self.dtype}"
        )


class Comparison(NamedTuple):
    """(prompts, tokens) bool: where the model would not write the reference's token, and where only a tie let it."""

    differs: Tensor
    tied: Tensor


def tie_tolerance(dtype: str) -> float:
    """Differences of logits, as a part of the largest, that rounding explains: two units in the last place of `dtype`.

    At least what the reload check allows between two orders of sums in float32.
    """
    return max(2 * torch.finfo(getattr(torch, dtype)).eps, 1e-4)


def divergent_tokens(
    model: nn.Module,
    reference: nn.Module,
    ids: Tokens | Tensor,
    *,
    written: Continuations = Continuations(),  # noqa: B008 (a tuple, never changed)
    tolerance: float | None = None,
    progress: Progress = silent,
    known: dict[Any, Any] | None = None,
) -> DivergentTokens:
    """First divergent token and share of divergent tokens over continuations of prompts cut from `ids`.

    ids: `Tokens`, or a tensor (tokens,): the prompts are spread evenly over it and do not overlap. written: how many, and
    how long. tolerance: of ties, by default what `tie_tolerance` says of the models' dtype (the coarser of the two).
    known: what the reference wrote before, so that it writes once for many models; what it writes is added.

    Raises RequestError when the text is too short, a model has too few positions, or the vocabularies differ; RunError when
    a logit is not finite.
    """
    known = {} if known is None else known
    tokens = as_tokens(ids)
    prompts = cut_prompts(tokens.ids, written)
    for each in (model, reference):
        check_length(each, written.prompt + written.continuation, "A prompt with its continuation")
    if tolerance is None:
        tolerance = max(tie_tolerance(dtype_of(each)) for each in (model, reference))
    ends = end_tokens(reference)
    forced: list[Comparison] = []
    lengths: list[int] = []
    own = 0
    batches = prompts.split(min(together(each, written) for each in (model, reference)))
    with evaluating(model, reference), progress("divergent tokens", len(batches)) as bar:
        for batch in batches:
            key = ("text", written.continuation, str(batch.tolist()))
            if key not in known:
                known[key] = greedy(reference, batch, written.continuation, what="the reference")
            text = known[key]
            counted = counted_tokens(text, ends)
            found = compare_forced(model, batch, text, tolerance)
            forced.append(Comparison(found.differs & counted, found.tied & counted))
            said = greedy(model, batch, written.continuation, toward=text, tolerance=tolerance)
            own += int(((said != text) & counted).sum())
            lengths += counted.sum(1).tolist()
            bar.advance()
    whole = Comparison(*(torch.cat(parts) for parts in zip(*forced, strict=True)))
    first = first_divergent(whole.differs, lengths)
    happened = [after < length for after, length in zip(first, lengths, strict=True)]
    curve = survival_curve(first, happened)
    total = sum(lengths)
    return DivergentTokens(
        quantiles={f"{share:g}": survival_quantile(curve, share) for share in QUANTILES},
        mean=restricted_mean(curve),
        censored=1 - sum(happened) / len(happened),
        share=own / total,
        corrected=int(whole.differs.sum()) / total,
        survival=tuple((after, float(left)) for after, left in enumerate(curve) if after),
        ties=int(whole.tied.sum()) / total,
        tolerance=tolerance,
        prompts=len(prompts),
        prompt=written.prompt,
        continuation=written.continuation,
        tokens=total,
        text=tokens.name,
        sha256=tokens.sha256,
        dtype=dtype_of(model),
    )


def cut_prompts(ids: Tensor, written: Continuations) -> Tensor:
    """(prompts, prompt) windows of `ids` (tokens,), spread evenly. Raises RequestError where it does not hold them."""
    if min(written) < 1:
        raise RequestError(
            f"{written.prompts} prompts of {written.prompt} + {written.continuation} tokens cannot be compared; at least 1 "
            "of 1 + 1."
        )
    if len(ids) < written.prompts * written.prompt:
        raise RequestError(
            f"The text is too short: it has {len(ids)} tokens, that is {len(ids) // written.prompt} prompts of "
            f"{written.prompt}, and {written.prompts} are needed; give a longer text, or ask for fewer or shorter prompts."
        )
    apart = len(ids) // written.prompts
    return torch.stack([ids[start * apart : start * apart + written.prompt] for start in range(written.prompts)])


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids with which a text of `model` ends; none for a module without a configuration."""
    for config in (getattr(model, "generation_config", None), text_config(model)):
        ids: Any = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def counted_tokens(text: Tensor, ends: Sequence[int]) -> Tensor:
    """(prompts, tokens) bool: the tokens of `text` up to the first that ends it, that one included."""
    over = torch.isin(text, torch.tensor(ends, dtype=text.dtype))
    return over.cumsum(1) - over.long() == 0


def first_divergent(differs: Tensor, lengths: Sequence[int]) -> list[int]:
    """How many tokens come before the first True of each row of (prompts, tokens); its length where there is none."""
    return [
        int(row.long().argmax()) if bool(row.any()) else length for row, length in zip(differs, lengths, strict=True)
    ]


def greedy(
    model: nn.Module,
    prompts: Tensor,
    count: int,
    *,
    toward: Tensor | None = None,
    tolerance: float = 0.0,
    what: str = "the model",
    cache: bool = True,
    enough: Callable[[Tensor], bool] = lambda text: False,
) -> Tensor:
    """(prompts, count) tokens that `model` writes after `prompts` (prompts, tokens), each the one of the highest logit.

    Nothing ends a text but `enough`, which is asked of what is written so far, (prompts, tokens); all end together. With a
    key-value cache where the model has one and `cache` says so; otherwise everything is read again for each token.

    toward: (prompts, count) a text whose tokens are taken where they are tied with the highest within `tolerance`; of equal
    logits otherwise the first counts.
    """
    text, kept = prompts, None
    cached = cache and has_cache(model)
    for place in range(count):
        if cached:
            logits, kept = step(model, text if kept is None else text[:, -1:], kept)
        else:
            logits = logits_of(model, text)
        last = finite(logits[:, -1], f"token {place} of the text that {what} writes")
        if toward is None:
            chosen = last.argmax(-1).cpu()
        else:
            chosen, _ = _choose(last, toward[:, place], tolerance)
        text = torch.cat([text, chosen[:, None]], dim=1)
        if enough(text[:, prompts.shape[1] :]):
            break
    return text[:, prompts.shape[1] :]


def compare_forced(model: nn.Module, prompts: Tensor, text: Tensor, tolerance: float) -> Comparison:
    """What `model` would write in place of each token of `text` (prompts, count), reading `prompts` and `text` before it."""
    logits = logits_of(model, torch.cat([prompts, text[:, :-1]], dim=1))[:, prompts.shape[1] - 1 :]
    chosen, tied = _choose(finite(logits, "the pass over the reference's text"), text, tolerance)
    return Comparison(chosen != text, tied)


def together(model: nn.Module, written: Continuations) -> int:
    """How many prompts go through at once: `BATCH`, or fewer where the logits of a pass over their texts would be too
    many."""
    vocabulary = getattr(text_config(model), "vocab_size", None) or 1
    return max(1, min(BATCH, LOGITS // ((written.prompt + written.continuation) * vocabulary)))


def _choose(logits: Tensor, wanted: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The token of the highest of `logits` (..., vocabulary), or that of `wanted` (...) where it is tied with it; on the
    CPU.

    Returns: those tokens (...), and where `wanted` was taken though it is not the highest.
    """
    wanted = wanted.to(logits.device)
    if int(wanted.max()) >= logits.shape[-1]:
        raise RequestError(
            f"The model predicts over {logits.shape[-1]} tokens and its reference over more; their texts cannot be compared "
            "token by token."
        )
    lowest, highest = torch.aminmax(logits, dim=-1)
    best = logits.argmax(-1)
    gap = highest.double() - logits.gather(-1, wanted[..., None])[..., 0].double()
    same = gap <= tolerance * torch.maximum(highest.abs(), lowest.abs()).double()
    return torch.where(same, wanted, best).cpu(), (same & (best != wanted)).cpu()

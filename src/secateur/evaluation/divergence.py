"""How far a model's predictions have moved from its reference's."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.forward import check_length, dtype_of, evaluating, finite, logits_of
from secateur.evaluation.perplexity import (
    Perplexity,
    Protocol,
    as_tokens,
    log_probabilities,
    protocol_of,
    result,
    rows_of,
    split,
    window_count,
)
from secateur.evaluation.text import Tokens


class Divergence(BaseModel):
    """kl: mean KL(reference || model) per token, in nats. agreement: share of tokens where both rank the same token
    first. Both over the predicted tokens of the protocol (its dtype is the model's)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kl: float
    agreement: float
    protocol: Protocol


class Comparison(NamedTuple):
    """What one pass of two models over the same text says."""

    divergence: Divergence
    model: Perplexity
    reference: Perplexity


def divergence(
    model: nn.Module,
    reference: nn.Module,
    ids: Tokens | Tensor,
    *,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress = silent,
) -> Divergence:
    """Mean KL(reference || model) and top-1 agreement; arguments and errors as in `compare`."""
    return compare(model, reference, ids, window=window, windows=windows, progress=progress).divergence


def compare(
    model: nn.Module,
    reference: nn.Module,
    ids: Tokens | Tensor,
    *,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Divergence and both perplexities in one pass, window by window: one window's logits are held at a time.

    ids, window, windows and errors as in
    `perplexity`; RequestError too when the two models predict over different vocabularies.
    """
    tokens = as_tokens(ids)
    count = window_count(tokens, window, windows)
    for either in (model, reference):
        check_length(either, window, "A window")
    kl = nll = reference_nll = 0.0
    agreed = 0
    with evaluating(model, reference), progress("divergence", count) as bar:
        for index, piece in enumerate(split(tokens.ids, window, count)):
            ours = finite(logits_of(model, piece[None])[0, :-1], f"window {index}")
            theirs = finite(logits_of(reference, piece[None])[0, :-1], f"window {index} of the reference")
            if ours.shape != theirs.shape:
                raise RequestError(
                    f"The model predicts over {ours.shape[-1]} tokens and its reference over {theirs.shape[-1]}; they "
                    "cannot be compared token by token: evaluate the model without a reference."
                )
            pairs = zip(rows_of(ours, piece), rows_of(theirs, piece), strict=True)
            for (rows, targets), (reference_rows, _) in pairs:
                log_q = log_probabilities(rows)
                log_p = log_probabilities(reference_rows.to(rows.device))
                at_target = targets.to(log_q.device)[:, None]
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                nll -= float(log_q.gather(-1, at_target).sum())
                reference_nll -= float(log_p.gather(-1, at_target).sum())
                agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            bar.advance()
    protocol = protocol_of(tokens, window, count, dtype_of(model))
    return Comparison(
        divergence=Divergence(kl=kl / protocol.tokens, agreement=agreed / protocol.tokens, protocol=protocol),
        model=result(nll, protocol, tokens),
        reference=result(reference_nll, protocol_of(tokens, window, count, dtype_of(reference)), tokens),
    )

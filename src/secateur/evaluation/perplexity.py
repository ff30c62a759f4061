"""Perplexity, always together with the protocol that makes it mean something."""

import math
from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.context import Progress, silent
from secateur.errors import RequestError
from secateur.evaluation.forward import check_length, dtype_of, evaluating, finite, logits_of
from secateur.evaluation.text import Tokens

# Rows of logits that are looked at in double precision at once: 64 rows of a 256k vocabulary are 128 MB.
ROWS = 64


class Protocol(BaseModel):
    """What a perplexity was measured on and how; two perplexities compare only when all of this is equal.

    window, stride: tokens (the stride equals the window: windows never overlap). tokens: predicted tokens, window - 1
    in each window, since the first token of a window has nothing before it. unused: tokens of the text behind the last
    window. text, sha256, tokenizer, vocabulary, bos: see `Tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None
    sha256: str | None
    tokenizer: str | None
    vocabulary: int | None
    bos: bool | None
    window: int
    stride: int
    windows: int
    tokens: int
    unused: int
    dtype: str

    def sentence(self) -> str:
        """The protocol in words."""
        bos = {True: "begins with BOS", False: "no BOS", None: "BOS unknown"}[self.bos]
        digest = f" (sha256 {self.sha256[:12]})" if self.sha256 else ""
        return (
            f"text {self.text or 'given as token ids'}{digest}; "
            f"tokenizer {self.tokenizer or 'unknown'}"
            + (f" ({self.vocabulary} entries)" if self.vocabulary is not None else "")
            + f", {bos}; {self.windows} windows of {self.window} tokens, stride {self.stride}, "
            f"{self.tokens} tokens predicted; {self.dtype}"
        )


class Perplexity(BaseModel):
    """exp of `nll`, the mean negative log-likelihood in nats over the predicted tokens, and its protocol.

    bits_per_byte: the same likelihood over the bytes of the predicted tokens, log2(e) · nll · tokens / bytes: comparable
    between vocabularies, which a perplexity is not; None where it is not known which bytes the tokens stand for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    perplexity: float
    nll: float
    protocol: Protocol
    bits_per_byte: float | None = None


def perplexity(
    model: nn.Module,
    ids: Tokens | Tensor,
    *,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity of `model` on consecutive windows that do not overlap.

    ids: `Tokens`, or a tensor (tokens,). window: tokens read at once. windows: how many of the first windows to read;
    all full windows by default. Sums are in float64.

    Raises RequestError when the text is too short or the window exceeds the model's positions, RunError when a logit is
    not finite.
    """
    tokens = as_tokens(ids)
    count = window_count(tokens, window, windows)
    check_length(model, window, "A window")
    total = 0.0
    with evaluating(model), progress("perplexity", count) as bar:
        for index, piece in enumerate(split(tokens.ids, window, count)):
            logits = finite(logits_of(model, piece[None])[0, :-1], f"window {index}")
            total += sum(
                float(-target_log_probabilities(rows, targets).sum()) for rows, targets in rows_of(logits, piece)
            )
            bar.advance()
    return result(total, protocol_of(tokens, window, count, dtype_of(model)), tokens)


def as_tokens(ids: Tokens | Tensor) -> Tokens:
    """`ids` as `Tokens`; a bare tensor has no provenance."""
    tokens = ids if isinstance(ids, Tokens) else Tokens(ids)
    if tokens.ids.dim() != 1:
        raise RequestError(
            f"Token ids of shape {tuple(tokens.ids.shape)} were given; one sequence (tokens,) is needed."
        )
    return tokens


def window_count(tokens: Tokens, window: int, windows: int | None) -> int:
    """How many windows to read; RequestError when the text does not hold them."""
    if window < 2:
        raise RequestError(f"A window of {window} tokens predicts nothing; ask for at least 2.")
    if windows is not None and windows < 1:
        raise RequestError(f"{windows} windows were asked for; ask for at least 1.")
    length, full = len(tokens.ids), len(tokens.ids) // window
    wanted = full if windows is None else windows
    if full < max(wanted, 1):
        raise RequestError(
            f"The text is too short: it has {length} tokens, that is {full} full windows of {window}, and "
            f"{max(wanted, 1)} are needed; give a longer text or ask for a smaller window."
        )
    return wanted


def split(ids: Tensor, window: int, count: int) -> Iterator[Tensor]:
    """The first `count` windows of `ids`, each (window,); they follow each other and never overlap."""
    for index in range(count):
        yield ids[index * window : (index + 1) * window]


def rows_of(logits: Tensor, piece: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows at a time of `logits` (window - 1, vocabulary) with the tokens of `piece` (window,) they predict."""
    targets = piece[1:].to(logits.device)
    return zip(torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float64: a small divergence is a difference of nearly equal numbers."""
    # Metal has no float64.
    return torch.log_softmax(logits if logits.device.type != "mps" else logits.cpu(), dim=-1, dtype=torch.float64)


def target_log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) in nats, (rows,), from `logits` (rows, vocabulary) and `targets` (rows,)."""
    log_p = log_probabilities(logits)
    return log_p.gather(-1, targets.to(log_p.device)[:, None])[:, 0]


def protocol_of(tokens: Tokens, window: int, count: int, dtype: str) -> Protocol:
    """The protocol of a measurement on `count` windows of `tokens`."""
    return Protocol(
        text=tokens.name,
        sha256=tokens.sha256,
        tokenizer=tokens.tokenizer,
        vocabulary=tokens.vocabulary,
        bos=tokens.bos,
        window=window,
        stride=window,
        windows=count,
        tokens=count * (window - 1),
        unused=len(tokens.ids) - count * window,
        dtype=dtype,
    )


def result(total: float, protocol: Protocol, tokens: Tokens) -> Perplexity:
    """`total`: the summed negative log-likelihood in nats, of the windows of `tokens` that the protocol names."""
    nll = total / protocol.tokens
    bits = None
    if tokens.ends is not None:
        ends = tokens.ends[: protocol.windows * protocol.window].view(-1, protocol.window)
        read = int((ends[:, -1] - ends[:, 0]).sum())
        bits = total / math.log(2) / read if read else None
    # exp overflows beyond e^709; such a model is as wrong as can be and the mean still says how wrong.
    return Perplexity(
        perplexity=math.exp(nll) if nll < 709 else math.inf, nll=nll, protocol=protocol, bits_per_byte=bits
    )

"""A model whose answers are remembered: what many others are compared with reads the same text again and again."""

from typing import Any

from torch import Tensor, nn

from secateur.evaluation.forward import logits_of


class Remembered(nn.Module):
    """Gives the logits that `module` gives, computed once for each text as far as they fit.

    module: stays as it is, and may be run beside. most: bytes of logits that are kept; None for all of them. Texts that come
    when these are full are computed every time: the first ones stay, because texts come in the same order again.
    """

    def __init__(self, module: nn.Module, most: int | None = None) -> None:
        super().__init__()
        self.module, self.most = module, most
        if hasattr(module, "config"):
            self.config: Any = module.config
        self._seen: dict[tuple[tuple[int, ...], tuple[int, ...], int], Tensor] = {}
        self._bytes = 0

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, tokens, vocabulary) logits for `ids` of shape (batch, tokens); not to be changed in place."""
        return self.after(ids, 0)

    def after(self, ids: Tensor, start: int) -> Tensor:
        """The logits from position `start` on, (batch, tokens - start, vocabulary), of which these alone are kept."""
        key = (tuple(ids.shape), tuple(ids.flatten().tolist()), start)
        if (known := self._seen.get(key)) is not None:
            return known
        logits = logits_of(self.module, ids)
        if start:
            logits = logits[:, start:].clone()  # a part alone would hold on to the whole
        if self.most is None or self._bytes + logits.nbytes <= self.most:
            self._seen[key] = logits
            self._bytes += logits.nbytes
        return logits


def logits_after(model: nn.Module, ids: Tensor, start: int) -> Tensor:
    """Logits of `model` for `ids` (batch, tokens) from position `start` on; one that remembers them computes them once."""
    return model.after(ids, start) if isinstance(model, Remembered) else logits_of(model, ids)[:, start:]

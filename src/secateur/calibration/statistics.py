"""What calibration tokens say of a matrix's inputs: sums over tokens, so that parts add up to the whole.

A method asks for one of the types below; the engine collects the union of what a step asks for, once for all matrices that
read the same tensor (q, k and v; gate and up), and each type is a view of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.tensor.hessian import Damped, Damping, damp
from secateur.tensor.products import linear

PANEL = 192  # a Gram matrix is symmetric: in panels this wide nearly half of the work is saved


class Sums:
    """Running sums over the tokens that one input has seen.

    Args:
        wanted: among "gram", "cross", "squares", "sum" and "gated".
        columns: d, width of the input.
    """

    def __init__(self, wanted: Iterable[str], columns: int, device: str | torch.device = "cpu") -> None:
        wanted = set(wanted)
        if "gram" in wanted:
            wanted.discard("squares")  # they are its diagonal
        self.tokens = 0
        # single numbers for each column are cheap in float64, and long sums of squares need it
        self.parts = {
            name: torch.zeros(columns, columns, device=device)
            if name in ("gram", "cross")
            else torch.zeros(columns, dtype=torch.float64, device=device)
            for name in sorted(wanted)
        }

    @torch.no_grad()
    def add(self, inputs: Tensor, gates: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Counts (t, d) inputs.

        Args:
            gates: (t,) what the output of their expert is multiplied by; 1 where there is none.
            dense: (t, d) what the same tokens are there in the dense network.
        """
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(inputs)
        if "gram" in self.parts:
            _add_gram(self.parts["gram"], inputs)
        if "cross" in self.parts:
            assert dense is not None, "who asks for the dense inputs gives them"
            self.parts["cross"] += linear(dense.reshape(inputs.shape).float().T, inputs.T)
        if "squares" in self.parts:
            self.parts["squares"] += inputs.square().sum(dim=0)
        if "sum" in self.parts:
            self.parts["sum"] += inputs.sum(dim=0, dtype=torch.float64)
        if "gated" in self.parts:
            weighted = inputs if gates is None else inputs * gates.reshape(-1, 1).float()
            self.parts["gated"] += weighted.square().sum(dim=0)

    def merge(self, other: "Sums") -> None:
        """Adds what was seen elsewhere."""
        self.tokens += other.tokens
        for name, part in self.parts.items():
            part += other.parts[name]

    def finish(self) -> None:
        """Completes what was collected by halves; nothing may be added or merged after."""
        if "gram" in self.parts:
            _mirror(self.parts["gram"])

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in self.parts.values())

    @property
    def squares(self) -> Tensor:
        return self.parts["gram"].diagonal() if "gram" in self.parts else self.parts["squares"].float()


def _panels(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)]


def _add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Adds inputsᵀ inputs to the upper half (in panels) of `gram`."""
    columns = inputs.T.contiguous()
    for start, end in _panels(gram.shape[0]):
        gram[start:end, start:] += linear(columns[start:end], columns[start:])


def _mirror(gram: Tensor) -> None:
    for start, end in _panels(gram.shape[0]):
        gram[end:, start:end] = gram[start:end, end:].T
        square = gram[start:end, start:end]
        square.copy_((square + square.T) / 2)


@dataclass(frozen=True)
class InputNorms:
    """How large each input is.

    Args:
        squares: (d,) sum over tokens of x².
        tokens: how many were seen.
    """

    squares: Tensor
    tokens: int
    wants: ClassVar[frozenset[str]] = frozenset({"squares"})

    @classmethod
    def of(cls, sums: Sums) -> "InputNorms":
        return cls(sums.squares, sums.tokens)

    @property
    def norms(self) -> Tensor:
        """(d,) root of the mean square."""
        return (self.squares / self.tokens).sqrt()


@dataclass(frozen=True)
class GatedNorms:
    """How large each input is once its token's gate is counted: Σ (g x)². Outside experts gates are 1.

    Args:
        squares: (d,) sum over tokens of (g x)².
        tokens: how many were seen.
    """

    squares: Tensor
    tokens: int
    wants: ClassVar[frozenset[str]] = frozenset({"gated"})

    @classmethod
    def of(cls, sums: Sums) -> "GatedNorms":
        return cls(sums.parts["gated"].float(), sums.tokens)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each input.

    Args:
        mean, variance: (d,) over tokens; the variance is divided by the number of tokens.
        tokens: how many were seen.
    """

    mean: Tensor
    variance: Tensor
    tokens: int
    wants: ClassVar[frozenset[str]] = frozenset({"sum", "squares"})

    @classmethod
    def of(cls, sums: Sums) -> "Moments":
        mean = sums.parts["sum"] / sums.tokens
        variance = sums.squares.double() / sums.tokens - mean.square()
        return cls(mean.float(), variance.clamp(min=0).float(), sums.tokens)


@dataclass
class Gram:
    """Second moment of a matrix's inputs; what is derived from it is kept, for the next method or matrix that asks.

    Args:
        matrix: (d, d) sum over tokens of x xᵀ, float32.
        tokens: how many were seen.
    """

    matrix: Tensor
    tokens: int
    wants: ClassVar[frozenset[str]] = frozenset({"gram"})
    _damped: dict[Any, Damped] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, sums: Sums) -> "Gram":
        return cls(sums.parts["gram"], sums.tokens)

    def damped(self, fraction: float = 0.01, mode: Damping = "mean") -> Damped:
        """The damped Hessian with its factors, computed once for each setting."""
        if (fraction, mode) not in self._damped:
            self._damped[fraction, mode] = damp(self.matrix, fraction, mode)
        return self._damped[fraction, mode]


@dataclass(frozen=True)
class CrossGram:
    """What the inputs are in the dense network against what they are behind compressed layers, on the same tokens.

    Args:
        matrix: (d, d) sum over tokens of x yᵀ, x in the dense network, y behind the compressed layers, float32.
        tokens: how many were seen.
    """

    matrix: Tensor
    tokens: int
    wants: ClassVar[frozenset[str]] = frozenset({"cross"})

    @classmethod
    def of(cls, sums: Sums) -> "CrossGram":
        return cls(sums.parts["cross"], sums.tokens)


@dataclass(frozen=True)
class HeldOutInputs:
    """Some inputs of a matrix on held-out tokens, for a method to judge by what it has solved on all others.

    Args:
        rows: (t, d), some hundreds at most; None where no token was held out, or none reached the matrix.
    """

    rows: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """How much the loss reacts to each weight.

    Args:
        squares: (r, d) sum over samples of (∂loss/∂w)².
        samples: how many.
    """

    squares: Tensor
    samples: int


INPUT_STATISTICS: tuple[type, ...] = (InputNorms, GatedNorms, Moments, Gram, CrossGram)


class Statistics:
    """What was collected of one input, in every form that was asked for; one object for all matrices that read it."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._views: dict[type, Any] = {}

    @property
    def tokens(self) -> int:
        """How many tokens were seen; 0 says nothing about the input, unlike an input that was always 0."""
        return self.sums.tokens

    @property
    def dead(self) -> int:
        """How many columns were 0 on every token; 0 where nothing was collected that could tell."""
        if not {"gram", "squares"} & set(self.sums.parts):
            return 0
        return int((self.sums.squares == 0).sum())

    def view(self, kind: type) -> Any:
        if kind not in self._views:
            self._views[kind] = kind.of(self.sums)  # type: ignore[attr-defined]
        return self._views[kind]


UNSEEN = Statistics(Sums((), 0))

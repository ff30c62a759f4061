"""Which weights go: exact numbers of them, ties broken by index, masks stored explicitly.

A mask is a bool tensor of the weight's shape, True where a weight stays. Scores say what a weight is worth: the lowest go.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """What a matrix is to lose.

    One of three: a `fraction` of its weights, 0 ≤ fraction < 1; all but `kept` `of` every so many consecutive inputs
    (N:M, N kept of M); or a fraction of its tiles of `block` = (outputs, inputs), each kept or removed whole.
    """

    fraction: float | None = None
    kept: int | None = None
    of: int | None = None
    block: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str | float) -> "Pattern":
        """From how people write it: 0.5, "2:4" (2 kept of 4), "0.5/16x16". Raises ValueError for anything else."""
        text = str(text).strip()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            kept, of = map(int, found.groups())
            if not 0 < kept <= of:
                raise ValueError(f"{text} keeps {kept} of {of}; N:M keeps at least one and at most M")
            return cls(kept=kept, of=of)
        number, slash, tile = text.partition("/")
        try:
            fraction = float(number)
        except ValueError:
            raise ValueError(
                f"{text} is neither a fraction (0.5), N:M (2:4) nor a fraction of tiles (0.5/16x16)"
            ) from None
        if not 0 <= fraction < 1:
            raise ValueError(f"{text} removes a fraction outside [0, 1)")
        if not slash:
            return cls(fraction=fraction)
        if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", tile)):
            raise ValueError(f"{text} names no tile; write outputs x inputs, such as 0.5/16x16")
        return cls(fraction=fraction, block=(int(found[1]), int(found[2])))

    def __str__(self) -> str:
        if self.of is not None:
            return f"{self.kept}:{self.of}"
        tile = f"/{self.block[0]}x{self.block[1]}" if self.block else ""
        return f"{self.fraction:g}{tile}"

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that it removes."""
        if self.of is not None and self.kept is not None:
            return 1 - self.kept / self.of
        return float(self.fraction or 0.0)


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Splits `total` among parts in proportion to their sizes, in whole numbers that sum to it exactly.

    Rounding errors are carried along, so that any run of neighbours is within one of its due.
    """
    whole, given, seen = sum(sizes), 0, 0
    result = []
    for size in sizes:
        seen += size
        due = (2 * total * seen + whole) // (2 * whole) if whole else 0  # rounded to nearest, in integers
        result.append(due - given)
        given = due
    return result


def keep_per_row(scores: Tensor, remove: Sequence[int]) -> Tensor:
    """(r, d) mask that removes the remove[i] lowest scores of row i; among equals the first go."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    counts = torch.tensor(remove, device=scores.device).unsqueeze(1)
    places = torch.arange(scores.shape[1], device=scores.device)
    # an order takes three times the memory of its scores, so some rows at a time
    for part, number, mask in zip(
        *(t.split(_rows_at_once(scores.shape[1])) for t in (scores, counts, kept)), strict=True
    ):
        mask.scatter_(1, part.sort(dim=1, stable=True).indices, places >= number)
    return kept


def _rows_at_once(columns: int) -> int:
    return max(1, 2**20 // max(1, columns))


def keep_overall(scores: Tensor, remove: int) -> Tensor:
    """Mask of any shape that removes the `remove` lowest scores of all; among equals the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    if remove:
        flat = scores.reshape(-1)
        # several times faster than sorting everything; only what equals the threshold needs an order
        threshold = flat.kthvalue(remove).values
        below = flat < threshold
        ties = (flat == threshold).nonzero()[: remove - int(below.sum()), 0]
        kept[below] = False
        kept[ties] = False
    return kept.view(scores.shape)


_GROUPS = 1 << 16  # compared at once: bounds what the comparisons take


def keep_n_of_m(scores: Tensor, kept: int, of: int) -> Tensor:
    """(r, d) mask that keeps the `kept` highest of every `of` consecutive columns; `of` divides d, ties as elsewhere."""
    rows, columns = scores.shape
    if of > 8:
        groups = scores.reshape(-1, of)
        gone = groups.sort(dim=1, stable=True).indices[:, : of - kept]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(1, gone, False).view(rows, columns)
    # each member's rank by comparison with the others: many times faster than sorting tiny groups
    members = scores.reshape(-1, of).T.contiguous()
    kept_members = torch.empty_like(members, dtype=torch.bool)
    earlier = torch.ones(of, of, dtype=torch.bool, device=scores.device).tril(-1).unsqueeze(2)
    lowest = torch.arange(of - 1, -1, -1, dtype=torch.int8, device=scores.device).unsqueeze(1)
    for start in range(0, members.shape[1], _GROUPS):
        some = members[:, start : start + _GROUPS]
        # [i, j] for j < i: whether j goes before i, as the first among equals does
        before = (some.unsqueeze(0) <= some.unsqueeze(1)).logical_and_(earlier).view(torch.int8)
        # how many go before a member: those before it in the row, and those after it that it does not go before
        rank = before.sum(1, dtype=torch.int8) - before.sum(0, dtype=torch.int8) + lowest
        torch.ge(rank, of - kept, out=kept_members[:, start : start + _GROUPS])
    return kept_members.T.reshape(rows, columns)


def keep_blocks(scores: Tensor, block: tuple[int, int], remove: int) -> Tensor:
    """(r, d) mask that removes the `remove` tiles of shape `block` with the lowest sums of scores; tiles divide (r, d)."""
    rows, columns = scores.shape[0] // block[0], scores.shape[1] // block[1]
    sums = scores.view(rows, block[0], columns, block[1]).sum(dim=(1, 3))
    kept = keep_overall(sums, remove)
    return kept.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)


@dataclass(frozen=True)
class Budget:
    """What one matrix is to lose, in whole numbers.

    Args:
        pattern: the form.
        remove: weights to remove; for a pattern of tiles, tiles.
        shape: (r, d) of the matrix.
    """

    pattern: Pattern
    remove: int
    shape: tuple[int, int]

    @classmethod
    def uniform(cls, pattern: Pattern, shape: tuple[int, int]) -> "Budget":
        """The pattern's own fraction of this matrix, to the nearest whole number. Raises ValueError where it cannot be."""
        rows, columns = shape
        if pattern.of is not None:
            if columns % pattern.of:
                raise ValueError(f"{pattern} needs a number of inputs that {pattern.of} divides, found {columns}")
            return cls(pattern, round(pattern.sparsity * rows * columns), shape)
        if pattern.block is not None:
            if rows % pattern.block[0] or columns % pattern.block[1]:
                raise ValueError(
                    f"tiles of {pattern.block[0]}x{pattern.block[1]} do not divide a matrix of {rows}x{columns}"
                )
            return cls(
                pattern, round(pattern.sparsity * (rows // pattern.block[0]) * (columns // pattern.block[1])), shape
            )
        return cls(pattern, round(pattern.sparsity * rows * columns), shape)

    def rows(self) -> list[int]:
        """(r,) how many weights each row loses; they sum to `remove`."""
        return shares(self.remove, [self.shape[1]] * self.shape[0])

    def columns(self, sizes: Sequence[int]) -> list[int]:
        """How many weights each run of columns loses, for runs of these widths; they sum to `remove`."""
        return shares(self.remove, [self.shape[0] * size for size in sizes])

    def mask(self, scores: Tensor | Callable[[slice], Tensor], per: str = "row") -> Tensor:
        """(r, d) mask that removes the lowest of `scores`; `per`, "row" or "layer", matters to a plain fraction alone.

        scores: (r, d), or what gives those of some rows: where each row is judged alone, never all of them are held.
        """
        if not callable(scores):
            return self._masked(scores, slice(0, self.shape[0]), per)
        together = self.pattern.block is not None or (self.pattern.of is None and per == "layer")
        step = self.shape[0] if together else _rows_at_once(self.shape[1])
        kept: Tensor | None = None
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            part = self._masked(scores(rows), rows, per)
            kept = part.new_empty(self.shape) if kept is None else kept
            kept[rows] = part
        assert kept is not None, "a matrix has rows"
        return kept

    def _masked(self, scores: Tensor, rows: slice, per: str) -> Tensor:
        if self.pattern.of is not None and self.pattern.kept is not None:
            return keep_n_of_m(scores, self.pattern.kept, self.pattern.of)
        if self.pattern.block is not None:
            return keep_blocks(scores, self.pattern.block, self.remove)
        return keep_overall(scores, self.remove) if per == "layer" else keep_per_row(scores, self.rows()[rows])

    @property
    def weights(self) -> int:
        """How many weights are removed in all."""
        return self.remove * self._tile

    @property
    def units(self) -> int:
        """How many weights or tiles there are."""
        return self.shape[0] * self.shape[1] // self._tile

    @property
    def _tile(self) -> int:
        return self.pattern.block[0] * self.pattern.block[1] if self.pattern.block else 1

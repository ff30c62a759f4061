"""What methods that remove whole blocks see of them, and what they say should become of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from secateur.network.anatomy import Block
from secateur.network.modelling_file import BLOCK, part_parameters
from secateur.network.source import Source


@dataclass(frozen=True)
class Kept:
    """Which blocks stay, all others go.

    Args:
        blocks: sorted indices.
        scores: what decided, by block; the lowest go. Blocks that were not scored are missing.
    """

    blocks: tuple[int, ...]
    scores: Mapping[int, float] = field(default_factory=dict)


class BlockView:
    """One block, or a part of one. Its parameters are read one by one when asked for, as float32, and not kept."""

    def __init__(self, source: Source, block: Block, device: str = "cpu", part: str = BLOCK) -> None:
        self._source, self._names, self._device = source, part_parameters(block, part), device
        self.index = block.index
        self.size = sum(source.skeleton.get_parameter(name).numel() for name in self._names)

    def __repr__(self) -> str:
        return f"BlockView(index={self.index}, size={self.size})"

    def matrices(self) -> Iterator[Tensor]:
        """Everything of two or more dimensions: linear maps, stacked experts, convolutions."""
        return self._read(lambda dimensions: dimensions > 1)

    def vectors(self) -> Iterator[Tensor]:
        """Biases, scales of norms and the like."""
        return self._read(lambda dimensions: dimensions < 2)

    def _read(self, wanted) -> Iterator[Tensor]:  # type: ignore[no-untyped-def]
        for name in self._names:
            if wanted(self._source.skeleton.get_parameter(name).ndim):
                yield self._source.parameter(name).to(self._device).float()


def lacking(source: Source, part: str) -> frozenset[int]:
    """The blocks that have no such part, by index."""
    return frozenset(block.index for block in source.anatomy.blocks if not part_parameters(block, part))


class Blocks(Sequence[BlockView]):
    """The blocks of a network in order, or that part of each that may go.

    Args:
        remove: how many are to go.
        protected: indices of those that must stay; those without the part are added.
        part: "block", "attention" or "feed_forward".
    """

    def __init__(
        self, source: Source, remove: int, protected: Iterable[int] = (), device: str = "cpu", part: str = BLOCK
    ) -> None:
        self.remove, self.protected = remove, frozenset(protected) | lacking(source, part)
        self._blocks = [BlockView(source, block, device, part) for block in source.anatomy.blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index):  # type: ignore[no-untyped-def,override]
        return self._blocks[index]

    def without(self, order: Iterable[int], scores: Mapping[int, float] | None = None) -> Kept:
        """All but the first of `order` that may go, as many as are to go."""
        gone = [index for index in dict.fromkeys(order) if index not in self.protected][: self.remove]
        return Kept(tuple(index for index in range(len(self)) if index not in gone), dict(scores or {}))

    def without_lowest(self, scores: Mapping[int, float]) -> Kept:
        """All but those with the lowest scores; of equal ones the first go, and what has no score goes last of all."""
        scored = sorted(scores, key=lambda index: (scores[index], index))
        return self.without([*scored, *(index for index in reversed(range(len(self))) if index not in scores)], scores)

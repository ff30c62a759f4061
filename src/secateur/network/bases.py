"""The directions of the residual stream that stay, place by place, in files; and the stream as it passes a block's parts.

Places are counted as in `rotation.py`: a block has as many as parts that the stream passes one after the other. It adds
what a part gives to the stream x that the part's norm has read. Where the next place has another basis, the stream has to be
turned on its way past the part: that is done from outside, by adding to what the part gives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RunError
from secateur.files import read_tensors, write_tensors
from secateur.network.anatomy import Block
from secateur.network.modelling_file import passed_parts

_HELD = 3  # what one block needs: its two places and the next


class Bases:
    """Orthonormal bases of the stream, (h, d) float64 each, one in a file for each place; or one for all places.

    Args:
        folder: of the files.
        hidden: channels of the whole stream, h.
        places: how many there are; 1 is one basis for the whole network.
    """

    def __init__(self, folder: Path, hidden: int, places: int) -> None:
        self._folder, self.of, self.places = folder / f"of-{places}", hidden, places
        self._held: dict[int, Tensor] = {}

    @property
    def differ(self) -> bool:
        """Whether places have bases of their own, so that the stream has to be turned between them."""
        return self.places > 1

    @property
    def kept(self) -> int:
        """Directions that stay, d."""
        return self.at(0).shape[1]

    @property
    def complete(self) -> bool:
        return all(self.known(place) for place in range(self.places))

    def known(self, place: int) -> bool:
        return self._path(place).exists()

    def at(self, place: int) -> Tensor:
        """(h, d) the basis of a place."""
        number = place if self.differ else 0
        if number not in self._held:
            while len(self._held) >= _HELD:
                self._held.pop(next(iter(self._held)))
            self._held[number] = read_tensors(self._path(number))[0]["basis"]
        return self._held[number]

    def share(self, place: int) -> float:
        """The share of the energy of calibration tokens that lies in the basis of a place, as it was told."""
        return float(read_tensors(self._path(place))[0]["share"])

    def keep(self, place: int, basis: Tensor, method: str, share: float = 1.0) -> None:
        """Keeps what a method gave. Raises RunError when the directions are not orthonormal, or not as many as before."""
        basis = basis.double().cpu()
        far = (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max()
        if len(basis) != self.of or not float(far) < 1e-6 or (place and basis.shape[1] != self.kept):
            raise RunError(
                f"{method}: the directions kept are not orthonormal, or not as many everywhere; nothing was cut."
            )
        told = torch.tensor(share, dtype=torch.float64)
        write_tensors(self._path(place), {"basis": basis.contiguous(), "share": told})

    def turn(self, place: int) -> Tensor:
        """(d, d) float64, what is added to the stream z of a place beside the part behind it, in the basis of the next:
        z + W z, W = Q'ᵀ Q - 1.
        """
        turned = self.at(place + 1).T @ self.at(place)
        return turned - torch.eye(len(turned), dtype=turned.dtype)

    def _path(self, place: int) -> Path:
        return self._folder / f"{place}.safetensors"


Change = Callable[[int, Tensor], Tensor]
"""What is made of the stream (..., h) at a place."""


@contextmanager
def passing(
    model: nn.Module,
    block: Block,
    read: Change | None,
    past: Change,
    parts: Sequence[str] | None = None,
) -> Iterator[None]:
    """While it is open, the stream changes where it passes a part of a block.

    Args:
        read: what the norms in front of the part at a place read, of the stream there; by default the stream itself.
        past: what the part is added to instead of that stream, made of what the norm reads.
        parts: which of them, by default all.
    """
    streams: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def given(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any) -> Any:
            seen = read(place, args[0]) if read else args[0]
            streams[place] = args[0], seen
            return (seen, *args[1:])

        return hook

    def added(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            stream, seen = streams.pop(place)
            first = output[0] if isinstance(output, tuple) else output
            first = first + (past(place, seen) - stream)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    try:
        passed = passed_parts(block)
        for number, (name, (norms, part)) in enumerate(passed.items()):
            place = len(passed) * block.index + number
            if parts is not None and name not in parts:
                continue
            for norm in norms:
                handles.append(model.get_submodule(f"{block.path}.{norm}").register_forward_pre_hook(given(place)))
            handles.append(model.get_submodule(f"{block.path}.{part}").register_forward_hook(added(place)))
        yield
    finally:
        for handle in handles:
            handle.remove()

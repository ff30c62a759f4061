"""Masks beside the weights: which weights were removed is written down, not guessed from zeros."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import RequestError
from secateur.files import read_tensors, write_tensors

FOLDER = "masks"


def pack(kept: Tensor) -> Tensor:
    """Eight entries of a bool tensor in each byte, the first in the highest bit; the last byte is filled with zeros."""
    bits = kept.reshape(-1).view(torch.uint8)  # a large mask is not copied
    if missing := -len(bits) % 8:
        bits = torch.nn.functional.pad(bits, (0, missing))
    bits = bits.view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8, device=bits.device)
    for place in range(8):
        packed |= bits[:, place] << (7 - place)
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pack` was given."""
    bits = torch.empty(len(packed), 8, dtype=torch.bool, device=packed.device)
    for place in range(8):
        bits[:, place] = packed >> (7 - place) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(shape)


@dataclass(frozen=True)
class PackedMask:
    """A mask in an eighth of its memory."""

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, kept: Tensor) -> "PackedMask":
        return cls(pack(kept).cpu(), tuple(kept.shape))

    def kept(self) -> Tensor:
        """The mask as it was given."""
        return unpack(self.bits, self.shape)


def write_masks(path: Path, kept: Mapping[str, PackedMask]) -> None:
    """Writes masks by the names of their matrices; shapes go into the header."""
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    write_tensors(path, {name: mask.bits for name, mask in kept.items()}, {"shapes": json.dumps(shapes)})


def read_mask_file(path: Path) -> dict[str, PackedMask]:
    """What `write_masks` wrote, by matrix."""
    tensors, metadata = read_tensors(path)
    shapes = json.loads(metadata["shapes"])
    return {name: PackedMask(packed, tuple(shapes[name])) for name, packed in tensors.items()}


def read_masks(directory: str | Path) -> dict[str, Tensor]:
    """The masks of a compressed model: {matrix: (outputs, inputs) bool, True where a weight stays}.

    Where several steps of a recipe pruned a matrix, what the last of them said.

    Raises RequestError when the directory holds none.
    """
    root = Path(directory) / "secateur"

    def order(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", str(path.relative_to(root)))]

    files = sorted(root.rglob(f"{FOLDER}/*.safetensors"), key=order)
    if not files:
        raise RequestError(
            f"{directory} holds no masks: no weights were zeroed there, or secateur/{FOLDER} was removed."
        )
    return {name: mask.kept() for path in files for name, mask in read_mask_file(path).items()}

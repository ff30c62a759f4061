"""How much the loss reacts to each unit's weights: Taylor terms of every tensor that is coupled to the units, in one pass.

What is kept is summed over each row or column that a unit has in a tensor, so files are small whatever the network; while
it is collected, the dense model and two sums for each coupled parameter are in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from secateur.calibration.samples import Samples
from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RunError
from secateur.files import read_tensors, write_tensors, write_text
from secateur.network.anatomy import Axis, Group, Slice
from secateur.network.source import Source, dense_model

Term = Literal["first", "second", "mixed"]
_PARTS = ("first", "first_size", "second", "mixed_size")


@dataclass(frozen=True)
class TensorTerms:
    """Taylor terms of one coupled tensor, each (count, width): a row or column of it for each unit and channel.

    With weights w, g the mean over sequences of ∂loss/∂w, F the mean of its square (the diagonal of the empirical Fisher
    matrix): loss without w ≈ loss − w g + ½ w² F.

    Args:
        first: Σ w g, signed.
        first_size: Σ |w g|.
        second: Σ w² F.
        mixed_size: Σ |w g − ½ w² F|.
    """

    first: Tensor
    first_size: Tensor
    second: Tensor
    mixed_size: Tensor

    @classmethod
    def of(cls, weights: Tensor, gradients: Tensor, squares: Tensor) -> "TensorTerms":
        """From (count, width, n) each."""
        first, second = weights * gradients, weights.square() * squares
        parts = (first, first.abs(), second, (first - second / 2).abs())
        return cls(*(part.sum(-1, dtype=torch.float64).float() for part in parts))

    def sums(self, term: Term) -> Tensor:
        """(count, width) Σ s with s = w g, w² F, or w g − ½ w² F."""
        return {"first": self.first, "second": self.second, "mixed": self.first - self.second / 2}[term]

    def sizes(self, term: Term) -> Tensor:
        """(count, width) Σ |s|."""
        return {"first": self.first_size, "second": self.second, "mixed": self.mixed_size}[term]


@dataclass(frozen=True)
class UnitGradients:
    """How much the loss reacts to the units of one kind in one block.

    Args:
        tensors: of each coupled tensor, in the order of the group: what makes the units, weights and biases (gate or
            queries first), then the columns of the output matrix.
        samples: over how many sequences g and F are means.
    """

    tensors: tuple[TensorTerms, ...]
    samples: int


def learn_unit_gradients(
    source: Source,
    samples: Samples,
    axes: Sequence[Axis],
    folder: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> None:
    """Collects the gradients of the next-token loss, one backward for each sequence, and keeps by block in `folder` what
    they say of the units of these kinds.

    The dense model and two sums for each parameter coupled to units are in memory, in float32. The first process does it
    for all.

    Raises RunError naming the parameter whose gradients are not finite.
    """
    marker = folder / "complete"
    if processes()[0] == 0 and not marker.exists():
        groups = {
            block.index: [group for axis in axes if (group := block.group(axis)) is not None]
            for block in source.anatomy.blocks
        }
        model = dense_model(source, device).requires_grad_(False)
        names = {part.parameter for found in groups.values() for group in found for part in group.slices}
        wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
        sums = {name: torch.zeros_like(parameter) for name, parameter in wanted.items()}
        squares = {name: torch.zeros_like(parameter) for name, parameter in wanted.items()}

        def count(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                # taken as soon as it is there, so that never more than a few gradients are in memory
                assert parameter.grad is not None, "the hook of a gradient that is there"
                sums[name] += parameter.grad
                squares[name].addcmul_(parameter.grad, parameter.grad)
                parameter.grad = None

            return hook

        for name, parameter in wanted.items():
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(count(name))
        with torch.enable_grad(), progress("gradients", len(samples.sequences)) as bar:
            for ids in samples.sequences:
                batch = ids.unsqueeze(0).to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:]).backward()
                bar.advance()
        for name, tensor in squares.items():
            if not bool(torch.isfinite(tensor.sum())):
                raise RunError(f"the gradients of {name} are not finite on the calibration tokens; check the model.")
        for block, found in groups.items():
            told = {
                f"{group.axis}.{place}.{part}": getattr(terms, part)
                for group in found
                for place, terms in enumerate(_terms(group, wanted, sums, squares, len(samples.sequences)))
                for part in _PARTS
            }
            write_tensors(folder / f"{block}.safetensors", told)
        write_text(folder / "samples", str(len(samples.sequences)))
        write_text(marker, "")
    barrier()


@torch.no_grad()
def _terms(
    group: Group,
    weights: Mapping[str, Parameter],
    sums: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    count: int,
) -> list[TensorTerms]:
    return [
        TensorTerms.of(
            _rows(weights[part.parameter], part, group.count),
            _rows(sums[part.parameter], part, group.count) / count,
            _rows(squares[part.parameter], part, group.count) / count,
        )
        for part in group.slices
    ]


def _rows(tensor: Tensor, part: Slice, count: int) -> Tensor:
    """(count, width, n) what the units have of a tensor; n is 1 for a vector."""
    mine = tensor.narrow(part.dim, part.offset, count * part.width).movedim(part.dim, 0)
    return mine.reshape(count, part.width, -1)


def pretend_unit_gradients(folder: Path, block: int, groups: Sequence[Group]) -> None:
    """Leaves what `read_unit_gradients` finds, with drawn numbers: for timing what comes after."""
    drawn = torch.Generator().manual_seed(0)
    told = {
        f"{group.axis}.{place}.{part}": torch.rand(group.count, where.width, generator=drawn)
        for group in groups
        for place, where in enumerate(group.slices)
        for part in _PARTS
    }
    write_tensors(folder / f"{block}.safetensors", told)
    write_text(folder / "samples", "1")


def read_unit_gradients(folder: Path, block: int, group: Group) -> UnitGradients:
    """What `learn_unit_gradients` kept of the units of one kind in one block."""
    told, _ = read_tensors(folder / f"{block}.safetensors")
    tensors = tuple(
        TensorTerms(*(told[f"{group.axis}.{place}.{part}"] for part in _PARTS)) for place in range(len(group.slices))
    )
    return UnitGradients(tensors, int((folder / "samples").read_text()))

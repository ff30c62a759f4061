"""How much the loss reacts to each weight, on calibration tokens: the one statistic that needs the whole model in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from secateur.calibration.samples import Samples
from secateur.calibration.statistics import Gradients
from secateur.context import Progress, barrier, processes, silent
from secateur.errors import RunError
from secateur.files import read_json, read_tensors, write_json, write_tensors, write_text
from secateur.network.matrices import MatrixRef, view
from secateur.network.modelling_file import BLOCK, part_parameters
from secateur.network.source import Source, dense_model


@dataclass(frozen=True)
class BlockGradients:
    """How much the loss reacts to each block: Σ over its weights of |Σ over sequences of w · ∂loss/∂w|.

    Args:
        matrices: (blocks,) over parameters of two or more dimensions.
        vectors: (blocks,) over all others.
    """

    matrices: Tensor
    vectors: Tensor


def learn_gradients(
    source: Source,
    samples: Samples,
    refs: Mapping[int, Sequence[MatrixRef]],
    folder: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> None:
    """Sums the squared gradients of the next-token loss over the sequences, and keeps them by block in `folder`.

    The dense model and one gradient and one sum for each parameter of `refs` are in memory of every process, in float32.
    Processes share the sequences out; their sums are added in the order of the processes.

    Raises RunError naming the parameter whose gradients are not finite.
    """
    marker, (rank, world) = folder / "complete", processes()
    if not marker.exists():
        model = dense_model(source, device)
        names = {ref.parameter for block in refs.values() for ref in block}
        wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        squares = {}
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            squares[name] = torch.zeros_like(parameter)
        mine = samples.sequences[rank::world]
        with torch.enable_grad(), progress("gradients", len(mine)) as bar:
            for ids in mine:
                batch = ids.unsqueeze(0).to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:]).backward()
                for name, parameter in wanted.items():
                    if parameter.grad is not None:  # an expert that no token reached has none
                        squares[name].addcmul_(parameter.grad, parameter.grad)
                        parameter.grad = None
                bar.advance()
        for name, tensor in squares.items():
            if not bool(torch.isfinite(tensor.sum())):
                raise RunError(f"the gradients of {name} are not finite on the calibration tokens; check the model.")
        of_block = {block: sorted({ref.parameter for ref in found}) for block, found in refs.items()}
        for block, own in of_block.items():
            write_tensors(_part(folder, block, rank), {name: squares[name] for name in own})
        barrier()
        if rank == 0:
            del model, wanted, squares
            for block, own in of_block.items():
                parts = [read_tensors(_part(folder, block, each))[0] for each in range(world)]
                write_tensors(
                    folder / f"{block}.safetensors",
                    {name: reduce(torch.add, (part[name] for part in parts)) for name in own},
                )
                for each in range(world):
                    _part(folder, block, each).unlink()
            write_text(folder / "samples", str(len(samples.sequences)))
            write_text(marker, "")
    barrier()


def _part(folder: Path, block: int, process: int) -> Path:
    """What one process found of a block."""
    return folder / f"{block}.of-{process}.safetensors"


def learn_block_gradients(
    source: Source, samples: Samples, path: Path, device: str = "cpu", progress: Progress = silent, part: str = BLOCK
) -> BlockGradients:
    """Sums the signed gradients of the next-token loss over the sequences, and keeps what they say of each block in `path`.

    The dense model and one gradient for each parameter of its blocks are in memory, in float32. The first process does it
    for all. part: of each block; what lies outside it is not counted.

    Raises RunError naming the block whose gradients are not finite.
    """
    if processes()[0] == 0 and not path.exists():
        model = dense_model(source, device)
        block_of = {name: block.index for block in source.anatomy.blocks for name in part_parameters(block, part)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in block_of and parameter.is_floating_point())
        with torch.enable_grad(), progress("gradients", len(samples.sequences)) as bar:
            for ids in samples.sequences:
                batch = ids.unsqueeze(0).to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                # not cleared between sequences: the sum over them is what is wanted
                functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:]).backward()
                bar.advance()
        found = {kind: [0.0] * len(source.anatomy.blocks) for kind in ("matrices", "vectors")}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # an expert that no token reached has none
                kind = "matrices" if parameter.ndim > 1 else "vectors"
                size = (parameter.detach() * parameter.grad).abs().sum(dtype=torch.float64)
                if not bool(torch.isfinite(size)):
                    raise RunError(
                        f"the gradients of {name} are not finite on the calibration tokens; check the model."
                    )
                found[kind][block_of[name]] += float(size)
        write_json(path, found)
    barrier()
    return BlockGradients(**{kind: torch.tensor(sums, dtype=torch.float64) for kind, sums in read_json(path).items()})


def pretend_gradients(folder: Path, block: int, shapes: Mapping[str, torch.Size]) -> None:
    """Leaves what `read_gradients` finds, with drawn numbers: for timing what comes after."""
    drawn = torch.Generator().manual_seed(0)
    write_tensors(
        folder / f"{block}.safetensors", {name: torch.rand(shape, generator=drawn) for name, shape in shapes.items()}
    )
    write_text(folder / "samples", "1")


def read_gradients(folder: Path, ref: MatrixRef) -> Gradients:
    """What `learn_gradients` kept of one matrix."""
    tensors, _ = read_tensors(folder / f"{ref.block}.safetensors")
    return Gradients(view(ref, tensors[ref.parameter]).contiguous(), int((folder / "samples").read_text()))

"""Every matrix of a network that multiplies tokens, one by one: linear layers, and each expert of a stacked bank.

What a matrix is follows from the module tree, from the anatomy and from trials on random numbers; names decide nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import RequestError
from secateur.network import recognise
from secateur.network.anatomy import Anatomy, Block
from secateur.network.recognise import join
from secateur.network.trace import Call, clone, describe, first_tensor, real_call, trace

TOLERANCE = 1e-5  # of the largest output: what is not touched comes out the same, but for the order of sums


@dataclass(frozen=True)
class MatrixRef:
    """One matrix that multiplies tokens, y = W x.

    Args:
        name: the parameter's, with the expert's index in brackets where it is a slice of a stacked one.
        parameter: name in the model of the parameter that holds it.
        expert: index of the expert it belongs to, None outside experts.
        rows, columns: outputs and inputs.
        transposed: whether the parameter stores it as (inputs, outputs).
        block: index of its block.
        role: "attention"; "feed_forward", a shared expert's too; "expert"; "mixer", which mixes tokens beside a
            convolution, as in Mamba; "mixer_step", the matrix there that widens the step size; "other".
    """

    name: str
    parameter: str
    expert: int | None
    rows: int
    columns: int
    transposed: bool
    block: int
    role: str


def view(ref: MatrixRef, parameter: Tensor) -> Tensor:
    """(rows, columns) the matrix, a view of the parameter that holds it."""
    matrix = parameter[ref.expert] if parameter.ndim == 3 else parameter
    return matrix.T if ref.transposed else matrix


@torch.no_grad()
def put(ref: MatrixRef, parameter: Tensor, matrix: Tensor) -> None:
    """Writes a (rows, columns) matrix into the parameter that holds it, in place and in its dtype."""
    view(ref, parameter).copy_(matrix)


@dataclass(frozen=True)
class _Found:
    """A matrix of a block, its names relative to the block; `stacked` where it is a slice of its parameter."""

    parameter: str
    expert: int | None
    rows: int
    columns: int
    transposed: bool
    role: str
    stacked: bool = False


def matrices(model: nn.Module, anatomy: Anatomy) -> list[list[MatrixRef]]:
    """The matrices of each block, in the order of its modules. Left out are the scoring of experts, gates with one
    output, and what is the same tensor as one before it.

    model: the network, meta included; nothing of its weights is read.

    Raises RequestError where the experts of a block cannot be run, so that it stays open which side is their input.
    """
    modules = [model.get_submodule(block.path) for block in anatomy.blocks]
    signatures = [recognise.signature(module, index) for index, module in enumerate(modules)]
    first = {signature: index for index, signature in reversed(list(enumerate(signatures)))}
    banks = [
        join(block.path, bank)
        for block, module in zip(anatomy.blocks, modules, strict=True)
        for bank in recognise.expert_banks(module)
    ]
    stacked = {i: anatomy.blocks[i].path for i in sorted(first.values()) if recognise.expert_banks(modules[i])}
    traces = trace(model, stacked, banks) if stacked else {}
    tried: dict[Any, dict[str, int] | str] = {}
    found = {
        index: _examine(
            modules[index], anatomy.blocks[index], anatomy.hidden, traces[index].calls if index in traces else {}, tried
        )
        for index in first.values()
    }
    repeated = {name for group in anatomy.tied for name in group[1:]}
    result = []
    for block, signature in zip(anatomy.blocks, signatures, strict=True):
        refs = [_ref(each, block) for each in found[first[signature]]]
        result.append([ref for ref in refs if ref.parameter not in repeated])
    return result


def _ref(found: _Found, block: Block) -> MatrixRef:
    parameter = join(block.path, found.parameter)
    name = f"{parameter}[{found.expert}]" if found.stacked else parameter
    return MatrixRef(
        name, parameter, found.expert, found.rows, found.columns, found.transposed, block.index, found.role
    )


def _examine(
    module: nn.Module, block: Block, hidden: int, calls: dict[str, Call], tried: dict[Any, dict[str, int] | str]
) -> list[_Found]:
    """The matrices of one block. tried: what trials of banks have shown so far, by how a bank is built."""

    def local(name: str) -> str:
        return name.removeprefix(block.path + ".")

    router = local(block.experts.router) if block.experts and block.experts.router else None
    host = local(block.experts.module) + "." if block.experts else None
    roles = _roles(module, block, hidden)
    found: list[tuple[str, _Found]] = []
    for matrix in recognise.matrices(module):
        if matrix.weight == router or matrix.outputs == 1:
            continue
        expert, role = None, roles.get(matrix.weight, "other")
        if host and matrix.weight.startswith(host):
            number = matrix.weight.removeprefix(host).partition(".")[0]
            expert, role = (int(number), "expert") if number.isdecimal() else (None, role)
        size = (matrix.outputs, matrix.inputs, matrix.output_dim == 1)
        found.append((matrix.module, _Found(matrix.weight, expert, *size, role)))
    for path, bank in recognise.expert_banks(module).items():
        stacks = {name: p for name, p in bank._parameters.items() if p is not None and p.ndim == 3 and min(p.shape) > 1}
        built = recognise.signature(bank)
        if built not in tried:
            tried[built] = _input_dims(bank, list(stacks), calls.get(path), hidden)
        sides = tried[built]
        if isinstance(sides, str):
            raise RequestError(
                f"the experts {join(block.path, path)} could not be examined by running them on random numbers ({sides}), "
                "so it is not known which side of their matrices is the input."
            )
        for name, stack in stacks.items():
            inputs, outputs = stack.shape[sides[name]], stack.shape[3 - sides[name]]
            found += [
                (path, _Found(join(path, name), expert, outputs, inputs, sides[name] == 1, "expert", stacked=True))
                for expert in range(stack.shape[0])
            ]
    order = {path: number for number, (path, _) in enumerate(module.named_modules())}
    return [each for _, each in sorted(found, key=lambda entry: order[entry[0]])]


def _roles(module: nn.Module, block: Block, hidden: int) -> dict[str, str]:
    """What the linear layers of a block are for, by the name of their weight in it; those not known are left out."""
    roles: dict[str, str] = {}
    for path, part in module.named_modules():
        if not (isinstance(part, nn.Conv1d) and part.groups == part.in_channels > 1):
            continue
        beside = path.rpartition(".")[0]
        for matrix in recognise.matrices(module.get_submodule(beside)):
            # in Mamba the step size comes through a matrix of low rank: it reads neither the stream nor the channels
            step = matrix.outputs == part.in_channels and matrix.inputs not in (hidden, part.in_channels)
            roles[join(beside, matrix.weight)] = "mixer_step" if step else "mixer"
    prefix = len(block.path) + 1
    if block.attention:
        parts = (block.attention.q, block.attention.k, block.attention.v, block.attention.o)
        roles.update({name[prefix:]: "attention" for names in parts for name in names})
    if block.feed_forward:
        roles.update({part.parameter[prefix:]: "feed_forward" for part in block.feed_forward.group.slices})
    return roles


def _input_dims(bank: nn.Module, names: Sequence[str], call: Call | None, hidden: int) -> dict[str, int] | str:
    """Which dimension, 1 or 2, of each stacked parameter meets its input; or why that cannot be told.

    Two things show it, whatever the shapes. Where one channel of the input is zero, what the first matrix holds for
    that channel has no effect. What the last matrix holds for one channel of the output changes that channel alone.
    """
    if call is None:
        return "the model could not be traced"
    generator = torch.Generator().manual_seed(0)
    shapes = {name: bank.get_parameter(name).shape[1:] for name in names}
    values = {name: torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5) for name, shape in shapes.items()}
    stacks = {id(bank.get_parameter(name)): values[name] for name in names}

    def stand_in(parameter: Tensor) -> Tensor:
        # all experts are one in memory, which is enough to see what each of them does
        if id(parameter) in stacks:
            return stacks[id(parameter)].expand(parameter.shape)
        if parameter.ndim < 2:
            return torch.rand(parameter.shape, generator=generator) + 0.5
        return torch.zeros(()).expand(parameter.shape)

    try:
        twin = clone(bank, stand_in, lambda buffer: torch.ones(buffer.shape, dtype=buffer.dtype))
        given = real_call(call, hidden, generator)
        width = _width(given)

        def run(silent: bool = False) -> Tensor:
            args, kwargs = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, given)
            if silent:
                first_tensor((args, kwargs))[..., 0] = 0  # type: ignore[index]
            with torch.no_grad():
                output = first_tensor(twin(*args, **kwargs))
            if output is None or not bool(torch.isfinite(output).all()) or not bool(output.any()):
                raise ValueError("they gave no usable output")
            return output.reshape(-1, output.shape[-1])

        usual, silent = run(), run(silent=True)

        def changed(name: str, dim: int, base: Tensor) -> list[int]:
            """Channels of the output that feel it when the first entry along `dim` is another."""
            entry = values[name].select(dim - 1, 0)
            before = entry.clone()
            entry.add_(torch.randn(entry.shape, generator=generator))
            difference = (run(silent=base is silent) - base).abs().amax(dim=0)
            entry.copy_(before)
            return (difference > TOLERANCE * base.abs().max()).nonzero().flatten().tolist()

        sides = {}
        for name, value in values.items():
            told = set()
            for dim in (1, 2):
                size = value.shape[dim - 1]
                felt = changed(name, dim, usual) if size in (width, usual.shape[1]) else []
                if size == usual.shape[1] and felt == [0]:
                    told.add(3 - dim)
                elif size == width and felt and not changed(name, dim, silent):
                    told.add(dim)
            if len(told) != 1:
                return f"what {name} does is not clear"
            sides[name] = told.pop()
        return sides
    except Exception as error:  # a foreign module may fail in any way; then nothing is known
        return describe(error)


def _width(call: Any) -> int:
    first = first_tensor(call)
    if first is None or not first.is_floating_point():
        raise ValueError("they are not given a tensor of numbers first")
    return first.shape[-1]

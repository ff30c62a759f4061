"""Where the neurons of experts lie that stand together in stacked parameters, found by trials on random numbers.

Shapes leave open which dimension a neuron lies along, whether gate and up stand one behind the other or alternate, and
which biases are a neuron's. Every reading that the shapes allow is tried on a copy of the bank with a few neurons: it holds
where cutting neurons gives what silencing them gives.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.network.probe import UNITS
from secateur.network.recognise import ExpertsProposal
from secateur.network.trace import Call, clone, describe, first_tensor, real_call
from secateur.network.trial import TOLERANCE, stand_in, stand_in_buffer

_READINGS = 64  # more than any bank that is known allows


@dataclass(frozen=True)
class BankPart:
    """Where neurons lie in one stacked parameter of a bank, as in `secateur.network.anatomy.Slice`; dim counts the first."""

    name: str
    dim: int
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class BankLayout:
    """inputs: what makes the neurons, the matrix behind the nonlinearity first where it can be told, biases behind the
    matrices. output: the matrix that reads them.
    """

    inputs: tuple[BankPart, ...]
    output: BankPart


def try_bank(bank: nn.Module, found: ExpertsProposal, hidden: int, call: Call | None) -> BankLayout | str:
    """How the neurons of every expert lie in `bank`, on any device, meta included; or why that is not known.

    call: how the bank was called in a trace of the whole model.
    """
    if call is None:
        return "the model could not be traced"
    said = "its shapes are not those of feed-forward layers"
    for number, layout in enumerate(_readings(bank, found.width, hidden)):
        if number == _READINGS:
            return said
        try:
            trial = _BankTrial(bank, layout, found, hidden, call)
            refusal = trial.refusal()
            if not refusal:
                return trial.sorted()
        except Exception as error:  # a foreign module may fail in any way; then this reading does not hold
            refusal = f"a copy with {UNITS} neurons could not be run ({describe(error)})"
        said = refusal if number == 0 else said
    return said


def _readings(bank: nn.Module, units: int, hidden: int) -> Iterator[BankLayout]:
    """Every way in which the shapes could be those of experts with so many neurons, likeliest first."""
    parameters = {name: p for name, p in bank._parameters.items() if p is not None}
    stacks = {name: tuple(p.shape) for name, p in parameters.items() if p.ndim == 3}
    rows = {name: p.shape[1] for name, p in parameters.items() if p.ndim == 2}
    for output in reversed(stacks):  # modules mostly hold their parameters in the order of use
        for out in (dim for dim in (2, 1) if stacks[output][dim] == units and stacks[output][3 - dim] == hidden):
            others = [name for name in stacks if name != output]
            if not others:
                continue
            sides = [
                [
                    (name, dim, stacks[name][dim] // units)
                    for dim in (1, 2)
                    if stacks[name][3 - dim] == hidden and stacks[name][dim] in (units, 2 * units)
                ]
                for name in others
            ]
            for chosen in product(*sides):
                yield from _with_biases(chosen, rows, units, hidden, BankPart(output, out))


def _with_biases(
    matrices: tuple[tuple[str, int, int], ...], rows: Mapping[str, int], units: int, hidden: int, output: BankPart
) -> Iterator[BankLayout]:
    """matrices: (name, dimension of the neurons, numbers that each has there). rows: lengths of biases by name."""
    fused = {branches for _, _, branches in matrices}
    # a bias is a neuron's, or the output's, which stays whole
    own = [
        [(name, 1, size // units)] * (size // units in fused and size % units == 0) + [None] * (size == hidden)
        or [None]
        for name, size in rows.items()
    ]
    for biases in product(*own):
        parts = [*matrices, *(bias for bias in biases if bias is not None)]
        for alternate in (False, True) if 2 in fused else (False,):
            inputs: list[BankPart] = []
            for name, dim, branches in parts:
                if branches == 1 or alternate:
                    inputs.append(BankPart(name, dim, 0, branches))
                else:
                    inputs += [BankPart(name, dim, 0), BankPart(name, dim, units)]
            yield BankLayout(tuple(inputs), output)


class _BankTrial:
    """A copy of a bank that runs with any few neurons; all its experts are one in memory."""

    def __init__(self, bank: nn.Module, layout: BankLayout, found: ExpertsProposal, hidden: int, call: Call) -> None:
        self._layout, self._units, self._count = layout, found.width, found.count
        generator = torch.Generator().manual_seed(0)
        self._call = real_call(call, hidden, generator)
        self._twin = clone(bank, lambda tensor: stand_in(tensor, generator), stand_in_buffer)
        config: Any = getattr(self._twin, "config", None)  # a copy too
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # others ask for widths that numbers in memory are aligned by
        for name, value in vars(self._twin).items():
            if type(value) is int and value == found.width and value not in (hidden, found.count):
                setattr(self._twin, name, UNITS)
        self._few: dict[str, Tensor] = {}
        for part in (*layout.inputs, layout.output):
            if part.name not in self._few:
                shape = list(bank.get_parameter(part.name).shape[1:])
                shape[part.dim - 1] = shape[part.dim - 1] // found.width * UNITS
                scale = max(prod(shape) // shape[part.dim - 1], 1) ** -0.5
                self._few[part.name] = torch.randn(shape, generator=generator) * (2 * scale if len(shape) > 1 else 0.5)

    def _at(self, part: BankPart, units: Tensor) -> Tensor:
        """Where these of the few neurons lie."""
        offset = part.offset // self._units * UNITS
        return (offset + units[:, None] * part.width + torch.arange(part.width)).flatten()

    def _without(self, units: Tensor) -> dict[str, Tensor]:
        gone: dict[str, tuple[int, list[Tensor]]] = {}
        for part in (*self._layout.inputs, self._layout.output):
            gone.setdefault(part.name, (part.dim - 1, []))[1].append(self._at(part, units))
        found = {}
        for name, (dim, places) in gone.items():
            stays = torch.ones(self._few[name].shape[dim], dtype=torch.bool)
            stays[torch.cat(places)] = False
            found[name] = self._few[name].index_select(dim, stays.nonzero().flatten())
        return found

    def _changed(self, part: BankPart, factor: float) -> dict[str, Tensor]:
        tensor = self._few[part.name].clone()
        tensor.index_copy_(
            part.dim - 1,
            (places := self._at(part, torch.arange(UNITS))),
            tensor.index_select(part.dim - 1, places) * factor,
        )
        return {**self._few, part.name: tensor}

    def _run(self, values: Mapping[str, Tensor]) -> Tensor:
        """(tokens, hidden) what the bank gives with these numbers in every expert."""
        for name, value in values.items():
            self._twin._parameters[name] = nn.Parameter(value.expand(self._count, *value.shape), requires_grad=False)
        args, kwargs = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, self._call)
        with torch.no_grad():
            output = first_tensor(self._twin(*args, **kwargs))
        if output is None or not bool(torch.isfinite(output).all()):
            raise ValueError("it gave no usable output")
        return output.reshape(-1, output.shape[-1])

    def refusal(self) -> str:
        """Why this reading does not hold; "" where it does."""
        full, output = self._run(self._few), self._layout.output
        nothing = self._run({**self._few, output.name: torch.zeros_like(self._few[output.name])})
        size = float((full - nothing).abs().max())
        if not size > 0:
            return "its output does not depend on them"
        for cut in ([0], [3], [UNITS - 1], [1, 2, 5]):
            units = torch.tensor(cut)
            silent = self._few[output.name].index_fill(output.dim - 1, units, 0.0)
            zeroed = self._run({**self._few, output.name: silent})
            if float((zeroed - full).abs().max()) <= TOLERANCE * size:
                return "some of their neurons have no effect"
            if not float((self._run(self._without(units)) - zeroed).abs().max()) <= TOLERANCE * size:
                return "cutting a neuron changes what the other neurons give"
        return ""

    def sorted(self) -> BankLayout:
        """The layout with the matrix first in which the output is not linear, where the other shows itself as linear."""
        inputs = list(self._layout.inputs)
        matrices = [part for part in inputs if self._few[part.name].ndim == 2]
        if len(matrices) != 2 or len(inputs) != 2:  # one alone; or biases beside, with which nothing is linear
            return self._layout
        full = self._run(self._few)
        size = float(full.abs().max())
        # negative, because ReLU too is linear for positive factors
        linear = [
            float((self._run(self._changed(p, -2.0)) + 2 * full).abs().max()) <= TOLERANCE * size for p in matrices
        ]
        if linear == [True, False]:
            inputs.reverse()
        return BankLayout(tuple(inputs), self._layout.output)

"""How a model's parameter is made of stored tensors: mostly it is one, but experts stored apart are merged in memory.

transformers declares for each architecture how stored tensors become parameters, as a chain of operations on tensors.
Here that chain is followed on shapes alone, which shows where each number goes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Split, Transpose

from secateur.errors import RunError

Index = tuple[slice | int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What one stored tensor gives to a parameter: parameter[region] = stored[taken], with two dimensions swapped.

    Args:
        key: name of the stored tensor.
        region: which part of the parameter it fills; () for all of it.
        taken: which part of the stored tensor that is; () for all of it. Otherwise other parameters lie beside it.
        swapped: dimensions that change places, None for none.
    """

    key: str
    region: Index = ()
    taken: Index = ()
    swapped: tuple[int, int] | None = None

    def given(self, stored: Tensor) -> Tensor:
        """What of the stored tensor lies in the parameter, in the parameter's order of dimensions; a view."""
        part = stored[self.taken]
        return part.transpose(*self.swapped) if self.swapped else part


def assemble(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> Tensor:
    """A parameter from its stored tensors; the stored tensor or a view of it where it is one."""
    given = [part.given(stored[part.key]) for part in parts]
    if not parts[0].region:
        return given[0]
    dtype = given[0].dtype
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype)
    parameter = torch.empty(_size(parts), dtype=dtype, device=given[0].device)
    for part, tensor in zip(parts, given, strict=True):
        parameter[part.region] = tensor
    return parameter


def take_apart(name: str, parts: Sequence[Part], parameter: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of a parameter, by key; views of it, except of those in which other parameters lie too.

    stored: the stored tensors as they are so far, at least those in which other parameters lie.

    A parameter of fewer experts, each stored apart, takes the names of the first: the others are left out. Where they are
    narrower, each stored tensor takes the same share of every dimension as before.

    Raises RunError where any other parameter that is not stored as it is has changed its shape.
    """
    found: dict[str, Tensor] = {}
    if stacked(parts):
        if 0 < len(parameter) < _size(parts)[0]:
            parts = [part for part in parts if _first(part) < len(parameter)]
        parts = resized(parts, tuple(parameter.shape))
    for part in parts:
        size = _size(parts) if part.region else part.given(stored[part.key]).shape if part.taken else parameter.shape
        if tuple(parameter.shape) != tuple(size):
            raise RunError(
                f"{name} was to become {list(parameter.shape)} from {list(size)}, but the checkpoint stores it in "
                f"another layout ({part.key}), in which Secateur cannot change its shape."
            )
        tensor = parameter[part.region]
        tensor = tensor.transpose(*part.swapped) if part.swapped else tensor
        if part.taken:
            whole = stored[part.key].to(tensor.dtype, copy=True)
            whole[part.taken] = tensor
            tensor = whole
        found[part.key] = tensor
    return found


def stacked(parts: Sequence[Part]) -> bool:
    """Whether every stored tensor lies in one entry of the parameter's first dimension, as experts stored apart do."""
    return all(part.region and isinstance(part.region[0], int) and not part.taken for part in parts)


def resized(parts: Sequence[Part], shape: Shape) -> Sequence[Part]:
    """The parts of a parameter of experts stored apart when every expert has another size; as they are where their shares
    of a dimension that changes are not equal, or cannot stay so.
    """
    size = _size(parts)
    for dim in range(1, len(size)):
        runs = {(index.start, index.stop) for part in parts if isinstance(index := part.region[dim], slice)}
        share = size[dim] // len(runs) if runs else 0
        even = sorted(runs) == [(start, start + share) for start in range(0, size[dim], share)] if share else False
        if shape[dim] == size[dim]:
            continue
        if not even or shape[dim] % len(runs):
            return parts
        new = shape[dim] // len(runs)
        parts = [
            replace(part, region=(*part.region[:dim], _scaled(part.region[dim], share, new), *part.region[dim + 1 :]))
            for part in parts
        ]
    return parts


def _scaled(index: slice | int, share: int, new: int) -> slice | int:
    return slice(index.start // share * new, index.stop // share * new) if isinstance(index, slice) else index


def _first(part: Part) -> int:
    index = part.region[0]
    assert isinstance(index, int), "asked of stacked parts alone"
    return index


def _size(parts: Sequence[Part]) -> Shape:
    """The shape of a parameter that several parts fill."""

    def stop(index: slice | int) -> int:
        return int(index.stop) if isinstance(index, slice) else index + 1

    return tuple(max(stop(part.region[dim]) for part in parts) for dim in range(len(parts[0].region)))


class Unsupported(Exception):  # noqa: N818 (says what, for a sentence made elsewhere)
    """An operation that is not understood here; its name is the message."""


class Misfit(Exception):  # noqa: N818
    """Stored tensors that do not fit together."""


@dataclass(frozen=True)
class Value:
    """A tensor that a chain of operations has made so far: its shape and the parts that fill it, regions written out."""

    shape: Shape
    parts: tuple[Part, ...]

    @classmethod
    def stored(cls, key: str, shape: Shape) -> "Value":
        return cls(shape, (Part(key, _all(shape)),))

    @property
    def compact(self) -> tuple[Part, ...]:
        """The parts; a single one that fills everything says so by an empty region."""
        if len(self.parts) == 1 and self.parts[0].region == _all(self.shape):
            return (replace(self.parts[0], region=()),)
        return self.parts

    @property
    def untouched(self) -> bool:
        return len(self.parts) == 1 and self.parts == Value.stored(self.parts[0].key, self.shape).parts


Values = dict[str, list[Value]]


def follow(
    operations: Sequence[Any],
    values: Values,
    sources: Sequence[str],
    targets: Sequence[str],
    wanted: Callable[[str], Shape],
) -> dict[str, Value]:
    """What a chain of transformers' conversion operations makes, by target pattern.

    Args:
        values: the stored tensors that each source pattern collected, in order.
        sources, targets: the patterns of the conversion.
        wanted: shape of the parameter behind a target pattern.

    Raises Unsupported for an operation that is not understood, Misfit for tensors that cannot be put together.
    """
    for operation in operations:
        values = _apply(operation, values, sources, targets, wanted)
    if len(targets) == 1 and len(values) == 1:
        values = {targets[0]: next(iter(values.values()))}
    if set(values) != set(targets) or any(len(made) != 1 for made in values.values()):
        raise Unsupported(" and ".join(map(repr, operations)))
    return {target: made[0] for target, made in values.items()}


def _apply(
    operation: Any, values: Values, sources: Sequence[str], targets: Sequence[str], wanted: Callable[[str], Shape]
) -> Values:
    # exact types: what derives from one of them does something else
    kind = type(operation)
    if kind is MergeModulelist:
        return {pattern: [_stack(made, operation.dim)] for pattern, made in values.items()}
    if kind is Concatenate and len(targets) == 1:
        ordered = [value for pattern in sources for value in values.get(pattern, [])]
        return {targets[0]: [_concatenate(ordered, operation.dim)]}
    only = [value for made in values.values() for value in made]
    if len(only) != 1 or not only[0].untouched:
        raise Unsupported(repr(operation))
    value = only[0]
    if kind is Transpose and len(targets) == 1:
        if operation.check_dims and value.shape == wanted(targets[0]):
            return {targets[0]: [value]}
        return {targets[0]: [_transpose(value, operation.dim0, operation.dim1)]}
    if kind is Split or (kind is Chunk and operation.num_shards_attribute is None):
        size, count = value.shape[operation.dim], len(targets)
        # as torch.chunk: equal sizes, the last one what is left
        sizes = [-(-size // count)] * (count - 1)
        sizes.append(size - sum(sizes))
        if kind is Split:
            sizes = [wanted(target)[operation.dim] for target in targets]
        return {target: [made] for target, made in zip(targets, _split(value, sizes, operation.dim), strict=True)}
    raise Unsupported(repr(operation))


def _all(shape: Shape) -> Index:
    return tuple(slice(0, size) for size in shape)


def _stack(values: Sequence[Value], dim: int) -> Value:
    if len({value.shape for value in values}) != 1:
        raise Misfit
    shape = values[0].shape
    parts = tuple(
        replace(part, region=(*part.region[:dim], index, *part.region[dim:]))
        for index, value in enumerate(values)
        for part in value.parts
    )
    return Value((*shape[:dim], len(values), *shape[dim:]), parts)


def _concatenate(values: Sequence[Value], dim: int) -> Value:
    if len({(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}) != 1:
        raise Misfit
    offset, parts = 0, []
    for value in values:
        for part in value.parts:
            index = part.region[dim]
            moved = slice(index.start + offset, index.stop + offset) if isinstance(index, slice) else index + offset
            parts.append(replace(part, region=(*part.region[:dim], moved, *part.region[dim + 1 :])))
        offset += value.shape[dim]
    return Value((*values[0].shape[:dim], offset, *values[0].shape[dim + 1 :]), tuple(parts))


def _transpose(value: Value, first: int, second: int) -> Value:
    shape = list(value.shape)
    shape[first], shape[second] = shape[second], shape[first]
    part = replace(value.parts[0], region=_all(tuple(shape)), swapped=(first, second))
    return Value(tuple(shape), (part,))


def _split(value: Value, sizes: Sequence[int], dim: int) -> list[Value]:
    if sum(sizes) != value.shape[dim] or min(sizes) < 1:
        raise Misfit
    made, offset = [], 0
    for size in sizes:
        shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
        taken = tuple(slice(offset, offset + size) if d == dim else slice(0, n) for d, n in enumerate(value.shape))
        made.append(Value(shape, (replace(value.parts[0], region=_all(shape), taken=taken),)))
        offset += size
    return made

"""Runs a model on fake tensors, which have shapes and history but no storage, to see what feeds what.

Also holds what trials on copies of single modules (`secateur.network.probe`) share with that run: copying a module
tree without its weights, and turning a recorded call into one with numbers.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

TOKENS = 12  # enough that no unit of a random feed-forward layer is silent on all of them

Call = tuple[tuple[Any, ...], dict[str, Any]]


def clone(
    module: nn.Module, parameter_as: Callable[[Tensor], Tensor], buffer_as: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of the module tree in evaluation mode, without hooks, with other parameters and buffers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter_as(parameter), requires_grad=parameter.is_floating_point())
    for buffer in module.buffers():
        memo[id(buffer)] = buffer_as(buffer)
    twin = copy.deepcopy(module, memo).eval()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where `path` points, below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def first_tensor(value: Any, width: int | None = None) -> Tensor | None:
    """The first tensor in a nested value, of last dimension `width` if given."""
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor) and (width is None or (leaf.ndim and leaf.shape[-1] == width)):
            return leaf
    return None


def describe(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(".")


class PassThrough(nn.Module):
    """Stands for a bank of experts, whose routing looks at values, which fake tensors lack."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@dataclass
class Trace:
    """What the modules of one block were given and gave, on fake tensors. Paths are relative to the block."""

    calls: dict[str, Call] = field(default_factory=dict)
    outputs: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)  # first tensor and its autograd node
    lengths: dict[str, int] = field(default_factory=dict)  # of tuples of outputs; 0 for an output that is no tuple
    error: str = ""  # why the run of the whole model stopped early

    def producer(self, tensor: Tensor | None, candidates: Iterable[str]) -> str | None:
        """Which of the modules `candidates` gave out `tensor`, or the tensor that it is a view of; the last one."""
        found = None
        for path in candidates:
            if tensor is not None and path in self.outputs and _base(self.outputs[path][0]) is _base(tensor):
                found = path
        return found

    def depends(self, tensor: Tensor, path: str, hidden: int) -> bool | None:
        """Whether `tensor` was computed from the output of module `path` within this block; None if not seen."""
        if path not in self.outputs or "" not in self.calls:
            return None
        entry = first_tensor(self.calls[""], hidden)
        stop = entry.grad_fn if entry is not None else None
        target = self.outputs[path][1]
        seen, todo = set(), [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node is stop or node in seen:
                continue
            if node is target:
                return True
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
        return False


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the stack of every operation that fake tensors refuse; the records say it in a line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def trace(model: nn.Module, blocks: dict[int, str], opaque: Sequence[str]) -> dict[int, Trace]:
    """Runs the whole `model` on fake tensors and records what happens in `blocks` (index to path).

    opaque: paths of modules to be passed through (banks of experts). A model that cannot be run so gives the records
    of the blocks that it reached.
    """
    traces = {index: Trace() for index in blocks}

    def watch(record: Trace, path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            record.calls.setdefault(path, (args, kwargs))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                record.outputs.setdefault(path, (tensor, tensor.grad_fn))
                record.lengths.setdefault(path, len(output) if isinstance(output, tuple) else 0)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        try:
            twin = clone(model, _fake, _fake)
            for path in opaque:
                set_submodule(twin, path, PassThrough())
            for index, path in blocks.items():
                block = twin.get_submodule(path)
                for name, module in block.named_modules():
                    watch(traces[index], name, module)
            for part in twin.modules():  # a cache would be filled with fake tensors and travel into the trials
                if hasattr(getattr(part, "config", None), "use_cache"):
                    part.config.use_cache = False  # type: ignore[union-attr]
            tokens = torch.zeros(1, TOKENS, dtype=torch.long)
            options = inspect.signature(twin.forward).parameters
            twin(tokens, **({"use_cache": False} if "use_cache" in options else {}))
        except Exception as error:  # a foreign model may fail in any way; the rest stays undetermined
            for record in traces.values():
                record.error = describe(error)
    return traces


def real_call(call: Call | None, hidden: int, generator: torch.Generator) -> Call:
    """A call with numbers in the place of a trace's fake tensors: noise for states and positions, no masking."""

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        if value.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if value.is_complex():
            return torch.randn(shape, dtype=value.dtype, generator=generator)
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        if len(shape) > 3 and shape[-1] != hidden:
            return torch.zeros(shape)  # an additive mask
        return torch.randn(shape, generator=generator)

    if call is None:
        return (torch.randn(1, TOKENS, hidden, generator=generator),), {}
    return tree_map(real, call[0]), tree_map(real, call[1])

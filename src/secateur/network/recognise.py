"""Proposes the parts of a network from its module tree, the shapes of its matrices and config numbers.

Nothing here reads a weight or trusts a name: what shapes leave open is settled by `secateur.network.probe`.
Names in this file are relative to the module they are looked for in, unless a docstring says otherwise.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import RequestError

_BUILT = "_is_hf_initialized"  # what transformers notes in the modules of a finished model; no setting


@dataclass(frozen=True)
class Matrix:
    """A linear map: `module` is its path; its weight has its outputs along `output_dim` (Conv1D is transposed)."""

    module: str
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    output_dim: int

    @property
    def parent(self) -> str:
        return self.module.rpartition(".")[0]


@dataclass(frozen=True)
class FeedForwardProposal:
    """`inputs` (one or two matrices; a fused one has two `segments`) and `down`, all inside module `host`."""

    host: str
    inputs: tuple[Matrix, ...]
    segments: int
    down: Matrix
    units: int

    @property
    def branches(self) -> tuple[tuple[Matrix, int], ...]:
        """Every input branch as (matrix, index of its first output)."""
        return tuple((matrix, part * self.units) for matrix in self.inputs for part in range(self.segments))


@dataclass(frozen=True)
class AttentionProposal:
    """Projections of one attention module; `fused` when one matrix holds several of q, k and v."""

    host: str
    inputs: tuple[Matrix, ...]
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    fused: bool


@dataclass(frozen=True)
class ExpertsProposal:
    """A bank of `count` experts of `width` units in module `host`; `router` is the parameter that scores them."""

    host: str
    count: int
    width: int
    router: str | None


def join(*parts: str) -> str:
    """Joins module or parameter paths, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def matrices(root: nn.Module) -> list[Matrix]:
    """Every linear map below `root` (`nn.Linear` and the transposed `Conv1D` of transformers), in module order."""
    found = []
    for path, module in root.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, (nn.Linear, Conv1D)) else None
        if weight is None or weight.ndim != 2:
            continue
        output_dim = 1 if isinstance(module, Conv1D) else 0
        bias = join(path, "bias") if module._parameters.get("bias") is not None else None
        outputs, inputs = weight.shape[output_dim], weight.shape[1 - output_dim]
        found.append(Matrix(path, join(path, "weight"), bias, inputs, outputs, output_dim))
    return found


def expert_banks(root: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold experts as stacked three-dimensional parameters, by path."""
    return {
        path: module
        for path, module in root.named_modules()
        if sum(p.ndim == 3 and min(p.shape) > 1 for p in module._parameters.values() if p is not None) >= 2
    }


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest outermost `nn.ModuleList` whose every element holds matrices, and its path.

    Where the model can name its decoder (encoder-decoder and multimodal models), only that is searched.
    Raises RequestError when there is none.
    """
    decoder = model
    get_decoder = getattr(model, "get_decoder", None)
    if callable(get_decoder):
        answer = get_decoder()
        decoder = answer if isinstance(answer, nn.Module) else model
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    found: dict[str, nn.ModuleList] = {}
    for path, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(outer + ".") for outer in found):
            continue  # lists inside blocks hold experts or heads, and may well be longer than the list of blocks
        full = {type(element) for element in module if len(matrices(element)) >= 2 or expert_banks(element)}
        # a block that lost its attention and its feed-forward is still one of its kind
        if all(type(element) in full for element in module):
            found[path] = module
    if not found:
        raise RequestError(
            f"No blocks were found in {type(model).__name__}: it has no module list whose every element holds linear "
            "layers. Give a decoder language model whose blocks stand in an nn.ModuleList."
        )
    path = max(found, key=lambda name: (len(found[name]), sum(p.numel() for p in found[name].parameters())))
    return join(prefix, path), found[path]


STREAM = "residual_stream"
"""The entry of the configuration of a model of ours whose stream is not as wide as its architecture says."""


def hidden_size(blocks: nn.ModuleList, config: Any) -> int:
    """Width of the residual stream: the config's number if matrices have it, else the size most matrices share."""
    sizes: Counter[int] = Counter()
    for matrix in matrices(blocks):
        sizes.update({matrix.inputs, matrix.outputs})
    proposed = (getattr(config, STREAM, None) or {}).get("width") or getattr(config, "hidden_size", None)
    if isinstance(proposed, int) and proposed in sizes:
        return proposed
    return sizes.most_common(1)[0][0]


def signature(block: nn.Module, index: int = -1) -> tuple[Any, ...]:
    """Equal for blocks that are built alike: classes and settings of all modules, shapes of all parameters.

    index: the block's own, which modules may hold as a setting without being different for it.
    """
    classes = tuple((path, type(module), _settings(module, index)) for path, module in block.named_modules())
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return classes, shapes


def _settings(module: nn.Module, index: int) -> tuple[Any, ...]:
    """Plain attributes; layers of one class may differ by them alone (window, sparsity of the activation)."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if (isinstance(value, (bool, float, str)) or (isinstance(value, int) and value != index)) and name != _BUILT
    )


def _common_parent(found: list[Matrix]) -> str:
    paths = [matrix.parent.split(".") if matrix.parent else [] for matrix in found]
    shared = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def _proposals(host: str, group: list[Matrix], hidden: int) -> Iterator[FeedForwardProposal]:
    # Wide first: where a module holds other square matrices too, the feed-forward part is the wide one.
    for down in sorted(group, key=lambda matrix: (matrix.inputs == hidden, -matrix.inputs)):
        if down.outputs != hidden:
            continue
        units = down.inputs
        rest = [matrix for matrix in group if matrix is not down and matrix.inputs == hidden]
        single = [matrix for matrix in rest if matrix.outputs == units]
        for pair in combinations(single, 2):
            yield FeedForwardProposal(host, pair, 1, down, units)
        for matrix in rest:
            if matrix.outputs == 2 * units:
                yield FeedForwardProposal(host, (matrix,), 2, down, units)
        for matrix in single:
            yield FeedForwardProposal(host, (matrix,), 1, down, units)


def feed_forward_proposals(block: nn.Module, hidden: int, outside: set[str]) -> Iterator[FeedForwardProposal]:
    """Every set of matrices of `block` whose shapes could make a feed-forward layer, likeliest first.

    Matrices of one parent module are tried together first, then those left over (layers wrapped one by one).
    hidden: width of the residual stream. outside: modules whose matrices are no candidates (experts).
    """
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices(block):
        if not any(matrix.module == path or matrix.module.startswith(path + ".") for path in outside):
            groups.setdefault(matrix.parent, []).append(matrix)
    for parent, group in groups.items():
        yield from _proposals(parent, group, hidden)
    lone = [group[0] for group in groups.values() if len(group) == 1]
    if len(lone) in (2, 3):
        yield from _proposals(_common_parent(lone), lone, hidden)


def attention_proposals(block: nn.Module, hidden: int, heads: int, taken: set[str]) -> Iterator[AttentionProposal]:
    """Every reading of the matrices of one module as attention with `heads` query heads, likeliest first.

    hidden: width of the residual stream. taken: paths of matrices that belong to other parts.
    """
    groups: dict[str, list[Matrix]] = {}
    for matrix in matrices(block):
        if matrix.module not in taken:
            groups.setdefault(matrix.parent, []).append(matrix)
    for parent, group in groups.items():
        # All four matrices may be square: modules mostly stand in the order of use, so the last proposes itself first.
        for output in reversed(group):
            inputs = tuple(matrix for matrix in group if matrix is not output)
            if output.outputs != hidden or output.inputs % heads or not 1 <= len(inputs) <= 3:
                continue
            if any(matrix.inputs != hidden for matrix in inputs):
                continue
            head_dim = output.inputs // heads
            # Whatever the packing, q, k and v together have (heads + 2 kv_heads) head_dim outputs.
            kv_heads, rest = divmod(sum(matrix.outputs for matrix in inputs) - output.inputs, 2 * head_dim)
            if rest or kv_heads < 1 or heads % kv_heads:
                continue
            sizes = sorted(matrix.outputs for matrix in inputs)
            q, kv = heads * head_dim, kv_heads * head_dim
            if sizes in (sorted([q, kv, kv]), sorted([q, 2 * kv]), [q + 2 * kv]):
                yield AttentionProposal(parent, inputs, output, heads, kv_heads, head_dim, len(inputs) < 3)


def experts_proposal(block: nn.Module, hidden: int) -> ExpertsProposal | None:
    """The bank of experts of `block`: stacked three-dimensional parameters, or a list of modules built alike."""
    for path, module in expert_banks(block).items():
        stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
        count = stacks[0].shape[0]
        widths = []
        for stack in stacks:
            sizes = list(stack.shape[1:])
            if hidden in sizes:
                sizes.remove(hidden)
                widths.append(sizes[0])
        if widths and all(stack.shape[0] == count for stack in stacks):
            return ExpertsProposal(path, count, min(widths), _router(block, path, count, hidden))
    for path, module in block.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({signature(element) for element in module}) > 1:
            continue
        downs = [matrix.inputs for matrix in matrices(module[0]) if matrix.outputs == hidden]
        if len(matrices(module[0])) >= 2 and downs:
            return ExpertsProposal(path, len(module), downs[0], _router(block, path, len(module), hidden))
    return None


def _router(block: nn.Module, bank: str, count: int, hidden: int) -> str | None:
    # attention may have as many outputs as there are experts, so what lies beside the bank comes first
    beside = join(bank.rpartition(".")[0], "")
    named = sorted(block.named_parameters(), key=lambda each: not each[0].startswith(f"{beside}."))
    for name, parameter in named:
        if not name.startswith(bank + ".") and sorted(parameter.shape) == sorted((count, hidden)):
            return name
    return None


def has_recurrence(block: nn.Module) -> bool:
    """Whether `block` mixes tokens by a state (Mamba and kin): a depthwise convolution beside bare state parameters."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1:
            parent = block.get_submodule(path.rpartition(".")[0])
            if any(parameter is not None for parameter in parent._parameters.values()):
                return True
    return False


def norm_parameters(root: nn.Module) -> list[str]:
    """Names of the scales and biases of norms below `root`: leaf modules that hold only equally long vectors."""
    names = []
    for path, module in root.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if not own or any(True for _ in module.children()) or isinstance(module, (nn.Linear, Conv1D)):
            continue
        shapes = {tuple(parameter.shape) for parameter in own.values()}
        shape = shapes.pop()
        if not shapes and len(shape) == 1 and shape[0] > 1:
            names += [join(path, name) for name in own]
    return names


def embeddings_and_head(model: nn.Module, blocks: str, config: Any) -> tuple[tuple[str, ...], str | None, int]:
    """Names of embedding weights outside the `blocks` (a path), of the head's weight, and the vocabulary's size."""
    inside = blocks + "."
    found = {
        join(path, "weight"): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not path.startswith(inside)
    }
    tokens: Any = None
    with suppress(AttributeError, NotImplementedError):  # no model of transformers, or one that does not know
        tokens = model.get_input_embeddings()  # type: ignore[operator]
    sizes = [module.num_embeddings for module in found.values()]
    proposed = getattr(config, "vocab_size", None)
    if isinstance(tokens, nn.Embedding):
        vocabulary = tokens.num_embeddings
    elif proposed in sizes:
        vocabulary = int(proposed)
    else:
        vocabulary = max(sizes, default=0)
    heads = [m.weight for m in matrices(model) if m.outputs == vocabulary and not m.module.startswith(inside)]
    return tuple(found), (heads[-1] if heads else None), vocabulary


def tied_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor, in parameter order.

    A skeleton on meta has lost the identity of tied tensors, so there the model's own declaration is added; a live
    model is believed as it is.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    group: dict[str, str] = {}
    first: dict[int, str] = {}
    on_meta = False
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group[name] = first.setdefault(id(parameter), name)
        on_meta = on_meta or parameter.is_meta
    declared = getattr(model, "all_tied_weights_keys", None) if on_meta else None
    for one, other in (declared or {}).items():
        if one in group and other in group and group[one] != group[other]:
            old, new = group[one], group[other]
            group = {name: new if root == old else root for name, root in group.items()}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(group[name], []).append(name)
    return tuple(tuple(found) for found in members.values() if len(found) > 1)

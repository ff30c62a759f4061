"""Whether a network built with smaller heads computes what the whole one does with the other dimensions silent.

Tried on copies of the attention of each kind of block, with random queries, keys and values and with what the models really
give their attention beside these: cosines and sines at positions up to the longest.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import RequestError
from secateur.network.anatomy import HeadDims, Slice
from secateur.network.channels import Channels, norms_over
from secateur.network.recognise import AttentionProposal, expert_banks, matrices, signature
from secateur.network.source import Source
from secateur.network.store import build
from secateur.network.trace import TOKENS, Call, PassThrough, clone, set_submodule
from secateur.network.trial import TOLERANCE, AttentionTrial, stand_in_buffer


def query_factor(source: Source, raw: Mapping[str, Any], where: Mapping[int, HeadDims], kept: Tensor) -> float:
    """What queries are multiplied by, because scores are divided by the root of the size of a head, or are not.

    Args:
        raw: says the smaller heads.
        where: the dimensions of the heads of each block.
        kept: (k,) dimensions that stay in queries and keys.

    Raises RequestError where no factor makes the smaller heads compute what they should.
    """
    narrow = build(source, raw)
    blocks = source.anatomy.blocks
    modules = {index: source.skeleton.get_submodule(blocks[index].path) for index in where}
    first = {signature(module, index): index for index, module in reversed(list(modules.items()))}
    hosts = {index: blocks[index].attention.module for index in sorted(first.values())}  # type: ignore[union-attr]
    size = next(iter(where.values())).head_dim
    found: set[float] = set()
    try:
        assert narrow is not None
        limit = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None) or TOKENS
        calls = [_calls(model, list(hosts.values()), limit) for model in (source.skeleton, narrow)]
        for index, host in hosts.items():
            pair = [
                (model.get_submodule(host), given[host])
                for model, given in zip((source.skeleton, narrow), calls, strict=True)
            ]
            compare = partial(_difference, pair[0], pair[1], host, where[index], kept)
            factors = [1.0, (len(kept) / size) ** 0.5]
            # not a number counts as different
            found.add(next((factor for factor in factors if compare(factor) <= TOLERANCE), 0.0))
    except Exception:  # whatever an architecture does with heads of a size that it was not made for
        found = {0.0}
    if len(found) != 1 or 0.0 in found:
        raise RequestError(
            f"{type(source.skeleton).__name__} with {len(kept)} of {size} dimensions in a head does not compute what it "
            f"does with the others silent, so {source.spec} cannot lose them; choose other axes."
        )
    return found.pop()


class _SeenAll(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a run once every attention was reached."""


def _calls(model: nn.Module, hosts: list[str], positions: int) -> dict[str, Call]:
    """What modules are called with when the model reads tokens far apart in so many positions, masks left out."""
    twin = clone(
        model,
        lambda tensor: (
            torch.zeros(()).expand(tensor.shape)
            if tensor.is_floating_point()
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
        ),
        stand_in_buffer,
    )
    for path in expert_banks(twin):  # which need weights in memory
        set_submodule(twin, path, PassThrough())
    found: dict[str, Call] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, tree_map(_unmasked, (args, kwargs)))
            if len(found) == len(hosts):
                raise _SeenAll

        return hook

    for path in hosts:
        twin.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
    given = torch.linspace(0, positions - 1, TOKENS).long()[None]
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    try:
        with torch.no_grad():
            twin(ids, position_ids=given, use_cache=False)
    except _SeenAll:
        pass
    return found


def _unmasked(value: Any) -> Any:
    """Tokens at positions far apart may be taken for several texts, so what masks they get says nothing here."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return torch.ones_like(value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 3:
        return torch.zeros_like(value)
    return value


def _difference(
    whole: tuple[nn.Module, Call],
    narrow: tuple[nn.Module, Call],
    host: str,
    dims: HeadDims,
    kept: Tensor,
    factor: float,
) -> float:
    """By how much the outputs of both attentions differ, of the largest."""
    generator = torch.Generator().manual_seed(0)
    size, less, together = dims.head_dim, len(kept), dims.heads // dims.kv_heads
    drawn = [
        torch.randn(TOKENS, heads, size, generator=generator) for heads in (dims.heads, dims.kv_heads, dims.kv_heads)
    ]
    q, k, v = drawn
    values = torch.stack([torch.randperm(size, generator=generator)[:less].sort().values for _ in range(dims.kv_heads)])
    chosen = values.expand(TOKENS, -1, -1)
    silent = [torch.zeros_like(each).index_copy(2, kept, each[..., kept]) for each in (q, k)]
    silent.append(torch.zeros_like(v).scatter(2, chosen, v.gather(2, chosen)))
    query = q[..., kept] * (1.0 if dims.query_norm else factor)
    short = [query, k[..., kept], v.gather(2, chosen)]
    outputs: list[Tensor] = []
    vectors: dict[str, Tensor] = {}
    for (module, call), given, width in ((whole, silent, size), (narrow, short, less)):
        proposal = _proposal(module, host, dims, width)
        trial = AttentionTrial(module, proposal, call, generator)
        for name, parameter in trial.twin.named_parameters():  # what heads have beside their dimensions is the same
            if vectors.setdefault(name, parameter.data).shape == parameter.shape:
                parameter.data = vectors[name]
        local = [path[len(host) + 1 :] if host else path for path in dims.norms]
        _set_norms(trial.twin, local, dims, kept, width, factor)
        placed = _placed(proposal, host, dims, given, width)
        with norms_over(trial.twin, Channels(size, (), {}, {}, tuple(local) if width == size else ()), kept):
            outputs.append(trial.run(placed).unflatten(1, (dims.heads, width)))
    wanted = outputs[0].gather(2, chosen.repeat_interleave(together, dim=1))
    return float((outputs[1] - wanted).abs().max() / wanted.abs().max())


def _proposal(module: nn.Module, host: str, dims: HeadDims, size: int) -> AttentionProposal:
    """The projections of an attention, whose heads have this size."""
    prefix = f"{host}." if host else ""
    found = {prefix + matrix.weight: matrix for matrix in matrices(module)}
    names = dict.fromkeys(part[0].parameter for part in (dims.queries, dims.keys, dims.values))
    inputs = tuple(found[name] for name in names)
    return AttentionProposal("", inputs, found[dims.output.parameter], dims.heads, dims.kv_heads, size, len(inputs) < 3)


def _placed(
    proposal: AttentionProposal, host: str, dims: HeadDims, given: list[Tensor], size: int
) -> dict[int, Tensor]:
    """(tokens, outputs) for each input, with queries, keys and values where they lie."""
    prefix = f"{host}." if host else ""
    places = {prefix + matrix.weight: place for place, matrix in enumerate(proposal.inputs)}
    found = {place: torch.zeros(TOKENS, matrix.outputs) for place, matrix in enumerate(proposal.inputs)}
    parts: tuple[Slice, ...] = (dims.queries[0], dims.keys[0], dims.values[0])
    for part, value in zip(parts, given, strict=True):
        start, numbers = part.offset * size // dims.head_dim, value.flatten(1)
        found[places[part.parameter]][:, start : start + numbers.shape[1]] = numbers
    return found


def _set_norms(twin: nn.Module, paths: list[str], dims: HeadDims, kept: Tensor, size: int, factor: float) -> None:
    """Gives the norms of heads numbers, in the smaller attention those of the dimensions kept, as a cut would."""
    generator = torch.Generator().manual_seed(1)
    for path, own in zip(paths, dims.norms, strict=True):
        module = twin.get_submodule(path)
        numbers = {name: torch.rand(dims.head_dim, generator=generator) + 0.5 for name, _ in module.named_parameters()}
        if size != dims.head_dim:
            if own == dims.query_norm:
                numbers = scaled_norm(module, numbers, factor)
            numbers = {name: value[kept] for name, value in numbers.items()}
        for name, parameter in module.named_parameters():
            parameter.data = numbers[name]


def scaled_norm(norm: nn.Module, numbers: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The learned vectors of a norm, by their name in it, with which its output is multiplied by a factor.

    Some are stored less one, which shows in what the norm makes of zeros there.
    """
    found: dict[str, Tensor] = {}
    size = next(iter(norm.parameters())).shape[0]
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    for name, tensor in numbers.items():
        outputs = []
        for value in (0.0, 1.0):
            twin = clone(norm, lambda parameter: torch.zeros(parameter.shape), stand_in_buffer)
            twin.get_parameter(name).data.fill_(value)
            with torch.no_grad():
                outputs.append(float(twin(x)[0, 0]))
        offset = float(round(outputs[0] / (outputs[1] - outputs[0])))
        found[name] = tensor * factor + (factor - 1) * offset
    return found

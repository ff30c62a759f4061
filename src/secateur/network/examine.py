"""Finds the anatomy of a model: what `recognise` proposes, `trace` shows on fake tensors, and `probe` confirms by numbers.

Attribute names decide nothing. No weight is read, so a skeleton on meta and a loaded model have the same anatomy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur.network import expert_probe, probe, recognise
from secateur.network.anatomy import Anatomy, Attention, Block, Experts, FeedForward, Group, HeadDims, Slice
from secateur.network.head_probe import Turning, norms_of_heads, try_head_dims
from secateur.network.recognise import AttentionProposal, ExpertsProposal, FeedForwardProposal, Matrix, join
from secateur.network.trace import Call, Trace, trace


@dataclass(frozen=True)
class _Finding:
    """What holds for all blocks that are built alike; paths are relative to the block."""

    feed_forward: tuple[FeedForwardProposal, probe.FeedForwardRoles] | None
    norm: tuple[str, str | None, str | None] | None
    attention: tuple[AttentionProposal, probe.AttentionRoles] | None
    turning: Turning | None
    experts: ExpertsProposal | None
    chosen: int | None
    bank: expert_probe.BankLayout | None
    kind: str
    parallel: bool | None
    note: str


def anatomy(model: nn.Module, config: Any = None) -> Anatomy:
    """The anatomy of `model`, on any device, meta included; `config` is the model's own unless given.

    Blocks that are built alike are examined once. Raises RequestError when no blocks are found.
    """
    config = getattr(model, "config", None) if config is None else config
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config(decoder=True)
    path, blocks = recognise.find_blocks(model)
    hidden = recognise.hidden_size(blocks, config)
    signatures = [recognise.signature(block, index) for index, block in enumerate(blocks)]
    first = {signature: index for index, signature in reversed(list(enumerate(signatures)))}
    paths = {index: f"{path}.{index}" for index in range(len(blocks))}
    banks = [join(paths[index], bank) for index, block in enumerate(blocks) for bank in recognise.expert_banks(block)]
    traces = trace(model, {index: paths[index] for index in sorted(first.values())}, banks)
    findings = {index: _examine(blocks[index], traces[index], hidden, _config_of(config, index)) for index in traces}
    found = tuple(
        _block(block, index, paths[index], findings[first[signatures[index]]], hidden)
        for index, block in enumerate(blocks)
    )

    inside = {name for block in found for name in block.parameters}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = recognise.tied_groups(model)
    embeddings, head, vocabulary = recognise.embeddings_and_head(model, path, config)
    return Anatomy(
        blocks=found,
        embeddings=embeddings,
        head=head,
        norms=tuple(name for name in recognise.norm_parameters(model) if name not in inside),
        tied=tied,
        hidden=hidden,
        vocabulary=vocabulary,
        outside=tuple(name for name in sizes if name not in inside),
        parameters=sum(sizes.values()) - sum(sizes[name] for group in tied for name in group[1:]),
    )


def _config_of(config: Any, index: int) -> Any:
    """The configuration of one block; it has its own where blocks differ."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _examine(block: nn.Module, seen: Trace, hidden: int, config: Any) -> _Finding:
    notes = []
    experts = recognise.experts_proposal(block, hidden)
    banks = {experts.host} if experts else set()
    feed_forward, refused = _find_feed_forward(block, seen, hidden, banks)
    taken = set()
    if feed_forward:
        taken = {matrix.module for matrix in (*feed_forward[0].inputs, feed_forward[0].down)}
    attention, why = _find_attention(block, seen, hidden, config, taken | banks)

    beside = ""
    if experts:
        if feed_forward:
            beside = f", beside a shared one of width {feed_forward[0].units}"
        notes.append(
            f"Its feed-forward part {experts.host or 'here'} is a mixture of {experts.count} experts of width "
            f"{experts.width}{beside}."
        )
    recurrent = recognise.has_recurrence(block)
    if recurrent and not attention:
        alone = "" if feed_forward or experts else ", and has no feed-forward layer"
        notes.append(f"It mixes tokens by a recurrent state behind a convolution, not by attention{alone}.")
    else:
        notes += [why] if why else []
        if not feed_forward and not experts:
            notes.append(_refusal(refused, attention[0] if attention else None))
    if seen.error and "" not in seen.outputs:
        notes.append(f"What feeds what in it could not be seen: {seen.error}.")
    kind = "moe" if experts else "transformer" if feed_forward or attention else "mamba" if recurrent else "unknown"

    norm = parallel = None
    reader = experts.host if experts else feed_forward[0].inputs[0].module if feed_forward else None
    given = probe.first_tensor(seen.calls[reader], hidden) if reader in seen.calls else None
    if feed_forward and given is not None:
        roles = {name: probe.norm_roles(module, hidden) for name, module in _leaves(block)}
        producer = seen.producer(given, [name for name, role in roles.items() if role])
        if producer is not None:
            norm = (producer, *(roles[producer] or (None, None)))
    if attention and given is not None:
        depends = seen.depends(given, attention[0].host or attention[0].output.module, hidden)
        parallel = None if depends is None else not depends
    chosen = _chosen(seen.calls.get(experts.host)) if experts else None
    bank = _bank(block, experts, seen, hidden) if experts else None
    turning = _turning(block, attention, seen, hidden) if attention else None
    return _Finding(feed_forward, norm, attention, turning, experts, chosen, bank, kind, parallel, " ".join(notes))


def _chosen(call: Call | None) -> int | None:
    """How many experts each token goes to, by the (tokens, chosen) indices that a bank of experts is given."""
    given = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor)]
    numbers = {leaf.shape[-1] for leaf in given if leaf.ndim > 1 and leaf.dtype in (torch.int64, torch.int32)}
    return numbers.pop() if len(numbers) == 1 else None


def _bank(block: nn.Module, found: ExpertsProposal, seen: Trace, hidden: int) -> expert_probe.BankLayout | None:
    """How the neurons of experts lie that stand together in stacked parameters."""
    if found.host not in recognise.expert_banks(block):
        return None
    answer = expert_probe.try_bank(block.get_submodule(found.host), found, hidden, seen.calls.get(found.host))
    return None if isinstance(answer, str) else answer


def _leaves(block: nn.Module) -> list[tuple[str, nn.Module]]:
    linear = {matrix.module for matrix in recognise.matrices(block)}
    return [
        (path, module)
        for path, module in block.named_modules()
        if path not in linear and not any(True for _ in module.children())
    ]


def _find_feed_forward(
    block: nn.Module, seen: Trace, hidden: int, banks: set[str]
) -> tuple[tuple[FeedForwardProposal, probe.FeedForwardRoles] | None, list[tuple[FeedForwardProposal, str]]]:
    refused = []
    for proposal in recognise.feed_forward_proposals(block, hidden, banks):
        host = block.get_submodule(proposal.host)
        answer = probe.try_feed_forward(host, proposal, hidden, seen.calls.get(proposal.host))
        if not isinstance(answer, str):
            return (proposal, answer), []
        refused.append((proposal, answer))
    return None, refused


def _refusal(refused: list[tuple[FeedForwardProposal, str]], attention: AttentionProposal | None) -> str:
    """Why there is no feed-forward layer: of the likeliest proposal that is no part of the attention."""
    mixing = {*attention.inputs, attention.output} if attention else set()
    for proposal, answer in refused:
        parts = (*proposal.inputs, proposal.down)
        if not mixing.intersection(parts):
            shapes = ", ".join(f"{matrix.module} ({matrix.inputs} to {matrix.outputs})" for matrix in parts)
            return f"The matrices {shapes} are not confirmed as a feed-forward layer: {answer}."
    return "It holds no matrices whose shapes make a feed-forward layer."


def _find_attention(
    block: nn.Module, seen: Trace, hidden: int, config: Any, taken: set[str]
) -> tuple[tuple[AttentionProposal, probe.AttentionRoles] | None, str]:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None, "The config does not say how many attention heads there are, so attention was not looked for."
    refusal = f"It holds no matrices whose shapes make attention with {heads} heads."
    for number, proposal in enumerate(recognise.attention_proposals(block, hidden, heads, taken)):
        host = block.get_submodule(proposal.host)
        answer = probe.try_attention(host, proposal, hidden, seen.calls.get(proposal.host))
        if not isinstance(answer, str):
            return (proposal, answer), ""
        if number == 0:
            refusal = f"{proposal.host or 'The block'} is not confirmed as attention: {answer}."
    return None, refusal


def _turning(
    block: nn.Module, attention: tuple[AttentionProposal, probe.AttentionRoles], seen: Trace, hidden: int
) -> Turning | None:
    """How positions turn the dimensions of its heads, where these lie apart from each other."""
    proposal, roles = attention
    if roles.runs is None:
        return None
    host, size = block.get_submodule(proposal.host), proposal.head_dim
    leaves = [path for path, module in _leaves(host) if probe.norm_roles(module, size)]
    norms = norms_of_heads(host, size, set(leaves))
    order = (roles.q, roles.k, roles.v)
    return try_head_dims(host, proposal, roles.runs, order, hidden, seen.calls.get(proposal.host), norms)


def _block(block: nn.Module, index: int, path: str, finding: _Finding, hidden: int) -> Block:
    sizes = {join(path, name): p.numel() for name, p in block.named_parameters(remove_duplicate=False)}
    experts = None
    if finding.experts:
        router = join(path, finding.experts.router) if finding.experts.router else None
        experts = Experts(
            join(path, finding.experts.host), finding.experts.count, finding.experts.width, router, finding.chosen,
            _experts(block, path, finding.experts), _expert_neurons(path, finding.experts, finding.bank),
        )  # fmt: skip
    return Block(
        index=index,
        path=path,
        parameters=tuple(sizes),
        size=sum(sizes.values()),
        feed_forward=_feed_forward(path, finding, hidden),
        attention=_attention(path, finding, block),
        experts=experts,
        kind=finding.kind,
        parallel=finding.parallel,
        norms=tuple(join(path, name) for name in recognise.norm_parameters(block)),
        note=finding.note,
    )


def _feed_forward(path: str, finding: _Finding, hidden: int) -> FeedForward | None:
    if finding.feed_forward is None:
        return None
    proposal, roles = finding.feed_forward

    def weight(branch: tuple[Matrix, int]) -> Slice:
        return Slice(join(path, branch[0].weight), branch[0].output_dim, branch[1])

    def bias(branch: tuple[Matrix, int]) -> Slice | None:
        return Slice(join(path, branch[0].bias), 0, branch[1]) if branch[0].bias else None

    gate = None if roles.gate is None else proposal.branches[roles.gate]
    up = proposal.branches[roles.up]
    down = proposal.down
    module, scale, shift = finding.norm or (None, None, None)
    return FeedForward(
        module=join(path, proposal.host),
        units=proposal.units,
        hidden=hidden,
        gate=weight(gate) if gate else None,
        up=weight(up),
        down=Slice(join(path, down.weight), 1 - down.output_dim),
        gate_bias=bias(gate) if gate else None,
        up_bias=bias(up),
        down_bias=join(path, down.bias) if down.bias else None,
        activation=join(path, proposal.host, roles.activation) if roles.activation else "",
        norm=join(path, module, scale) if module and scale else None,
        norm_bias=join(path, module, shift) if module and shift else None,
        norm_module=join(path, module) if module else None,
        others=tuple(Slice(join(path, proposal.host, name), 0) for name in roles.others),
    )


def _attention(path: str, finding: _Finding, block: nn.Module) -> Attention | None:
    if finding.attention is None:
        return None
    found, roles = finding.attention
    q, k, v = ((join(path, found.inputs[role].weight),) for role in (roles.q, roles.k, roles.v))
    output = (join(path, found.output.weight),)
    return Attention(
        join(path, found.host), found.heads, found.kv_heads, found.head_dim, found.fused, q, k, v, output,
        _heads(path, found, roles), _queries(path, found, roles), _head_dims(path, found, finding.turning, block),
    )  # fmt: skip


def _head_dims(path: str, found: AttentionProposal, turning: Turning | None, block: nn.Module) -> HeadDims | None:
    if turning is None:
        return None
    size = found.head_dim

    def parts(run: tuple[int, int, int]) -> tuple[Slice, ...]:
        index, first, _ = run
        matrix = found.inputs[index]
        weight = Slice(join(path, matrix.weight), matrix.output_dim, first * size, size)
        return (weight, Slice(join(path, matrix.bias), 0, first * size, size)) if matrix.bias else (weight,)

    query_norm, key_norm = (join(found.host, norm) if norm else "" for norm in (turning.query_norm, turning.key_norm))
    scales = [
        join(path, norm, name)
        for norm in (query_norm, key_norm)
        for name, _ in (block.get_submodule(norm).named_parameters() if norm else ())
    ]
    output, bias = found.output, found.output.bias
    return HeadDims(
        found.heads, found.kv_heads, size, turning.layout, turning.turned,
        parts(turning.q), parts(turning.k), parts(turning.v),
        Slice(join(path, output.weight), 1 - output.output_dim, 0, size),
        join(path, bias) if bias else None,
        join(path, query_norm) if query_norm else "", join(path, key_norm) if key_norm else "", tuple(scales),
    )  # fmt: skip


def _experts(block: nn.Module, path: str, found: ExpertsProposal) -> Group | None:
    """Experts whose numbers lie in tensors with one entry for each, in the bank, the router and beside it."""
    bank, count = block.get_submodule(found.host)._parameters, found.count
    stacks = [name for name, p in bank.items() if p is not None]
    if (
        found.router is None
        or not stacks
        or any(block.get_parameter(join(found.host, s)).shape[0] != count for s in stacks)
    ):
        return None
    # what is said of each expert beside its weights stands near the router: biases, some learned outside training
    near = found.host.rpartition(".")[0] or found.router.rpartition(".")[0]
    inside = {join(found.host, name) for name in stacks}

    def vectors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
        return [n for n, t in named if n.startswith(f"{near}.") and tuple(t.shape) == (count,) and n not in inside]

    stored = block.state_dict()
    inputs = [*(join(found.host, name) for name in stacks), *vectors(block.named_parameters())]
    dim = 0 if block.get_parameter(found.router).shape[0] == count else 1
    return Group(
        "experts",
        count,
        tuple(Slice(join(path, name), 0) for name in inputs),
        Slice(join(path, found.router), dim),
        None,
        buffers=tuple(join(path, name) for name in vectors(block.named_buffers()) if name in stored),
    )


def _expert_neurons(path: str, found: ExpertsProposal, bank: expert_probe.BankLayout | None) -> Group | None:
    if bank is None:
        return None
    host = join(path, found.host)
    inputs = tuple(Slice(join(host, each.name), each.dim, each.offset, each.width) for each in bank.inputs)
    output = Slice(join(host, bank.output.name), bank.output.dim)
    return Group("expert_neurons", found.width, inputs, output, None, stacked=found.count)


def _heads(path: str, found: AttentionProposal, roles: probe.AttentionRoles) -> Group | None:
    if roles.runs is None:
        return None
    # queries first, then keys and values, in whatever order the module holds them
    order = [roles.q, roles.k, roles.v]
    runs = sorted(roles.runs, key=lambda run: (order.index(run[0]), run[1]))
    size, inputs = found.head_dim, []
    first = sum(length for index, _, length in runs if index == runs[0][0])
    count = found.inputs[runs[0][0]].outputs // (first * size)
    for index, start, length in runs:
        matrix = found.inputs[index]
        inputs.append(Slice(join(path, matrix.weight), matrix.output_dim, start * size, length * size))
        if matrix.bias:
            inputs.append(Slice(join(path, matrix.bias), 0, start * size, length * size))
    output, bias = found.output, found.output.bias
    columns = Slice(join(path, output.weight), 1 - output.output_dim, 0, output.inputs // count)
    return Group("heads", count, tuple(inputs), columns, join(path, bias) if bias else None)


def _queries(path: str, found: AttentionProposal, roles: probe.AttentionRoles) -> Group | None:
    """Single query heads, where those that share keys and values lie side by side and apart from these."""
    together = found.heads // found.kv_heads
    runs = [run for run in roles.runs or () if run[0] == roles.q and run[2] == together]
    if together == 1 or len(runs) != 1:
        return None
    index, start, _ = runs[0]
    size, matrix, output = found.head_dim, found.inputs[index], found.output
    inputs = [Slice(join(path, matrix.weight), matrix.output_dim, start * size, size)]
    if matrix.bias:
        inputs.append(Slice(join(path, matrix.bias), 0, start * size, size))
    columns = Slice(join(path, output.weight), 1 - output.output_dim, 0, size)
    bias = join(path, output.bias) if output.bias else None
    return Group("queries", found.heads, tuple(inputs), columns, bias, found.kv_heads)

"""Confirms by trials on random numbers what shapes alone leave open, with no weight of the model and little memory.

A trial runs a copy of one module with its feed-forward width shrunk to a few units, or with its projections replaced
by prepared outputs, and shows what each matrix does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.network.recognise import AttentionProposal, FeedForwardProposal, Matrix, matrices
from secateur.network.trace import TOKENS, Call, clone, describe, first_tensor, real_call, set_submodule
from secateur.network.trial import TOLERANCE, AttentionTrial, Given, stand_in, stand_in_buffer

UNITS = 8  # a shrunk feed-forward layer


def norm_roles(module: nn.Module, width: int) -> tuple[str | None, str | None] | None:
    """Names of the scale and of the bias of a norm over `width` features; None if the module is no norm.

    A norm's output does not change when its input grows; its scale's effect differs between tokens, its bias's
    does not.
    """
    generator = torch.Generator().manual_seed(0)

    try:
        twin = clone(module, lambda tensor: stand_in(tensor, generator), stand_in_buffer)
        x = torch.randn(TOKENS, width, generator=generator)
        with torch.no_grad():
            base = twin(x)
            if base.shape != x.shape or (twin(4 * x) - base).abs().max() > 1e-2 or torch.equal(base, x):
                return None
            scale = bias = None
            for name, parameter in twin.named_parameters():
                if tuple(parameter.shape) != (width,):
                    return None
                parameter.add_(1.0)
                effect = twin(x) - base
                parameter.sub_(1.0)
                if effect.std(dim=0).max() > 1e-3:
                    scale = name
                else:
                    bias = name
    except Exception:  # a module that cannot be called with one tensor is no norm of the usual kind
        return None
    return scale, bias


@dataclass(frozen=True)
class FeedForwardRoles:
    """What a trial of a feed-forward layer showed.

    gate, up: indices into the proposal's branches (gate None for a plain layer). activation: path of the module that
    is the nonlinearity, relative to the host, "" where the layer is not exactly down(activation(gate) * up).
    others: names, relative to the host, of further vectors with one number for each unit.
    """

    gate: int | None
    up: int
    activation: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Weights:
    """Weights of a shrunk layer of k units: branches (k, hidden) with biases (k,), down (hidden, k), others (k,)."""

    branches: tuple[tuple[Tensor, Tensor], ...]
    down: Tensor
    others: tuple[Tensor, ...]

    def keep(self, units: Tensor) -> "_Weights":
        branches = tuple((weight[units], bias[units]) for weight, bias in self.branches)
        return _Weights(branches, self.down[:, units], tuple(vector[units] for vector in self.others))

    def silence(self, units: Tensor) -> "_Weights":
        down = self.down.clone()
        down[:, units] = 0
        return _Weights(self.branches, down, self.others)

    def scale(self, branch: int, factor: float) -> "_Weights":
        factors = [factor if index == branch else 1.0 for index in range(len(self.branches))]
        branches = tuple((weight * f, bias * f) for (weight, bias), f in zip(self.branches, factors, strict=True))
        return _Weights(branches, self.down, self.others)


class FeedForwardTrial:
    """A copy of a feed-forward layer's host module that runs with any few units.

    host: the module named by `proposal.host`, on any device, meta included. Other matrices in it are silenced, so
    that of a whole block only the feed-forward part and the residual stream are left.
    """

    def __init__(self, host: nn.Module, proposal: FeedForwardProposal, hidden: int, call: Call | None) -> None:
        self.proposal = proposal
        generator = torch.Generator().manual_seed(0)
        self.call = real_call(call, hidden, generator)
        wide = proposal.units != hidden  # else a vector of that length is rather a norm's
        own = {self._local(matrix.module) for matrix in (*proposal.inputs, proposal.down)}
        linear = {matrix.module: matrix for matrix in matrices(host)}
        self.others = tuple(
            name
            for name, parameter in host.named_parameters()
            if wide and tuple(parameter.shape) == (proposal.units,) and name.rpartition(".")[0] not in linear
        )

        self.host = clone(host, lambda tensor: stand_in(tensor, generator), stand_in_buffer)
        for path, matrix in linear.items():
            if path not in own:
                set_submodule(self.host, path, Given(torch.zeros(matrix.outputs)))
        self.states: dict[str, Tensor] = {}  # what the modules of the copy were given in the last run
        for path, module in self.host.named_modules():
            if path and not any(True for _ in module.children()):
                module.register_forward_pre_hook(self._watch(path))
        self.weights = _Weights(
            tuple(
                (
                    torch.randn(UNITS, hidden, generator=generator) * (2 / hidden**0.5),
                    torch.randn(UNITS, generator=generator) * 0.5 * (matrix.bias is not None),
                )
                for matrix, _ in proposal.branches
            ),
            torch.randn(hidden, UNITS, generator=generator),
            tuple(torch.rand(UNITS, generator=generator) + 0.5 for _ in self.others),
        )

    def _local(self, path: str) -> str:
        host = self.proposal.host
        return path[len(host) + 1 :] if host else path

    def _watch(self, path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            value = first_tensor(args)
            if value is not None:
                self.states[path] = value

        return hook

    @property
    def product(self) -> Tensor:
        """What `down` was given in the last run."""
        return self.states[self._local(self.proposal.down.module)]

    def run(self, weights: _Weights, disturbed: bool = False) -> Tensor:
        """The host's output, (tokens, hidden), with these weights in the place of its feed-forward layer's.

        disturbed: with another input at the first token, which causal attention lets all others see.
        """
        parts = self.proposal.segments
        for index, matrix in enumerate(self.proposal.inputs):
            branches = weights.branches[index * parts : (index + 1) * parts]
            self._set(matrix, torch.cat([w for w, _ in branches]), torch.cat([b for _, b in branches]))
        self._set(self.proposal.down, weights.down, torch.zeros(len(weights.down)))
        for name, vector in zip(self.others, weights.others, strict=True):
            path, _, attribute = name.rpartition(".")
            owner = self.host.get_submodule(path)
            setattr(owner, attribute, nn.Parameter(vector, requires_grad=False))
            if isinstance(owner, nn.LayerNorm):
                owner.normalized_shape = tuple(vector.shape)
        hidden = len(weights.down)

        def fresh(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.clone()  # a module may work in place
            if disturbed and value.ndim > 1 and value.shape[-1] == hidden:
                # Not the same for all channels, which a norm would hide.
                value[..., 0, :] += 1.0 + torch.arange(hidden) % 2
            return value

        args, kwargs = tree_map(fresh, self.call)
        with torch.no_grad():
            output = first_tensor(self.host(*args, **kwargs), hidden)
        if output is None:
            raise ValueError("it gave no tensor of the hidden size")
        return output.reshape(-1, output.shape[-1])

    def _set(self, matrix: Matrix, weight: Tensor, bias: Tensor) -> None:
        module = self.host.get_submodule(self._local(matrix.module))
        outputs, inputs = weight.shape
        stored = weight.T.contiguous() if matrix.output_dim else weight
        module.weight = nn.Parameter(stored, requires_grad=False)
        if matrix.bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        for name, size in (("in_features", inputs), ("out_features", outputs), ("nx", inputs), ("nf", outputs)):
            if hasattr(module, name):
                setattr(module, name, size)

    def activation(self, gate: int | None, up: int) -> str:
        """Path of the module f for which the layer is exactly down(f(gate(x)) * up(x)), or down(f(up(x))); else ""."""
        self.run(self.weights)
        product, x = self.product, self.states[self._local(self.proposal.inputs[0].module)]
        states = [x @ weight.T + bias for weight, bias in self.weights.branches]
        own = {self._local(matrix.module) for matrix in (*self.proposal.inputs, self.proposal.down)}
        for path, given in list(self.states.items()):
            module = self.host.get_submodule(path)
            if path in own or given.shape[-1] != UNITS or isinstance(module, (nn.Dropout, nn.Identity)):
                continue
            with torch.no_grad():
                wanted = module(states[up]) if gate is None else module(states[gate]) * states[up]
            if wanted.shape == product.shape and (wanted - product).abs().max() <= TOLERANCE * product.abs().max():
                return path
        return ""


def try_feed_forward(
    host: nn.Module, proposal: FeedForwardProposal, hidden: int, call: Call | None
) -> FeedForwardRoles | str:
    """Runs a shrunk copy of `host` and says which branch does what, or why the proposal does not hold.

    Three things are asked of a feed-forward layer. (1) Tokens do not mix, as they do in attention. (2) Cutting some
    units from all its matrices gives what zeroing their columns of `down` gives: units do not mix. (3) In a gated
    layer, `up` is the branch in which what `down` is given is linear: the factor -2 (negative, because ReLU too is
    linear for positive factors) comes out again; `gate` is the branch where it does not. In a plain layer the one
    branch is not linear, else it would be a matrix of low rank.
    """
    try:
        trial = FeedForwardTrial(host, proposal, hidden, call)
        weights, every = trial.weights, torch.arange(UNITS)
        full, nothing = trial.run(weights), trial.run(weights.silence(every))
        size = float((full - nothing).abs().max())
        if not 0 < size < float("inf"):
            return "its output does not depend on them"
        if float((trial.run(weights, disturbed=True) - full)[1:].abs().max()) > TOLERANCE * size:
            return "it mixes tokens"
        for cut in ([0], [3], [UNITS - 1], [1, 2, 5]):
            units = torch.tensor(cut)
            zeroed = trial.run(weights.silence(units))
            if float((zeroed - full).abs().max()) <= TOLERANCE * size:
                return "some of their units have no effect"
            kept = torch.tensor([unit for unit in range(UNITS) if unit not in cut])
            if not float((trial.run(weights.keep(kept)) - zeroed).abs().max()) <= TOLERANCE * size:
                return "cutting a unit changes what the other units give: the layer mixes its units"
        linear = []
        trial.run(weights)
        product = trial.product
        for branch in range(len(weights.branches)):
            trial.run(weights.scale(branch, -2.0))
            difference = (trial.product + 2 * product).abs().max()
            linear.append(float(difference) <= TOLERANCE * float(product.abs().max()))
        if len(linear) == 1:
            if linear[0]:
                return "nothing nonlinear stands between them"
            gate, up = None, 0
        elif True in linear:
            up = len(linear) - 1 - linear[::-1].index(True)  # both only where the layer is symmetric in them
            gate = 1 - up
        else:
            return "the output is linear in none of its two input matrices, so gate and up cannot be told apart"
        return FeedForwardRoles(gate, up, trial.activation(gate, up), trial.others)
    except Exception as error:  # a foreign module may fail in any way; then nothing is confirmed
        return f"a copy with {UNITS} units could not be run ({describe(error)})"


class AttentionRoles(NamedTuple):
    """Which of the proposal's inputs are q, k and v (all 0 for one fused matrix), and where its heads lie in them.

    runs: (input, first, length) in head dimensions: the first group of heads that share keys and values has these, the next
    group those that follow them, and so on; its output columns follow each other likewise. None where heads cannot be
    told apart, or lie in no such order.
    """

    q: int
    k: int
    v: int
    runs: tuple[tuple[int, int, int], ...] | None


def try_attention(host: nn.Module, proposal: AttentionProposal, hidden: int, call: Call | None) -> AttentionRoles | str:
    """What the proposal's inputs do; or why it does not hold.

    Another q at one token changes that token alone, another k or v changes others; the output is linear in v. Other numbers
    in the rows of one head change the outputs of the heads that it shares keys and values with, and no others.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        if call is None:
            return "the model could not be traced"
        trial = AttentionTrial(host, proposal, real_call(call, hidden, generator), generator)
        given, run = trial.values, trial.run
        base = run()
        size = float(base.abs().max())
        token = TOKENS // 2

        def constant(index: int) -> bool:
            """Whether the same value at all tokens comes out unchanged by the mixing: weights of softmax sum to one."""
            output = run({index: given[index][:1].repeat(TOKENS, 1)})
            return float((output - output[:1]).abs().max()) <= TOLERANCE * size

        def roles(q: int, k: int, v: int) -> AttentionRoles:
            width, touched = proposal.head_dim, []
            for index, value in enumerate(given):
                for place in range(value.shape[-1] // width):
                    other = value.clone()
                    part = slice(place * width, (place + 1) * width)
                    other[:, part] = torch.randn(other[:, part].shape, generator=generator)
                    changed = (run({index: other}) - base).abs().amax(dim=0) > TOLERANCE * size
                    heads = changed.unflatten(0, (-1, width)).any(dim=1).nonzero().flatten().tolist()
                    touched.append((index, place, set(heads)))
            whole = all(value.shape[-1] % width == 0 for value in given) and base.shape[1] % width == 0
            return AttentionRoles(q, k, v, _runs(touched, base.shape[1] // width) if whole else None)

        local_only: list[int] = []
        spreading: list[int] = []
        for index, value in enumerate(given):
            other = value.clone()
            other[token] = torch.randn(other.shape[-1], generator=generator)
            changed = ((run({index: other}) - base).abs().amax(dim=-1) > TOLERANCE * size).nonzero().flatten().tolist()
            if not changed:
                return "its output does not depend on all of them"
            (local_only if changed == [token] else spreading).append(index)
        if len(local_only) != (len(given) > 1):
            return "its tokens do not mix as in attention"
        if len(given) < 3:
            kv = spreading[0]
            if not constant(kv):
                return "it does not average over tokens"
            return roles(local_only[0] if local_only else kv, kv, kv)
        values = [
            index
            for index in spreading
            if float((run({index: -2.0 * given[index]}) + 2 * base).abs().max()) <= TOLERANCE * size
        ] or [index for index in spreading if constant(index)]  # a norm on v hides that the output is linear in it
        if len(values) != 1:
            return "k and v cannot be told apart"
        keys = [index for index in spreading if index not in values]
        return roles(local_only[0], keys[0], values[0])
    except Exception as error:  # a foreign module may fail in any way; then nothing is confirmed
        return f"it could not be run ({describe(error)})"


def _runs(touched: list[tuple[int, int, set[int]]], heads: int) -> tuple[tuple[int, int, int], ...] | None:
    """The runs of AttentionRoles, from the heads that change with each place of each input."""
    groups: list[set[int]] = []
    for _, _, changed in touched:
        if not changed:
            return None
        together = [group for group in groups if group & changed]
        groups = [group for group in groups if not group & changed] + [changed.union(*together)]
    groups.sort(key=min)
    share = heads // len(groups)
    if [sorted(group) for group in groups] != [list(range(g * share, (g + 1) * share)) for g in range(len(groups))]:
        return None
    found: list[list[tuple[int, int, int]]] = []
    for group in groups:
        runs: list[tuple[int, int, int]] = []
        for index, place, changed in touched:
            if changed <= group:
                if runs and runs[-1][0] == index and sum(runs[-1][1:]) == place:
                    runs[-1] = (index, runs[-1][1], runs[-1][2] + 1)
                else:
                    runs.append((index, place, 1))
        found.append(runs)
    for number, runs in enumerate(found):
        if runs != [(index, first + number * length, length) for index, first, length in found[0]]:
            return None
    return tuple(found[0])

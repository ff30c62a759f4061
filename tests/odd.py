"""Hand-written networks that are none of transformers', whose attribute names say nothing or lie."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LyingAttention(nn.Module):
    """Causal attention whose names and order are all wrong: k_proj is v, v_proj is q, q_proj is k."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.o_in = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.k_proj, self.v_proj, self.q_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_in(mixed.transpose(1, 2).flatten(-2))


class Odd(nn.Module):
    """A feed-forward layer of three matrices alpha, beta, gamma; `roles` says which is gate, up and down."""

    def __init__(self, hidden: int, units: int, roles: str, function: nn.Module, bias: bool = True) -> None:
        super().__init__()
        for name in ("alpha", "beta", "gamma"):
            into = not roles.endswith(name)
            self.add_module(name, nn.Linear(hidden if into else units, units if into else hidden, bias=bias))
        self.bend = function
        self.roles = roles.split()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, role) for role in self.roles)
        return down(self.bend(gate(x)) * up(x))


class Lies(nn.Module):
    """gate_proj is up, up_proj is gate: a checkpoint whose author named them the other way round."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, units)
        self.up_proj = nn.Linear(hidden, units)
        self.down_proj = nn.Linear(units, hidden)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class UpFirst(nn.Module):
    """Fused, with up before gate, and the nonlinearity called as a function."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.both = nn.Linear(hidden, 2 * units)
        self.out = nn.Linear(units, hidden)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.out(up * functional.gelu(gate))


class Wrapped(nn.Module):
    """Each matrix in a module of its own, and a learnt scale for each unit between them."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.intermediate = nn.Sequential(nn.Linear(hidden, units), nn.ReLU())
        self.strength = nn.Parameter(torch.rand(units) + 0.5)
        self.output = nn.Sequential(nn.Linear(units, hidden), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x) * self.strength)


class Mixing(nn.Module):
    """What happens between the matrices mixes units (or leaves no linear branch): not a layer that can be cut.

    Only `how` "nothing" can.
    """

    def __init__(self, hidden: int, units: int, how: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, units)
        self.up_proj = nn.Linear(hidden, units)
        self.down_proj = nn.Linear(units, hidden)
        self.how = how
        if how == "layer norm":
            self.norm = nn.LayerNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = functional.silu(self.gate_proj(x)), self.up_proj(x)
        if self.how == "both bent":
            return self.down_proj(gate * torch.tanh(up))
        state = gate * up
        if self.how == "nothing":
            return self.down_proj(state)
        if self.how == "inner width":
            state = state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6)
        elif self.how == "softmax":
            state = state.softmax(-1)
        elif self.how == "tokens":
            state = state + state.roll(1, dims=-2)
        elif self.how == "fixed width":
            state = state.view(*x.shape[:-1], 10, 16).flatten(-2)
        else:
            state = self.norm(state)
        return self.down_proj(state)


class LowRank(nn.Module):
    """Two matrices with nothing between them: one matrix of low rank, not a feed-forward layer."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.into = nn.Linear(hidden, rank)
        self.out = nn.Linear(rank, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(self.out(self.into(x)), x.shape[-1:])


class Running(nn.Module):
    """Mixes tokens by a running sum: the matrices of fused attention, but no attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(q * (k * v).cumsum(dim=-2))


class Cell(nn.Module):
    def __init__(self, hidden: int, inner: nn.Module, parallel: bool, heads: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(hidden), nn.LayerNorm(hidden, elementwise_affine=False)
        self.mix: nn.Module = LyingAttention(hidden, heads)
        self.inner, self.parallel = inner, parallel

    def forward(self, x: Tensor) -> Tensor:
        middle = x + self.mix(self.one(x))
        return middle + self.inner(self.two(x if self.parallel else middle))


class Flat(nn.Module):
    """Attention and feed-forward matrices side by side on the block, all square, no activation module, no norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in "abcdefg":
            self.add_module(name, nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.children()
        v, k, q = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (b, d, f))
        x = x + c(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + e(functional.silu(g(x)) * a(x))


class Language(nn.Module):
    """A language model that is none of transformers'."""

    def __init__(self, *cells: nn.Module, hidden: int = 64, heads: int | None = 4) -> None:
        super().__init__()
        if heads:
            self.config = SimpleNamespace(num_attention_heads=heads)
        self.table = nn.Embedding(101, hidden)
        self.stack = nn.ModuleList(cells)
        self.answer = nn.Linear(hidden, 101)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for cell in self.stack:
            x = cell(x)
        return self.answer(x)


def language(*inner: nn.Module, parallel: bool = False, **settings: Any) -> Language:
    return Language(*(Cell(64, module, parallel) for module in inner), **settings).eval()

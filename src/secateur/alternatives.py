"""Which other methods could do what a step did, from their cards in the registry."""

from collections.abc import Sequence

from secateur.contract import TEXT
from secateur.registry import Gram, Method, methods
from secateur.telling import Told


def reads_text(method: Method) -> bool:
    """Whether it learns from text whatever its parameters, and needs no gradients."""
    return method.data == TEXT


def rewrites(method: Method) -> bool:
    """Whether it always asks for the second moment of inputs, from which kept weights are fitted again."""
    return any(need is Gram and name not in method.only for name, need in method.needs.items())


def gives_smaller(method: Method) -> bool:
    return method.speedup == "universal" and reads_text(method) and method.scope in ("units", "network")


def alike(told: Told, index: int, method: Method) -> list[Method]:
    """Other methods that remove the same: single weights, whole blocks, tokens, or units of the kinds that this step cut."""
    families = ({"units", "network"}, {"weight"}, {"blocks"}, {"vocabulary"})
    family = next((each for each in families if method.scope in each), {method.scope})
    cut = set(told.at("decisions", index, "units") or {})
    return [
        other
        for other in methods().values()
        if other.name != method.name and other.kind == method.kind and other.scope in family and cut <= set(other.axes)
    ]


def ranked(others: Sequence[Method]) -> list[Method]:
    """Those first that fit kept weights again, then those that block by block need little."""
    return sorted(others, key=lambda other: (not rewrites(other), other.scope != "units", other.name))


def names(others: Sequence[Method], told: Told, most: int = 4) -> str:
    """A few of them by name, the likeliest first, and how many more there are."""
    shown = ", ".join(other.name for other in ranked(others)[:most])
    rest = len(others) - most
    return f"{shown} and {rest} more (`secateur methods`)" if rest > 0 else shown

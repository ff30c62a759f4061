"""Comparing results of runs, for many tests."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from secateur.registry import Method

# Measurements and times live here alone; everything else is promised bit for bit.
MEASURED = {"secateur.json", "README.md"}


def promised(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a result that is promised bit for bit, by its path inside."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in MEASURED)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_claim(method: Method, dense: nn.Module, result: nn.Module) -> None:
    """What claims a speedup on any hardware has made dense matrices smaller; nothing else changes a shape."""
    before, after = (
        {name: part.numel() for name, part in model.named_parameters(remove_duplicate=False) if part.ndim >= 2}
        for model in (dense, result)
    )
    if before.keys() == after.keys():  # with fewer blocks, a name may be that of another block
        larger = [name for name, count in after.items() if before[name] < count]
        assert not larger, f"{method.name} makes {larger[0]} larger"
    if method.speedup == "universal":
        lighter = sum(after.values()) < sum(before.values())
        assert lighter, f"{method.name} claims a universal speedup, but the dense matrices are as large as before"
    else:
        assert after == before, f"{method.name} claims no universal speedup, but dense matrices have other shapes"


@contextmanager
def skipped(model: nn.Module, blocks: Sequence[str]) -> Iterator[nn.Module]:
    """The model with some of its blocks giving out what they are given; blocks as paths."""
    given: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (given.pop(), *output[1:]) if isinstance(output, tuple) else given.pop()

    handles = []
    for path in blocks:
        block = model.get_submodule(path)
        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class Killed(BaseException):
    """Stands for a kill: no handler in the library catches it."""


def kill_at_rename(monkeypatch: Any, number: int) -> dict[str, int]:
    """Makes the `number`-th rename from now (counted from 0) a kill; the counter that is returned counts on."""
    counter = {"renames": 0}
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if counter["renames"] == number:
            counter["renames"] += 1
            raise Killed(f"killed before {target.name} appeared")
        counter["renames"] += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return counter

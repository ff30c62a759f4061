"""What a receipt says, and where it stands there: the figures that explanations and pages are made of.

A figure is named by its JSON Pointer (RFC 6901), such as /card/model/parameters. Receipts are read as plain data, and what
one does not hold is None: an older one lacks parts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from secateur.errors import RequestError
from secateur.workspace import RECEIPT, STATE

COMPARISON = "compare.json"
"""What `secateur compare` leaves in its directory."""


def read_receipt(run: str | Path) -> dict[str, Any]:
    """The receipt of a finished run: RUN is its directory, or the receipt itself.

    Raises RequestError where there is none, or none that can be read.
    """
    path = Path(run)
    if path.is_dir():
        if not (path / RECEIPT).is_file():
            if (path / COMPARISON).is_file():
                raise RequestError(f"{run} is a comparison of several runs: name one of the directories in it.")
            if (path / STATE).is_dir():
                raise RequestError(f"the run in {run} is not finished: start its command again, and it goes on.")
            raise RequestError(f"{run} holds no {RECEIPT}: name the directory that `secateur compress` has written.")
        path = path / RECEIPT
    receipt = read_plain(path)
    decisions = receipt.get("decisions")
    if not isinstance(decisions, list) or not isinstance(receipt.get("recipe"), dict) or "source" not in receipt:
        raise RequestError(f"{path} is not the receipt of a run: it holds no recipe, source and decisions.")
    if not all(_readable(decision) for decision in decisions):
        raise RequestError(f"{path} is a receipt of another version, which this one cannot read; make the run again.")
    return receipt


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises RequestError."""
    if not path.is_file():
        raise RequestError(f"there is no file {path}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} could not be read: {error}.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} holds no mapping of names to values.")
    return found


def _readable(decision: Any) -> bool:
    """Whether the entries for layers are where they are looked for."""
    if not isinstance(decision, dict) or "method" not in decision:
        return False
    axes = decision.get("units") or {}
    return all(
        isinstance(entry, dict) and {"kept", "of"} <= set(entry)
        for blocks in axes.values()
        for entry in (blocks.values() if isinstance(blocks, dict) else [None])
    )


def pointer(keys: Sequence[str | int]) -> str:
    """The JSON Pointer of a way through mappings and lists."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def at(receipt: Any, keys: Sequence[str | int]) -> Any:
    """What stands there, None where nothing does."""
    for key in keys:
        if isinstance(receipt, Mapping):
            receipt = receipt.get(key, receipt.get(str(key)))
        elif isinstance(receipt, list) and isinstance(key, int) and 0 <= key < len(receipt):
            receipt = receipt[key]
        else:
            return None
    return receipt


def number(value: Any) -> float | None:
    """A finite number, None for anything else: infinities are strings in JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isfinite(value) else None


@dataclass(frozen=True)
class Layer:
    """One decision of a step: the units of a block, or a matrix.

    block: its number, None where the name does not say it. kept, of: how many units, weights or directions stay, of how
    many. calibration, held_out: relative error of its output, on the tokens that were learned from and on others. keys:
    where its entry stands in the receipt.
    """

    name: str
    block: int | None
    kept: int
    of: int
    calibration: float | None
    held_out: float | None
    keys: tuple[str | int, ...]

    @property
    def removed(self) -> float:
        """The fraction that went."""
        return 1 - self.kept / self.of if self.of else 0.0

    @property
    def error(self) -> float | None:
        """On tokens that were not learned from, where there were some."""
        return self.calibration if self.held_out is None else self.held_out

    @property
    def error_keys(self) -> tuple[str | int, ...]:
        return (*self.keys, "calibration_error" if self.held_out is None else "held_out_error")


def unit_layers(receipt: Mapping[str, Any], step: int) -> dict[str, list[Layer]]:
    """By kind of unit, one for each block that a step cut."""
    found = at(receipt, ("decisions", step, "units")) or {}
    return {
        axis: [
            _layer(f"block {block}", int(block), entry["kept"], entry, ("decisions", step, "units", axis, block))
            for block, entry in blocks.items()
        ]
        for axis, blocks in found.items()
    }


def matrix_layers(receipt: Mapping[str, Any], step: int) -> list[Layer]:
    """The matrices in which a step zeroed or changed weights."""
    found = at(receipt, ("decisions", step, "matrices")) or {}
    return [
        _layer(name, block_of(name), entry["of"] - entry["removed"], entry, ("decisions", step, "matrices", name))
        for name, entry in found.items()
    ]


def _layer(name: str, block: int | None, kept: int, entry: Mapping[str, Any], keys: tuple[str | int, ...]) -> Layer:
    errors = (number(entry.get("calibration_error")), number(entry.get("held_out_error")))
    return Layer(name, block, kept, entry["of"], *errors, keys)


def block_of(name: str) -> int | None:
    """The number of the block that a parameter belongs to: the first number in its path, since blocks lie in a list."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def kind_of(name: str) -> str:
    """What a matrix is called inside its block, all experts alike: "self_attn.q_proj", "mlp.experts.*.up_proj"."""
    parts = name.split("[")[0].split(".")
    at_block = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    inside = ["*" if part.isdigit() else part for part in parts[at_block + 1 :]]
    return ".".join(inside[:-1] if inside[-1:] == ["weight"] and len(inside) > 1 else inside)


def by_block(layers: Sequence[Layer], value: str = "error") -> dict[int, float]:
    """The mean of a value over the layers of each block, for blocks that have one."""
    found: dict[int, list[float]] = {}
    for layer in layers:
        if layer.block is not None and (entry := getattr(layer, value)) is not None:
            found.setdefault(layer.block, []).append(entry)
    return {block: sum(entries) / len(entries) for block, entries in sorted(found.items())}

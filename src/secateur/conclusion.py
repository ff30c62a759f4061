"""What is said of a run when its last step is done: that the result computes what it should, and the receipt."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secateur.errors import RequestError, RunError
from secateur.figures import block_of, kind_of
from secateur.network.matrices import MatrixRef, matrices, view
from secateur.network.modelling_file import FILE
from secateur.network.source import Source, open_model
from secateur.network.verify import CleanProcess, Verified, verify
from secateur.network.zeros import size_under_zstd
from secateur.recipe import Recipe
from secateur.report import shape
from secateur.stage import Stage


def reload_check(
    output: Path, stages: Sequence[Stage], max_memory: int, clean: CleanProcess | None, trust_remote_code: bool
) -> tuple[Source, Verified]:
    """The result as it lies in `output`, which computes what the last of `stages` promised. Raises RunError otherwise.

    Other arguments as `compress` takes them.
    """
    last = stages[-1]
    try:
        result = open_model(output, trust_remote_code=trust_remote_code)
        with last.reference():
            checked = verify(result, last.source, last.expected(), max_memory, clean, last.expected_tokens())
    except RequestError as error:  # what was asked for was right, what was written is not
        raise RunError(f"the result does not open again: {error} Start again with --restart.") from error
    return result, checked


def what_was_done(
    recipe: Recipe,
    source: Source,
    result: Source,
    stages: Sequence[Stage],
    checked: Verified,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The receipt of a run, but for what was measured and how long it took. hashes: SHA-256 of the source's files."""
    output = Path(result.spec)
    decisions = [
        {
            "step": stage.index,
            "method": stage.step.method,
            **stage.decided(),
            "notes": stage.notes,
            "warnings": stage.warnings,
        }
        for stage in stages
    ]
    receipt: dict[str, Any] = {
        "recipe": recipe.plain(),
        "source": {"model": str(source.spec), "base_model": source.place.base, "licence": source.place.licence,
                   "sha256": hashes},
        "decisions": decisions,
        "shape": shape(result),
        "reload_check": {"how": checked.how, "largest_difference": checked.difference, "tokens": checked.tokens},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("secateur", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
    }  # fmt: skip
    if (output / FILE).exists():
        receipt["code"] = [FILE]
    if zeros := written_zeros(result, decisions):
        receipt["zeros"] = zeros
    if any(stage.step.registered.caution for stage in stages):
        receipt["stored"] = _stored(source, output)
    return receipt


def written_zeros(result: Source, decisions: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """{"zeros", "of"}: how many weights are zero, of how many, in what is left of the matrices that steps zeroed weights in;
    None where none did.

    Counted in what is written: steps that cut, fold or turn these matrices later leave other zeros than were made.
    """
    if not any(said.get("matrices") for said in decisions):
        return None
    zeroed = _where_zeroed(decisions)
    refs: dict[str, list[MatrixRef]] = {}
    for ref in (ref for block in matrices(result.skeleton, result.anatomy) for ref in block):
        if (block_of(ref.name), kind_of(ref.name)) in zeroed:
            refs.setdefault(ref.parameter, []).append(ref)
    zeros = of = 0
    for name, own in refs.items():
        parameter = result.parameter(name)  # one at a time: all of them may not fit
        for ref in own:
            matrix = view(ref, parameter)
            zeros += matrix.numel() - int(matrix.count_nonzero())
            of += matrix.numel()
    return {"zeros": zeros, "of": of}


def _where_zeroed(decisions: Sequence[Mapping[str, Any]]) -> set[tuple[int | None, str]]:
    """Block of the result, and kind of matrix in it. Experts of a kind are one: a step that removes some renumbers them."""
    found: set[tuple[int | None, str]] = set()
    for said in decisions:
        blocks = said.get("blocks")
        if blocks and "part" not in blocks:  # without a part alone, a block keeps its number
            number = {old: new for new, old in enumerate(blocks["kept"])}
            found = {(number[block], kind) for block, kind in found if block in number}
        found |= {(block_of(name), kind_of(name)) for name in said.get("matrices") or ()}
    return found


def _stored(source: Source, output: Path) -> dict[str, Any]:
    """How much source and result take on disk, as they are and under zstd: what zeros are worth there."""
    sizes: dict[str, Any] = {}
    for name, files in (("source", source.files), ("result", sorted(output.glob("*.safetensors")))):
        sizes[name] = {"bytes": sum(path.stat().st_size for path in files), "zstd": size_under_zstd(files)}
    return sizes

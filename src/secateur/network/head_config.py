"""Configurations of networks whose heads have lost dimensions: the size of a head, and the frequencies that are left.

Which entry says the size is found by building. Frequencies are read from the buffers of the whole skeleton and stated as
factors (`rope_type: longrope`), which the built skeleton must turn into the same numbers; which buffer follows which set of
factors is found by building with factors that differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RequestError
from secateur.network.anatomy import HeadDims
from secateur.network.source import Source
from secateur.network.store import build, config_entries, set_entry

# how transformers calls rotations whose frequencies do not depend on the length of the text, or (longrope) in two steps
_FIXED = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
_CLOSE = 1e-6  # of a frequency: a few roundings in float32
_FRACTION, _FACTORS = "partial_rotary_factor", ("short_factor", "long_factor")

Ropes = dict[str | None, dict[str, Any]]
"""Parameters of rotations, by kind of layer; under None where all layers share them."""


def narrow_config(
    source: Source, raw: Mapping[str, Any], blocks: Sequence[HeadDims], whole: HeadDims, pairs: Tensor
) -> dict[str, Any]:
    """A configuration that says heads with these pairs of dimensions.

    Args:
        raw: which may have other widths than the source by now.
        blocks: the heads of each block. whole: what they have in common.
        pairs: (k,) sorted, those that stay.

    Raises RequestError where the architecture cannot be built so or cannot say the frequencies.
    """
    size, turned = 2 * len(pairs), 2 * int((pairs < whole.turned // 2).sum())
    architecture = type(source.skeleton).__name__
    if whole.turned and not turned:
        raise RequestError(f"heads of {source.spec} must keep some of the dimensions that positions turn; cut fewer.")
    ropes = _ropes(source) if whole.turned else {}
    if whole.turned < whole.head_dim:
        for rope in ropes.values():
            # rounded down by who reads it
            rope[_FRACTION] = turned / size if int(size * (turned / size)) == turned else (turned + 0.5) / size
    kept = pairs[pairs < whole.turned // 2]
    # factors that are there already must be as many as there are pairs
    fitting: Ropes = {
        key: rope | {name: _of(rope[name], kept) for name in _FACTORS if rope.get(name)} for key, rope in ropes.items()
    }
    narrow = _sized(source, raw, _with_ropes(raw, fitting), blocks, whole.head_dim, size)
    if narrow is None:
        raise RequestError(
            f"the configuration of {architecture} cannot say {size} of {whole.head_dim} dimensions of a head with as many "
            f"heads, so {source.spec} with fewer could not be opened again; choose other axes."
        )
    if not whole.turned or turned == whole.turned:
        return narrow
    for rope in ropes.values():
        if rope.get("rope_type", "default") not in _FIXED:
            raise RequestError(
                f"positions of {source.spec} turn heads by frequencies that depend on the length of the text "
                f"({rope['rope_type']}), which cannot be said for single dimensions; choose other axes."
            )
    return _with_frequencies(source, narrow, ropes, whole.turned // 2, kept)


def _ropes(source: Source) -> Ropes:
    """The parameters of rotations, as transformers has put them in order."""
    said = deepcopy(source.config.get_text_config(decoder=True).to_dict().get("rope_parameters") or {})
    if said and all(isinstance(value, dict) or value is None for value in said.values()):
        return {key: value for key, value in said.items() if value is not None}
    return {None: said}


def _with_ropes(raw: Mapping[str, Any], ropes: Ropes) -> dict[str, Any]:
    """A configuration with other parameters of rotations, under the name that it uses for them."""
    changed = deepcopy(dict(raw))
    if not ropes:
        return changed
    said = ropes[None] if None in ropes else {str(key): value for key, value in ropes.items()}
    new = None not in ropes or "rope_parameters" in raw or "rope_scaling" not in raw
    for name in ("rope_parameters", "rope_scaling"):
        changed.pop(name, None)
    changed["rope_parameters" if new else "rope_scaling"] = deepcopy(said)
    fractions = {rope[_FRACTION] for rope in ropes.values() if _FRACTION in rope}
    if _FRACTION in raw and len(fractions) == 1:
        changed[_FRACTION] = fractions.pop()
    return changed


def _of(factors: Sequence[float], kept: Tensor) -> list[float]:
    return [factors[pair] for pair in kept.tolist()]


def _sized(
    source: Source, before: Mapping[str, Any], raw: dict[str, Any], blocks: Sequence[HeadDims], old: int, new: int
) -> dict[str, Any] | None:
    """The configuration with the entry that says the size of a head, found by building; None where there is none.

    before: for heads of the old size.
    """
    whole = build(source, before)
    if whole is None:
        return None
    wanted = _shapes(whole)
    for dims in blocks:
        for name, dim in {(part.parameter, part.dim) for part in dims.group.slices}:
            shape = wanted[name]
            wanted[name] = (*shape[:dim], shape[dim] * new // old, *shape[dim + 1 :])
    entries = [path for path, value in config_entries(raw, source) if type(value) is int and value == old]
    # the usual name, which many architectures heed though their configuration does not list it
    for path in dict.fromkeys([*entries, ("head_dim",)]):
        changed = deepcopy(raw)
        set_entry(changed, path, new)
        narrow = build(source, changed)
        if narrow is not None and _shapes(narrow) == wanted:
            return changed
    return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _with_frequencies(source: Source, raw: dict[str, Any], ropes: Ropes, pairs: int, kept: Tensor) -> dict[str, Any]:
    """The configuration with factors that give the frequencies of the pairs `kept`, of so many."""
    there = dict(_vectors(source.skeleton, pairs))
    refusal = RequestError(
        f"the configuration of {type(source.skeleton).__name__} cannot say which frequencies positions turn heads by, so "
        f"{source.spec} could not keep those of the dimensions that stay; choose other axes."
    )

    def built(factors: Mapping[str | None, Sequence[float]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said = {key: _longrope(source, rope, factors[key], kept, key) for key, rope in ropes.items()}
        changed = _with_ropes(raw, said)
        model = build(source, changed)
        if model is None:
            raise refusal
        found = {name: vector for name, vector in _vectors(model, len(kept)) if name in there}
        return changed, found

    _, plain = built({key: [1.0] * len(kept) for key in ropes})
    # a factor of its own for each kind of layer shows which of them a buffer follows
    _, others = built({key: [number + 2.0] * len(kept) for number, key in enumerate(ropes)})
    owner: dict[str, str | None] = {}
    for name in plain.keys() & others.keys():
        for number, key in enumerate(ropes):
            if torch.allclose(plain[name], others[name] * (number + 2.0), rtol=1e-5, atol=0):
                owner[name] = key
    if set(owner.values()) != set(ropes):
        raise refusal
    wanted = {name: there[name][kept].double() for name in owner}
    if any(bool((vector <= 0).any()) for vector in wanted.values()):
        raise refusal
    factors: dict[str | None, Tensor] = {key: plain[name].double() / wanted[name] for name, key in owner.items()}
    for _ in range(3):  # what is rounded in between is made up for
        changed, found = built({key: factor.tolist() for key, factor in factors.items()})
        if all(torch.equal(found[name].double(), wanted[name]) for name in owner):
            break
        factors = {key: factors[key] * found[name].double() / wanted[name] for name, key in owner.items()}
    if not all(torch.allclose(found[name].double(), wanted[name], rtol=_CLOSE, atol=0) for name in owner):
        raise refusal
    return changed


def _vectors(model: nn.Module, length: int) -> Iterator[tuple[str, Tensor]]:
    """Buffers with a number for each pair of dimensions."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and tuple(buffer.shape) == (length,) and not buffer.is_meta:
            yield name, buffer


def _longrope(
    source: Source, rope: Mapping[str, Any], factors: Sequence[float], kept: Tensor, key: str | None
) -> dict[str, Any]:
    """Parameters of a rotation by which each plain frequency is divided by a factor, whatever the length of the text."""
    config = source.config.get_text_config(decoder=True)
    said = {name: rope[name] for name in ("rope_theta", _FRACTION) if rope.get(name) is not None}
    short = torch.tensor(factors, dtype=torch.float64)
    long = short
    before = rope.get("rope_type") == "longrope"
    if before:  # a rotation that changes with the length goes on doing so
        old_short, old_long = (torch.tensor(_of(rope[name], kept), dtype=torch.float64) for name in _FACTORS)
        long = short * old_long / old_short
    return said | {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "factor": float(rope.get("factor") or 1.0) if before else 1.0,
        "attention_factor": _attention_factor(source.skeleton, key),
        "original_max_position_embeddings": rope["original_max_position_embeddings"]
        if before
        else config.max_position_embeddings,
    }


def _attention_factor(model: nn.Module, key: str | None) -> float:
    """What cosines and sines are multiplied by, which some kinds of rotation do."""
    name = "attention_scaling" if key is None else f"{key}_attention_scaling"
    return float(next((vars(module)[name] for module in model.modules() if name in vars(module)), 1.0))

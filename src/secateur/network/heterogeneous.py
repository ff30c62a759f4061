"""Configurations of models whose blocks differ: in feed-forward width, in heads, in parts that some have lost.

They are said in the `per_layer_config` of transformers. Which of its entries means what is not known by name: those that a
block's constructor reads are tried on the meta device until it builds exactly the shapes that are wanted.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from itertools import chain, product
from types import ModuleType
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from torch import nn

from secateur.errors import RequestError
from secateur.network.anatomy import Block
from secateur.network.modelling_file import (
    ATTENTION,
    FEED_FORWARD,
    FILE,
    SHORTCUT,
    Frame,
    base_class,
    frame,
    part_modules,
    plain_config,
    shortcut_names,
)
from secateur.network.recognise import STREAM, join, matrices, signature

if TYPE_CHECKING:
    from secateur.network.source import Source

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
_SAME = "plan the same widths for every block"


@dataclass(frozen=True)
class BlockShape:
    """What a block is to have; None keeps what it has.

    Args:
        units: feed-forward neurons.
        heads, kv_heads: query heads, and the key-value heads that they share; each stays as wide as it is.
        experts: of a mixture. expert_units: neurons of each of them.
        skip: "attention" and "feed_forward", of which the block is to have nothing more.
        shortcuts: whether a matrix turns the residual stream beside each of its parts.
    """

    units: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    expert_units: int | None = None
    skip: tuple[str, ...] = ()
    shortcuts: bool = False


# entries of a block that no class of transformers knows
_OURS = ("skip", "shortcuts")


def heterogeneous_config(
    source: "Source", raw: Mapping[str, Any], shapes: Mapping[int, BlockShape], stream: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config.json that says what each block has; `modelling_file.model_files` gives the code that goes with it.

    Args:
        source: the model so far, whose blocks may differ already.
        raw: its config.json.
        shapes: what becomes of blocks, by index; those left out stay.
        stream: what becomes of the residual stream where its width, or what its norms are, has to be said by code; by
            default what `raw` says.

    Raises RequestError when a shape is impossible, or the architecture could not be opened with it.
    """
    plain = frame(raw, type(source.config)) if base_class(source.skeleton) else None
    if plain is None:
        raise RequestError(
            f"blocks of {source.spec} that differ from each other could not be opened again, because "
            f"{type(source.skeleton).__name__} is no class of transformers; {_SAME}."
        )
    blocks = plain.anatomy.blocks
    for index in shapes:
        if index not in range(len(blocks)):
            raise RequestError(f"{source.spec} has no block {index}; its {len(blocks)} blocks are counted from 0.")
    said: dict[int, dict[str, Any]] = {}
    wanted = _shapes(plain.model)
    known: dict[Any, tuple[dict[str, Any], Shapes]] = {}
    targets = {block.index: _target(source, plain, block, shapes.get(block.index, BlockShape())) for block in blocks}
    for block in blocks:
        # blocks that are built alike and are to be alike are tried once
        key = (targets[block.index], signature(plain.block(block.index), block.index))
        if key not in known:
            known[key] = _solve(plain, block, targets[block.index])
        own, inside = known[key]
        said[block.index] = deepcopy(own)
        for name in block.parameters:
            del wanted[name]
        wanted |= {join(block.path, name): size for name, size in inside.items()}
    changed, stream = plain_config(raw), stream or raw.get(STREAM)
    if stream:
        wanted = _turned(plain, wanted, stream)
    # a stream of another width than the plain architecture's fits no tensor of it
    fits = not stream or stream["width"] == plain.anatomy.hidden
    if fits and any(said.values()) and not any(set(own) - {*_OURS} for own in said.values()):
        changed |= _guard(plain, changed, targets, said)
    for own in said.values():
        # an entry that only blocks know: the width of a head, which is the same everywhere
        changed |= {name: own.pop(name) for name in list(own) if name not in _OURS and not hasattr(plain.config, name)}
    digits = len(str(len(blocks) - 1))
    changed |= {
        "architectures": [plain.names[0]],
        "auto_map": plain.auto_map,
        "per_layer_config": {str(index).zfill(digits): own for index, own in said.items() if own},
        # architectures read entries of all blocks when they check a configuration, where one number must stand
        "allow_global_per_layer_attribute_access": True,
    }
    if stream:
        changed[STREAM] = dict(stream)
    _check(plain, changed, wanted)
    return changed


def _target(source: "Source", plain: Frame, block: Block, wish: BlockShape) -> BlockShape:
    """What the block is to have in whole numbers; None for a part that it never had."""
    now, where = source.anatomy.blocks[block.index], f"block {block.index} of {source.spec}"
    for part in wish.skip:
        if part not in (ATTENTION, FEED_FORWARD):
            raise RequestError(f"{where} cannot skip '{part}'; a block may skip {ATTENTION} and {FEED_FORWARD}.")
    left = {name[len(block.path) + 1 :] for name in now.parameters}
    gone = {part for part in (ATTENTION, FEED_FORWARD) if not _has(plain, block, part, left)}
    skip = tuple(sorted(gone | set(wish.skip)))
    numbers: dict[str, int | None] = {}
    inner, attention = now.feed_forward, now.attention
    had = {
        "units": (inner.units if inner else None, FEED_FORWARD, "feed-forward neurons"),
        "heads": (attention.heads if attention else None, ATTENTION, "attention heads"),
        "kv_heads": (attention.kv_heads if attention else None, ATTENTION, "key-value heads"),
        "experts": (now.experts.count if now.experts else None, FEED_FORWARD, "experts"),
        "expert_units": (now.experts.width if now.experts else None, FEED_FORWARD, "neurons of every expert"),
    }
    for name, (has, part, words) in had.items():
        want = getattr(wish, name)
        if want is not None and (has is None or part in wish.skip):
            raise RequestError(f"{where} cannot be given {want} {words}, because it has none or is to skip them.")
        if want is not None and not 1 <= want <= (has or 0):
            raise RequestError(f"{where} has {has} {words} and cannot keep {want}; keep at least 1, or skip the part.")
        numbers[name] = None if part in skip else (want or has)
    heads, kv_heads = numbers["heads"], numbers["kv_heads"]
    if heads and kv_heads and heads % kv_heads:
        raise RequestError(
            f"{where} cannot have {heads} heads over {kv_heads} key-value heads; every one of these must serve equally many."
        )
    turned = any(name.endswith(SHORTCUT) for name in left)
    return BlockShape(**numbers, skip=skip, shortcuts=wish.shortcuts or turned)


def _has(plain: Frame, block: Block, part: str, left: set[str]) -> bool:
    """Whether parameters are `left` of a part; a part that was never seen counts as there."""
    paths = part_modules(block, part)
    return not paths or any(name.startswith(f"{path}.") for name in left for path in paths)


def _solve(plain: Frame, block: Block, shape: BlockShape) -> tuple[dict[str, Any], Shapes]:
    """The entries of a block's own and the shapes of its parameters, by name in the block. Raises RequestError."""
    module = plain.block(block.index)
    shapes = _shapes(module)
    own: dict[str, Any] = {}
    entries = _Entries(plain, block.index)
    inner, attention = block.feed_forward, block.attention
    kind = plain.whole.__name__
    inside = block.group("expert_neurons")
    widths = [(inner.group if inner else None, shape.units), (inside, shape.expert_units)]
    narrower = [(group, kept) for group, kept in widths if group and kept and kept != group.count]
    if narrower:
        narrow = dict(shapes)
        for group, kept in narrower:
            for part in group.slices:
                name = part.parameter[len(block.path) + 1 :]
                narrow[name] = _less(narrow[name], part.dim, group.count - kept)
        single = [list(entries.one(group.count, kept)) for group, kept in narrower]
        # one entry may say both widths
        each_and_both = chain(
            *single, ({name: n for each in both for name, n in each.items()} for both in product(*single))
        )
        found = entries.find(narrow, each_and_both)
        if found is None:
            said = " and ".join(f"{kept} of {group.count}" for group, kept in narrower)
            raise RequestError(
                f"the configuration of {kind} has no entry that sets the feed-forward width of a block, so blocks of "
                f"differing widths ({said} neurons) could not be opened again; {_SAME}."
            )
        own |= found
        shapes = narrow
    mixture = block.group("experts")
    if shape.experts and mixture and shape.experts != mixture.count:
        narrow = dict(shapes)
        for part in mixture.slices:
            name = part.parameter[len(block.path) + 1 :]
            narrow[name] = _less(narrow[name], part.dim, mixture.count - shape.experts)
        found = entries.find(narrow, ({**own, **each} for each in entries.one(mixture.count, shape.experts)))
        if found is None:
            raise RequestError(
                f"the configuration of {kind} has no entry that sets the number of experts of a block, so blocks with "
                f"differing numbers ({shape.experts} of {mixture.count}) could not be opened again; {_SAME}."
            )
        own |= found
        shapes = narrow
    if (
        shape.heads
        and shape.kv_heads
        and attention
        and (shape.heads, shape.kv_heads) != (attention.heads, attention.kv_heads)
    ):
        fewer = _fewer_heads(module, block, shape.heads, shape.kv_heads)
        narrow = {name: shapes[name] if name not in fewer else _less(shapes[name], *fewer[name]) for name in shapes}
        # the feed-forward may have its new width already
        tries = entries.heads(attention.heads, shape.heads, attention.kv_heads, shape.kv_heads, attention.head_dim)
        found = entries.find(narrow, ({**own, **each} for each in tries))
        if found is None:
            raise RequestError(
                f"the configuration of {kind} has no entries that set the heads of a block at the width that a head has, so "
                f"{shape.heads} of {attention.heads} heads could not be opened again; keep all heads in every block."
            )
        own |= found
        shapes = narrow
    for skipped in shape.skip:
        paths = part_modules(block, skipped)
        if not paths or tuple(plain.parts.get(skipped, ())) != paths:
            raise RequestError(
                f"{block.path} of {kind} cannot go without its {skipped.replace('_', '-')}, because no module of it can be "
                "left out alone; keep it."
            )
        shapes = {name: size for name, size in shapes.items() if not name.startswith(tuple(f"{p}." for p in paths))}
    if shape.skip:
        own["skip"] = list(shape.skip)
    if shape.shortcuts:
        if not plain.shortcuts or shape.skip:
            raise RequestError(
                f"{block.path} of {kind} cannot be given matrices that turn the residual stream beside its attention and "
                "its feed-forward, because it is not one behind the other, each behind a norm of its own; choose a "
                "method, or parameters, that need none (such as rotation=one)."
            )
        width = plain.anatomy.hidden
        shapes |= {name[len(block.path) + 1 :]: (width, width) for name in shortcut_names(block).values()}
        own["shortcuts"] = list(plain.shortcuts)
    return own, shapes


def _less(size: tuple[int, ...], dim: int, fewer: int) -> tuple[int, ...]:
    return (*size[:dim], size[dim] - fewer, *size[dim + 1 :])


def _fewer_heads(module: nn.Module, block: Block, heads: int, kv_heads: int) -> dict[str, tuple[int, int]]:
    """What is cut from parameters, as (dimension, how much less), when the attention keeps so many heads."""
    attention = block.attention
    assert attention is not None
    by_weight = {join(block.path, matrix.weight): matrix for matrix in matrices(module)}
    gone: dict[str, int] = {}
    queries, keys = attention.heads - heads, attention.kv_heads - kv_heads
    for names, number in ((attention.q, queries), (attention.k, keys), (attention.v, keys)):
        for name in names:
            gone[name] = gone.get(name, 0) + number * attention.head_dim
    fewer: dict[str, tuple[int, int]] = {}
    for name, number in gone.items():
        matrix = by_weight[name]
        fewer[matrix.weight] = (matrix.output_dim, number)
        if matrix.bias:
            fewer[matrix.bias] = (0, number)
    for name in attention.o:
        fewer[by_weight[name].weight] = (1 - by_weight[name].output_dim, queries * attention.head_dim)
    return fewer


class _Watched:
    """A configuration that remembers what was read of it, also what it has not."""

    def __init__(self, config: Any) -> None:
        self._config, self._read = config, dict[str, None]()

    def __getattr__(self, name: str) -> Any:
        self._read[name] = None
        return getattr(self._config, name)


class _Entries:
    """The entries of the configuration that a block's constructor reads."""

    def __init__(self, plain: Frame, index: int) -> None:
        self._plain, self._index = plain, index
        watched = _Watched(plain.config)
        try:
            plain.build(plain.arguments, watched, index)
        except Exception as error:  # a constructor may want a real configuration; what it read before tells enough
            logger.debug("a block was not built from a watched configuration: %s", error)
        read = [name for name in watched._read if not name.startswith("_")]
        self._values = {name: getattr(plain.config, name, None) for name in read}

    def having(self, number: int) -> list[str]:
        return [name for name, value in self._values.items() if type(value) is int and value == number]

    @property
    def unset(self) -> list[str]:
        """Those that are left to their default, also such as the configuration does not have."""
        return [name for name, value in self._values.items() if value is None]

    def one(self, old: int, new: int) -> Iterator[dict[str, Any]]:
        """Settings of one entry that may change a number."""
        known = [name for name in self.unset if hasattr(self._plain.config, name)]
        return ({name: new} for name in [*self.having(old), *known])

    def heads(self, old: int, new: int, old_kv: int, new_kv: int, width: int) -> Iterator[dict[str, Any]]:
        """Settings that may change heads, fewest entries first; the width of a head is held where it would follow."""
        queries, keys = self.having(old), dict.fromkeys([*self.having(old_kv), *self.unset])
        for held, shared in product((False, True), (False, True)):
            for query, key, fixed in product(queries, keys if shared else [""], self.unset if held else [""]):
                settings = {query: new, key: new_kv, fixed: width}
                yield {name: value for name, value in settings.items() if name}

    def find(self, wanted: Shapes, tries: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        """The first settings with which the block has the wanted shapes."""
        for settings in tries:
            config = copy(self._plain.config)
            try:
                for name, value in settings.items():
                    setattr(config, name, value)
                built = self._plain.build(self._plain.arguments, config, self._index)
            except Exception as error:  # whatever an architecture does with a value it was not made for
                logger.debug("settings %s refused: %s", settings, error)
                continue
            if _shapes(built) == wanted:
                return settings
        return None


def _guard(
    plain: Frame, raw: Mapping[str, Any], targets: Mapping[int, BlockShape], said: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Where blocks lack parts, or have matrices beside them, and all widths agree: a common width that no block has.

    The right one is said by each.

    Without it somebody who does not let the code run would get the plain architecture, which fits the stored tensors as
    far as they go, fills the parts that are gone with random numbers and leaves matrices out.

    raw: the plain architecture's config.json.
    """
    wide = {each: replace(target, skip=(), shortcuts=False) for each, target in targets.items()}
    others = [(each, replace(shape, units=2 * shape.units)) for each, shape in wide.items() if shape.units]
    others += [
        (each, replace(shape, heads=2 * shape.heads, kv_heads=2 * shape.kv_heads))
        for each, shape in wide.items()
        if shape.heads and shape.kv_heads
    ]
    others += [(each, replace(shape, experts=2 * shape.experts)) for each, shape in wide.items() if shape.experts]
    others += [
        (each, replace(shape, expert_units=2 * shape.expert_units))
        for each, shape in wide.items()
        if shape.expert_units
    ]
    tried: list[dict[str, Any]] = []
    for each, other in others:
        with suppress(RequestError):
            entries = _solve(plain, plain.anatomy.blocks[each], other)[0]
            if not entries or entries in tried:
                continue
            tried.append(entries)
            # the file is made anew from what config.json says: a norm over all heads fits no other number of them, so that
            # nothing could be seen of such a model's parts
            wider = frame({**raw, **entries}, type(plain.config))
            assert wider is not None, "of the same class"
            if (wider.parts, wider.shortcuts, wider.stream) == (plain.parts, plain.shortcuts, plain.stream):
                right = {name: getattr(plain.config, name) for name in entries if hasattr(plain.config, name)}
                said.update({index: {**right, **own} for index, own in said.items()})
                return entries
    raise RequestError(
        f"blocks of {plain.whole.__name__} that lack a part could be taken for whole ones by somebody who loads the result "
        "without its code, because its configuration sets neither widths nor heads; keep every part."
    )


def _turned(plain: Frame, shapes: Shapes, stream: Mapping[str, Any]) -> Shapes:
    """Shapes of parameters with another residual stream; `shapes` gives those of the architecture."""
    width, found = stream["width"], dict(shapes)
    regions = [(plain.stream["block"], f"{block.path}.") for block in plain.anatomy.blocks]
    for where, prefix in [*regions, (plain.stream["outside"], "")]:
        for name, dim in where["dims"].items():
            if (size := found.get(prefix + name)) is not None:
                found[prefix + name] = (*size[:dim], width, *size[dim + 1 :])
        for path in where["norms"] if stream["centred"] else ():
            found = {name: size for name, size in found.items() if name.rpartition(".")[0] != prefix + path}
            found[f"{prefix}{path}.weight"] = (width,)
        for path in where["readers"] if stream["centred"] else ():
            if (size := found.get(f"{prefix}{path}.weight")) is not None:
                found.setdefault(f"{prefix}{path}.bias", (size[1 - where["dims"][f"{path}.weight"]],))
    return {name: (width, width) if name.endswith(SHORTCUT) else size for name, size in found.items()}


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}


def skeleton_of(plain: Frame, raw: Mapping[str, Any]) -> nn.Module:
    """The model that the file builds from this config.json, on the meta device."""
    module = ModuleType(FILE.removesuffix(".py"))
    exec(compile(plain.render(), FILE, "exec"), module.__dict__)  # the very text that is written beside it
    config = type(plain.config).from_dict(deepcopy(dict(raw)))
    with init_empty_weights(include_buffers=False):
        model: nn.Module = getattr(module, plain.names[0])._from_config(config)
    return model.eval()


def _check(plain: Frame, raw: Mapping[str, Any], wanted: Shapes) -> None:
    """Raises RequestError unless the file builds the wanted model from this config.json."""
    try:
        model = skeleton_of(plain, raw)
    except Exception as error:  # an architecture may refuse what its blocks could be built with
        raise RequestError(
            f"{plain.whole.__name__} cannot be built with blocks that differ from each other "
            f"({str(error).strip().splitlines()[0][:200]}); {_SAME}."
        ) from error
    if _shapes(model) != wanted:
        wrong = sorted(name for name in {*wanted, *_shapes(model)} if wanted.get(name) != _shapes(model).get(name))
        raise RequestError(f"{plain.whole.__name__} gives {wrong[0]} another shape than is planned for it; {_SAME}.")

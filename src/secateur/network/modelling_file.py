"""The one file of code that a model brings whose blocks differ, or turn the stream: what is in it, and whether it is ours.

The file is filled in from the architecture alone, never from widths: two results of one architecture hold the same bytes,
and a file of these bytes is known to be harmless without asking whoever wrote it.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PretrainedConfig

from secateur.errors import RequestError
from secateur.network.anatomy import Anatomy, Block
from secateur.network.examine import anatomy
from secateur.network.recognise import STREAM, signature
from secateur.network.stream_roles import find_roles, norms_before
from secateur.network.trace import Call, trace

logger = logging.getLogger(__name__)

FILE = "modeling_heterogeneous.py"
PREFIX = "Heterogeneous"
BLOCK, ATTENTION, FEED_FORWARD = "block", "attention", "feed_forward"
SHORTCUT = "_shortcut.weight"  # how the names of matrices beside parts end
# what config.json of such a model has beside the entries of its architecture
_ENTRIES = ("per_layer_config", "auto_map", "allow_global_per_layer_attribute_access", STREAM)
# how a block of an architecture may be built
_ARGUMENTS = {
    "layer, index": lambda kind, config, index: kind(config, index),
    "layer": lambda kind, config, index: kind(config),
    "index, layer": lambda kind, config, index: kind(index, config),
}


def base_class(model: nn.Module) -> type | None:
    """The class of transformers that `model` is, or that a file of ours has derived it from; None for any other."""
    for kind in type(model).__mro__:
        named = type(model).__name__ in (kind.__name__, PREFIX + kind.__name__)
        if named and getattr(transformers, kind.__name__, None) is kind:
            return kind
    return None


def is_heterogeneous(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with a file of ours."""
    architecture = next(iter(raw.get("architectures") or []), "")
    return bool(raw.get("per_layer_config")) and architecture.startswith(PREFIX)


def plain_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` without what a heterogeneous model adds to it: the same architecture with one width for all blocks."""
    if not is_heterogeneous(raw):
        return dict(raw)
    plain = {name: value for name, value in raw.items() if name not in _ENTRIES}
    plain["architectures"] = [raw["architectures"][0].removeprefix(PREFIX)]
    return plain


@dataclass(frozen=True)
class Frame:
    """An architecture as far as the file is concerned.

    Args:
        whole: class with the head, such as the one that `architectures` of a plain config names.
        config: of the plain architecture.
    """

    whole: type
    config: PretrainedConfig

    @cached_property
    def model(self) -> nn.Module:
        """The plain architecture on the meta device."""
        with init_empty_weights(include_buffers=False):
            return self.whole._from_config(self.config).eval()  # type: ignore[attr-defined]

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.model)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two classes in the file: with the head and without."""
        return PREFIX + self.whole.__name__, PREFIX + type(self.model.base_model).__name__  # type: ignore[arg-type]

    @property
    def auto_map(self) -> dict[str, str]:
        module, (whole, body) = FILE.removesuffix(".py"), self.names
        return {"AutoModel": f"{module}.{body}", "AutoModelForCausalLM": f"{module}.{whole}"}

    @cached_property
    def arguments(self) -> str:
        """What a block is built with. Raises RequestError when no way of building gives the block that is there."""
        block = self.block(0)
        for arguments in _ARGUMENTS:
            try:
                built = self.build(arguments, self.config, 0)
            except Exception as error:  # whatever a constructor does with arguments that it was not made for
                logger.debug("a block cannot be built with (%s): %s", arguments, error)
                continue
            if signature(built, 0) == signature(block, 0):
                return arguments
        raise RequestError(
            f"blocks of {self.whole.__name__} that differ from each other could not be opened again, because a "
            f"{type(block).__name__} cannot be built from a configuration alone; plan the same widths for every block."
        )

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.blocks[index].path)

    def build(self, arguments: str, config: Any, index: int) -> nn.Module:
        """A block on the meta device from a configuration of its own."""
        with init_empty_weights(include_buffers=False):
            return _ARGUMENTS[arguments](type(self.block(index)), config, index).eval()  # type: ignore[no-untyped-call]

    @cached_property
    def parts(self) -> dict[str, dict[str, int]]:
        """The modules of each part inside a block, and how many outputs each returns in a tuple (0: one, bare).

        A part that no block shows, or whose modules differ between blocks, is left out.
        """
        found: dict[str, dict[str, int]] = {}
        for part in (ATTENTION, FEED_FORWARD):
            modules = {paths for block in self.anatomy.blocks if (paths := part_modules(block, part))}
            if len(modules) == 1:
                [paths] = modules
                # blocks with and without experts may stand in one model and give their outputs in different forms
                having = [each for each in self.anatomy.blocks if part_modules(each, part)]
                kinds = {each.experts is None: each for each in reversed(having)}.values()
                banks = [each.experts.module for each in self.anatomy.blocks if each.experts]
                traces = trace(self.model, {each.index: each.path for each in kinds}, banks).values()
                lengths = [{path: seen.lengths.get(path) for path in paths} for seen in traces]
                if all(each == lengths[0] for each in lengths) and all(
                    path in seen.lengths and _reads_once(seen.calls[path], self.anatomy.hidden)
                    for seen in traces
                    for path in paths
                ):
                    found[part] = {path: seen.lengths[path] for seen in traces for path in paths}
        return found

    @cached_property
    def shortcuts(self) -> dict[str, tuple[str, str]]:
        """A norm in front of each part inside a block, and the module whose output is added behind it; none where blocks
        differ in that.
        """
        found = [passed_parts(block) for block in self.anatomy.blocks]
        alike = all(each == found[0] for each in found)
        return {part: (norms[0], module) for part, (norms, module) in found[0].items()} if alike else {}

    @cached_property
    def stream(self) -> dict[str, dict[str, Any]]:
        """Where the residual stream lies in a block and outside of blocks: the dimension along which each parameter has a
        number for each channel, the norms over it, and the modules that read it behind norms with a bias. Nothing where that
        is not known, or blocks differ in it.
        """
        nothing: dict[str, Any] = {"dims": {}, "norms": [], "readers": []}
        try:
            roles = find_roles(self.model, self.anatomy, self.whole.__name__)
        except RequestError as error:
            logger.debug("the stream of %s cannot be turned: %s", self.whole.__name__, error)
            return {"block": nothing, "outside": nothing}
        readers = [name.rpartition(".")[0] for name in roles.biases]
        found: dict[str, dict[str, Any]] = {}
        for path in [*(block.path + "." for block in self.anatomy.blocks), ""]:
            inside = tuple(f"{block.path}." for block in self.anatomy.blocks)

            def here(name: str, path: str = path, inside: tuple[str, ...] = inside) -> bool:
                return name.startswith(path) if path else not name.startswith(inside)

            found[path] = {
                "dims": {name[len(path) :]: dims[0] for name, dims in roles.dims.items() if here(name)},
                "norms": [name[len(path) :] for name in roles.norms if here(name)],
                "readers": list(dict.fromkeys(name[len(path) :] for name in readers if here(name))),
            }
        outside = found.pop("")
        block = next(iter(found.values()))
        alike = all(each == block for each in found.values())
        return {"block": block, "outside": outside} if alike else {"block": nothing, "outside": nothing}

    def render(self) -> str:
        """The file. Raises RequestError for an architecture that it could not serve."""
        text = Path(__file__).with_name("modeling_heterogeneous.txt").read_text(encoding="utf-8")
        body = self.model.base_model
        path = self.anatomy.blocks[0].path.rpartition(".")[0]
        known = getattr(transformers, type(body).__name__, None) is type(body) and body is not self.model
        if not known or self.config.get_text_config(decoder=True) is not self.config:
            raise RequestError(
                f"blocks of {self.whole.__name__} that differ from each other could not be opened again, because it is no "
                "plain language model with a public class for what lies below its head; plan the same widths for every "
                "block."
            )
        return Template(text).substitute(
            whole=self.whole.__name__,
            body=type(body).__name__,
            blocks=path,
            blocks_of_body=path.removeprefix(f"{self.model.base_model_prefix}."),
            parts=json.dumps(self.parts),
            shortcuts=json.dumps(self.shortcuts),
            stream=json.dumps(self.stream),
            base=self.model.base_model_prefix,
            arguments=self.arguments,
        )


def _reads_once(call: Call, hidden: int) -> bool:
    """Whether a module is given the residual stream at most once; one that is given it twice adds to it by itself."""
    given = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return sum(leaf.ndim in (2, 3) and leaf.shape[-1] == hidden for leaf in given) <= 1


def part_modules(block: Block, part: str) -> tuple[str, ...]:
    """The modules, relative to the block, that make up its attention or feed-forward; none where it has no such part."""
    inside = len(block.path) + 1
    if part == ATTENTION:
        return (block.attention.module[inside:],) if block.attention and block.attention.module != block.path else ()
    if block.experts:  # with their router, and what is shared beside them
        around = block.experts.module.rpartition(".")[0]
        return (around[inside:],) if around != block.path else ()
    found = block.feed_forward
    if found is None:
        return ()
    if found.module != block.path:
        return (found.module[inside:],)
    # its matrices stand in the block itself, one by one: with each of them silent nothing is left to add
    names = dict.fromkeys(part.parameter for part in (found.gate, found.up, found.down) if part)
    return tuple(name[inside:].rpartition(".")[0] for name in names)


def passed_parts(block: Block) -> dict[str, tuple[tuple[str, ...], str]]:
    """The parts that the stream passes one after the other, each as the paths in the block of the norms that read the stream
    in front of it and of the module whose output is added to the stream; none where that is not known. Attention and
    feed-forward side by side are passed as one, the whole block.
    """
    layer, attention = block.feed_forward, block.attention
    before = norms_before(block, block.norms)
    if before is None or not layer or not attention or attention.module == block.path or block.experts:
        return {}
    inside = len(block.path) + 1
    norms = [path[inside:] for path in before]
    # of a layer whose matrices stand in the block itself the last one gives what is added
    added = layer.module if layer.module != block.path else layer.down.parameter.rpartition(".")[0]
    if block.parallel:
        return {BLOCK: (tuple(dict.fromkeys(norms[::-1])), added[inside:])}
    return {ATTENTION: ((norms[0],), attention.module[inside:]), FEED_FORWARD: ((norms[1],), added[inside:])}


def places_of(anatomy: Anatomy) -> int:
    """How many places there are where norms read the stream: one in front of each part that it passes, and the last."""
    return sum(len(passed_parts(block)) or 2 for block in anatomy.blocks) + 1


def shortcut_names(block: Block) -> dict[str, str]:
    """The parameters, by name in the model, that turn the stream beside each part of a block."""
    return {part: f"{block.path}.{part}{SHORTCUT}" for part in passed_parts(block)}


def is_turned(anatomy: Anatomy) -> bool:
    """Whether matrices turn the residual stream beside parts of its blocks, so that it has a basis of its own at each."""
    return any(name.endswith(SHORTCUT) for block in anatomy.blocks for name in block.parameters)


def part_parameters(block: Block, part: str) -> tuple[str, ...]:
    """The parameters of its attention or feed-forward, or of the whole block, by name in the model."""
    if part == BLOCK:
        return block.parameters
    inside = tuple(f"{block.path}.{path}." for path in part_modules(block, part))
    return tuple(name for name in block.parameters if inside and name.startswith(inside))


def nothings(plain: Frame, part: str) -> dict[str, Callable[[int], nn.Module]]:
    """What stands in the place of each module of a part that is gone, by path in the block: made for a block's index.

    Raises RequestError where the architecture cannot go without it.
    """
    if not plain.parts.get(part):
        raise RequestError(
            f"blocks of {plain.whole.__name__} cannot go without their {part.replace('_', '-')}, because no module of them "
            "can be left out alone; remove whole blocks."
        )
    module = ModuleType(FILE.removesuffix(".py"))
    exec(compile(plain.render(), FILE, "exec"), module.__dict__)  # the very text that is written beside a model

    def maker(outputs: int) -> Callable[[int], nn.Module]:
        return lambda index: module.Nothing(outputs, index if part == ATTENTION else None)

    return {path: maker(outputs) for path, outputs in plain.parts[part].items()}


def frame(raw: Mapping[str, Any], kind: type[PretrainedConfig]) -> Frame | None:
    """The architecture behind a config.json, plain or of ours; None where transformers has no class for it."""
    plain = plain_config(raw)
    try:
        return _frame(json.dumps(plain, sort_keys=True), kind)  # type: ignore[arg-type]  # a class can be hashed
    except TypeError:  # a live configuration may hold anything
        return _frame_of(plain, kind)


def _frame_of(plain: Mapping[str, Any], kind: type[PretrainedConfig]) -> Frame | None:
    whole: Any = getattr(transformers, next(iter(plain.get("architectures") or []), ""), None)
    return Frame(whole, kind.from_dict(dict(plain))) if hasattr(whole, "_from_config") else None


@lru_cache(maxsize=4)
def _frame(plain: str, kind: type[PretrainedConfig]) -> Frame | None:
    """Kept, because a run asks for the same again and again, and running a network on fake tensors takes seconds."""
    return _frame_of(json.loads(plain), kind)


def model_files(raw: Mapping[str, Any], kind: type[PretrainedConfig]) -> dict[str, str]:
    """The code that goes beside this config.json, by file name: none for an ordinary model."""
    found = frame(raw, kind) if is_heterogeneous(raw) else None
    return {FILE: found.render()} if found else {}


def is_ours(directory: Path) -> bool:
    """Whether the only code that this model brings is byte for byte what would be written for it here.

    Such code may run without anybody's word for it. Nothing of the directory is run to find out, and code of a tokenizer,
    a line more in the file or another file named by config.json make it foreign.
    """
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not is_heterogeneous(raw):
            return False
        if [path.name for path in directory.glob("*.py")] != [FILE]:
            return False
        words = directory / "tokenizer_config.json"
        if words.exists() and "auto_map" in json.loads(words.read_text(encoding="utf-8")):
            return False
        found = frame(raw, transformers.CONFIG_MAPPING[raw["model_type"]])
        if found is None or raw.get("auto_map") != found.auto_map:
            return False
        return (directory / FILE).read_bytes() == found.render().encode()
    except Exception as error:  # whatever is wrong with it, it is not what we would have written
        logger.debug("%s is not a file of ours: %s", directory / FILE, error)
        return False

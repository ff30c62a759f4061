"""Opens a model wherever it is, and reads its tensors when they are needed.

Opening reads configuration and file headers alone. A safetensors file is open while tensors of it are read and closed
after; nothing here holds a weight.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from secateur.errors import RequestError, RunError
from secateur.files import disk_full, human, sha256
from secateur.network.anatomy import Anatomy
from secateur.network.checkpoint import TensorInfo, bind, check_finite, headers, line, stored_buffers, tensor_hash
from secateur.network.examine import anatomy
from secateur.network.locate import Place, locate
from secateur.network.modelling_file import is_heterogeneous, is_ours
from secateur.network.parts import Part, assemble, stacked, take_apart

logger = logging.getLogger(__name__)


@dataclass
class Source:
    """A model that is only read: its configuration, its stored tensors, its structure.

    Args:
        spec: the model as the person named it.
        directory: folder with config and tokenizer files, None for a live module.
        config: the transformers configuration.
        tensors: every stored tensor by its name in the files.
        place: where it came from; licence and base model for the model card.
    """

    spec: str
    directory: Path | None
    config: PretrainedConfig
    tensors: dict[str, TensorInfo]
    place: Place
    trust_remote_code: bool = False
    live: nn.Module | None = field(default=None, repr=False)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model with its parameters on the meta device and its buffers real: structure without weights."""
        if self.live is not None:
            return _with_precise_buffers(_empty_copy(self.live), self.config, self.trust_remote_code)
        try:
            model = skeleton(self.config, self.trust_remote_code)
        except Exception as error:  # transformers raises a different family for each thing that a config lacks
            raise RequestError(
                f"transformers cannot build a language model from the configuration of {self.spec}: {line(error)}"
            ) from error
        if model.dtype in _HALF:
            _replace(model, _buffers_in_float32(self.config, self.trust_remote_code))
        # some are learned, such as the bias by which experts are chosen
        buffers = dict(model.named_buffers())
        for name, key in stored_buffers(model, self.tensors).items():
            buffers[name].copy_(self.read([key])[key])
        return model

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.skeleton)

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The stored tensors that make each model parameter; tied parameters share theirs.

        Raises RequestError for a parameter that is missing, wholly or in part, or of another shape than it should be.
        """
        return bind(self.skeleton, self.tensors, self.spec)

    def stored_keys(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors behind a parameter."""
        return tuple(dict.fromkeys(part.key for part in self.parts[name]))

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values() if info.file})

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The stored tensors of these names. Each file is open only meanwhile; tensors may map it until they are dropped."""
        names = list(names)
        found: dict[str, torch.Tensor] = {}
        if self.live is not None:
            state = self.live.state_dict(keep_vars=False)
            return {name: state[name].detach().cpu() for name in names}
        for path in sorted({file for name in names if (file := self.tensors[name].file)}):
            try:
                with safe_open(path, framework="pt") as file:
                    found.update({name: file.get_tensor(name) for name in names if self.tensors[name].file == path})
            except (SafetensorError, OSError) as error:  # its header was read before: it has changed since
                raise RunError(f"{path} can no longer be read ({line(error)}); bring it back and go on.") from error
        return {name: found[name] for name in names}

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter by its name in the model, as stored."""
        return self.read_parameters([name])[name]

    def entry(self, name: str, index: int) -> torch.Tensor:
        """One entry along the first dimension of a parameter, as stored: of experts stored apart only that one is read."""
        parts = self.parts[name]
        if not stacked(parts):
            return self.parameter(name)[index]
        own = [replace(part, region=part.region[1:]) for part in parts if part.region[0] == index]
        return assemble(own, self.read(dict.fromkeys(part.key for part in own)))

    def read_parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Parameters by their names in the model, in its shapes, as stored; only merged ones are copies."""
        names = list(names)
        return self.assemble(names, self.read(dict.fromkeys(key for name in names for key in self.stored_keys(name))))

    def assemble(self, names: Iterable[str], stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters by their names in the model, from the `stored` tensors behind them."""
        return {name: assemble(self.parts[name], stored) for name in names}

    def take_apart(
        self, name: str, tensor: torch.Tensor, stored: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a changed parameter: views of it where one parameter alone is made of them.

        stored: what they are so far, for those that hold other parameters too; read where left out.
        """
        parts = self.parts[name]
        if stored is None:
            stored = self.read([part.key for part in parts if part.taken])
        return take_apart(name, parts, tensor, stored)

    def quick_print(self) -> list[list[Any]]:
        """Name, size and time of each file: changes when the source does, at no cost. A live module's tensors' hashes."""
        if self.live is not None:
            return [[name, tensor_hash(tensor)] for name, tensor in self.live.state_dict().items()]
        # configuration and tokenizer are copied into the result, so they count as much as the weights
        files = [self.place.file] if self.place.file else sorted(self.place.directory.iterdir())
        shown = [path for path in files if path.is_file() and path.name != "README.md" and path.name[0] != "."]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shown]

    def scan(self, seen: Callable[[int], None] = lambda n: None) -> dict[str, str]:
        """Reads everything once: SHA-256 per file. Raises RequestError naming the first tensor with a non-finite value."""
        hashes = {}
        by_file: dict[Path | None, list[str]] = {}
        for name, info in self.tensors.items():
            by_file.setdefault(info.file, []).append(name)
        for path, names in by_file.items():
            if path is not None:
                hashes[path.name] = sha256(path, seen=seen)
            for name in names:
                check_finite(name, self.read([name])[name], self.spec)
        return hashes


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration with parameters on the meta device, in evaluation mode."""
    architecture = next(iter(config.architectures or []), None)
    kind = getattr(transformers, architecture, None) if architecture else None
    with init_empty_weights(include_buffers=False):
        if kind is not None and hasattr(kind, "_from_config"):
            model = kind._from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def check_device(device: str) -> None:
    """Raises RequestError when torch knows no such device or this machine has none."""
    try:
        usable = torch.device(device).type != "meta"  # holds no numbers
        # only using it tells: what a missing device raises depends on how torch was built
        torch.empty(1, device=device)
    except Exception as error:
        raise RequestError(
            f"the device '{device}' cannot be used here ({line(error)}); name another, such as cpu."
        ) from error
    if not usable:
        raise RequestError(f"the device '{device}' computes nothing; name another, such as cpu.")


def open_model(spec: str | Path | nn.Module, *, work: Path | None = None, trust_remote_code: bool = False) -> Source:
    """Opens MODEL: a directory, a hub id, a `.gguf` file, `package:NAME`, or a live module.

    Args:
        work: folder for the one conversion that `.bin` and GGUF files need; without it such a source has
            configuration and structure but no tensors.
        trust_remote_code: let the model's own code run. Code that is byte for byte what we write runs in any case.

    Raises RequestError with one sentence for anything that cannot be opened.
    """
    if isinstance(spec, nn.Module):
        return _live(spec)
    place = locate(str(spec))
    trust_remote_code = trust_remote_code or (place.file is None and is_ours(place.directory))
    if place.weights != "safetensors":
        return _converted(place, work, trust_remote_code)
    config = _config(place, trust_remote_code)
    return Source(place.spec, place.directory, config, headers(place.directory), place, trust_remote_code)


def load(
    spec: str | Path, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The whole model through transformers, in evaluation mode, and its tokenizer (None when it has none)."""
    place = locate(str(spec))
    trust_remote_code = trust_remote_code or (place.file is None and is_ours(place.directory))
    config = _config(place, trust_remote_code)
    model: nn.Module = _whole(place, config, getattr(torch, dtype), trust_remote_code)
    return model.to(device).eval(), tokenizer(place, trust_remote_code)


def dense_model(source: Source, device: str) -> nn.Module:
    """The whole model of a source in float32 and evaluation mode, a copy of a live one."""
    if source.live is None:
        return load(source.spec, device=device, trust_remote_code=source.trust_remote_code)[0]
    # not `.float()`: transformers refuses it for what was read from a GGUF file, de-quantized as it is
    return deepcopy(source.live).to(device, torch.float32).eval()


def tokenizer(place: Place, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a place, or None when there is none."""
    extra = {"gguf_file": place.file.name} if place.file else {}
    if not extra and not any((place.directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(place.directory, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # each kind of tokenizer file fails in its own way
        raise RequestError(f"the tokenizer of {place.spec} could not be read: {line(error)}") from error


def _config(place: Place, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a place, without any note of how its weights were quantized. Raises RequestError."""
    if place.file:
        # a copy, because transformers writes into configurations
        return deepcopy(_gguf_config(place.file, place.file.stat().st_mtime_ns))
    try:
        raw = json.loads((place.directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"config.json of {place.spec} could not be read: {line(error)}") from error
    if not isinstance(raw, dict):
        raise RequestError(f"config.json of {place.spec} does not hold a configuration; fetch it again.")
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise RequestError(
            f"{place.spec} brings code of its own ({', '.join(sorted(raw['auto_map']))}), which Secateur runs only with "
            "--trust-remote-code."
        )
    if is_heterogeneous(raw) and not trust_remote_code:
        raise RequestError(
            f"the code that {place.spec} brings for its differing blocks is not what this version of Secateur writes; look "
            "at it, and let it run with --trust-remote-code."
        )
    if quantized := raw.get("quantization_config"):
        raise RequestError(
            f"{place.spec} is already quantized ({quantized.get('quant_method', 'unknown method')}); Secateur needs the "
            "weights it was made from: open the original checkpoint."
        )
    try:
        return transformers.AutoConfig.from_pretrained(place.directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a wrong value in a config raises depends on the architecture
        raise RequestError(f"the configuration of {place.spec} could not be read: {line(error)}") from error


@lru_cache(maxsize=8)
def _gguf_config(path: Path, changed: int) -> PretrainedConfig:
    """The configuration in a GGUF header. Kept, because transformers walks the vocabulary for seconds to find it."""
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers checks nothing of a GGUF header before it uses it
        raise RequestError(f"the configuration of {path} could not be read: {line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _live(module: nn.Module) -> Source:
    config = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise RequestError(f"{type(module).__name__} carries no transformers config, so it could not be saved again.")
    # tensors that are one in memory (tied embeddings) are stored once, as in a saved checkpoint
    state, seen = module.state_dict(), set[tuple[Any, ...]]()
    tensors = {}
    for name, tensor in state.items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if where not in seen or tensor.numel() == 0:
            tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
        seen.add(where)
    return Source(type(module).__name__, None, config, tensors, Place(type(module).__name__, Path()), live=module)


def _empty_copy(module: nn.Module) -> nn.Module:
    """A live module with its parameters on the meta device and its buffers real, whatever its config says of widths."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    # deepcopy takes what it finds in its memo for already copied, so that no weight is
    return deepcopy(module, dict(empty)).eval()


def _with_precise_buffers(model: nn.Module, config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """A live module's copy with the buffers that a loaded model computes anew: `.to(bfloat16)` has rounded frequencies."""
    stored = set(model.state_dict())
    rounded = {name: buffer for name, buffer in model.named_buffers() if name not in stored and buffer.dtype in _HALF}
    if rounded:
        try:
            fresh = _buffers_in_float32(config, trust_remote_code)
        except Exception as error:  # a module of one's own need not be what its configuration says
            logger.debug("buffers stay as they are: %s", error)
            return model
        _replace(model, {name: buffer for name, buffer in fresh.items() if name in rounded})
    return model


_HALF = (torch.float16, torch.bfloat16)


def _buffers_in_float32(config: PretrainedConfig, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """A model's buffers, computed in float32: some architectures compute angles in the dtype of the weights."""
    config = deepcopy(config)
    config.dtype = torch.float32
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = torch.float32
    return dict(skeleton(config, trust_remote_code).named_buffers())


def _replace(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Puts buffers in the place of those of the same name and shape."""
    for name, buffer in list(model.named_buffers()):
        if name in buffers and buffers[name].shape == buffer.shape:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = buffers[name]


def conversion_dtype(place: Place, config: PretrainedConfig) -> torch.dtype:
    """What a `.bin` or GGUF model is converted to: the dtype it says of itself, float32 for de-quantized weights."""
    said = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    return said if said is not None and place.file is None else torch.float32


def _converted(place: Place, work: Path | None, trust_remote_code: bool) -> Source:
    """A `.bin` or GGUF model as safetensors in the work folder; converted there once."""
    config = _config(place, trust_remote_code)
    if work is None:
        return Source(place.spec, place.directory, config, {}, place, trust_remote_code)
    target = work / "source"
    exact = torch.float32 if place.file else "auto"
    if not (target / "config.json").exists():
        count = sum(parameter.numel() for parameter in skeleton(config, trust_remote_code).parameters())
        size = human(count * conversion_dtype(place, config).itemsize)
        # a warning, because levels below are not shown by default and this is what minutes are spent on
        logger.warning(
            "%s is converted once to safetensors: this needs about %s of memory and of disk.", place.spec, size
        )
        partial = work / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model = _whole(place, config, exact, trust_remote_code)
        words = tokenizer(place, trust_remote_code)
        try:
            model.save_pretrained(partial, max_shard_size="500MB")
            if words:
                words.save_pretrained(partial)
            partial.replace(target)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if disk_full(error):
                raise RunError(
                    f"the disk is full: {place.spec} needs {size} in {work} to be converted; free some space and start the "
                    "same command again."
                ) from error
            raise RunError(f"{place.spec} could not be converted into {work}: {line(error)}") from error
    # configuration and tokenizer of a `.bin` model are taken as they came; those of a GGUF file are made here
    directory = target if place.file else place.directory
    return Source(place.spec, directory, config, headers(target), place, trust_remote_code)


def _whole(
    place: Place, config: PretrainedConfig, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    extra = {"gguf_file": place.file.name} if place.file else {}
    architecture = next(iter(config.architectures or []), None)
    kind = getattr(transformers, architecture, None) if architecture and not trust_remote_code else None
    loader = kind if kind is not None and hasattr(kind, "from_pretrained") else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(place.directory, dtype=dtype, trust_remote_code=trust_remote_code, **extra)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle, a wrong shape, a quantization unknown to it: each its own family
        raise RequestError(f"transformers could not load {place.spec}: {line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        # GGUF weights are plain floats by now; what still says that they are quantized would stop them from being saved
        del model.config.quantization_config
        model.hf_quantizer = None
    return model

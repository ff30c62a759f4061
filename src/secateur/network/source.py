"""Opens a model wherever it is, and reads its tensors when they are needed.

Opening reads configuration and file headers alone. A safetensors file is open while tensors of it are read and closed
after; nothing here holds a weight.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from secateur.errors import RequestError, RunError
from secateur.files import human, sha256
from secateur.network.anatomy import Anatomy, anatomy
from secateur.network.locate import Place, locate

logger = logging.getLogger(__name__)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, known from its file's header alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
        return skeleton(self.config, self.trust_remote_code)

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.skeleton)

    @cached_property
    def keys(self) -> dict[str, str]:
        """The stored name of each model parameter; tied parameters share one. Raises RequestError for a missing one."""
        return _bind(self.skeleton, self.tensors, self.spec)

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values() if info.file})

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The stored tensors of these names. Each file is open only meanwhile; tensors may map it until they are dropped."""
        names = list(names)
        if self.live is not None:
            state = self.live.state_dict(keep_vars=False)
            return {name: state[name].detach().cpu() for name in names}
        found = {}
        for path in sorted({file for name in names if (file := self.tensors[name].file)}):
            with safe_open(path, framework="pt") as file:
                found.update({name: file.get_tensor(name) for name in names if self.tensors[name].file == path})
        return {name: found[name] for name in names}

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter by its name in the model, as stored."""
        key = self.keys[name]
        return self.read([key])[key]

    def quick_print(self) -> list[list[Any]]:
        """Name, size and time of each file: changes when the source does, at no cost. A live module's tensors' hashes."""
        if self.live is not None:
            return [[name, _tensor_hash(tensor)] for name, tensor in self.live.state_dict().items()]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]

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
                _check_finite(name, self.read([name])[name], self.spec)
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


def open_model(spec: str | Path | nn.Module, *, work: Path | None = None, trust_remote_code: bool = False) -> Source:
    """Opens MODEL: a directory, a hub id, a `.gguf` file, `package:NAME`, or a live module.

    Args:
        work: folder for the one conversion that `.bin` and GGUF files need; without it such a source has
            configuration and structure but no tensors.
        trust_remote_code: let the model's own code run.

    Raises RequestError with one sentence for anything that cannot be opened.
    """
    if isinstance(spec, nn.Module):
        return _live(spec)
    place = locate(str(spec))
    if place.weights != "safetensors":
        return _converted(place, work, trust_remote_code)
    config = _config(place, trust_remote_code)
    return Source(place.spec, place.directory, config, _headers(place.directory), place, trust_remote_code)


def load(
    spec: str | Path, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The whole model through transformers, in evaluation mode, and its tokenizer (None when it has none)."""
    place = locate(str(spec))
    config = _config(place, trust_remote_code)
    model = _whole(place, config, getattr(torch, dtype), trust_remote_code).to(device).eval()
    return model, tokenizer(place, trust_remote_code)


def tokenizer(place: Place, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a place, or None when there is none."""
    extra = {"gguf_file": place.file.name} if place.file else {}
    if not extra and not any((place.directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(place.directory, trust_remote_code=trust_remote_code, **extra)


def _config(place: Place, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a place, without any note of how its weights were quantized. Raises RequestError."""
    if place.file:
        # a copy, because transformers writes into configurations
        return deepcopy(_gguf_config(place.file, place.file.stat().st_mtime_ns))
    raw = json.loads((place.directory / "config.json").read_text())
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise RequestError(
            f"{place.spec} brings code of its own ({', '.join(sorted(raw['auto_map']))}), which Secateur runs only with "
            "--trust-remote-code."
        )
    if quantized := raw.get("quantization_config"):
        raise RequestError(
            f"{place.spec} is already quantized ({quantized.get('quant_method', 'unknown method')}); Secateur needs the "
            "weights it was made from: open the original checkpoint."
        )
    try:
        return transformers.AutoConfig.from_pretrained(place.directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"the configuration of {place.spec} could not be read: {_line(error)}") from error


@lru_cache(maxsize=8)
def _gguf_config(path: Path, changed: int) -> PretrainedConfig:
    """The configuration in a GGUF header. Kept, because transformers walks the vocabulary for seconds to find it."""
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"the configuration of {path} could not be read: {_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a directory's safetensors files, from the headers; the index must agree with them."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            where: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise RequestError(f"{index.name} in {directory} is not a valid index: {_line(error)}") from error
    else:
        where = {}
    files = sorted({directory / name for name in where.values()}) or sorted(directory.glob("*.safetensors"))
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        if not path.exists():
            raise RequestError(f"shard {path.name}, which the index names, is missing in {directory}; fetch it again.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    piece = file.get_slice(name)
                    dtype = _DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise RequestError(f"tensor {name} in {path.name} has dtype {piece.get_dtype()}, unknown here.")
                    tensors[name] = TensorInfo(tuple(piece.get_shape()), dtype, path)
        except SafetensorError as error:
            raise RequestError(
                f"shard {path.name} in {directory} is damaged or cut short ({_line(error)}); fetch it again."
            ) from error
    for name, shard in where.items():
        if name not in tensors or tensors[name].file != directory / shard:
            raise RequestError(
                f"the index of {directory} says that {shard} holds {name}, but it does not; shards and index are not of "
                "one model: fetch them again."
            )
    return {name: info for name, info in tensors.items() if not where or name in where}


def _bind(model: nn.Module, tensors: Mapping[str, TensorInfo], spec: str) -> dict[str, str]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    keys: dict[str, str] = {}
    for name in shapes:
        # a checkpoint of the bare model lacks the prefix that the model with a head has
        for key in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}"):
            if key in tensors:
                keys[name] = key
                break
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in keys and other in keys:
            keys[name] = keys[other]
    for name, shape in shapes.items():
        if name not in keys:
            raise RequestError(
                f"{spec} holds no tensor for {name} of {type(model).__name__}: the checkpoint is incomplete or stores "
                "its weights in a layout that is not supported."
            )
        if tensors[keys[name]].shape != shape:
            raise RequestError(
                f"tensor {keys[name]} of {spec} has shape {list(tensors[keys[name]].shape)}, but its config asks for "
                f"{list(shape)}."
            )
    return keys


def _live(module: nn.Module) -> Source:
    config = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise RequestError(f"{type(module).__name__} carries no transformers config, so it could not be saved again.")
    tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
    return Source(type(module).__name__, None, config, tensors, Place(type(module).__name__, Path()), live=module)


def _converted(place: Place, work: Path | None, trust_remote_code: bool) -> Source:
    """A `.bin` or GGUF model as safetensors in the work folder; converted there once."""
    config = _config(place, trust_remote_code)
    if work is None:
        return Source(place.spec, place.directory, config, {}, place, trust_remote_code)
    target = work / "source"
    if not (target / "config.json").exists():
        size = sum(parameter.numel() for parameter in skeleton(config, trust_remote_code).parameters()) * 4
        logger.info(
            "%s is converted once to safetensors in float32: this needs about %s of memory and %s of disk.",
            place.spec, human(size), human(size),
        )  # fmt: skip
        partial = work / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model = _whole(place, config, torch.float32, trust_remote_code)
            model.save_pretrained(partial, max_shard_size="500MB")
            if words := tokenizer(place, trust_remote_code):
                words.save_pretrained(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"{place.spec} could not be converted into {work}: {_line(error)}") from error
        partial.rename(target)
    return Source(place.spec, target, config, _headers(target), place, trust_remote_code)


def _whole(place: Place, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    extra = {"gguf_file": place.file.name} if place.file else {}
    architecture = next(iter(config.architectures or []), None)
    kind = getattr(transformers, architecture, None) if architecture and not trust_remote_code else None
    loader = kind if kind is not None and hasattr(kind, "from_pretrained") else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(place.directory, dtype=dtype, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"transformers could not load {place.spec}: {_line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        # GGUF weights are plain floats by now; what still says that they are quantized would stop them from being saved
        del model.config.quantization_config
        model.hf_quantizer = None
    return model


def _tensor_hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _check_finite(name: str, tensor: torch.Tensor, spec: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # the extremes carry any NaN or infinity, and are thirty times faster to find than a mask of finite values
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not torch.isfinite(low) or not torch.isfinite(high):
        raise RequestError(
            f"tensor {name} of {spec} holds non-finite values (NaN or infinity); the checkpoint is damaged or diverged in "
            "training: use another one."
        )


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__

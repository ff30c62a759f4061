"""Which graph of llama.cpp computes what a model computes, and what stands in a GGUF file for it.

Names of tensors and of metadata come from the tables of the `gguf` package. What those do not say is in `FAMILIES`. Blocks
that differ go through the one graph that reads widths block by block ("deci"), which is llama's otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from secateur.errors import RequestError
from secateur.network.source import Source

_SILU, _TANH = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Family:
    """A graph of llama.cpp and what a configuration must say for it to be the right one.

    Args:
        arch: the graph.
        blocks_differ: the graph that reads widths block by block, None where there is none.
        rows: what becomes of q and k: "pairs" where the graph rotates neighbours and transformers rotates halves.
        plus_one: scales of norms are stored less one.
        expects: entries of the configuration, and the values that the graph stands for.
        scale: the entry that sets the scale of attention, which the graph takes from the width of a head.
        softcaps: the entries of the caps on attention scores and logits.
        windows: blocks alternate between a sliding window and all tokens, the window first.
    """

    arch: MODEL_ARCH
    blocks_differ: MODEL_ARCH | None = None
    plus_one: bool = False
    expects: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    scale: str | None = None
    softcaps: tuple[str, str] | None = None
    windows: bool = False


# by `model_type`; each was generated with in llama.cpp against transformers (tests/test_export.py)
FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, MODEL_ARCH.DECI, expects={"hidden_act": _SILU}),
    "mistral": Family(MODEL_ARCH.LLAMA, MODEL_ARCH.DECI, expects={"hidden_act": _SILU}),
    "qwen2": Family(MODEL_ARCH.QWEN2, MODEL_ARCH.DECI, expects={"hidden_act": _SILU}),
    "qwen3": Family(MODEL_ARCH.QWEN3, expects={"hidden_act": _SILU}),
    "gemma": Family(MODEL_ARCH.GEMMA, plus_one=True, expects={"hidden_activation": (None, *_TANH)}),
    "gemma2": Family(
        MODEL_ARCH.GEMMA2,
        plus_one=True,
        expects={"hidden_activation": _TANH},
        scale="query_pre_attn_scalar",
        softcaps=("attn_logit_softcapping", "final_logit_softcapping"),
        windows=True,
    ),
    "phi3": Family(MODEL_ARCH.PHI3, expects={"hidden_act": _SILU}),
    "gpt2": Family(
        MODEL_ARCH.GPT2,
        expects={
            "activation_function": _TANH, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
}  # fmt: skip
# graphs that rotate neighbouring pairs of a head, where transformers rotates its two halves
_PAIRS = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI)
# Activations are rounded too: to half precision before they meet such a matrix, to eight bits before they meet q8_0. The
# activation tables of llama.cpp hold half precision.
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType, float]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 2e-3),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 1e-2),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 3e-2),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 6e-2),
}
# neurons of nothing in place of a feed-forward that was removed: the graph would leave out the attention too
_NOTHING = 32


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, the parameter behind it (None: zeros), its shape, and what it is stored as."""

    name: str
    parameter: str | None
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    rotated: int = 0
    plus_one: bool = False
    transposed: bool = False
    values: np.ndarray[Any, Any] | None = field(default=None, repr=False)


class Layout:
    """What stands in the file: which graph, which tensors, which metadata."""

    def __init__(self, source: Source, dtype: str) -> None:
        self.source, self.config, self.dtype = source, source.config, dtype
        self.notes: list[str] = []
        kind = getattr(self.config, "model_type", "")
        family = FAMILIES.get(kind)
        if family is None:
            raise RequestError(
                f"models of type {kind or type(source.skeleton).__name__} cannot be exported to GGUF yet, only "
                f"{', '.join(FAMILIES)}."
            )
        self.family = family
        self._expect()
        self._measure()
        self.arch = family.arch
        if self.uneven:
            if family.blocks_differ is None:
                raise RequestError(
                    f"blocks of {source.spec} differ, and llama.cpp reads one width for all blocks of {kind}; use --to "
                    "padded first, or plan the same widths for every block."
                )
            self.arch = family.blocks_differ
        self.names = gguf.get_tensor_name_map(self.arch, len(self.units))
        self.context = self._context()
        self.factors = self._frequencies()
        self.entries = list(self._entries())

    def _expect(self) -> None:
        for name, values in self.family.expects.items():
            if (said := getattr(self.config, name, None)) not in values:
                raise RequestError(
                    f"{name} of {self.source.spec} is {said}, and the graph of llama.cpp for this type has "
                    f"{values[-1]}; it cannot be exported to GGUF."
                )

    def _measure(self) -> None:
        blocks = self.source.anatomy.blocks
        self.units = [block.feed_forward.units if block.feed_forward else 0 for block in blocks]
        self.heads = [block.attention.heads if block.attention else 0 for block in blocks]
        self.kv_heads = [block.attention.kv_heads if block.attention else 0 for block in blocks]
        widths = {block.attention.head_dim for block in blocks if block.attention}
        if len(widths) != 1 or not any(self.units):
            raise RequestError(
                f"heads of {self.source.spec} differ in width between blocks, which GGUF cannot say here."
            )
        [self.head_dim] = widths
        self.uneven = any(len(set(each)) > 1 for each in (self.units, self.heads, self.kv_heads))
        if self.family.scale and getattr(self.config, self.family.scale) != self.head_dim:
            raise RequestError(
                f"{self.family.scale} of {self.source.spec} is not the width of a head ({self.head_dim}), which the graph "
                "of llama.cpp takes for it; it cannot be exported to GGUF."
            )

    def _context(self) -> int:
        context, window = self.config.max_position_embeddings, getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or []
        if self.family.windows:
            due = ["full_attention" if index % 2 else "sliding_attention" for index in range(len(self.units))]
            if kinds != due and window is not None and window < context:
                raise RequestError(
                    f"blocks of {self.source.spec} do not take turns between a sliding window and all tokens, as the graph "
                    "of llama.cpp does; it cannot be exported to GGUF."
                )
        elif window is not None and window < context and (not kinds or "sliding_attention" in kinds):
            self.notes.append(
                f"llama.cpp sees all tokens where this model has a window of {window}: longer texts differ."
            )
            context = min(context, window)
        return int(context)

    def _frequencies(self) -> np.ndarray[Any, Any] | None:
        """What each frequency of rotation is divided by, None where by one everywhere."""
        self.rotary, self.theta = 0, 0.0
        module = next((each for each in self.source.skeleton.modules() if hasattr(each, "inv_freq")), None)
        if module is None:
            return None
        said = self.config.rope_parameters
        frequencies = cast(Tensor, module.inv_freq).double().cpu()
        self.rotary, self.theta = 2 * len(frequencies), float(said["rope_theta"])
        plain = self.theta ** (-torch.arange(0, self.rotary, 2, dtype=torch.float64) / self.rotary)
        factors = (plain / frequencies).float().numpy()
        # factors that are the same for short and long texts are plain factors
        changing = said.get("rope_type") == "longrope" and said["short_factor"] != said["long_factor"]
        changing = changing or said.get("rope_type") == "dynamic"
        scaled = changing or getattr(module, "attention_scaling", 1.0) != 1.0
        even = np.allclose(factors, 1, rtol=1e-5)
        if scaled or not (even or self.arch in _PAIRS):
            raise RequestError(
                f"positions of {self.source.spec} are scaled ({said.get('rope_type')}) in a way that this export cannot say "
                "in GGUF; use llama.cpp's own converter."
            )
        return None if even else factors

    def _entries(self) -> Iterator[Entry]:
        kind, vector = TYPES[self.dtype][0], GGMLQuantizationType.F32
        heads = dict[str, int]()
        for block in self.source.anatomy.blocks:
            if block.attention and self.arch in _PAIRS:
                heads |= dict.fromkeys(map(_stem, block.attention.q), block.attention.heads)
                heads |= dict.fromkeys(map(_stem, block.attention.k), block.attention.kv_heads)
        modules = dict(self.source.skeleton.named_modules())
        missing = {index for index, count in enumerate(self.heads) if not count}
        # a tensor of several names is written once, under the first: loaders take the embedding for a head that is missing
        again = {name for group in self.source.anatomy.tied for name in group[1:]}
        for name, parameter in self.source.skeleton.named_parameters():
            if name in again:
                continue
            found = self.names.get_type_and_name(name, (".weight", ".bias"))
            if found is None:
                raise RequestError(
                    f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.arch]} has no place for {name} of {self.source.spec}."
                )
            tensor, theirs = found
            index = int(theirs.split(".")[1]) if theirs.startswith("blk.") else None
            if tensor == gguf.MODEL_TENSOR.ATTN_NORM and index in missing and index != 0:
                continue  # a block without attention has no norm before it there
            shape = tuple(parameter.shape)
            owner = modules[name.rpartition(".")[0]]
            flipped = len(shape) == 2 and getattr(owner, "nf", None) == shape[1]  # a Conv1D of transformers
            shape = shape[::-1] if flipped else shape
            yield Entry(
                theirs, name, shape, _fitting(kind, shape) if len(shape) > 1 else vector,
                rotated=heads.get(_stem(name), 0),
                plus_one=self.family.plus_one and len(shape) == 1,
                transposed=flipped,
            )  # fmt: skip
        hidden = self.source.anatomy.hidden
        for index, count in enumerate(self.units):
            if not count:
                for part, shape in (
                    ("gate", (_NOTHING, hidden)),
                    ("up", (_NOTHING, hidden)),
                    ("down", (hidden, _NOTHING)),
                ):
                    yield Entry(f"blk.{index}.ffn_{part}.weight", None, shape, _fitting(kind, shape))
        if 0 in missing:
            # the width of a head is taken from the first block, which must have one: of zeros
            for part, shape in (
                ("q", (self.head_dim, hidden)),
                ("k", (self.head_dim, hidden)),
                ("v", (self.head_dim, hidden)),
            ):
                yield Entry(f"blk.0.attn_{part}.weight", None, shape, _fitting(kind, shape))
            yield Entry(
                "blk.0.attn_output.weight", None, (hidden, self.head_dim), _fitting(kind, (hidden, self.head_dim))
            )
        if self.factors is not None:
            yield Entry("rope_freqs.weight", None, self.factors.shape, vector, values=self.factors)

    def _name(self, tokens: list[str]) -> str:
        """What the file is called inside. llama.cpp treats tokens of its own choice apart where it says Phi-3, and does not
        load a file of that name without them.
        """
        name = self.source.place.base or self.source.spec
        wanted = {"<unk>", "<s>", "<|endoftext|>"} <= set(tokens)
        return name if wanted or not any(each in name.lower() for each in ("phi3", "phi-3")) else "model"

    def metadata(self, writer: GGUFWriter, tokens: list[str]) -> None:
        source, config = self.source, self.config
        writer.add_name(self._name(tokens))
        if source.place.licence:
            writer.add_license(source.place.licence)
        writer.add_file_type(TYPES[self.dtype][1])
        if self.dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        units = [count or _NOTHING for count in self.units]
        heads, kv_heads = ([each[0] or 1, *each[1:]] for each in (self.heads, self.kv_heads))
        writer.add_block_count(len(units))
        writer.add_context_length(self.context)
        writer.add_embedding_length(source.anatomy.hidden)
        writer.add_vocab_size(source.anatomy.vocabulary)
        writer.add_feed_forward_length(units if self.uneven else units[0])
        writer.add_head_count(heads if self.uneven else heads[0])
        writer.add_head_count_kv(kv_heads if self.uneven else kv_heads[0])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        if self.rotary:
            writer.add_rope_dimension_count(self.rotary)
            writer.add_rope_freq_base(self.theta)
        if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
            writer.add_layer_norm_rms_eps(epsilon)
        else:
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        if self.family.softcaps:
            scores, logits = (getattr(config, name) for name in self.family.softcaps)
            # zero: no cap
            writer.add_attn_logit_softcapping(scores or 0.0)
            writer.add_final_logit_softcapping(logits or 0.0)
        if self.family.windows:
            writer.add_sliding_window(config.sliding_window)

    def tensor(self, entry: Entry) -> Tensor | np.ndarray[Any, Any]:
        """The numbers of an entry in float32, in the file's order."""
        if entry.values is not None:
            return entry.values
        if entry.parameter is None:
            return np.zeros(entry.shape, dtype=np.float32)
        values = self.source.parameter(entry.parameter).float()
        if entry.transposed:
            values = values.T
        if entry.plus_one:
            values = values + 1
        if entry.rotated:
            # (heads, half, pair, ...): the halves of a head become neighbours
            values = values.unflatten(0, (entry.rotated, 2, -1)).transpose(1, 2).reshape(values.shape)
        return values.contiguous().numpy()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _fitting(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """Quantized rows are whole blocks of numbers; those that are not stay in half precision."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16

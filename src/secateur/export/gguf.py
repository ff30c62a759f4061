"""Writes a model as one GGUF file, tensor by tensor, for llama.cpp and whatever is built on it."""

import math
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor

from secateur.errors import RequestError, RunError
from secateur.export.check import WORDS, Tried, score_difference, try_loader
from secateur.export.common import Exported, check_place
from secateur.export.gguf_layout import TYPES, Layout
from secateur.export.gguf_tokenizer import Words, read_words
from secateur.files import atomic
from secateur.network.source import Source, tokenizer
from secateur.network.store import stored_dtype
from secateur.network.stream import streamed_logits
from secateur.network.verify import prompt

_OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def to_gguf(source: Source, output: Path, dtype: str | None = None) -> Exported:
    """Writes `source` to the file `output` and checks it, in llama.cpp where that is installed.

    dtype: f32, f16, bf16 or q8_0 for matrices, the source's own where None; vectors stay in float32.

    Raises RequestError for what llama.cpp has no graph for, and RunError where the file computes something else.
    """
    check_place(output, source)
    if output.suffix != ".gguf":
        raise RequestError(f"a GGUF file is named *.gguf, and {output.name} is not; loaders go by the name.")
    dtype = dtype or _own_dtype(source)
    if dtype not in TYPES:
        raise RequestError(f"--dtype {dtype} cannot be written as GGUF here; choose one of {', '.join(TYPES)}.")
    layout = Layout(source, dtype)
    words = read_words(
        source.directory or Path(),
        tokenizer(source.place, source.trust_remote_code),
        source.anatomy.vocabulary,
        source.spec,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # loaders go by the ending; a folder of its own keeps what is not finished from being taken for a model
    folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    with folder as name, atomic(output) as partial:
        file = Path(name) / output.name
        sums = _write(file, layout, words)
        checks, notes, measured = _check(file, layout, words, sums)
        file.replace(partial)
    return Exported(
        "gguf", str(output), gguf.MODEL_ARCH_NAMES[layout.arch], dtype, output.stat().st_size, source.bytes,
        checks, [*layout.notes, *words.notes, *notes], measured,
    )  # fmt: skip


def _own_dtype(source: Source) -> str:
    largest = max(source.tensors.values(), key=lambda info: info.bytes)
    return _OWN.get(stored_dtype(source, None, largest.dtype), "f32")


def _write(file: Path, layout: Layout, words: Words) -> dict[str, int]:
    """Writes the file with one tensor in memory at a time; a checksum for each."""
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout.arch])
    try:
        layout.metadata(writer, words.tokens)
        words.write(writer)
        for entry in layout.entries:
            block, size = gguf.GGML_QUANT_SIZES[entry.kind]
            bytes_ = math.prod(entry.shape) // block * size
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), bytes_, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sums = {}
        for entry in layout.entries:
            data = quantize(np.asarray(layout.tensor(entry)), entry.kind)
            sums[entry.name] = zlib.crc32(data.tobytes())
            writer.write_tensor_data(data)
        return sums
    finally:
        writer.close()


def _check(
    file: Path, layout: Layout, words: Words, sums: dict[str, int]
) -> tuple[list[str], list[str], dict[str, float]]:
    """Reads the file back, and runs it where llama.cpp is there. Raises RunError where it is not what was meant."""
    reader = gguf.GGUFReader(file)
    if {tensor.name: zlib.crc32(tensor.data.tobytes()) for tensor in reader.tensors} != sums:
        raise RunError(
            f"{file.name} reads back other than it was written; the disk or its file system may be at fault."
        )
    checks = [f"the gguf reader finds its {len(sums)} tensors byte for byte"]
    del reader
    ids = prompt(layout.source.anatomy.vocabulary)
    tried = try_loader("llama.cpp", file, ids, words=WORDS)
    if tried.missing:
        absent = (
            f"not run in llama.cpp, which is not installed (pip install 'secateur[llama]', package {tried.missing})."
        )
        return checks, [absent], {}
    if tried.error:
        raise RunError(f"llama.cpp does not run the GGUF file of {layout.source.spec}: {tried.error}")
    assert tried.scores is not None
    apart = score_difference(_expected(layout, ids, tried), tried.scores)
    if not apart <= TYPES[layout.dtype][2]:  # also true for a difference that is not a number
        raise RunError(
            f"llama.cpp runs the GGUF file of {layout.source.spec}, but its logits differ by {apart:.2g} (allowed "
            f"{TYPES[layout.dtype][2]:g}), so nothing was kept; please report it."
        )
    checks.append(
        f"llama.cpp ({tried.version}) generates; over {len(tried.written)} greedy tokens its scores differ by at most "
        f"{apart:.1g} of the largest logit, weights rounded alike"
    )
    ours = tuple(_encode(layout.source))
    if tried.ids != ours:
        theirs = tried.ids or ()
        shared = range(min(len(ours), len(theirs)))
        at = next((place for place in shared if ours[place] != theirs[place]), len(shared))
        raise RunError(
            f"llama.cpp splits text into other tokens than the tokenizer of {layout.source.spec} does (from token {at} of a "
            "test sentence on), so nothing was kept; export it with llama.cpp's own converter."
        )
    checks.append(f"llama.cpp splits a test sentence into the same {len(ours)} tokens")
    return checks, [], {"difference": apart, "speed": tried.speed or 0.0}


def _encode(source: Source) -> list[int]:
    found: list[int] = tokenizer(source.place, source.trust_remote_code).encode(WORDS)
    return found


def _expected(layout: Layout, ids: list[int], tried: Tried) -> Tensor:
    """(steps, vocabulary) logits of the source at the steps that were told, its weights rounded as the file's are."""
    kinds = {entry.parameter: entry.kind for entry in layout.entries if entry.parameter}
    for group in layout.source.anatomy.tied:
        kinds |= {name: kinds[known] for known in group if known in kinds for name in group}

    def fetch(names: Sequence[str]) -> dict[str, Tensor]:
        return {
            name: rounded(layout.source.parameter(name).float(), kinds.get(name, GGMLQuantizationType.F32))
            for name in names
        }

    read = torch.tensor([[*ids, *tried.written[:-1]]])
    logits = streamed_logits(layout.source.skeleton, layout.source.anatomy, fetch, read)[0]
    return logits[len(ids) - 1 :].float()


def rounded(values: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """What is read back of a float32 tensor that was stored as `kind`."""
    if kind == GGMLQuantizationType.F32:
        return values
    return torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind)).view(values.shape)

"""Writes a model as an ONNX graph: token ids in, logits out, any batch and any length, without a KV cache.

The graph reads whole sequences: it suits scoring, embedding and short texts. Generating with it computes the whole prefix
for every token. Shapes stand in the graph, so blocks that differ are nothing special.
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from secateur.errors import RequestError, RunError
from secateur.export.check import difference, need, try_loader
from secateur.export.common import Exported, check_place, size_of, whole_directory
from secateur.files import write_text
from secateur.network.checkpoint import line
from secateur.network.source import Source, load
from secateur.network.store import copy_companions, raw_config, write_config
from secateur.network.verify import TOLERANCE, prompt

FILE = "model.onnx"


class _Logits(nn.Module):
    """The one output that the graph has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def to_onnx(source: Source, output: Path, dtype: str | None = None) -> Exported:
    """Writes `source` to the directory `output` in float32 and compares its logits in onnxruntime.

    The whole model is in memory, twice while it is written: torch.export traces a loaded model.

    Raises RequestError where the packages are missing, or torch cannot trace the architecture.
    """
    check_place(output, source)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "export", "--to onnx")
    if dtype not in (None, "f32"):
        raise RequestError(f"--dtype {dtype} cannot be written as ONNX here; leave it out for f32.")
    assert source.directory is not None, "a command line names files"
    spec = source.directory if source.tensors and source.place.weights != "bin" else source.spec
    model, _ = load(spec, trust_remote_code=source.trust_remote_code)
    ids = torch.tensor([prompt(source.anatomy.vocabulary)])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
    with whole_directory(output) as folder:
        _trace(model, folder / FILE, source.spec)
        del model
        write_config(folder, raw_config(source), torch.float32)
        copy_companions(source, folder)
        tried = try_loader("onnxruntime", folder, ids[0].tolist(), tokens=4)
        if tried.error or tried.logits is None:
            raise RunError(f"onnxruntime does not run the graph of {source.spec}: {tried.error}")
        apart = difference(expected, tried.logits)
        if not apart <= TOLERANCE:  # also true for a difference that is not a number
            raise RunError(
                f"onnxruntime runs the graph of {source.spec}, but its logits differ by {apart:.2g} (allowed "
                f"{TOLERANCE:g}), so nothing was kept; please report it."
            )
        write_text(folder / "README.md", _card(source))
    where = f"onnxruntime ({tried.version}) in a clean process, at three shapes"
    check = f"{where}; largest relative difference of logits {apart:.1g}"
    note = (
        "the graph has no KV cache: it reads whole sequences, and generating computes the prefix anew for every token."
    )
    return Exported(
        "onnx", str(output), type(source.skeleton).__name__, "f32", size_of(output), source.bytes, [check], [note],
        {"difference": apart, "speed": tried.speed or 0.0},
    )  # fmt: skip


def _trace(model: nn.Module, file: Path, spec: str) -> None:
    """Raises RequestError where torch cannot."""
    ids = torch.ones(2, 16, dtype=torch.long)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    said, told = transformers_logging.get_verbosity(), logging.getLogger("torch.onnx").level
    transformers_logging.set_verbosity(transformers_logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model).eval(), (ids,), dynamo=True, input_names=["input_ids"], output_names=["logits"],
                dynamic_shapes={"input_ids": free}, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(file), external_data=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever torch cannot trace or translate, it says in a way of its own
        raise RequestError(
            f"torch cannot write {spec} ({type(model).__name__}) as an ONNX graph: {line(error)[:200]}"
        ) from error
    finally:
        transformers_logging.set_verbosity(said)
        logging.getLogger("torch.onnx").setLevel(told)


def _card(source: Source) -> str:
    licence = f"license: {source.place.licence}\n" if source.place.licence else ""
    base = source.place.base or source.place.directory.name
    return (
        f"---\n{licence}library_name: onnx\ntags:\n- secateur\n---\n\n# {base} as ONNX\n\nMade with Secateur. "
        f"`{FILE}` takes `input_ids` (batch, tokens) and gives `logits` (batch, tokens, vocabulary) in float32; it has "
        "no KV cache.\n"
    )

"""Other formats: a model directory as GGUF, as ONNX, or padded to one width for all blocks."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from secateur.errors import RequestError, suggest
from secateur.export.common import Exported
from secateur.network.source import Source, open_model

FORMATS = ("gguf", "onnx", "padded")


def _writer(to: str) -> Callable[[Source, Path, str | None], Exported]:
    # imported one by one, because each brings a library of its own
    if to == "gguf":
        from secateur.export.gguf import to_gguf

        return to_gguf
    if to == "onnx":
        from secateur.export.onnx import to_onnx

        return to_onnx
    if to == "padded":
        from secateur.export.padded import to_padded

        return to_padded
    raise RequestError(f"there is no format '{to}'; there are {', '.join(FORMATS)}.{suggest(to, FORMATS)}")


def export(
    model: str | Path, to: str, output: str | Path, dtype: str | None = None, trust_remote_code: bool = False
) -> Exported:
    """Writes MODEL in another format, checks what was written, and only then gives it its name.

    Args:
        model: a directory, a hub id, a `.gguf` file or `package:NAME`.
        to: "gguf" (a file), "onnx" or "padded" (directories).
        output: must not exist yet.
        dtype: of the numbers written; which there are depends on the format. None: the model's own.

    Raises RequestError where it cannot be done and nothing was written, RunError where the result fails its check.
    """
    output = Path(output)
    write = _writer(to)
    source = open_model(model, trust_remote_code=trust_remote_code)
    if source.tensors:
        return write(source, output, dtype)
    # a `.bin` or GGUF model is converted once; the folder lies where there is room for a model
    nearest = next(parent for parent in output.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=nearest, prefix=f".{output.name}.") as work:
        return write(open_model(model, work=Path(work), trust_remote_code=trust_remote_code), output, dtype)


__all__ = ["FORMATS", "Exported", "export"]

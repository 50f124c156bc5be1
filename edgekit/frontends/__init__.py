"""Model files in, `onnx_ir.Model` out. The files here are the only ones that read a model format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import ModelError
from edgekit.schema import printable

if TYPE_CHECKING:
    import onnx_ir

SUFFIXES = (".onnx",)


def load(source: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> onnx_ir.Model:
    """The network in the file `source`, chosen by its suffix, with static shapes and float32 inputs.

    `shapes`: input name -> shape, for inputs whose file leaves sizes open.
    Raises: ModelError, one line, for anything that cannot be used.
    """
    path = Path(source)
    if path.suffix.lower() in SUFFIXES or not path.suffix:
        from edgekit.frontends import onnx as onnx_frontend

        return onnx_frontend.load(path, shapes)
    hints = {
        ".pt": "Export it with torch.onnx.export",
        ".pth": "Export it with torch.onnx.export",
        ".tflite": "Export the original network to ONNX",
        ".pb": "Export it with tf2onnx",
        ".h5": "Export it with tf2onnx",
        ".engine": "Give the ONNX file that the engine was built from",
    }
    hint = hints.get(path.suffix.lower(), "Give an ONNX file")
    raise ModelError(
        f"model {printable(str(path), 200)}: unknown format, expected {' or '.join(SUFFIXES)}, "
        f"got {printable(path.suffix)!r}. {hint}."
    )

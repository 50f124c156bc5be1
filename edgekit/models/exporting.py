"""Writing a torch module as float32 ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_onnx(
    model: Any, path: Path, example: tuple[Any, ...], inputs: list[str], outputs: list[str],
    metadata: Mapping[str, str] | None = None, opset: int = 17,
) -> None:  # fmt: skip
    """Trace `model` (a torch module) in evaluation mode on `example`, with its sizes as constants.

    Batch norms are folded. metadata: `metadata_props` of the file, which is written whole or not at all.
    """
    import onnx
    import torch

    training = {
        part: part.training for part in model.modules()
    }  # each its own: a wrapper's says nothing of what it wraps
    file = path.with_name(path.name + ".part")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the older exporter gives the plainer graph
        warnings.filterwarnings(
            "ignore", "Converting a tensor to a Python"
        )  # sizes are meant to be constants
        torch.onnx.export(
            model.eval(),
            example,
            str(file),
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamo=False,
            do_constant_folding=True,
        )
    for part, before in training.items():
        part.training = before
    if metadata:
        proto = onnx.load(file)
        onnx.helper.set_model_props(proto, dict(metadata))
        onnx.save(proto, file)
    file.replace(path)

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

    training = model.training
    part = path.with_name(path.name + ".part")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the older exporter gives the plainer graph
        warnings.filterwarnings(
            "ignore", "Converting a tensor to a Python"
        )  # sizes are meant to be constants
        torch.onnx.export(
            model.eval(),
            example,
            str(part),
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamo=False,
            do_constant_folding=True,
        )
    model.train(training)
    if metadata:
        proto = onnx.load(part)
        onnx.helper.set_model_props(proto, dict(metadata))
        onnx.save(proto, part)
    part.replace(path)

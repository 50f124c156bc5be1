"""Quantizes with NVIDIA's modelopt, in a venv of its own. Run by run.py: PEER MODEL.onnx CALIBRATION.npy FOLDER.

entropy: its default calibration; max: the plain range. Its Q/DQ file is meant for TensorRT; here ONNX Runtime runs it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from importlib.metadata import version

import numpy as np
import onnx


def main() -> None:
    peer, model, calibration, folder = sys.argv[1:]
    data = np.load(calibration)
    own = f"{folder}/input.onnx"  # it rewrites the file that it is given
    shutil.copyfile(model, own)
    name = onnx.load(own).graph.input[0].name
    with (
        open(f"{folder}/log.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        from modelopt.onnx.quantization import quantize

        start = time.perf_counter()
        quantize(
            own,
            quantize_mode="int8",
            calibration_data={name: data},
            calibration_method=peer,
            calibration_eps=["cpu"],
            output_path=f"{folder}/model.onnx",
            high_precision_dtype="fp32",
        )
        seconds = time.perf_counter() - start
    versions = {"modelopt": version("nvidia-modelopt")}
    print(json.dumps({"file": "model.onnx", "seconds": seconds, "pictures": len(data), "versions": versions}))


if __name__ == "__main__":
    main()

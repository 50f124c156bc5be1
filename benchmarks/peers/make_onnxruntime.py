"""Quantizes with onnxruntime.quantization. Run by run.py: PEER MODEL.onnx CALIBRATION.npy FOLDER.

defaults: quantize_static as it comes (S8S8, per tensor). minmax, percentile: what its documentation
advises for x86: unsigned activations, signed weights per channel, Q/DQ.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

STRIDE = 4
"""Pictures between two merges of the histograms: without, all activations of all pictures stay in memory."""


class Reader(CalibrationDataReader):
    def __init__(self, name: str, data: np.ndarray) -> None:
        self.name, self.data = name, data
        self.set_range(0, len(data))

    def __len__(self) -> int:
        return len(self.data)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, np.ndarray] | None:
        i = next(self.left, None)
        return None if i is None else {self.name: np.ascontiguousarray(self.data[i : i + 1])}


def main() -> None:
    peer, model, calibration, folder = sys.argv[1:]
    logging.disable(logging.WARNING)
    data = np.load(calibration, mmap_mode="r")
    data = data[: len(data) // STRIDE * STRIDE]
    name = onnx.load(model, load_external_data=False).graph.input[0].name
    out = f"{folder}/model.onnx"
    start = time.perf_counter()
    options: dict[str, object] = {}
    if peer != "defaults":
        ready = f"{folder}/ready.onnx"
        quant_pre_process(model, ready)
        model = ready
        method = CalibrationMethod.Percentile if peer == "percentile" else CalibrationMethod.MinMax
        options = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
            "calibrate_method": method,
            "extra_options": {"CalibStridedMinMax": STRIDE, "CalibPercentile": 99.999},
        }
    quantize_static(model, out, Reader(name, data), **options)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "file": "model.onnx",
                "seconds": seconds,
                "pictures": len(data),
                "versions": {"onnxruntime": onnxruntime.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()

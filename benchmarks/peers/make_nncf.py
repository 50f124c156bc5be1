"""Quantizes with NNCF for OpenVINO, in a venv of its own. Run by run.py: PEER MODEL.onnx CALIBRATION.npy FOLDER.

mixed: the preset for networks with SiLU and the like (asymmetric activations); performance: NNCF's default.
"""

from __future__ import annotations

import json
import sys
import time

import nncf
import numpy as np
import openvino


def main() -> None:
    peer, model, calibration, folder = sys.argv[1:]
    data = np.load(calibration, mmap_mode="r")
    network = openvino.Core().read_model(model)
    preset = nncf.QuantizationPreset.MIXED if peer == "mixed" else nncf.QuantizationPreset.PERFORMANCE
    start = time.perf_counter()
    dataset = nncf.Dataset([np.ascontiguousarray(data[i : i + 1]) for i in range(len(data))])
    quantized = nncf.quantize(network, dataset, preset=preset, subset_size=len(data))
    openvino.save_model(quantized, f"{folder}/model.xml", compress_to_fp16=False)
    seconds = time.perf_counter() - start
    versions = {"nncf": nncf.__version__, "openvino": openvino.__version__.partition("-")[0]}
    print(json.dumps({"file": "model.xml", "seconds": seconds, "pictures": len(data), "versions": versions}))


if __name__ == "__main__":
    main()

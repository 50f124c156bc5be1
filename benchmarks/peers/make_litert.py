"""Converts with onnx2tf and quantizes with ai-edge-quantizer, in a venv of its own.

Run by run.py: PEER MODEL.onnx CALIBRATION.npy FOLDER. float: converted only; int8: static_wi8_ai8;
dynamic: 8-bit weights, activations quantized as they come.
The converted file is held against ONNX Runtime on a calibration picture, which also tells which of
its outputs is which: onnx2tf may order and lay them out anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime

MIN_DB = 40.0
"""Converted against the original: below it the conversion is wrong, not merely rounded."""
WRITTEN = {4: (0, 2, 3, 1)}
"""Axes of an ONNX tensor in the order that onnx2tf writes, by rank."""


def nhwc(x: np.ndarray, turned: bool) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(WRITTEN[x.ndim])) if turned else np.ascontiguousarray(x)


def match(model: str, converted: bytes, x: np.ndarray) -> tuple[bool, dict[str, dict[str, object]], str]:
    """(input turned, ONNX output -> {index, turned, db}, TFLite input name)."""
    from ai_edge_litert.interpreter import Interpreter

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    wanted = dict(zip(names, session.run(None, {session.get_inputs()[0].name: x}), strict=True))
    interpreter = Interpreter(model_content=converted, num_threads=1)
    interpreter.allocate_tensors()
    (entry,) = interpreter.get_input_details()
    turned = list(entry["shape"]) != list(x.shape)
    interpreter.set_tensor(entry["index"], nhwc(x, turned))
    interpreter.invoke()
    found = [interpreter.get_tensor(o["index"]) for o in interpreter.get_output_details()]
    outputs: dict[str, dict[str, object]] = {}
    for name, want in wanted.items():
        best: tuple[float, int, bool] | None = None
        for index, got in enumerate(found):
            for flip in (False, True):
                if flip and want.ndim not in WRITTEN:
                    continue
                expected = nhwc(want, flip)
                if expected.shape != got.shape:
                    continue
                error = float(((expected - got) ** 2).sum())
                db = 200.0 if error == 0 else 10 * np.log10(float((want**2).sum()) / error)
                if best is None or db > best[0]:
                    best = (db, index, flip)
        if best is None or best[0] < MIN_DB:
            raise SystemExit(
                f"onnx2tf: output {name} is wrong after conversion ({best and round(best[0], 1)} dB)"
            )
        outputs[name] = {"index": best[1], "turned": best[2], "db": round(best[0], 1)}
    return turned, outputs, entry["name"]


def main() -> None:
    peer, model, calibration, folder = sys.argv[1:]
    data = np.load(calibration, mmap_mode="r")
    start = time.perf_counter()
    with (
        open(f"{folder}/log.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        import onnx2tf

        onnx2tf.convert(input_onnx_file_path=model, output_folder_path=folder, non_verbose=True)
    (path,) = Path(folder).glob("*_float32.tflite")
    converted = path.read_bytes()
    seconds = time.perf_counter() - start
    turned, outputs, _ = match(model, converted, np.ascontiguousarray(data[:1]))
    start = time.perf_counter()
    if peer != "float":
        with open(f"{folder}/log.txt", "a") as log, contextlib.redirect_stdout(log):
            from ai_edge_litert.interpreter import Interpreter
            from ai_edge_quantizer import quantizer, recipe

            chosen = recipe.static_wi8_ai8() if peer == "int8" else recipe.dynamic_wi8_afp32()
            tool = quantizer.Quantizer(str(path), chosen)
            result = None
            if peer == "int8":
                ((signature, spec),) = Interpreter(model_content=converted).get_signature_list().items()
                (name,) = spec["inputs"]
                samples = [{name: nhwc(data[i : i + 1], turned)} for i in range(len(data))]
                result = tool.calibrate({signature: samples})
            converted = bytes(tool.quantize(result).quantized_model)
    seconds += time.perf_counter() - start
    for file in Path(folder).iterdir():
        if file.name != "log.txt":
            os.unlink(file)
    Path(folder, "model.tflite").write_bytes(converted)
    versions = {name: version(name) for name in ("onnx2tf", "ai-edge-quantizer", "ai-edge-litert")}
    print(
        json.dumps(
            {
                "file": "model.tflite",
                "seconds": seconds,
                "pictures": len(data) if peer == "int8" else 0,
                "versions": versions,
                "input_turned": turned,
                "outputs": outputs,
            }
        )
    )


if __name__ == "__main__":
    main()

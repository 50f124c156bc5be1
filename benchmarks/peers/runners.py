"""A quantized file at work: float32 NCHW in, float32 NCHW out, whatever its library wants inside.

Each has `inputs` and `outputs` (arrays by name, as edgekit's own bindings) and `run()`, which counts every
conversion; LiteRT's also has `net()`, the invocation alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit.backends.base import LoadOptions, half
from edgekit.manifest import Variant
from edgekit.runtime.session import fill
from edgekit.spec import DType


class Runner(Protocol):
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def run(self) -> None: ...


def onnxruntime(data: bytes) -> Any:
    """An ONNX file on ONNX Runtime, one thread."""
    variant = Variant("peer", "onnxruntime", "float32", "onnx", "", len(data), "")
    return half("onnxruntime", "engine").load(memoryview(data), variant, LoadOptions(threads=1)).bind()


class OpenVino:
    """An ONNX file or an OpenVINO IR (its .xml, the .bin beside it), one thread; `precision` of the float rest."""

    def __init__(self, file: Path, names: tuple[str, ...], precision: str = "f32") -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": "1",
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled: Any = openvino.Core().compile_model(str(file), "CPU", settings)
        self._request = self.compiled.create_infer_request()
        (port,) = self.compiled.inputs
        self.inputs = {port.get_any_name(): np.zeros(port.get_shape(), np.float32)}
        self.outputs = {}
        for name in names:
            out = self.compiled.output(name)
            self.outputs[name] = np.zeros(out.get_shape(), np.float32)
            self._request.set_tensor(out, openvino.Tensor(self.outputs[name], shared_memory=True))
        for array in self.inputs.values():
            self._request.set_input_tensor(openvino.Tensor(array, shared_memory=True))

    def run(self) -> None:
        self._request.infer(share_inputs=True, share_outputs=True)


class LiteRt:
    """A .tflite file made by make_litert.py, one thread; `facts` is what that said of inputs and outputs."""

    def __init__(self, file: Path, facts: Mapping[str, Any], shape: tuple[int, ...], name: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter: Any = Interpreter(model_path=str(file), num_threads=1)
        self._interpreter.allocate_tensors()
        (entry,) = self._interpreter.get_input_details()
        details = self._interpreter.get_output_details()
        self.inputs = {name: np.zeros(shape, np.float32)}
        self._x = self.inputs[name]
        view = self._x.transpose(0, 2, 3, 1) if facts["input_turned"] else self._x
        self._in, self._view, self._quant = entry["index"], view, _quantization(entry)
        self._codes = np.zeros(entry["shape"], entry["dtype"])
        self._work = np.zeros(entry["shape"], np.float32)
        self.outputs, self._out = {}, []
        for output, rule in facts["outputs"].items():
            detail = details[rule["index"]]
            size = tuple(int(d) for d in detail["shape"])
            turned = rule["turned"]
            array = np.zeros((size[0], size[3], size[1], size[2]) if turned else size, np.float32)
            self.outputs[output] = array
            target = array.transpose(0, 2, 3, 1) if turned else array
            self._out.append((detail["index"], target, _quantization(detail)))

    def net(self) -> None:
        """The invocation alone, on the codes of the last `run`."""
        self._interpreter.invoke()

    def run(self) -> None:
        if self._quant is None:
            np.copyto(self._work, self._view)
            self._interpreter.tensor(self._in)()[...] = self._work
        else:
            scale, zero = self._quant
            low, high = np.iinfo(self._codes.dtype).min, np.iinfo(self._codes.dtype).max
            np.multiply(self._view, np.float32(1 / scale), out=self._work)
            self._work += zero
            np.rint(self._work, out=self._work)
            np.clip(self._work, low, high, out=self._work)
            np.copyto(self._codes, self._work, casting="unsafe")
            self._interpreter.tensor(self._in)()[...] = self._codes
        self._interpreter.invoke()
        for index, target, quant in self._out:
            codes = self._interpreter.tensor(index)()
            if quant is None:
                np.copyto(target, codes)
            else:
                np.subtract(codes, np.float32(quant[1]), out=target)
                target *= np.float32(quant[0])


def _quantization(detail: Mapping[str, Any]) -> tuple[float, int] | None:
    scale, zero = detail["quantization"]
    return (scale, zero) if np.dtype(detail["dtype"]).kind in "iu" else None


class Bundled:
    """A payload of an edgekit bundle: its binding, fed and read as the network without quantization would be.

    `run` is the binding's own: a camera picture is written into that input by one kernel anyway.
    """

    def __init__(self, bundle: Any, variant: Variant) -> None:
        from edgekit.backends.base import half as part

        self._executable = part(variant.backend, "engine").load(
            bundle.read(variant.path), variant, LoadOptions(threads=1, cache_key=variant.digest)
        )
        self.binding = self._executable.bind()
        self._specs = {t.name: t for t in bundle.manifest.tensors}
        (self._input,) = self.binding.inputs

    def feed(self, x: np.ndarray) -> None:
        """x: float32 [1, C, H, W], as the float network takes it."""
        target, spec = self.binding.inputs[self._input], self._specs[self._input]
        if target.shape != x.shape:
            x = x.transpose(0, 2, 3, 1)
        if spec.quant is not None:
            codes = np.rint(x / spec.quant.scale[0]) + spec.quant.zero_point[0]
            bounds = np.iinfo(target.dtype)
            target[...] = np.clip(codes, bounds.min, bounds.max)
        elif spec.dtype is not DType.float32:
            raise ValueError(f"input {self._input}: {spec.dtype.value} without scale, expected float32")
        else:
            fill(target, x, getattr(self.binding, "codes", {}).get(self._input))

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """The outputs as float32 arrays of `shapes` (NCHW), copied."""
        found = {}
        for name, shape in shapes.items():
            array, spec = self.binding.outputs[name], self._specs[name]
            values = array.astype(np.float32)
            if spec.quant is not None:
                values = (values - spec.quant.zero_point[0]) * np.float32(spec.quant.scale[0])
            found[name] = values if values.shape == tuple(shape) else values.transpose(0, 3, 1, 2)
        return found


def outputs_of(
    runner: Runner, inputs: list[np.ndarray], run: Callable[[], None] | None = None
) -> list[dict[str, np.ndarray]]:
    """What a runner answers to each of `inputs`, copied."""
    (target,) = runner.inputs.values()
    found = []
    for x in inputs:
        target[...] = x
        (run or runner.run)()
        found.append({name: array.copy() for name, array in runner.outputs.items()})
    return found


def facts(folder: Path) -> dict[str, Any]:
    """What the maker of an artefact said of it."""
    value: dict[str, Any] = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    return value

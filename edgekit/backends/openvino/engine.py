"""Device half: runs an ONNX payload with OpenVINO on an x86 CPU.

What is not integer runs in float32: without being told, OpenVINO computes in bfloat16 wherever the CPU
can, which a bundle proven in float32 must not. Inputs and outputs are preallocated and bound once.
OpenVINO keeps its own copy of the weights, so the mapped bundle is not held. Pictures and states of an int8
payload lie channels last, as its integer kernels want them: the session's arrays are views of that.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from edgekit.backends.base import TO_FIRST, TO_LAST, Binding, LoadOptions, Ports, usable, zeros
from edgekit.backends.onnxruntime.wire import external_weights
from edgekit.errors import BundleError, MissingExtraError, StreamError, printable
from edgekit.manifest import Variant
from edgekit.spec import DType, TensorSpec

_TYPES = {
    "f32": DType.float32,
    "f16": DType.float16,
    "i8": DType.int8,
    "u8": DType.uint8,
    "i32": DType.int32,
    "i64": DType.int64,
    "boolean": DType.bool,
}

_SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
}


def load(data: memoryview, variant: Variant, options: LoadOptions) -> OpenVinoExecutable:
    """Compile the ONNX bytes `data` for this CPU; they are not needed any more afterwards.

    Raises: MissingExtraError without openvino; BundleError when it refuses the payload.
    """
    return OpenVinoExecutable(data, variant, options.threads)


class OpenVinoExecutable:
    """One compiled model. Each `bind` has its own request and buffers, which different threads may run."""

    def __init__(self, data: memoryview, variant: Variant, threads: int) -> None:
        try:
            import openvino
        except ImportError:
            raise MissingExtraError("openvino", "openvino", "run this payload") from None
        self._openvino: Any = openvino
        outside = external_weights(data)  # OpenVINO would open the files they name
        if outside:
            raise BundleError(
                f"payload {variant.name}: weight {printable(outside[0])} lies in another file, expected it inside. "
                "Build the bundle again"
            )
        settings = dict(_SETTINGS)
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            core = openvino.Core()
            network = core.read_model(io.BytesIO(data))
            ports = Ports.of(variant)
            self._turned = ports.turned
            """Names of what lies channels last, in the file or by our wish."""
            if variant.precision == "int8":
                self._turned |= _turn(network, self._turned)
            compiled: Any = core.compile_model(network, "CPU", settings)
        except RuntimeError as error:
            raise BundleError(
                f"payload {variant.name}: openvino {openvino.__version__} refuses it: {_reason(error)}"
            ) from error
        self._compiled = compiled
        ports = dataclasses.replace(ports, turned=self._turned)
        self.inputs = tuple(ports.shown(_spec(port)) for port in compiled.inputs)
        self.outputs = tuple(ports.shown(_spec(port)) for port in compiled.outputs)
        self._facts = {
            "library": "openvino",
            "version": openvino.__version__.partition("-")[0],
            "device": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            "float_precision": str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()),
            "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        }

    def bind(self) -> OpenVinoBinding:
        """Buffers for one session. Raises: StreamError when closed."""
        return self.bind_to({})

    def bind_to(self, given: Mapping[str, np.ndarray], beside: Binding | None = None) -> OpenVinoBinding:
        """As `bind`, in arrays that are given: see backends.base.Fitting."""
        if self._compiled is None:
            raise StreamError("engine: closed. Load the bundle again")
        assert beside is None or isinstance(beside, OpenVinoBinding)
        memory = self._memory(given)
        binding = OpenVinoBinding(self._openvino, self._compiled, *memory, self._turned, beside)
        for arrays in (binding.inputs, binding.outputs):  # one array is one object
            assert isinstance(arrays, dict)
            for name, array in arrays.items():
                if name in given and array.ctypes.data == given[name].ctypes.data:
                    arrays[name] = given[name]
        return binding

    def bind_turns(self, states: Mapping[str, str]) -> tuple[OpenVinoBinding, OpenVinoBinding]:
        """Buffers for one session whose states (input -> output) take turns: see backends.base.Turning.

        A state that is read channels last but written channels first is copied by the session.
        Raises: StreamError when closed.
        """
        if self._compiled is None:
            raise StreamError("engine: closed. Load the bundle again")
        inputs, outputs = self._memory()
        swapped = {i: o for i, o in states.items() if (i in self._turned) == (o in self._turned)}
        other = (
            {**inputs, **{i: outputs[o] for i, o in swapped.items()}},
            {**outputs, **{o: inputs[i] for i, o in swapped.items()}},
        )
        first, second = (
            OpenVinoBinding(self._openvino, self._compiled, *memory, self._turned)
            for memory in ((inputs, outputs), other)
        )
        # one array is one object, whichever of the two shows it
        second.inputs = {
            name: first.outputs[swapped[name]] if name in swapped else array
            for name, array in first.inputs.items()
        }
        back = {o: i for i, o in swapped.items()}
        second.outputs = {
            name: first.inputs[back[name]] if name in back else array for name, array in first.outputs.items()
        }
        return first, second

    def _memory(
        self, given: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Arrays for inputs and outputs, as the library reads and writes them."""
        inputs, outputs = (
            {spec.name: self._stored(spec, given.get(spec.name)) for spec in specs}
            for specs in (self.inputs, self.outputs)
        )
        return inputs, outputs

    def _stored(self, spec: TensorSpec, given: np.ndarray | None) -> np.ndarray:
        axes = TO_LAST if spec.name in self._turned else range(len(spec.shape))
        if given is not None and usable(given, spec, axes):
            return given.transpose(axes)
        return zeros([spec.shape[axis] for axis in axes], spec.dtype.value)

    def close(self) -> None:
        """Let go; bindings still open go on working. Closing twice is fine."""
        self._compiled = None

    def describe(self) -> dict[str, Any]:
        """Library, version, device, precision of the float layers ("f32") and threads in use."""
        return dict(self._facts)


class OpenVinoBinding:
    """An inference request over arrays of ours."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(
        self,
        openvino: Any,
        compiled: Any,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        turned: frozenset[str] = frozenset(),
        beside: OpenVinoBinding | None = None,
    ) -> None:
        self.inputs, self.outputs = (
            {name: array.transpose(TO_FIRST) if name in turned else array for name, array in arrays.items()}
            for arrays in (inputs, outputs)
        )
        # a request has the memory of all that lies between its inputs and outputs
        self._shared: _Shared = _Shared(compiled.create_infer_request()) if beside is None else beside._shared
        self._tensors: tuple[list[Any], list[Any]] = (
            [openvino.Tensor(array, shared_memory=True) for array in inputs.values()],
            [openvino.Tensor(array, shared_memory=True) for array in outputs.values()],
        )
        self._request: Any = self._shared.request
        self._place()

    def _place(self) -> None:
        for i, tensor in enumerate(self._tensors[0]):
            self._request.set_input_tensor(i, tensor)
        for i, tensor in enumerate(self._tensors[1]):
            self._request.set_output_tensor(i, tensor)
        self._shared.last = self._tensors

    def run(self) -> None:
        """One inference. Raises: StreamError when the library fails or the binding is closed."""
        if self._request is None:
            raise StreamError("engine: openvino failed while running: the session is closed")
        try:
            if self._shared.last is not self._tensors:
                self._place()
            # views of our arrays, not copies; start_async and wait would cost a change of threads
            self._request.infer(share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise StreamError(f"engine: openvino failed while running: {_reason(error)}") from error

    def close(self) -> None:
        """Let go of the network; the arrays stay readable. Closing twice is fine."""
        self._request = None
        self._tensors = ([], [])


class _Shared:
    """A request, and whose tensors it has."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.last: Any = None


_PICTURE_CHANNELS = 4
"""Inputs of so many channels or fewer are pictures."""


def _turn(network: Any, already: frozenset[str] = frozenset()) -> frozenset[str]:
    """Let `network` take its pictures channels last, in place. Returns: the names of these inputs."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    found = {}
    for i, port in enumerate(network.inputs):
        shape, name = port.get_partial_shape(), port.get_any_name()
        few = len(shape) == 4 and shape.is_static and shape.to_shape()[1] <= _PICTURE_CHANNELS
        if few and name not in already:
            found[name] = i
    if found:
        processor = PrePostProcessor(network)
        for i in found.values():
            processor.input(i).tensor().set_layout(Layout("NHWC"))
            processor.input(i).model().set_layout(Layout("NCHW"))
        processor.build()
    return frozenset(found)


def _spec(port: Any) -> TensorSpec:
    name, kind, shape = port.get_any_name(), port.get_element_type().get_type_name(), port.get_partial_shape()
    if kind not in _TYPES or shape.is_dynamic:
        raise BundleError(
            f"payload tensor {name}: expected a static tensor of a known type, got {kind} {shape}. "
            "Build the bundle again"
        )
    return TensorSpec(name, _TYPES[kind], tuple(shape.to_shape()))


def _reason(error: Exception) -> str:
    """The line of OpenVINO's message that says most: what it has no rule for, else the first that is no place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [
        line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API failed"))
    ]
    rules = [line.removeprefix("-- ") for line in told if "No conversion rule found" in line]
    return (rules or told or lines or ["no reason given"])[0][:300]

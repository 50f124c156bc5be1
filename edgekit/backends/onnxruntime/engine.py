"""Device half: runs an ONNX payload with ONNX Runtime on the CPU.

The weights are used where they lie in the mapped bundle (no copy of the file); inputs and
outputs are preallocated and bound once, so a run neither allocates nor copies. Tensors that the file has channels
last (`base.Ports`) are shown as views of that. Whoever can still
run (the executable, each open binding) holds the map; when the last of them goes, it is released.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.backends.base import TO_FIRST, TO_LAST, Binding, LoadOptions, Ports, usable, zeros
from edgekit.backends.onnxruntime.wire import detach_weights
from edgekit.errors import BundleError, MissingExtraError, StreamError
from edgekit.manifest import Variant
from edgekit.spec import DType, TensorSpec

SPIN_VARIABLE = "EDGEKIT_ORT_SPIN"
"""Set to 0 where other threads need the cores: idle workers then sleep instead of spinning."""

DISABLED = ["WeightBiasQuantization"]
"""Optimizers that undo choices: this one quantizes float weights, per tensor, between quantized layers."""

KEEP_QDQ = "keep_qdq"
"""Option of a variant: compute quantized layers as Q/DQ says, in floats. For files of other libraries."""

_ORT_TYPES = {
    "tensor(float)": DType.float32,
    "tensor(float16)": DType.float16,
    "tensor(int8)": DType.int8,
    "tensor(uint8)": DType.uint8,
    "tensor(int32)": DType.int32,
    "tensor(int64)": DType.int64,
    "tensor(bool)": DType.bool,
}


def load(data: memoryview, variant: Variant, options: LoadOptions) -> OrtExecutable:
    """Load the ONNX bytes `data`, which are used where they lie and kept alive as long as needed.

    Raises: MissingExtraError without onnxruntime; BundleError when it refuses the payload.
    """
    return OrtExecutable(data, variant, options.threads, options.alone)


class OrtExecutable:
    """One InferenceSession. Runs are thread-safe; each `bind` has its own buffers."""

    reentrant = True

    def __init__(self, data: memoryview, variant: Variant, threads: int, alone: bool = True) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnxruntime", "run this bundle") from None
        self._ort = onnxruntime
        config = onnxruntime.SessionOptions()
        config.intra_op_num_threads = threads
        config.log_severity_level = 3
        if SPIN_VARIABLE in os.environ:
            config.add_session_config_entry("session.intra_op.allow_spinning", os.environ[SPIN_VARIABLE])
        if not alone:  # workers would spin for milliseconds after each run, on cores that other steps need
            config.add_session_config_entry("session.force_spinning_stop", "1")
        if variant.options.get(KEEP_QDQ):
            config.add_session_config_entry("session.disable_quant_qdq", "1")
        graph, weights = detach_weights(data)
        # views of `data`, which the library reads without holding them: they must outlive its session
        self._weights: Mapping[str, Any] = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()
        }
        try:
            config.add_external_initializers(list(self._weights), list(self._weights.values()))
            self._session: Any = onnxruntime.InferenceSession(
                graph, config, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
            )
        except Exception as error:
            first = str(error).strip().splitlines()[0][:300]
            raise BundleError(
                f"payload {variant.name}: onnxruntime {onnxruntime.__version__} refuses it: {first}"
            ) from error
        ports = Ports.of(variant)
        self._turned = ports.turned
        self.inputs = tuple(ports.shown(_spec(arg)) for arg in self._session.get_inputs())
        self.outputs = tuple(ports.shown(_spec(arg)) for arg in self._session.get_outputs())
        self._facts = {
            "library": "onnxruntime",
            "version": onnxruntime.__version__,
            "providers": self._session.get_providers(),
            "threads": threads or "the library's choice",
            "mapped_weight_bytes": sum(array.nbytes for array in weights.values()),
        }

    def bind(self) -> OrtBinding:
        """Buffers for one session. Raises: StreamError when closed."""
        return self.bind_to({})

    def bind_to(self, given: Mapping[str, np.ndarray], beside: Binding | None = None) -> OrtBinding:
        """As `bind`, in arrays that are given: see backends.base.Fitting."""
        if self._session is None:
            raise StreamError("engine: closed. Load the bundle again")
        return OrtBinding(self._ort, self._session, self._weights, *self._arrays(given), self._turned)

    def bind_turns(self, states: Mapping[str, str]) -> tuple[OrtBinding, OrtBinding]:
        """Buffers for one session whose states (input -> output) take turns: see backends.base.Turning.
        Raises: StreamError when closed.
        """
        first = self.bind()
        inputs, outputs = dict(first.inputs), dict(first.outputs)
        for source, target in states.items():
            if (source in self._turned) == (target in self._turned):  # else the session copies it
                inputs[source], outputs[target] = first.outputs[target], first.inputs[source]
        return first, OrtBinding(self._ort, self._session, self._weights, inputs, outputs, self._turned)

    def _arrays(self, given: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        inputs, outputs = (
            {spec.name: self._array(spec, given.get(spec.name)) for spec in specs}
            for specs in (self.inputs, self.outputs)
        )
        return inputs, outputs

    def _array(self, spec: TensorSpec, given: np.ndarray | None) -> np.ndarray:
        turned = spec.name in self._turned
        if given is not None and usable(given, spec, TO_LAST if turned else None):
            return given
        if not turned:
            return zeros(spec.shape, spec.dtype.value)
        return zeros([spec.shape[axis] for axis in TO_LAST], spec.dtype.value).transpose(TO_FIRST)

    def close(self) -> None:
        """Let go; bindings still open go on working. Closing twice is fine."""
        self._session, self._weights = None, {}

    def describe(self) -> dict[str, Any]:
        """Library, version, providers, threads asked for, and bytes of weights used in place."""
        return dict(self._facts)


class OrtBinding:
    """Buffers of one session, bound by address."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(
        self,
        ort: Any,
        session: Any,
        weights: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        turned: frozenset[str] = frozenset(),
    ) -> None:
        self._weights = weights
        self._binding = session.io_binding()
        self.inputs = inputs
        self.outputs = outputs
        self._values = []
        for arrays, bind in (
            (self.inputs, self._binding.bind_ortvalue_input),
            (self.outputs, self._binding.bind_ortvalue_output),
        ):
            for name, array in arrays.items():
                stored = array.transpose(TO_LAST) if name in turned else array
                value = ort.OrtValue.ortvalue_from_numpy(stored)
                self._values.append(value)
                bind(name, value)
        self._run = session.run_with_iobinding

    def run(self) -> None:
        """One inference. Raises: StreamError when the library fails or the binding is closed."""
        try:
            self._run(self._binding)
        except Exception as error:
            first = str(error).strip().splitlines()[0][:300]
            raise StreamError(f"engine: onnxruntime failed while running: {first}") from error

    def close(self) -> None:
        """Let go of the network; the arrays stay readable. Closing twice is fine."""
        self._run, self._binding, self._values, self._weights = _closed, None, [], {}


def _closed(_: Any) -> None:
    raise RuntimeError("the session is closed")


def _spec(arg: Any) -> TensorSpec:
    if arg.type not in _ORT_TYPES or not all(isinstance(d, int) for d in arg.shape):
        raise BundleError(
            f"payload tensor {arg.name}: expected a static tensor of a known type, got {arg.type} {arg.shape}"
        )
    return TensorSpec(arg.name, _ORT_TYPES[arg.type], tuple(arg.shape))

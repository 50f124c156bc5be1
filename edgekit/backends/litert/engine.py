"""Device half: runs a `.tflite` payload on the CPU with LiteRT, whose default delegate is XNNPACK.

Inputs and outputs are the interpreter's own tensors: a session's arrays are views of that memory, in the
graph's axis order, so a run neither allocates nor copies on our side. The views hold the interpreter; it
never reallocates, since nothing here changes a shape.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.backends.base import LoadOptions
from edgekit.errors import BundleError, MissingExtraError, StreamError
from edgekit.host import usable_cores
from edgekit.manifest import Variant
from edgekit.optional import native_messages
from edgekit.spec import DType, QuantParams, TensorSpec

CHATTER = ("INFO: Created TensorFlow Lite", "INFO: Applying ")
"""What the library writes to stderr when all is well."""

Port = tuple[str, list[int], list[int]]
"""Name, axis order and shape of an input or output (see lower.lower)."""


def load(data: memoryview, variant: Variant, options: LoadOptions) -> LiteExecutable:
    """Load the `.tflite` bytes `data` (copied: the library wants them in one Python object).

    Raises: MissingExtraError without a LiteRT package; BundleError when it refuses the payload.
    """
    return LiteExecutable(bytes(data), variant, options.threads)


def _library(variant: Variant) -> tuple[Any, str, str]:
    """(class Interpreter, package, version). tflite_runtime serves for float payloads: its XNNPACK
    does not take integers, which then run slower than floats."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, "ai-edge-litert", _version("ai-edge-litert")
    except ImportError:
        pass
    if variant.precision in ("float32", "float16"):
        try:
            from tflite_runtime.interpreter import Interpreter

            return Interpreter, "tflite-runtime", _version("tflite-runtime")
        except ImportError:
            pass
    raise MissingExtraError("ai-edge-litert", "litert", "run this bundle")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a package built into a board's system image
        return "unknown"


class LiteExecutable:
    """A payload. Each `bind` has an interpreter of its own: one cannot be shared by threads."""

    def __init__(self, data: bytes, variant: Variant, threads: int) -> None:
        self._interpreter, package, version = _library(variant)
        self._data = data
        self._variant = variant
        self._threads = threads or usable_cores()  # LiteRT by itself would take one
        self._orders = {side: _orders(variant, side) for side in ("inputs", "outputs")}
        self._first: Any = self._open()
        self.inputs = self._specs("inputs", self._first.get_input_details())
        self.outputs = self._specs("outputs", self._first.get_output_details())
        self._facts = {
            "library": package,
            "version": version,
            "threads": self._threads,
            **delegation(self._first),
        }

    def _open(self) -> Any:
        try:
            with native_messages(CHATTER):
                interpreter = self._interpreter(model_content=self._data, num_threads=self._threads)
                interpreter.allocate_tensors()
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise BundleError(f"payload {self._variant.name}: LiteRT refuses it: {first}") from error
        return interpreter

    def _specs(self, side: str, details: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        orders = self._orders[side]
        if len(orders) != len(details):
            raise BundleError(
                f"payload {self._variant.name}: has {len(details)} {side}, expected {len(orders)}. Build the bundle again"
            )
        specs = []
        for (name, order, stored), detail in zip(orders, details, strict=True):
            size = math.prod(int(d) for d in detail["shape"])
            if (
                sorted(order) != list(range(len(stored)))
                or math.prod(stored) != size
                or min(stored, default=1) < 1
            ):
                raise BundleError(
                    f"payload {self._variant.name}: tensor {name}: order {order} of {stored} does not fit "
                    f"{[int(d) for d in detail['shape']]}. Build the bundle again"
                )
            shape = tuple(stored[order.index(axis)] for axis in range(len(stored)))
            dtype = DType(np.dtype(detail["dtype"]).name)
            specs.append(TensorSpec(name, dtype, shape, quant=_quant(detail, dtype)))
        return tuple(specs)

    def bind(self) -> LiteBinding:
        """An interpreter for one session. Raises: StreamError when closed."""
        if self._interpreter is None:
            raise StreamError("engine: closed. Load the bundle again")
        interpreter, self._first = self._first or self._open(), None
        return LiteBinding(interpreter, self._orders["inputs"], self._orders["outputs"])

    def close(self) -> None:
        """Let go; bindings still open go on working. Closing twice is fine."""
        self._interpreter, self._first, self._data = None, None, b""

    def describe(self) -> dict[str, Any]:
        """Library, version, threads; `delegated`: operators that XNNPACK runs, of `operators`, in `partitions` runs."""
        return dict(self._facts)


class LiteBinding:
    """One session's interpreter, and its tensors as arrays in the graph's axis order."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(
        self,
        interpreter: Any,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
    ) -> None:
        self._interpreter: Any = interpreter
        self.inputs = _views(interpreter, interpreter.get_input_details(), inputs)
        self.outputs = _views(interpreter, interpreter.get_output_details(), outputs)
        for array in self.inputs.values():
            array[...] = 0
        self._invoke = interpreter.invoke

    def run(self) -> None:
        """One inference. Raises: StreamError when the library fails or the binding is closed."""
        try:
            self._invoke()
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise StreamError(f"engine: LiteRT failed while running: {first}") from error

    def close(self) -> None:
        """Let go of the network; the arrays stay readable. Closing twice is fine."""
        self._interpreter, self._invoke = None, _closed


def _closed() -> None:
    raise RuntimeError("the session is closed")


def _orders(variant: Variant, side: str) -> list[Port]:
    """How to read the file's tensors, from the variant's options. Raises: BundleError."""
    entries = variant.options.get(side)

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int for v in value)

    ok = isinstance(entries, list) and all(
        isinstance(e, list) and len(e) == 3 and isinstance(e[0], str) and numbers(e[1]) and numbers(e[2])
        for e in entries
    )
    if not ok or not isinstance(entries, list):
        raise BundleError(
            f"payload {variant.name}: option {side!r} is no list of [name, order, shape]. Build the bundle again"
        )
    return [(name, order, shape) for name, order, shape in entries]


def _quant(detail: Mapping[str, Any], dtype: DType) -> QuantParams | None:
    """What the file says of a tensor's codes; None for reals, and where it does not say one scale."""
    said = detail["quantization_parameters"]
    scales = tuple(float(s) for s in said["scales"])
    if dtype not in (DType.int8, DType.uint8) or len(scales) != 1 or not 0 < scales[0] < math.inf:
        return None
    return QuantParams(dtype, scales, (int(said["zero_points"][0]),))


def _views(
    interpreter: Any, details: Sequence[Mapping[str, Any]], ports: Sequence[Port]
) -> dict[str, np.ndarray]:
    """The tensors' memory by name, [1, C, H, W] where the graph has it so.

    The library refuses to run while numpy views that it made are alive, as it may reallocate; here
    nothing makes it, so the views are made from the address. Each keeps the interpreter alive.
    """
    views = {}
    for (name, order, shape), detail in zip(ports, details, strict=True):
        stored = interpreter.tensor(detail["index"])()
        memory = (ctypes.c_char * stored.nbytes).from_address(stored.ctypes.data)
        memory.owner = interpreter
        array = np.frombuffer(memory, stored.dtype).reshape(shape)
        views[name] = array.transpose([order.index(axis) for axis in range(len(order))])
    return views


def delegation(interpreter: Any) -> dict[str, int]:
    """How many operators the file has, how many of them the delegate took, and in how many runs."""
    operators = interpreter._get_ops_details()
    runs = [o for o in operators if o["op_name"] == "DELEGATE"]
    plain = [o for o in operators if o["op_name"] != "DELEGATE"]
    writer = {int(t): i for i, o in enumerate(plain) for t in o["outputs"]}
    taken: set[int] = set()
    for run in runs:  # backwards from what the delegate writes to what it reads
        reads = {int(t) for t in run["inputs"]}
        queue = [int(t) for t in run["outputs"]]
        while queue:
            tensor = queue.pop()
            node = writer.get(tensor)
            if node is None or node in taken:
                continue
            taken.add(node)
            queue += [int(t) for t in plain[node]["inputs"] if int(t) >= 0 and int(t) not in reads]
    return {"operators": len(plain), "delegated": len(taken), "partitions": len(runs)}

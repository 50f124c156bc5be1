"""Device half: runs payloads of the native engine (docs/native.md) by ctypes.

The payload is read where it lies in the mapped bundle, and not needed once it is loaded. Arrays of a session are views of
memory that the engine works in: a run neither allocates nor copies, and holds no lock of Python while it computes.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.backends.base import ALIGN, Binding, LoadOptions, zeros
from edgekit.backends.native import library as lib
from edgekit.errors import BundleError, StreamError
from edgekit.host import usable_cores
from edgekit.manifest import Variant
from edgekit.spec import DType, QuantParams, TensorSpec

SLACK = 64
"""Bytes that may be read behind the memory of a port."""


def load(data: memoryview, variant: Variant, options: LoadOptions) -> NativeExecutable:
    """Load a payload, which is checked first.

    Raises: MissingExtraError without the library; BundleError when it refuses the payload.
    """
    return NativeExecutable(data, f"payload {variant.name}", options.threads or usable_cores())


class NativeExecutable:
    """A payload. Sessions share its weights; each `bind` has working memory of its own."""

    reentrant = True

    def __init__(
        self,
        data: bytes | memoryview,
        what: str = "payload",
        threads: int = 1,
        isa: str | None = None,
        keep: bool = False,
        spin_us: int = lib.BY_DEFAULT,
    ) -> None:
        """isa: None = the best one of this CPU. keep: all tensors can be read after a run (`NativeBinding.tensor`)."""
        self._library = lib.load()
        self._what = what
        payload = _aligned(data)
        options = lib.Options(
            ctypes.sizeof(lib.Options), threads, isa.encode() if isa else None, int(keep), spin_us
        )
        handle = ctypes.c_void_p()
        status = self._library.ek_engine_open(
            payload.ctypes.data, payload.nbytes, ctypes.byref(options), ctypes.byref(handle)
        )
        lib.checked(self._library, status, what)
        self._engine: _Handle | None = _Handle(handle, self._library.ek_engine_close, None)
        count = ctypes.c_uint32()
        self._checked(self._library.ek_engine_ports(handle, ctypes.byref(count)))
        self._ports = [self._port(handle, number) for number in range(count.value)]
        self.inputs = tuple(p.spec for p in self._ports if not p.output)
        self.outputs = tuple(p.spec for p in self._ports if p.output)
        self.turnable = frozenset(p.spec.name for p in self._ports if p.output and p.turned)
        self._facts = json.loads(self._library.ek_engine_describe(handle))

    def _checked(self, status: int) -> None:
        lib.checked(self._library, status, self._what)

    def _port(self, handle: ctypes.c_void_p, number: int) -> _Port:
        port = lib.Port()
        self._checked(self._library.ek_engine_port(handle, number, ctypes.byref(port)))
        return _Port.of(number, port)

    def bind(self) -> NativeBinding:
        """Memory for one session. Raises: StreamError when closed."""
        return self.bind_to({})

    def bind_to(self, given: Mapping[str, np.ndarray], beside: Binding | None = None) -> NativeBinding:
        """As `bind`, in arrays that are given where they lie as the engine wants them: see backends.base.Fitting."""
        return NativeBinding(self._open(), self._library, self._ports, given)

    def bind_turns(self, states: Mapping[str, str]) -> tuple[NativeBinding, NativeBinding]:
        """Two bindings whose states (input -> output) take turns: see backends.base.Turning."""
        first = self.bind()
        given = {**first.inputs, **first.outputs}
        for source, target in states.items():
            given[source], given[target] = first.outputs[target], first.inputs[source]
        return first, NativeBinding(self._open(), self._library, self._ports, given, first)

    def _open(self) -> _Handle:
        if self._engine is None:
            raise StreamError("engine: closed. Load the bundle again")
        session = ctypes.c_void_p()
        self._checked(self._library.ek_session_create(self._engine.value, ctypes.byref(session)))
        return _Handle(session, self._library.ek_session_close, self._engine)

    def close(self) -> None:
        """Let go; bindings still open go on working. Closing twice is fine."""
        self._engine = None

    def describe(self) -> dict[str, Any]:
        """Library, instruction set, threads, bytes of memory, and the kernel of every step."""
        return {"library": "edgekit", "version": 1, **self._facts}


class NativeBinding:
    """One session of the engine, and its ports as arrays."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(
        self,
        session: _Handle,
        library: ctypes.CDLL,
        ports: list[_Port],
        given: Mapping[str, np.ndarray],
        beside: NativeBinding | None = None,
    ) -> None:
        """beside: whose arrays those in `given` are; they are taken as they are."""
        self._session: _Handle | None = session
        self._library = library
        self._run = library.ek_session_run
        self._handle = session.value
        self._held: list[Any] = [beside]
        arrays: list[dict[str, np.ndarray]] = [{}, {}]
        for port in ports:
            array = given.get(port.spec.name)
            if array is not None and (beside is not None or port.fits(array)):
                status = library.ek_session_bind(session.value, port.number, port.stored(array).ctypes.data)
                lib.checked(library, status, port.spec.name)
                self._held.append(array)
            else:
                array = port.array(self._memory(port.number), session)
            arrays[port.output][port.spec.name] = array
        self.inputs, self.outputs = arrays
        quants = {port.spec.name: port.spec.quant for port in ports}
        self.codes = {name: quant for name in self.inputs if (quant := quants[name]) is not None}
        """Inputs that take codes, with their scales."""

    def _memory(self, port: int) -> int:
        memory = ctypes.c_void_p()
        lib.checked(
            self._library, self._library.ek_session_memory(self._handle, port, ctypes.byref(memory)), "port"
        )
        return memory.value or 0

    def run(self) -> None:
        """One inference. Raises: StreamError when the binding is closed."""
        if self._session is None:
            raise StreamError("engine: the session is closed. Open one again")
        if self._run(self._handle) != lib.OK:
            raise StreamError(f"engine: {self._library.ek_last_error().decode(errors='replace')}")

    def tensor(self, number: int, bytes: int) -> np.ndarray:
        """`bytes` bytes from the first element of a tensor of the payload, after a run; needs `keep`.
        The array is valid while the binding is open."""
        memory = ctypes.c_void_p()
        status = self._library.ek_session_tensor(self._handle, number, ctypes.byref(memory))
        lib.checked(self._library, status, f"tensor {number}")
        view: Any = (ctypes.c_uint8 * bytes).from_address(memory.value or 0)
        return np.frombuffer(view, np.uint8)

    def profile(self, on: bool = True) -> None:
        """From now on, measure every step."""
        lib.checked(self._library, self._library.ek_session_profile(self._handle, int(on)), "session")

    def times(self, steps: int) -> np.ndarray:
        """Nanoseconds of each step of the last run, uint64 [steps]; needs `profile`."""
        times = np.zeros(steps, np.uint64)
        pointer = times.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
        lib.checked(self._library, self._library.ek_session_times(self._handle, pointer, steps), "session")
        return times

    def close(self) -> None:
        """Let go of the network; the arrays stay readable. Closing twice is fine."""
        self._session = None


class _Handle:
    """Something of the library's, closed when nobody holds it any more. `holds`: what it needs."""

    def __init__(self, value: ctypes.c_void_p, close: Any, holds: Any) -> None:
        self.value, self._close, self._holds = value, close, holds

    def __del__(self) -> None:
        self._close(self.value)


class _Port:
    def __init__(self, number: int, output: bool, spec: TensorSpec, turned: bool) -> None:
        self.number, self.output, self.spec, self.turned = number, output, spec, turned
        rank = len(spec.shape)
        self._axes = (0, *range(2, rank), 1) if turned else tuple(range(rank))
        """Axes of the session's shape in the order in which they lie."""

    @staticmethod
    def of(number: int, port: lib.Port) -> _Port:
        """From what the library says. Raises: BundleError."""
        shape = tuple(int(d) for d in port.shape[: port.rank])
        dtype = DType.float32 if port.dtype else DType.uint8
        quant = None if port.dtype else QuantParams(dtype, (float(port.scale),), (int(port.zero),))
        try:
            spec = TensorSpec(port.name.decode(), dtype, shape, quant=quant)
        except ValueError as error:
            raise BundleError(f"payload port {number}: {error}. Build the bundle again") from None
        return _Port(number, bool(port.output), spec, bool(port.channels_last))

    def stored(self, array: np.ndarray) -> np.ndarray:
        """A session's array as it lies."""
        return array.transpose(self._axes)

    def fits(self, array: np.ndarray) -> bool:
        """Whether the engine can work in this array. It may read some bytes behind it: memory of arrays ends before the
        end of a page only by chance, so an array is only taken where its owner says that there is more."""
        if array.shape != self.spec.shape or array.dtype != self.spec.dtype.value:
            return False
        stored = self.stored(array)
        flags = stored.flags
        return bool(
            flags.c_contiguous and flags.writeable and stored.ctypes.data % ALIGN == 0 and _room(array)
        )

    def array(self, memory: int, holds: Any) -> np.ndarray:
        """The session's view of memory."""
        stored = [self.spec.shape[axis] for axis in self._axes]
        view: Any = (ctypes.c_uint8 * self.spec.nbytes).from_address(memory)
        view.holds = holds
        flat = np.frombuffer(view, self.spec.dtype.value)
        back = [self._axes.index(axis) for axis in range(len(self._axes))]
        return flat.reshape(stored).transpose(back)


def _room(array: np.ndarray) -> bool:
    """Whether SLACK bytes behind an array belong to the memory it is a part of."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    end = array.ctypes.data + math.prod(array.shape) * array.itemsize
    return bool(end + SLACK <= root.ctypes.data + root.nbytes)


def _aligned(data: bytes | memoryview) -> np.ndarray:
    """The bytes as the engine wants them: at a multiple of ALIGN, copied where they are not."""
    given = np.frombuffer(data, np.uint8)
    if given.ctypes.data % ALIGN == 0:
        return given
    memory = zeros((given.size,), "uint8")
    memory[:] = given
    return memory

"""A stand-in for a Jetson: `tensorrt` and CUDA by their documented rules, each broken rule an `assert`.

What it holds the engine to:
- copies and kernels on a stream happen in order, and not before the host waits (a missing wait shows as
  stale outputs);
- asynchronous copies use page-locked memory, inside one live allocation, on a live stream;
- a context executes only with an address set for every tensor, inside a live device allocation of the
  tensor's size, on a stream of our own;
- while a stream records, its thread neither allocates, frees nor waits, and nothing is executed on it (thread-local capture);
- logger, runtime and engine outlive what was made with them;
- at the end nothing is left: no allocation, stream, graph or context.

The fake network computes y = 2 x + 1 for input and output of the same index.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import json
import threading
import time
import types
import weakref
from typing import Any

import numpy as np

from edgekit.backends.tensorrt.cuda import Device
from edgekit.errors import StreamError

ENGINE_MAGIC = b"FAKE-ENGINE "
TIMING_MAGIC = b"FAKE-TIMING "


class Machine:
    """Memory, streams and knobs for faults. One per test."""

    def __init__(self) -> None:
        self.device = Device("Fake Orin", "8.7", 16, 8 << 30)
        self.device_memory: dict[int, np.ndarray] = {}
        self.host_memory: dict[int, Any] = {}
        self.streams: dict[int, list[Any]] = {}
        self.recording: dict[int, list[Any]] = {}
        self.recorders: dict[int, int] = {}
        """Stream that records -> thread."""
        self.graphs: dict[int, list[Any]] = {}
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.calls: list[str] = []
        self.launches = 0
        self.executions = 0
        self.builds = 0
        self.cancellations = 0
        self.last_plan: dict[str, Any] = {}
        self._next = 0x7000_0000
        # faults
        self.memory_bytes = 1 << 30
        self.fail: set[str] = set()
        """Calls that raise StreamError (CUDA) or return False/None (TensorRT)."""
        self.parser_errors: list[tuple[str, str, str]] = []
        self.build_error = ""
        self.build_until_cancelled = False
        self.sync_inside_execute = False
        """The engine does something that cannot be recorded."""
        self.version = "10.3.0"

    def address(self, nbytes: int) -> int:
        self._next += (nbytes + 4095) // 4096 * 4096 + 4096
        return self._next - nbytes - 1 - self._next % 256

    def device_range(self, pointer: int, nbytes: int) -> np.ndarray:
        assert pointer in self.device_memory, f"device address {pointer:#x} is not a live allocation"
        memory = self.device_memory[pointer]
        assert nbytes <= memory.size, f"{nbytes} bytes do not fit the allocation of {memory.size}"
        return memory[:nbytes]

    def host_range(self, pointer: int, nbytes: int) -> np.ndarray:
        assert pointer in self.host_memory, f"host address {pointer:#x} is not page-locked"
        memory = self.host_memory[pointer]
        assert nbytes <= len(memory), f"{nbytes} bytes do not fit the allocation of {len(memory)}"
        return np.frombuffer(memory, np.uint8)[:nbytes]

    def enqueue(self, stream: int, work: Any) -> None:
        assert stream in self.streams, "stream is not live"
        self.recording.get(stream, self.streams[stream]).append(work)

    def idle(self) -> bool:
        """Nothing is left; contexts and engines may need a garbage collection to go."""
        gc.collect()
        left = (self.device_memory, self.host_memory, self.streams, self.graphs, self.contexts, self.engines)
        return not any(len(kind) for kind in left)

    def leaks(self) -> str:
        return (
            f"device {len(self.device_memory)}, host {len(self.host_memory)}, streams {len(self.streams)}, "
            f"graphs {len(self.graphs)}, contexts {len(self.contexts)}, engines {len(self.engines)}"
        )


class FakeCuda:
    """`cuda.CudaApi` on a `Machine`."""

    name = "fake-cuda 1.0"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def _enter(self, call: str, *, may_record: bool = False) -> None:
        m = self.machine
        m.calls.append(call)
        assert may_record or threading.get_ident() not in m.recorders.values(), (
            f"{call} while a stream records"
        )
        if call in m.fail:
            raise StreamError(f"CUDA {call}: cudaErrorFake made to fail")

    def device(self) -> Device:
        return self.machine.device

    def activate(self) -> None:
        pass

    def alloc(self, nbytes: int) -> int:
        m = self.machine
        self._enter("alloc")
        assert nbytes > 0
        if sum(a.size for a in m.device_memory.values()) + nbytes > m.memory_bytes:
            raise StreamError(f"CUDA cudaMalloc of {nbytes} bytes: cudaErrorMemoryAllocation out of memory")
        pointer = m.address(nbytes)
        m.device_memory[pointer] = np.full(nbytes, 0xCD, np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        self._enter("free")
        assert pointer in self.machine.device_memory, "freed twice or never allocated"
        for context in self.machine.contexts:
            assert pointer not in context.addresses.values(), "freed while a context still uses it"
        del self.machine.device_memory[pointer]

    def alloc_host(self, nbytes: int) -> int:
        self._enter("alloc_host")
        memory = (ctypes.c_uint8 * nbytes)(*([0xAB] * min(nbytes, 64)))
        pointer = ctypes.addressof(memory)
        self.machine.host_memory[pointer] = memory
        return pointer

    def free_host(self, pointer: int) -> None:
        self._enter("free_host")
        assert pointer in self.machine.host_memory, "freed twice or never allocated"
        for stream, work in self.machine.streams.items():
            assert not work, f"page-locked memory freed while stream {stream} has work"
        del self.machine.host_memory[pointer]

    def create_stream(self) -> int:
        self._enter("create_stream")
        self.machine._next += 1
        self.machine.streams[self.machine._next] = []
        return self.machine._next

    def destroy_stream(self, stream: int) -> None:
        self._enter("destroy_stream")
        assert not self.machine.streams[stream], "destroyed with work in it"
        del self.machine.streams[stream]

    def synchronize(self, stream: int) -> None:
        m = self.machine
        self._enter("synchronize")
        for work in m.streams[stream]:
            work()
        m.streams[stream].clear()

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        m = self.machine
        self._enter("to_device", may_record=True)
        m.device_range(device, nbytes)
        m.host_range(host, nbytes)

        def work() -> None:
            m.device_range(device, nbytes)[:] = m.host_range(host, nbytes)

        m.enqueue(stream, work)

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        m = self.machine
        self._enter("to_host", may_record=True)
        m.device_range(device, nbytes)
        m.host_range(host, nbytes)

        def work() -> None:
            m.host_range(host, nbytes)[:] = m.device_range(device, nbytes)

        m.enqueue(stream, work)

    def begin_capture(self, stream: int) -> None:
        self._enter("begin_capture")
        assert not self.machine.streams[stream], "recording begins on an idle stream here"
        self.machine.recording[stream] = []
        self.machine.recorders[stream] = threading.get_ident()

    def end_capture(self, stream: int) -> Any:
        m = self.machine
        work = m.recording.pop(stream)
        assert m.recorders.pop(stream) == threading.get_ident(), "a thread-local capture ends where it began"
        self._enter("end_capture")
        if None in work:
            raise StreamError("CUDA cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")
        m._next += 1
        m.graphs[m._next] = work
        return m._next

    def launch(self, graph: Any, stream: int) -> None:
        self._enter("launch")
        self.machine.launches += 1
        for work in self.machine.graphs[graph]:
            self.machine.enqueue(stream, work)

    def destroy_graph(self, graph: Any) -> None:
        self._enter("destroy_graph")
        del self.machine.graphs[graph]


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 8


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class HostMemory:
    """IHostMemory: a buffer with `nbytes`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def __buffer__(self, flags: int) -> memoryview:  # Python 3.12
        return memoryview(self._data)

    def __bytes__(self) -> bytes:
        return self._data


def make_tensorrt(machine: Machine) -> types.ModuleType:
    """A module to put in `sys.modules["tensorrt"]`. Networks are JSON instead of ONNX (see `network`)."""
    trt = types.ModuleType("tensorrt")
    trt.__version__ = machine.version  # type: ignore[attr-defined]

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = Severity

        def __init__(self) -> None:
            self.initialised = True

    class IProgressMonitor:
        def __init__(self) -> None:
            self.initialised = True

    class Tensor:
        def __init__(self, name: str, dtype: str, shape: list[int]) -> None:
            self.name, self.shape, self.dtype = name, tuple(shape), DataType[dtype]

    class Network:
        def __init__(self) -> None:
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor] = []

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))

        def get_input(self, i: int) -> Tensor:
            return self.inputs[i]

        def get_output(self, i: int) -> Tensor:
            return self.outputs[i]

    class ParserError:
        def __init__(self, op: str, node: str, text: str) -> None:
            self._op, self._node, self._text = op, node, text

        def node_operator(self) -> str:
            return self._op

        def node_name(self) -> str:
            return self._node

        def desc(self) -> str:
            return self._text

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            assert logger.initialised
            self._network = network
            self._logger = weakref.ref(logger)
            self._errors: list[ParserError] = []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, i: int) -> ParserError:
            return self._errors[i]

        def parse(self, data: bytes) -> bool:
            self._errors = [ParserError(*e) for e in machine.parser_errors]
            if self._errors:
                return False
            try:
                graph = json.loads(bytes(data))
            except ValueError:
                self._errors = [ParserError("", "", "Failed to parse the ONNX model.")]
                return False
            self._network.inputs = [Tensor(*t) for t in graph["inputs"]]
            self._network.outputs = [Tensor(*t) for t in graph["outputs"]]
            return True

    class TimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data or TIMING_MAGIC

        def serialize(self) -> HostMemory:
            return HostMemory(self.data)

    class Config:
        def __init__(self) -> None:
            self.flags: set[str] = {"TF32"}
            self.limits: dict[str, int] = {}
            self.builder_optimization_level = 3
            self.progress_monitor: Any = None
            self.cache: TimingCache | None = None

        def set_memory_pool_limit(self, pool: str, nbytes: int) -> None:
            self.limits[pool] = nbytes

        def set_flag(self, flag: str) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: str) -> None:
            self.flags.discard(flag)

        def create_timing_cache(self, data: bytes) -> TimingCache:
            return TimingCache(bytes(data))

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if not cache.data.startswith(TIMING_MAGIC):
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> TimingCache | None:
            return self.cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            assert logger.initialised
            # a bare pointer, as in TensorRT: the caller keeps the logger alive
            self._logger = weakref.ref(logger)

        def create_network(self, flags: int = 0) -> Network:
            assert flags == 1 << 1, "networks are strongly typed"
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
            machine.builds += 1
            logger, monitor = self._logger(), config.progress_monitor
            assert logger is not None, "the logger died before the builder"
            assert monitor is None or monitor.initialised
            machine.last_plan = {
                "limits": config.limits,
                "flags": sorted(config.flags),
                "level": config.builder_optimization_level,
                "timing": None if config.cache is None else config.cache.data,
            }
            if machine.build_error:
                logger.log(Severity.ERROR, machine.build_error)
                return None
            if machine.build_until_cancelled:
                monitor.phase_start("Building Engine", None, 1000)
                step = 0
                while monitor.step_complete("Building Engine", step):
                    time.sleep(0.002)
                    step += step < 900
                logger.log(Severity.ERROR, "Build canceled by user")
                machine.cancellations += 1
                return None
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    monitor.phase_start("Timing", "Building Engine", 3)
                    for inner in range(3):
                        if not monitor.step_complete("Timing", inner):
                            logger.log(Severity.ERROR, "Build canceled by user")
                            return None
                    monitor.phase_finish("Timing")
                    if not monitor.step_complete("Building Engine", step):
                        return None
                monitor.phase_finish("Building Engine")
            if config.cache is not None:
                config.cache.data += b"+1"
            tensors = [
                [t.name, t.dtype.name, list(t.shape), mode]
                for mode, side in (("INPUT", network.inputs), ("OUTPUT", network.outputs))
                for t in side
            ]
            facts = {"version": machine.version, "sms": machine.device.sms, "tensors": tensors}
            return HostMemory(ENGINE_MAGIC + json.dumps(facts).encode())

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self.addresses: dict[str, int] = {}
            machine.contexts.add(self)

        def set_tensor_address(self, name: str, pointer: int) -> bool:
            assert name in self._engine.tensors, f"no tensor {name!r}"
            if "set_tensor_address" in machine.fail:
                self._engine.log("set_tensor_address: made to fail")
                return False
            self.addresses[name] = pointer
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert isinstance(stream, int)
            assert stream in machine.streams, "not a live stream of our own"
            assert self.addresses.keys() == self._engine.tensors.keys(), "a tensor has no address"
            if "execute_async_v3" in machine.fail:
                self._engine.log("enqueueV3: made to fail")
                return False
            sizes = {n: int(np.prod(t.shape)) * 4 for n, t in self._engine.tensors.items()}
            for name, pointer in self.addresses.items():
                machine.device_range(pointer, sizes[name])
            if machine.sync_inside_execute and stream in machine.recording:
                machine.recording[stream].append(None)  # CUDA spoils the recording
                self._engine.log("operation not permitted when stream is capturing")
                return False
            addresses = dict(self.addresses)

            def work() -> None:
                machine.executions += 1
                ins = [n for n, t in self._engine.tensors.items() if t.mode is TensorIOMode.INPUT]
                outs = [n for n, t in self._engine.tensors.items() if t.mode is TensorIOMode.OUTPUT]
                for a, b in zip(ins, outs, strict=True):
                    x = machine.device_range(addresses[a], sizes[a]).view(np.float32)
                    machine.device_range(addresses[b], sizes[b]).view(np.float32)[:] = 2 * x + 1

            machine.enqueue(stream, work)
            return True

    class Engine:
        def __init__(self, facts: dict[str, Any], logger: Any) -> None:
            self._logger = logger
            self.tensors: dict[str, Any] = {}
            for name, dtype, shape, mode in facts["tensors"]:
                tensor = Tensor(name, dtype, shape)
                tensor.mode = TensorIOMode[mode]  # type: ignore[attr-defined]
                self.tensors[name] = tensor
            machine.engines.add(self)

        num_io_tensors = property(lambda self: len(self.tensors))

        def log(self, text: str) -> None:
            logger = self._logger()
            assert logger is not None, "the logger died before the engine"
            logger.log(Severity.ERROR, text)

        def get_tensor_name(self, i: int) -> str:
            return list(self.tensors)[i]

        def get_tensor_dtype(self, name: str) -> DataType:
            return self.tensors[name].dtype

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.tensors[name].shape

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return self.tensors[name].mode

        def create_execution_context(self) -> Context | None:
            if "create_execution_context" in machine.fail:
                self.log("out of memory")
                return None
            return Context(self)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert logger.initialised
            self._logger = weakref.ref(logger)

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            logger = self._logger()
            assert logger is not None, "the logger died before the runtime"
            data = bytes(data)
            facts = json.loads(data[len(ENGINE_MAGIC) :]) if data.startswith(ENGINE_MAGIC) else None
            if facts is None or (facts["version"], facts["sms"]) != (machine.version, machine.device.sms):
                logger.log(Severity.ERROR, "Serialization assertion stdVersionRead == kVERSION failed")
                return None
            return Engine(facts, self._logger)

    names = types.SimpleNamespace
    public: dict[str, Any] = {
        "ILogger": ILogger,
        "IProgressMonitor": IProgressMonitor,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "DataType": DataType,
        "NetworkDefinitionCreationFlag": enum.IntEnum("Flag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}),
        "MemoryPoolType": names(WORKSPACE="WORKSPACE"),
        "BuilderFlag": names(TF32="TF32", SPARSE_WEIGHTS="SPARSE_WEIGHTS"),
    }
    for name, value in public.items():
        setattr(trt, name, value)
    return trt


def network(inputs: list[tuple[str, tuple[int, ...]]], outputs: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """What the fake parser takes in place of ONNX."""
    sides = {
        side: [[name, "FLOAT", list(shape)] for name, shape in tensors]
        for side, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    return json.dumps(sides).encode()

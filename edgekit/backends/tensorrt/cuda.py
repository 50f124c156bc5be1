"""The few CUDA calls that running an engine needs, over cuda-bindings or, where a board has it, PyCUDA.

Pointers, streams and graphs are opaque to the caller. Every failing call raises StreamError naming the
call and CUDA's reason.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from edgekit.errors import MissingExtraError, StreamError


@dataclass(frozen=True)
class Device:
    """The GPU at index 0. Its number of SMs depends on the power mode."""

    name: str
    compute_capability: str
    sms: int
    memory_bytes: int


class CudaApi(Protocol):
    """Calls on device 0; pointers are addresses."""

    name: str

    def device(self) -> Device: ...

    def activate(self) -> None:
        """Makes the device usable in the calling thread."""
        ...

    def alloc(self, nbytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def alloc_host(self, nbytes: int) -> int:
        """Page-locked host memory."""
        ...

    def free_host(self, pointer: int) -> None: ...

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None: ...

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None: ...

    def begin_capture(self, stream: int) -> None: ...

    def end_capture(self, stream: int) -> Any:
        """The captured work, ready to launch. Ends the capture even when it raises."""
        ...

    def launch(self, graph: Any, stream: int) -> None: ...

    def destroy_graph(self, graph: Any) -> None: ...


def open_api() -> CudaApi:
    """The best binding installed. Raises: MissingExtraError without one, StreamError without a GPU."""
    runtime = _import_runtime()
    if runtime is not None:
        return CudaBindings(runtime)
    try:
        import pycuda.driver as driver
    except ImportError:
        raise MissingExtraError("cuda-bindings", "tensorrt", "run TensorRT engines") from None
    return PyCuda(driver)


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime  # 12.3 and newer, 13
    except ImportError:
        try:
            from cuda import cudart as runtime  # 12 and older
        except ImportError:
            return None
    return runtime


class CudaBindings:
    """`cuda.bindings.runtime`: each call returns (error, *results). The runtime's primary context of device 0
    serves every thread by itself, the one that TensorRT uses too."""

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime
        self.name = f"cuda-bindings {_version('cuda-bindings')}"
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise StreamError("CUDA: no GPU found. A TensorRT bundle runs on the board that it was built for")

    def _call(self, function: str, *args: Any, note: str = "") -> Any:
        error, *results = getattr(self._rt, function)(*args)
        if int(error) != 0:
            self._fail(function, error, note)
        return results[0] if len(results) == 1 else tuple(results)

    def _fail(self, function: str, error: Any, note: str) -> NoReturn:
        self._rt.cudaGetLastError()  # clears it, so that TensorRT does not meet it again
        _, name = self._rt.cudaGetErrorName(error)
        _, text = self._rt.cudaGetErrorString(error)
        shown = " ".join(part.decode() if isinstance(part, bytes) else str(part) for part in (name, text))
        raise StreamError(f"CUDA {function}{note}: {shown}")

    def device(self) -> Device:
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name
        return Device(
            name.decode() if isinstance(name, bytes) else str(name),
            f"{properties.major}.{properties.minor}",
            int(properties.multiProcessorCount),
            int(properties.totalGlobalMem),
        )

    def activate(self) -> None:
        self._call("cudaSetDevice", 0)

    def alloc(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes, note=f" of {nbytes} bytes"))

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def alloc_host(self, nbytes: int) -> int:
        return int(self._call("cudaHostAlloc", nbytes, 0, note=f" of {nbytes} bytes"))

    def free_host(self, pointer: int) -> None:
        self._call("cudaFreeHost", pointer)

    def create_stream(self) -> int:
        # non-blocking: no hidden synchronisation with work on the legacy default stream
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, nbytes, kind, stream)

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, nbytes, kind, stream)

    def begin_capture(self, stream: int) -> None:
        # thread-local: allocations of other sessions' threads do not spoil this capture
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)


class PyCuda:
    """`pycuda.driver` on the primary context, which TensorRT shares. Without CUDA graphs."""

    def __init__(self, driver: Any) -> None:
        self._cuda = driver
        self.name = f"pycuda {_version('pycuda')}"
        self._device_memory: dict[int, Any] = {}
        self._host_memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._thread = threading.local()
        try:
            driver.init()
            self._gpu = driver.Device(0)
            self._context = self._gpu.retain_primary_context()
        except driver.Error as error:
            raise StreamError(f"CUDA: no usable GPU: {error}") from None

    def _call(self, what: str, function: Any, *args: Any) -> Any:
        self.activate()
        try:
            return function(*args)
        except self._cuda.Error as error:
            raise StreamError(f"CUDA {what}: {error}") from None

    def activate(self) -> None:
        if not getattr(self._thread, "active", False):
            self._context.push()
            self._thread.active = True

    def device(self) -> Device:
        major, minor = self._gpu.compute_capability()
        sms = self._gpu.get_attribute(self._cuda.device_attribute.MULTIPROCESSOR_COUNT)
        return Device(self._gpu.name(), f"{major}.{minor}", int(sms), int(self._gpu.total_memory()))

    def alloc(self, nbytes: int) -> int:
        memory = self._call(f"mem_alloc of {nbytes} bytes", self._cuda.mem_alloc, nbytes)
        self._device_memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        memory = self._device_memory.pop(pointer)
        self._call("free", memory.free)

    def alloc_host(self, nbytes: int) -> int:
        memory = self._call(
            f"pagelocked_empty of {nbytes} bytes", self._cuda.pagelocked_empty, nbytes, np.uint8
        )
        self._host_memory[int(memory.ctypes.data)] = memory
        return int(memory.ctypes.data)

    def free_host(self, pointer: int) -> None:
        memory = self._host_memory.pop(pointer)
        self._call("free", memory.base.free)

    def create_stream(self) -> int:
        stream = self._call("Stream", self._cuda.Stream)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        self._streams.pop(stream)  # its destructor destroys it

    def synchronize(self, stream: int) -> None:
        self._call("synchronize", self._streams[stream].synchronize)

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        source = self._host_memory[host][:nbytes]
        self._call("memcpy_htod_async", self._cuda.memcpy_htod_async, device, source, self._streams[stream])

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        target = self._host_memory[host][:nbytes]
        self._call("memcpy_dtoh_async", self._cuda.memcpy_dtoh_async, target, device, self._streams[stream])

    def begin_capture(self, stream: int) -> None:
        raise StreamError("CUDA graphs: not used through pycuda. Install cuda-bindings for them")

    def end_capture(self, stream: int) -> Any:
        raise AssertionError("no capture was begun")

    def launch(self, graph: Any, stream: int) -> None:
        raise AssertionError("no graph was made")

    def destroy_graph(self, graph: Any) -> None:
        raise AssertionError("no graph was made")


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a distribution's own package without metadata
        return "of unknown version"

"""Kernels on NVIDIA GPUs: compiled by NVRTC for the board's GPU, launched on device addresses.

Each `<kernel>/kernel.cu` beside this file is one: plain C++ but for CUDA's keywords and without headers, with at least the
function `extern "C" __global__ void <kernel>(...)`; `<kernel>/cuda.py` makes its arguments. CI compiles all of them for sm_87
and sm_110, and tests run their arithmetic as C++ against reference.py; **this file has not run on a GPU**
(docs/gpu.md).

Needs `cuda-bindings` and NVRTC, which JetPack's CUDA toolkit has.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgekit.errors import MissingExtraError, StreamError

FOLDER = Path(__file__).parent
_TYPES: dict[str, Any] = {
    "u64": ctypes.c_uint64, "i64": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float,
}  # fmt: skip


def names() -> tuple[str, ...]:
    """Kernels that have a CUDA source."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/kernel.cu")))


def source(kernel: str) -> Path:
    return FOLDER / kernel / "kernel.cu"


def fields(*declarations: str) -> list[tuple[str, Any]]:
    """`_fields_` of a ctypes structure from the declarations in kernel.cu, `"int n, side[3]"`; a pointer is a u64."""
    found: list[tuple[str, Any]] = []
    for declaration in declarations:
        kind, _, names = declaration.partition(" ")
        for name, length in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            found.append((name, _TYPES[kind] * int(length) if length else _TYPES[kind]))
    return found


def blocks(threads: int, block: int) -> int:
    """Blocks of `block` threads for at least one thread."""
    return max(1, -(-threads // block))


@functools.cache
def compile_kernel(kernel: str, arch: str) -> bytes:
    """Its source as a cubin for `arch` ("sm_87": Orin, "sm_110": Thor, with NVRTC 13); 0.2 s, once a process.

    Raises: MissingExtraError without cuda-bindings or NVRTC; StreamError with NVRTC's log when it refuses.
    """
    _, nvrtc = _bindings()
    program = _call(
        nvrtc, "nvrtcCreateProgram", source(kernel).read_bytes(), f"{kernel}.cu".encode(), 0, [], []
    )
    # contraction off as everywhere: a * b + c must round as the reference does
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--fmad=false"]
    error = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(error) != 0:
        log = b" " * _call(nvrtc, "nvrtcGetProgramLogSize", program)
        _call(nvrtc, "nvrtcGetProgramLog", program, log)
        text = " ".join(log.decode(errors="replace").strip("\0 ").split())
        _fail(nvrtc, f"nvrtcCompileProgram of {kernel} for {arch}", error, text)
    cubin: bytes = b" " * _call(nvrtc, "nvrtcGetCUBINSize", program)
    _call(nvrtc, "nvrtcGetCUBIN", program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


class CudaKernel:
    """One kernel's code and constants on device 0; for one thread at a time. `<kernel>/cuda.py` adds `launch`.

    constants: arrays that are copied to the device and stay there as long as this lives; `_at` has their addresses.
    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors.
    """

    def __init__(self, kernel: str, **constants: np.ndarray) -> None:
        self._kernel = kernel
        self._module: Any = None
        self._functions: dict[str, Any] = {}
        self._memory: list[int] = []
        self._cuda, _ = _bindings()
        self._retained: Any = None
        _call(self._cuda, "cuInit", 0)
        self._gpu = _call(self._cuda, "cuDeviceGet", 0)
        # the primary context, the one that TensorRT and the CUDA runtime use
        self._context = _call(self._cuda, "cuDevicePrimaryCtxRetain", self._gpu)
        self._retained = self._gpu
        try:
            _call(self._cuda, "cuCtxSetCurrent", self._context)
            which = self._cuda.CUdevice_attribute
            major, minor = (
                _call(self._cuda, "cuDeviceGetAttribute", attribute, self._gpu)
                for attribute in (
                    which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )
            )
            self._module = _call(self._cuda, "cuModuleLoadData", compile_kernel(kernel, f"sm_{major}{minor}"))
            self._at = {name: self._upload(array) for name, array in constants.items()}
        except BaseException:
            self.close()
            raise

    def _upload(self, array: np.ndarray) -> int:
        data = np.ascontiguousarray(array)
        self._current()
        address = int(_call(self._cuda, "cuMemAlloc", max(1, data.nbytes)))
        self._memory.append(address)
        if data.nbytes:
            _call(self._cuda, "cuMemcpyHtoD", address, data.ctypes.data, data.nbytes)
        return address

    def _enqueue(
        self,
        launches: Iterable[tuple[str, Sequence[int]]],
        block: Sequence[int],
        stream: int,
        *arguments: Any,
    ) -> None:
        """Enqueue functions, each with its grid, on `stream`, one after the other; returns at once.

        grid, block: up to three sizes each.  arguments: ctypes values and structures, as the source declares them.
        Raises: StreamError on CUDA errors and when closed.
        """
        # the driver copies the arguments before it returns
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        for function, grid in launches:
            self._current()
            if function not in self._functions:
                found = _call(self._cuda, "cuModuleGetFunction", self._module, function.encode())
                self._functions[function] = found
            sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
            at = self._functions[function]
            _call(self._cuda, "cuLaunchKernel", at, *sizes, 0, stream, ctypes.addressof(pointers), 0)

    def close(self) -> None:
        """Free everything. Closing twice is fine; errors are left to the next call that meets them."""
        if self._retained is None:
            return
        cuda = self._cuda
        cuda.cuCtxSetCurrent(self._context)
        for address in self._memory:
            cuda.cuMemFree(address)
        if self._module is not None:
            cuda.cuModuleUnload(self._module)
        cuda.cuDevicePrimaryCtxRelease(self._retained)
        self._module, self._retained = None, None
        self._memory.clear()
        self._functions.clear()

    def _current(self) -> None:
        if self._module is None:
            raise StreamError(f"CUDA {self._kernel}: is closed")
        _call(self._cuda, "cuCtxSetCurrent", self._context)


class Mapped:
    """Host memory as the GPU sees it, for as long as this lives: a camera's USERPTR buffer, or any other.

    `address` on the device is good for reading and writing; on a Jetson no byte moves. Memory that a driver
    has mapped from a device (V4L2 MMAP) is refused by CUDA on some boards: allocate it and let the camera write
    there (`io=userptr`).
    Raises: MissingExtraError, StreamError.
    """

    def __init__(self, host: int, nbytes: int) -> None:
        self._cuda, _ = _bindings()
        self._host: int | None = None
        flags = self._cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        _call(self._cuda, "cuMemHostRegister", host, nbytes, flags)
        self._host = host
        try:
            self.address = int(_call(self._cuda, "cuMemHostGetDevicePointer", host, 0))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the memory back. Closing twice is fine."""
        host, self._host = self._host, None
        if host is not None:
            self._cuda.cuMemHostUnregister(host)


def _bindings() -> tuple[Any, Any]:
    """cuda-bindings' modules for the driver and for NVRTC."""
    try:
        from cuda.bindings import driver, nvrtc  # 12.3 and newer, 13
    except ImportError:
        try:
            from cuda import cuda as driver  # 12 and older
            from cuda import nvrtc
        except ImportError:
            raise MissingExtraError("cuda-bindings", "tensorrt", "run kernels on the GPU") from None
    return driver, nvrtc


def _call(module: Any, function: str, *args: Any) -> Any:
    try:
        error, *results = getattr(module, function)(*args)
    except RuntimeError as problem:  # the library beneath cuda-bindings is not there
        library = "NVRTC" if function.startswith("nvrtc") else "NVIDIA's driver"
        hint = f"{problem} Both come with JetPack: sudo apt install nvidia-jetpack"
        raise MissingExtraError(library, "tensorrt", "run kernels on the GPU", hint=hint) from None
    if int(error) != 0:
        _fail(module, function, error)
    return results[0] if len(results) == 1 else tuple(results)


def _fail(module: Any, what: str, error: Any, text: str = "") -> NoReturn:
    raise StreamError(f"CUDA {what}: {getattr(error, 'name', error)}{': ' + text if text else ''}")

"""Kernels on NVIDIA GPUs: compiled by NVRTC for the board's GPU, launched on device addresses.

So far one: `letterbox/kernel.cu`. On a Jetson, memory is one: a camera's buffer that the GPU can see (`Mapped`,
or a DMABUF imported as CUDA memory) goes through it straight into the input that a TensorRT engine reads, and no CPU
touches a pixel. CI compiles the source for sm_87 and sm_110 and runs its arithmetic as C++ against reference.py;
**this file has not run on a GPU** (docs/gpu.md).

Needs `cuda-bindings` and NVRTC, which JetPack's CUDA toolkit has.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgekit.errors import MissingExtraError, StreamError, UsageError
from edgekit.kernels.letterbox import LetterboxPlan, reference
from edgekit.pixels import PixelLayout
from edgekit.spec import QuantParams
from edgekit.tasks.preprocess import ImagePreprocess, Placement

SOURCE = Path(__file__).with_name("letterbox") / "kernel.cu"
BLOCK = (32, 8)
_FORMATS = {
    "bgr": 0, "rgb": 0, "bgra": 1, "rgba": 1, "grey": 2, "yuyv": 3, "uyvy": 4, "nv12": 5, "nv21": 6, "i420": 7,
}  # fmt: skip
_ALIGN = 16


class Parameters(ctypes.Structure):
    """`struct Letterbox` of kernel.cu, field by field."""

    _fields_ = (
        ("plane", ctypes.c_uint64 * 3),
        ("pitch", ctypes.c_int64 * 3),
        ("x_index", ctypes.c_uint64),
        ("x_weight", ctypes.c_uint64),
        ("y_index", ctypes.c_uint64),
        ("y_weight", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("format", ctypes.c_int),
        ("in_width", ctypes.c_int),
        ("in_height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("left", ctypes.c_int),
        ("top", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("order", ctypes.c_int * 3),
        ("color", ctypes.c_int * 7),
        ("pad", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("nhwc", ctypes.c_int),
    )


class LetterboxTables:
    """What `LetterboxPlan` is for the CPU: all that depends on (picture layout, rule) only.

    blob: uint8 [n], the tables to be copied to the device once.
    Raises: UsageError as `LetterboxPlan`, and for interpolation by area, which only the CPU does.
    """

    def __init__(self, spec: ImagePreprocess, layout: PixelLayout, quant: QuantParams | None = None) -> None:
        plan = LetterboxPlan(spec, layout, quant)
        if spec.interpolation != "bilinear":
            raise UsageError(
                f"interpolation {spec.interpolation!r}: not done on the GPU, expected 'bilinear'. "
                "Preprocess on the CPU (LetterboxPlan)."
            )
        self.spec, self.layout, self.placement = spec, layout, plan.placement
        self.out_shape, self.out_dtype = plan.out_shape, plan.out_dtype
        self._tables = reference.tables(spec, plan.placement, layout, quant)
        t = self._tables
        parts = {
            "x_index": t.x_index,
            "x_weight": t.x_weight,
            "y_index": t.y_index,
            "y_weight": t.y_weight,
            "values": t.values,
        }
        self._offsets: dict[str, int] = {}
        raw = bytearray()
        for name, part in parts.items():
            raw += bytes(-len(raw) % _ALIGN)
            self._offsets[name] = len(raw)
            raw += np.ascontiguousarray(part).tobytes()
        self.blob = np.frombuffer(bytes(raw), np.uint8)

    def parameters(self, blob: int, planes: Sequence[int], pitches: Sequence[int], out: int) -> Parameters:
        """The kernel's argument. blob, planes, out: addresses as the kernel sees them; pitches: bytes per row.

        Raises: UsageError for another number of planes than the layout has.
        """
        t, spec, layout = self._tables, self.spec, self.layout
        if len(planes) != len(layout.plane_shapes) or len(pitches) != len(planes):
            raise UsageError(
                f"picture {layout.format}: expected {len(layout.plane_shapes)} planes with their pitches, "
                f"got {len(planes)} and {len(pitches)}."
            )
        p = Parameters()
        for k, (plane, pitch) in enumerate(zip(planes, pitches, strict=True)):
            p.plane[k], p.pitch[k] = plane, pitch
        for name, offset in self._offsets.items():
            setattr(p, name, blob + offset)
        p.out = out
        p.format = _FORMATS[layout.format]
        p.in_width, p.in_height = layout.width, layout.height
        p.width, p.height = spec.width, spec.height
        p.left, p.top = max(0, self.placement.left), max(0, self.placement.top)
        p.columns, p.rows = len(t.x_index), len(t.y_index)
        p.order[:] = t.order
        p.color[:] = t.color.tolist()
        p.pad, p.bytes, p.nhwc = spec.pad_value, self.out_dtype.itemsize, spec.layout == "NHWC"
        return p


class CudaLetterbox:
    """The letterbox kernel on device 0, with its tables there; for one thread at a time.

    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors, UsageError as
    `LetterboxTables`.
    """

    def __init__(self, spec: ImagePreprocess, layout: PixelLayout, quant: QuantParams | None = None) -> None:
        self.tables = LetterboxTables(spec, layout, quant)
        self._blob = 0
        self._module: Any = None
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
            self._module = _call(self._cuda, "cuModuleLoadData", compile_letterbox(f"sm_{major}{minor}"))
            self._function = _call(self._cuda, "cuModuleGetFunction", self._module, b"letterbox")
            blob = self.tables.blob
            self._blob = int(_call(self._cuda, "cuMemAlloc", blob.size))
            _call(self._cuda, "cuMemcpyHtoD", self._blob, blob.ctypes.data, blob.size)
        except BaseException:
            self.close()
            raise

    def launch(
        self, planes: Sequence[int], pitches: Sequence[int], out: int, stream: int = 0, padded: bool = False
    ) -> Placement:
        """Enqueue the kernel on `stream`; returns at once. The picture must stay until the stream is past it.

        planes, pitches: device address of each plane and bytes from row to row.  out: device address of the
        input, of `tables.out_shape` and `tables.out_dtype`, C-contiguous.
        padded: `out` still holds a result of this object, so its padding need not be written again.
        Raises: StreamError on CUDA errors and when closed.
        """
        if self._module is None:
            raise StreamError("CUDA letterbox: is closed")
        _call(self._cuda, "cuCtxSetCurrent", self._context)
        parameters, flag = self.tables.parameters(self._blob, planes, pitches, out), ctypes.c_int(padded)
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(parameters), ctypes.addressof(flag))
        spec = self.tables.spec
        grid = (-(-spec.width // BLOCK[0]), -(-spec.height // BLOCK[1]), 1)
        # the driver copies the arguments before it returns
        pointers = ctypes.addressof(arguments)
        _call(self._cuda, "cuLaunchKernel", self._function, *grid, *BLOCK, 1, 0, stream, pointers, 0)
        return self.tables.placement

    def close(self) -> None:
        """Free everything. Closing twice is fine; errors are left to the next call that meets them."""
        if self._retained is None:
            return
        cuda = self._cuda
        cuda.cuCtxSetCurrent(self._context)
        if self._blob:
            cuda.cuMemFree(self._blob)
        if self._module is not None:
            cuda.cuModuleUnload(self._module)
        cuda.cuDevicePrimaryCtxRelease(self._retained)
        self._blob, self._module, self._retained = 0, None, None


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


@functools.cache
def compile_letterbox(arch: str) -> bytes:
    """kernel.cu as a cubin for `arch` ("sm_87": Orin, "sm_110": Thor, with NVRTC 13); 0.2 s, once a process.

    Raises: MissingExtraError without cuda-bindings or NVRTC; StreamError with NVRTC's log when it refuses.
    """
    _, nvrtc = _bindings()
    program = _call(nvrtc, "nvrtcCreateProgram", SOURCE.read_bytes(), b"letterbox.cu", 0, [], [])
    # contraction off as everywhere, though the source has no floats
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--fmad=false"]
    error = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(error) != 0:
        log = b" " * _call(nvrtc, "nvrtcGetProgramLogSize", program)
        _call(nvrtc, "nvrtcGetProgramLog", program, log)
        text = " ".join(log.decode(errors="replace").strip("\0 ").split())
        _fail(nvrtc, f"nvrtcCompileProgram for {arch}", error, text)
    cubin: bytes = b" " * _call(nvrtc, "nvrtcGetCUBINSize", program)
    _call(nvrtc, "nvrtcGetCUBIN", program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


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

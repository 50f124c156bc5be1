"""The letterbox kernel on NVIDIA GPUs: straight from a camera's buffer into the input that a TensorRT engine reads.

On a Jetson, memory is one: a buffer that the GPU can see (`kernels.cuda.Mapped`, or a DMABUF imported as CUDA
memory) is read in place, and no CPU touches a pixel. Tests run the source's arithmetic as C++ against reference.py;
**this file has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.cuda import CudaKernel, blocks, fields
from edgekit.kernels.letterbox import LetterboxPlan, reference
from edgekit.pixels import PixelLayout
from edgekit.spec import QuantParams
from edgekit.tasks.preprocess import ImagePreprocess, Placement

BLOCK = (32, 8)
_FORMATS = {
    "bgr": 0, "rgb": 0, "bgra": 1, "rgba": 1, "grey": 2, "yuyv": 3, "uyvy": 4, "nv12": 5, "nv21": 6, "i420": 7,
}  # fmt: skip
_ALIGN = 16


class Parameters(ctypes.Structure):
    """`struct Letterbox` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 plane[3]",
        "i64 pitch[3]",
        "u64 x_index, x_weight, y_index, y_weight, values, out",
        "int format, in_width, in_height, width, height, left, top, columns, rows, order[3], color[7], pad, bytes, nhwc",
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


class CudaLetterbox(CudaKernel):
    """The letterbox kernel on device 0, with its tables there; for one thread at a time.

    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors, UsageError as
    `LetterboxTables`.
    """

    def __init__(self, spec: ImagePreprocess, layout: PixelLayout, quant: QuantParams | None = None) -> None:
        self.tables = LetterboxTables(spec, layout, quant)
        super().__init__("letterbox", blob=self.tables.blob)

    def launch(
        self, planes: Sequence[int], pitches: Sequence[int], out: int, stream: int = 0, padded: bool = False
    ) -> Placement:
        """Enqueue the kernel on `stream`; returns at once. The picture must stay until the stream is past it.

        planes, pitches: device address of each plane and bytes from row to row.  out: device address of the
        input, of `tables.out_shape` and `tables.out_dtype`, C-contiguous.
        padded: `out` still holds a result of this object, so its padding need not be written again.
        Raises: StreamError on CUDA errors and when closed.
        """
        parameters, spec = self.tables.parameters(self._at["blob"], planes, pitches, out), self.tables.spec
        grid = (blocks(spec.width, BLOCK[0]), blocks(spec.height, BLOCK[1]))
        self._enqueue([("letterbox", grid)], BLOCK, stream, parameters, ctypes.c_int(padded))
        return self.tables.placement

"""Letterbox: one pass from the camera's bytes into the engine's input.

Resize, colour conversion, padding, channel order, normalisation, quantization and layout.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.letterbox import reference
from edgekit.pixels import YUV, Format, PixelLayout, Pixels
from edgekit.spec import DType, QuantParams
from edgekit.tasks.preprocess import ImagePreprocess, Placement, place

MAX_SIDE = 65536
_DTYPES = ("float32", "float16", "uint8")


class LetterboxPlan:
    """The tables of one (picture layout, rule) pair: made once, shared by threads, nothing allocated per call.

    `layout`: of the pictures; alpha is ignored.
    `quant`: the input takes codes of this scale and zero point (int8 or uint8; one, or one per channel)
        instead of values of `spec.dtype` (edgekit.input_codes).
    `isa`: code path of the native kernel, for tests.
    Raises: UsageError for a size, pixel format, dtype or quantization that cannot be used.
    """

    def __init__(
        self,
        spec: ImagePreprocess,
        layout: PixelLayout,
        quant: QuantParams | None = None,
        isa: str = "auto",
    ) -> None:
        height, width = layout.height, layout.width
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise UsageError(
                f"picture {width}x{height}: unusable size, expected sides of 1..{MAX_SIDE} pixels, "
                f"got {width}x{height}. Pass a picture of [H, W, 3]."
            )
        if quant is None:
            _check_dtype(spec)
        else:
            _check_quant(quant)
        self.spec = spec
        self.layout = layout
        self.quant = quant
        self.placement = place(spec, width, height)
        self.nhwc = spec.layout == "NHWC"
        self.out_shape = (1, spec.height, spec.width, 3) if self.nhwc else (1, 3, spec.height, spec.width)
        self.out_dtype = np.dtype((quant or spec).dtype.value)
        self._tables = reference.tables(spec, self.placement, layout, quant)
        self._isa = isa
        self._module = kernels.native()
        self._kernel = None if self._module is None else self._compile(self._module, isa, self.nhwc)
        self._kernel_last: Any = None

    def _compile(self, module: ModuleType, isa: str, nhwc: bool) -> Any:
        t, p = self._tables, self.placement
        return module.Letterbox(
            format=self.layout.format,
            in_size=(self.layout.height, self.layout.width),
            out_size=(self.spec.height, self.spec.width),
            corner=(max(0, p.top), max(0, p.left)),
            nhwc=nhwc,
            dtype=self.out_dtype.name,
            x_index=t.x_index,
            x_weight=t.x_weight,
            y_index=t.y_index,
            y_weight=t.y_weight,
            order=t.order,
            color=t.color,
            filters=[(f.start, f.weight, f.total) for f in t.filters],
            mean=t.mean,
            std=t.std,
            values=t.values.view(np.uint8),
            pad=t.pad.view(np.uint8),
            isa=isa,
        )

    def run(self, pixels: Pixels, out: np.ndarray, padded: bool = False) -> Placement:
        """Write `pixels`, of this plan's layout, into `out`, all of it.

        out: C-contiguous, or for NCHW a view of channels-last memory (what LiteRT's sessions show).
        padded: `out` still holds the result of this plan, so its rows of padding (44 % of a square
        input for a 16:9 camera) need not be written again.
        """
        assert pixels.layout is self.layout or pixels.layout == self.layout, "the plan is for another picture"
        memory, kernel, last = self._memory(out)
        if kernel is None:
            reference.letterbox(pixels, self._tables, self.placement, memory, self.nhwc or last)
        else:
            kernel.run(pixels.planes, memory, padded)
        return self.placement

    def _memory(self, out: np.ndarray) -> tuple[np.ndarray, Any, bool]:
        """`out` as it lies in memory, the kernel for that, and whether it is channels-last under an NCHW shape."""
        if out.shape != self.out_shape or out.dtype != self.out_dtype:
            raise UsageError(
                f"argument out: wrong tensor, expected {self.out_dtype.name} {list(self.out_shape)}, "
                f"got {out.dtype} {list(out.shape)}. Pass the engine's own input."
            )
        flags = out.flags
        last = not self.nhwc and not flags.c_contiguous  # [1, 3, h, w] over memory [1, h, w, 3]
        memory = out.transpose(0, 2, 3, 1) if last else out
        if last:
            flags = memory.flags
        if not (flags.c_contiguous and flags.writeable and flags.aligned):
            raise UsageError(
                "argument out: expected a writable C-contiguous array (or its channels-last view), "
                "got another view or a read-only one."
            )
        if last and self._module is not None:
            if self._kernel_last is None:
                self._kernel_last = self._compile(self._module, self._isa, True)
            return memory, self._kernel_last, True
        return memory, self._kernel, last

    def addresses(self, pixels: Pixels, out: np.ndarray) -> tuple[tuple[int, ...], int]:
        """Where `run` reads and writes, from the kernel itself: each plane's first byte, the input's first byte.

        What a copy in between would change, so what a test compares with the driver's buffer.
        """
        memory, kernel, _ = self._memory(out)
        if kernel is None:
            return pixels.addresses, int(memory.__array_interface__["data"][0])
        planes, target = kernel.addresses(pixels.planes, memory)
        return tuple(planes), target


def _check_dtype(spec: ImagePreprocess) -> None:
    if spec.dtype.value not in _DTYPES:
        raise UsageError(
            f"network input: unusable dtype, expected one of {', '.join(_DTYPES)}, "
            f"got {spec.dtype.value}. Quantize inside the graph."
        )
    if spec.dtype.value == "uint8" and (any(spec.mean) or any(s != 1 for s in spec.std)):
        raise UsageError(
            f"network input: uint8 cannot be normalised, expected mean 0 and std 1, "
            f"got mean {spec.mean} and std {spec.std}. Put the normalisation into the graph."
        )


def _check_quant(quant: QuantParams) -> None:
    if quant.dtype.value not in ("int8", "uint8") or len(quant.scale) not in (1, 3):
        raise UsageError(
            f"network input: unusable quantization, expected int8 or uint8 with 1 or 3 scales, "
            f"got {quant.dtype.value} with {len(quant.scale)}. Quantize inside the graph."
        )


@functools.lru_cache(maxsize=64)
def _plan(
    spec: ImagePreprocess, layout: PixelLayout, quant: QuantParams | None, module: ModuleType | None
) -> LetterboxPlan:
    return LetterboxPlan(spec, layout, quant)


def plan(spec: ImagePreprocess, layout: PixelLayout, quant: QuantParams | None = None) -> LetterboxPlan:
    """The plan for pictures of `layout`; made once per layout, rule and quantization, shared by threads."""
    return _plan(spec, layout, quant, kernels.native())


def letterbox(
    image: np.ndarray | Pixels,
    spec: ImagePreprocess,
    out: np.ndarray,
    *,
    color: str = "bgr",
    quant: QuantParams | None = None,
) -> Placement:
    """Picture -> network input in one pass: resize, colour, padding, channel order, normalisation, layout.

    image: Pixels of any format, or uint8 [H, W, 3], [H, W, 4] (alpha ignored) or [H, W] grey; rows may be padded (any
        row stride). `color` is the channel order of an array, "bgr" or "rgb"; for 4 channels BGRA or RGBA.
    out: the engine's input, [1, 3, h, w] or [1, h, w, 3] as `spec.layout` says, of `spec.dtype`
        (float32, float16, uint8) or, with `quant`, codes, C-contiguous or NCHW over channels-last memory; overwritten whole.
    Returns where the picture lies in the input. Tables are cached by (layout, rule).
    The arithmetic (reference.py) gives the same bits on every CPU, within one level of x86
    `cv2.resize(INTER_LINEAR)`.
    Raises: UsageError for an array of another shape or dtype.
    """
    pixels = image if isinstance(image, Pixels) else _array(image, color)
    return plan(spec, pixels.layout, quant).run(pixels, out)


def _array(image: np.ndarray, color: str) -> Pixels:
    """A grey, 3- or 4-channel array as pixels. Raises: UsageError."""
    if color not in ("bgr", "rgb"):
        raise UsageError(f"argument color: unknown order, expected 'bgr' or 'rgb', got {color!r}.")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f"picture: wrong type, expected a uint8 array, got {got}.")
    if image.ndim == 2:
        return Pixels.bgr(image, "grey") if image.size else _array(image[:, :, None], color)
    formats: dict[int, Format] = (
        {1: "grey", 3: "bgr", 4: "bgra"} if color == "bgr" else {1: "grey", 3: "rgb", 4: "rgba"}
    )
    if image.ndim != 3 or image.shape[2] not in formats or 0 in image.shape:
        raise UsageError(
            f"picture: wrong shape, expected [H, W], [H, W, 3] or [H, W, 4] with at least one pixel, "
            f"got {list(image.shape)}."
        )
    return Pixels.bgr(image, formats[image.shape[2]])


def to_bgr(pixels: Pixels) -> np.ndarray:
    """The picture as uint8 [H, W, 3] BGR in memory of its own. For showing it; engines are fed directly.

    The kernel's own arithmetic at the picture's size: within 0.6 of the exact conversion. Raises: UsageError for
    a side above 16384 pixels.
    """
    layout = pixels.layout
    if layout.format not in YUV:
        order = {"bgr": (0, 1, 2), "rgb": (2, 1, 0), "bgra": (0, 1, 2), "rgba": (2, 1, 0), "grey": (0, 0, 0)}
        return np.ascontiguousarray(pixels.planes[0][:, :, order[layout.format]])
    try:
        spec = ImagePreprocess(layout.width, layout.height, "stretch", layout="NHWC", dtype=DType.uint8)
    except ValueError as error:
        raise UsageError(f"picture: {error}") from None
    out = np.empty((1, layout.height, layout.width, 3), np.uint8)
    plan(spec, layout).run(pixels, out)
    result: np.ndarray = out[0]
    return result

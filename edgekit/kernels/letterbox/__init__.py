"""Letterbox: resize, pad, reorder, normalise and lay out one picture, in one pass into the engine's input."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.letterbox import reference
from edgekit.pixels import PACKED_BYTES, YUV, Format, PixelLayout, Pixels
from edgekit.tasks.preprocess import ImagePreprocess, Placement, place

MAX_SIDE = 65536
_DTYPES = ("float32", "float16", "uint8")


class LetterboxPlan:
    """The tables of one (picture layout, rule) pair: made once, shared by threads, nothing allocated per call.

    `layout`: of the pictures; alpha is ignored. `isa`: code path of the native kernel, for tests.
    Raises: UsageError for a size, pixel format or dtype that cannot be used.
    """

    def __init__(self, spec: ImagePreprocess, layout: PixelLayout, isa: str = "auto") -> None:
        if layout.format in YUV:
            raise UsageError(f"picture: pixel format {layout.format} is not taken yet. Pass BGR")
        height, width, channels = layout.height, layout.width, PACKED_BYTES[layout.format]
        color = layout.format[:3]
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise UsageError(
                f"picture {width}x{height}: unusable size, expected sides of 1..{MAX_SIDE} pixels, "
                f"got {width}x{height}. Pass a picture of [H, W, 3]."
            )
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
        self.spec = spec
        self.layout = layout
        self.placement = place(spec, width, height)
        self.in_shape = (height, width, channels)
        self.nhwc = spec.layout == "NHWC"
        self.out_shape = (1, spec.height, spec.width, 3) if self.nhwc else (1, 3, spec.height, spec.width)
        self.out_dtype = np.dtype(spec.dtype.value)
        self._tables = reference.tables(spec, self.placement, (height, width), channels, color)
        self._isa = isa
        self._module = kernels.native()
        self._kernel = None if self._module is None else self._compile(self._module, isa, self.nhwc)
        self._kernel_last: object | None = None

    def _compile(self, module: ModuleType, isa: str, nhwc: bool) -> object:
        t, p = self._tables, self.placement
        return module.Letterbox(
            in_shape=self.in_shape,
            out_size=(self.spec.height, self.spec.width),
            corner=(max(0, p.top), max(0, p.left)),
            nhwc=nhwc,
            dtype=self.out_dtype.name,
            x_index=t.x_index,
            x_weight=t.x_weight,
            y_index=t.y_index,
            y_weight=t.y_weight,
            order=t.order,
            mean=t.mean,
            std=t.std,
            pad=t.pad.view(np.uint8),
            isa=isa,
        )

    def run(self, pixels: Pixels, out: np.ndarray, padded: bool = False) -> Placement:
        """Write `pixels`, of this plan's layout, into `out`, all of it.

        out: C-contiguous, or for NCHW a view of channels-last memory (what LiteRT's sessions show).
        padded: `out` still holds the result of this plan, so its rows of padding (44 % of a square
        input for a 16:9 camera) need not be written again.
        """
        assert pixels.layout == self.layout, "the plan is for another picture"
        (image,) = pixels.planes
        if out.shape != self.out_shape or out.dtype != self.out_dtype:
            raise UsageError(
                f"argument out: wrong tensor, expected {self.out_dtype.name} {list(self.out_shape)}, "
                f"got {out.dtype} {list(out.shape)}. Pass the engine's own input."
            )
        last = not self.nhwc and not out.flags.c_contiguous  # [1, 3, h, w] over memory [1, h, w, 3]
        memory = out.transpose(0, 2, 3, 1) if last else out
        if not (memory.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
            raise UsageError(
                "argument out: expected a writable C-contiguous array (or its channels-last view), "
                "got another view or a read-only one."
            )
        kernel = self._kernel
        if last and self._module is not None:
            if self._kernel_last is None:
                self._kernel_last = self._compile(self._module, self._isa, True)
            kernel = self._kernel_last
        if kernel is None:
            reference.letterbox(image, self._tables, self.placement, memory, self.nhwc or last)
        else:
            kernel.run(image, memory, padded)  # type: ignore[attr-defined]
        return self.placement


@functools.lru_cache(maxsize=64)
def _plan(spec: ImagePreprocess, layout: PixelLayout, module: ModuleType | None) -> LetterboxPlan:
    return LetterboxPlan(spec, layout)


def plan(spec: ImagePreprocess, layout: PixelLayout) -> LetterboxPlan:
    """The plan for pictures of `layout`; made once per layout and rule, shared by threads."""
    return _plan(spec, layout, kernels.native())


def letterbox(
    image: np.ndarray | Pixels, spec: ImagePreprocess, out: np.ndarray, *, color: str = "bgr"
) -> Placement:
    """Picture -> network input in one pass: bilinear resize, padding, channel order, normalisation, layout.

    image: Pixels, or uint8 [H, W, 3], [H, W, 4] (alpha ignored) or [H, W] grey; rows may be padded (any
        row stride). `color` is the channel order of an array, "bgr" or "rgb"; for 4 channels BGRA or RGBA.
    out: the engine's input, [1, 3, h, w] or [1, h, w, 3] as `spec.layout` says, of `spec.dtype`
        (float32, float16, uint8), C-contiguous or NCHW over channels-last memory; overwritten whole.
    Returns where the picture lies in the input. Tables are cached by (layout, rule).
    The arithmetic (reference.py) gives the same bits on every CPU, within one level of x86
    `cv2.resize(INTER_LINEAR)`.
    Raises: UsageError for an array of another shape or dtype.
    """
    pixels = image if isinstance(image, Pixels) else _array(image, color)
    return plan(spec, pixels.layout).run(pixels, out)


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
    """The picture as uint8 [H, W, 3] BGR in memory of its own. For showing it; engines are fed directly."""
    layout = pixels.layout
    if layout.format not in YUV:
        order = {"bgr": (0, 1, 2), "rgb": (2, 1, 0), "bgra": (0, 1, 2), "rgba": (2, 1, 0), "grey": (0, 0, 0)}
        return np.ascontiguousarray(pixels.planes[0][:, :, order[layout.format]])
    raise UsageError(f"picture: pixel format {layout.format} is not taken yet. Pass BGR")

"""From camera picture to network input: the rule that a bundle carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgekit.schema import LATER
from edgekit.spec import DType


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize, pad, reorder and normalise one 8-bit picture.

    resize: `letterbox` keeps the aspect ratio and pastes at the top left (YOLOX);
        `letterbox-center` keeps it and centres (YOLOv5/v8, both pads rounded as Ultralytics
        does); `stretch` fills the input without keeping it (FastestDet, NanoDet); `crop` keeps it,
        scales the shorter side to `shorter_side` pixels and cuts the middle out (classifiers); `crop-bottom` keeps
        it, scales the width to `scaled_width` pixels and takes the middle columns and the lowest rows (cameras on
        vehicles: BEVFusion), padded above where the picture is too low.
    shorter_side: for `crop`, at least the input's larger side; None = the smallest that fills the input.
    scaled_width: for `crop-bottom`, at least the input's width; None = the input's width.
    pad_value: level of the padding, before normalisation.
    color: channel order of the network's input.
    mean, std: per channel in the order of `color`, in 8-bit levels: x = (pixel - mean) / std.
        `std = 255` is the usual "/255".
    interpolation: `bilinear` looks at the two nearest pixels per axis, as cv2's INTER_LINEAR does; `area`
        is the exact mean of all that an input pixel covers, free of aliasing where the picture is much
        larger than the input (an axis that grows is bilinear). What the network was trained with decides.
    """

    width: int
    height: int
    resize: Literal["letterbox", "letterbox-center", "stretch", "crop", "crop-bottom"] = "letterbox"
    pad_value: int = 114
    color: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: DType = DType.float32
    shorter_side: int | None = None
    interpolation: Literal["bilinear", "area"] = field(default="bilinear", metadata=LATER)
    scaled_width: int | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if not (1 <= self.width <= 16384 and 1 <= self.height <= 16384):
            raise ValueError(f"input size {self.width}x{self.height} must be between 1 and 16384")
        if not 0 <= self.pad_value <= 255:
            raise ValueError(f"pad_value {self.pad_value} must be between 0 and 255")
        if any(s == 0 for s in self.std):
            raise ValueError("std must not be 0")
        if not all(1e-37 <= abs(s) <= 3.4e38 for s in self.std) or not all(
            abs(m) <= 3.4e38 for m in self.mean
        ):
            raise ValueError(f"mean {self.mean} and std {self.std} must fit float32")
        if self.shorter_side is not None:
            if self.resize != "crop":
                raise ValueError(f"shorter_side goes with resize 'crop', got {self.resize!r}")
            if not max(self.width, self.height) <= self.shorter_side <= 16384:
                raise ValueError(
                    f"shorter_side {self.shorter_side} must be between the input's larger side, "
                    f"{max(self.width, self.height)}, and 16384"
                )
        if self.scaled_width is not None:
            if self.resize != "crop-bottom":
                raise ValueError(f"scaled_width goes with resize 'crop-bottom', got {self.resize!r}")
            if not self.width <= self.scaled_width <= 16384:
                raise ValueError(
                    f"scaled_width {self.scaled_width} must be between the input's width, {self.width}, and 16384"
                )


@dataclass(frozen=True)
class Placement:
    """Where the picture lies in the network input: x_in = x * scale_x + left (pixels); a cut one begins
    outside of it, so its `left` or `top` is negative."""

    scale_x: float
    scale_y: float
    left: int
    top: int
    width: int
    """Resized picture, pixels of the network input."""
    height: int


def place(spec: ImagePreprocess, width: int, height: int) -> Placement:
    """Placement of a picture of `width` x `height` pixels under the resize rule of `spec`.

    Letterbox: r = min(W/w, H/h), size truncated to int (YOLOX `preproc`); centred letterbox:
    size rounded, left/top = round(pad / 2 - 0.1) (Ultralytics `LetterBox`); crop: the longer side
    truncated, left/top = -round(excess / 2) (torchvision `Resize`, `CenterCrop`); crop-bottom: the
    height truncated, left = -(excess // 2), top = input's height - height (BEVFusion `ImageAug3D` in test).
    """
    if spec.resize == "stretch":
        return Placement(spec.width / width, spec.height / height, 0, 0, spec.width, spec.height)
    if spec.resize == "crop":
        short = min(width, height)
        if spec.shorter_side is None:
            ratio = max(spec.width / width, spec.height / height)
            w, h = max(spec.width, int(width * ratio)), max(spec.height, int(height * ratio))
        else:
            ratio = spec.shorter_side / short
            w, h = (side * spec.shorter_side // short for side in (width, height))
        return Placement(
            w / width, h / height, -round((w - spec.width) / 2), -round((h - spec.height) / 2), w, h
        )
    if spec.resize == "crop-bottom":
        w = spec.width if spec.scaled_width is None else spec.scaled_width
        h = max(1, height * w // width)
        return Placement(w / width, h / height, -((w - spec.width) // 2), spec.height - h, w, h)
    ratio = min(spec.width / width, spec.height / height)
    if spec.resize == "letterbox":
        return Placement(ratio, ratio, 0, 0, max(1, int(width * ratio)), max(1, int(height * ratio)))
    w, h = max(1, round(width * ratio)), max(1, round(height * ratio))
    left = round((spec.width - w) / 2 - 0.1)
    top = round((spec.height - h) / 2 - 0.1)
    return Placement(ratio, ratio, left, top, w, h)

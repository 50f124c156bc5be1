"""What a detector's raw outputs mean: the part of a bundle that replaces decode and NMS in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgekit.tasks.preprocess import ImagePreprocess

Family = Literal["yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "rows"]


@dataclass(frozen=True)
class Channels:
    """A run of channels, from `start`, of the engine output `tensor` ([1, C, H, W])."""

    tensor: str
    start: int = 0


@dataclass(frozen=True)
class HeadLevel:
    """One grid of predictions: `stride` input pixels per cell, raw (not activated) values.

    `anchors`: (w, h) in input pixels, one per anchor box (yolov5 only; their channels follow
    each other: anchor a starts at `start + a * (5 + num_classes)`).
    """

    stride: int
    box: Channels
    classes: Channels
    objectness: Channels | None = None
    anchors: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= 16384:
            raise ValueError(f"stride must be between 1 and 16384, got {self.stride}")


@dataclass(frozen=True)
class DetectHead:
    """Decoding rule of a detector family; s = sigmoid, (x, y) = cell column and row.

    yolox       xy = (t_xy + (x, y)) * stride, wh = exp(t_wh) * stride, score = s(obj) * s(cls)
    yolov5      xy = (2 s(t_xy) - 0.5 + (x, y)) * stride, wh = (2 s(t_wh))^2 * anchor,
                score = s(obj) * s(cls)                                   (v5 >= 4.0, also v7)
    yolov8      ltrb = E[softmax over reg_max bins] * stride around ((x, y) + cell_offset) * stride,
                score = s(cls)                                            (v8, v11: DFL)
    nanodet     as yolov8 with reg_max + 1 bins given as `bins`, score = s(cls); cell_offset 0
                (NanoDet-Plus) or 0.5 (NanoDet)
    fastestdet  xy = ((x, y) + tanh(t_xy)) * stride, wh = s(t_wh) * input size,
                score = s(obj)^0.6 * softmax(cls)^0.4
    rows        one output [1, N, D] (or [1, D, N] if `transposed`) already decoded, its columns
                named by `columns`: of x1 y1 x2 y2 | cx cy w h, then obj?, score class | cls*.
                `normalized`: coordinates are fractions of the input size.
    `bins`: distribution bins per box side (yolov8: 16, NanoDet: 8).
    """

    family: Family
    num_classes: int
    levels: tuple[HeadLevel, ...] = ()
    bins: int = 0
    cell_offset: float = 0.0
    rows: str = ""
    columns: tuple[str, ...] = ()
    transposed: bool = False
    normalized: bool = False

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.family == "rows":
            if not self.rows or not self.columns:
                raise ValueError("family 'rows' needs the output name and its columns")
        elif not self.levels:
            raise ValueError(f"family {self.family!r} needs at least one level")
        if self.family in ("yolov8", "nanodet") and self.bins < 2:
            raise ValueError(f"family {self.family!r} needs bins >= 2")


@dataclass(frozen=True)
class DetectSpec:
    """The `pipeline` of a detector bundle: picture -> input, raw outputs -> boxes.

    A box is kept when score >= `score_threshold`; class-aware NMS drops boxes overlapping a
    better one by IoU > `iou_threshold`; at most `max_detections` remain, best first.
    """

    task: ClassVar[str] = "detect"

    preprocess: ImagePreprocess
    head: DetectHead
    labels: tuple[str, ...]
    score_threshold: float = 0.25
    iou_threshold: float = 0.65
    max_detections: int = 300

    def __post_init__(self) -> None:
        if len(self.labels) != self.head.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.head.num_classes} classes")
        if not 0 <= self.score_threshold <= 1 or not 0 <= self.iou_threshold <= 1:
            raise ValueError("thresholds must be between 0 and 1")
        if not 1 <= self.max_detections <= 100_000:
            raise ValueError(f"max_detections must be between 1 and 100000, got {self.max_detections}")

"""Decode: raw head tensors -> boxes, touching only what can reach the score threshold."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError, did_you_mean
from edgekit.kernels.decode import reference
from edgekit.kernels.decode.reference import Grid
from edgekit.kernels.nms import MAX_CANDIDATES, MAX_CLASS, nms
from edgekit.tasks.detect.spec import DetectHead, HeadLevel

_NEEDS_OBJECTNESS = ("yolox", "yolov5", "fastestdet")
_screen = functools.lru_cache(maxsize=256)(reference.screen)
Found = tuple[np.ndarray, np.ndarray, np.ndarray]


class Decoder:
    """Decodes the outputs of one engine with buffers of its own; for one thread at a time.

    `width`, `height`: the network's input, pixels. `isa`: code path of the native kernel, for tests.
    Raises: UsageError for a head that lacks something.
    """

    def __init__(self, head: DetectHead, width: int, height: int, isa: str = "auto") -> None:
        self.head = head
        self.size = (width, height)
        if head.family == "rows":
            names = [head.rows]
        else:
            names = [
                c.tensor for lv in head.levels for c in (lv.box, lv.classes, lv.objectness) if c is not None
            ]
        self._names = tuple(dict.fromkeys(names))
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._checked: list[np.ndarray] = []
        self._tensors: list[np.ndarray] = []
        self._grids: tuple[Grid, ...] = ()
        self._isa = isa
        self._kernel: Any = None
        if head.num_classes > MAX_CLASS + 1:
            raise UsageError(
                f"head {head.family}: too many classes, expected at most {MAX_CLASS + 1}, got {head.num_classes}."
            )
        if head.family == "rows":
            _columns(head)
        for level in head.levels:
            if level.objectness is None and head.family in _NEEDS_OBJECTNESS:
                raise UsageError(f"head {head.family}: stride {level.stride} has no objectness channel.")
            if (head.family == "yolov5") != bool(level.anchors):
                raise UsageError(
                    f"head {head.family}: wrong anchors at stride {level.stride}, "
                    f"expected {'some' if head.family == 'yolov5' else 'none'}, got {len(level.anchors)}."
                )

    def run(self, outputs: Mapping[str, np.ndarray], threshold: float, all_classes: bool = False) -> Found:
        """Every cell whose best class scores at least `threshold`; with `all_classes` every such class of a cell.

        outputs: float32 [1, C, H, W] by name (any strides, so NHWC views serve; family rows: [1, N, D]
            or [1, D, N], objectness and scores activated, in 0..1).
        Returns boxes float32 [n, 4] (x1 y1 x2 y2 in input pixels, not clipped), scores float32 [n],
        classes int32 [n], the caller's own.
        Raises: UsageError for a tensor that is missing or of another shape or dtype.
        """
        self._bind(outputs)
        if self._kernel is None:
            return reference.decode(self._grids, self._tensors, threshold, all_classes)
        found: Found = self._kernel.run(threshold, *_screen(self.head.family, threshold), all_classes)
        return found

    def detect(
        self,
        outputs: Mapping[str, np.ndarray],
        threshold: float,
        iou_threshold: float,
        max_detections: int,
        mapping: np.ndarray,
        *,
        clip: bool = True,
        all_classes: bool = False,
    ) -> Found:
        """`run`, then `nms`, then `reference.to_picture`, in one native call without the interpreter's lock.

        mapping: float32 [3, 4], offset, scale and limit of x1 y1 x2 y2.
        Returns as `run`, best score first, boxes in pixels of the picture.
        """
        self._bind(outputs)
        if self._kernel is not None:
            low_object, low_class = _screen(self.head.family, threshold)
            kept: Found = self._kernel.detect(
                threshold,
                low_object,
                low_class,
                all_classes,
                iou_threshold,
                max_detections,
                MAX_CANDIDATES,
                mapping,
                clip,
            )
            return kept
        boxes, scores, classes = reference.decode(self._grids, self._tensors, threshold, all_classes)
        keep = nms(boxes, scores, classes, iou_threshold, max_detections)
        return reference.to_picture(boxes[keep], mapping, clip), scores[keep], classes[keep]

    def _bind(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Look at what the head reads, unless they are the arrays of the last call, as a session's are."""
        given = [outputs.get(name) for name in self._names]
        if self._checked and all(map(operator.is_, given, self._checked)):
            return
        tensors = self._check(outputs)
        if self.head.family == "rows":  # [1, D, 1, N], as one row of a grid
            (rows,) = tensors
            tensors = [(rows if self.head.transposed else rows.transpose(0, 2, 1))[:, :, None, :]]
        self._tensors = tensors
        if self._kernel is not None:
            self._kernel.bind(tensors)

    def _check(self, outputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The tensors that the head reads, of the right dtype and shape."""
        tensors = []
        for name in self._names:
            tensor = outputs.get(name)
            if tensor is None:
                raise UsageError(f"output {name!r}: missing. {did_you_mean(name, outputs)}")
            if tensor.dtype != np.float32:
                raise UsageError(f"output {name!r}: wrong dtype, expected float32, got {tensor.dtype}.")
            tensors.append(tensor if tensor.flags.aligned else tensor.copy())
        shapes = tuple([t.shape for t in tensors])
        if shapes != self._shapes:
            self._prepare(shapes)
        # copies are made anew each time, so only tensors that are read in place count as checked
        self._checked = (
            tensors if all(outputs[n] is t for n, t in zip(self._names, tensors, strict=True)) else []
        )
        return tensors

    def _prepare(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        by_name = dict(zip(self._names, shapes, strict=True))
        if self.head.family == "rows":
            self._grids = (_row_grid(self.head, by_name[self.head.rows], *self.size),)
        else:
            grids = [
                _level_grids(self.head, level, by_name, self._names, *self.size) for level in self.head.levels
            ]
            self._grids = tuple(grid for level in grids for grid in level)
        self._shapes = shapes
        module = kernels.native()
        if module is not None:
            self._kernel = module.Decoder([dataclasses.asdict(grid) for grid in self._grids], self._isa)


def decode(
    outputs: Mapping[str, np.ndarray],
    head: DetectHead,
    width: int,
    height: int,
    threshold: float,
    all_classes: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Decoder(head, width, height).run(outputs, threshold, all_classes)`, for one call."""
    return Decoder(head, width, height).run(outputs, threshold, all_classes)


def _level_grids(
    head: DetectHead,
    level: HeadLevel,
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
    width: int,
    height: int,
) -> list[Grid]:
    """One grid per anchor of `level`."""
    grid_w, grid_h = math.ceil(width / level.stride), math.ceil(height / level.stride)
    anchors = level.anchors or ((0.0, 0.0),)
    step = 5 + head.num_classes  # channels from one anchor's values to the next one's
    distribution = head.family in ("yolov8", "nanodet")
    box_channels = 4 * head.bins if distribution else 4
    reach = (len(anchors) - 1) * step
    wanted = [(level.box, box_channels + reach), (level.classes, head.num_classes + reach)]
    wanted += [(level.objectness, 1 + reach)] if level.objectness is not None else []
    for channels, count in wanted:
        shape, least = shapes[channels.tensor], channels.start + count
        fits = len(shape) == 4 and shape[0] == 1 and shape[1] >= least and channels.start >= 0
        if not fits or shape[2:] != (grid_h, grid_w):
            raise UsageError(
                f"output {channels.tensor!r}: wrong shape, expected [1, {least} or more, {grid_h}, {grid_w}] for "
                f"stride {level.stride}, got {list(shape)}. Check the head's strides, channels and class count."
            )
    grids = []
    for a, anchor in enumerate(anchors):
        start, side = level.box.start + a * step, head.bins if distribution else 1
        grids.append(
            Grid(
                family=head.family,
                height=grid_h,
                width=grid_w,
                stride=float(level.stride),
                anchor=anchor,
                bins=head.bins if distribution else 0,
                offset=head.cell_offset,
                num_classes=head.num_classes,
                box_tensor=names.index(level.box.tensor),
                box=(start, start + side, start + 2 * side, start + 3 * side),
                class_tensor=names.index(level.classes.tensor),
                class_start=level.classes.start + a * step,
                object_tensor=names.index(level.objectness.tensor) if level.objectness is not None else -1,
                object_start=level.objectness.start + a * step if level.objectness is not None else 0,
                score=-1,
                label=-1,
                corners=False,
                scale=(float(width), float(height)),
            )
        )
    return grids


def _columns(head: DetectHead) -> dict[str, int]:
    """Column index by name; `cls*` stands for num_classes columns, `_end` for their number in all."""
    known = ("x1", "y1", "x2", "y2", "cx", "cy", "w", "h", "obj", "score", "class", "cls*")
    index: dict[str, int] = {}
    at = 0
    for name in head.columns:
        if name not in known:
            raise UsageError(f"column {name!r}: unknown. {did_you_mean(name, known)}")
        if name in index:
            raise UsageError(f"column {name!r}: named twice in {','.join(head.columns)}.")
        index[name] = at
        at += head.num_classes if name == "cls*" else 1
    index["_end"] = at
    corners, centre = (
        all(c in index for c in ("x1", "y1", "x2", "y2")),
        all(c in index for c in ("cx", "cy", "w", "h")),
    )
    scored = ("score" in index) != ("cls*" in index)
    labelled = "score" not in index or "class" in index or head.num_classes == 1
    if corners == centre or not scored or not labelled:
        raise UsageError(
            f"columns {','.join(head.columns)}: incomplete, expected x1,y1,x2,y2 or cx,cy,w,h, then score,class "
            f"or cls* (with obj or without). Name them in the order of the tensor."
        )
    return index


def _row_grid(head: DetectHead, shape: tuple[int, ...], width: int, height: int) -> Grid:
    index = _columns(head)
    expected = f"[1, {index['_end']}, N]" if head.transposed else f"[1, N, {index['_end']}]"
    if len(shape) != 3 or shape[0] != 1 or shape[1 if head.transposed else 2] != index["_end"]:
        raise UsageError(
            f"output {head.rows!r}: wrong shape, expected {expected} for columns {','.join(head.columns)} and "
            f"{head.num_classes} classes, got {list(shape)}. Check the columns and the class count."
        )
    corners = "x1" in index
    x, y, u, v = (index[c] for c in (("x1", "y1", "x2", "y2") if corners else ("cx", "cy", "w", "h")))
    return Grid(
        family="rows",
        height=1,
        width=shape[2 if head.transposed else 1],
        stride=1.0,
        anchor=(0.0, 0.0),
        bins=0,
        offset=0.0,
        num_classes=head.num_classes,
        box_tensor=0,
        box=(x, y, u, v),
        class_tensor=0,
        class_start=index.get("cls*", 0),
        object_tensor=0 if "obj" in index else -1,
        object_start=index.get("obj", 0),
        score=index.get("score", -1),
        label=index.get("class", -1),
        corners=corners,
        scale=(float(width), float(height)) if head.normalized else (1.0, 1.0),
    )

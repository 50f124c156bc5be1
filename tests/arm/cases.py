"""Inputs and outputs of the kernels, the same on every machine: made of integers and exact arithmetic only."""

from __future__ import annotations

import numpy as np

from edgekit.kernels.block_conv import BlockConv, BlockConv8
from edgekit.kernels.boxes3d import bev_iou, iou_3d, nms_circle, nms_rotated
from edgekit.kernels.decode import Decoder, decode
from edgekit.kernels.letterbox import letterbox, plan
from edgekit.kernels.nms import nms
from edgekit.kernels.peaks import peaks
from edgekit.pixels import FORMATS, PixelLayout, Pixels
from edgekit.spec import DType, QuantParams
from edgekit.tasks.detect.spec import Channels, DetectHead, HeadLevel
from edgekit.tasks.preprocess import ImagePreprocess

WIDTH, HEIGHT = 96, 64
MAPPING = np.array([[0, 5, 0, 5], [0.3, 0.3, 0.3, 0.3], [320, 180, 320, 180]], np.float32)

RULES = {
    "yolox": ImagePreprocess(WIDTH, HEIGHT),
    "ultralytics": ImagePreprocess(
        WIDTH, HEIGHT, resize="letterbox-center", color="rgb", std=(255.0, 255.0, 255.0)
    ),
    "imagenet": ImagePreprocess(
        WIDTH, HEIGHT, "stretch", mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), layout="NHWC"
    ),
    "half": ImagePreprocess(WIDTH, HEIGHT, std=(255.0, 255.0, 255.0), dtype=DType.float16),
    "bytes": ImagePreprocess(WIDTH, HEIGHT, "stretch", dtype=DType.uint8),
    "area": ImagePreprocess(WIDTH, HEIGHT, interpolation="area"),
}
PICTURES = ((48, 37), (64, 96), (127, 333))
"""Heights and widths: enlarged, as it is, shrunk."""
CAMERA = ((48, 38), (64, 96), (128, 192), (127, 334))
"""The same with an even width, and twice the input's size."""
QUANTS = {
    "shifted": QuantParams(DType.int8, (1.0,), (-128,)),
    "per channel": QuantParams(DType.uint8, (0.7, 0.3, 250.0), (3, 20, 0)),
}


def results() -> dict[str, np.ndarray]:
    """Every kernel on every case, by name. Runs the kernels that `EDGEKIT_KERNELS` selects."""
    return {**_letterbox(), **_camera(), **_decode(), **_nms(), **_boxes3d(), **_peaks(), **_block_conv()}


def _letterbox() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out = {}
    for height, width in PICTURES:
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for name, rule in RULES.items():
            shape = (1, HEIGHT, WIDTH, 3) if rule.layout == "NHWC" else (1, 3, HEIGHT, WIDTH)
            tensor = np.empty(shape, rule.dtype.value)
            letterbox(picture, rule, tensor)
            out[f"letterbox {name} {width}x{height}"] = tensor
    return out


def _camera() -> dict[str, np.ndarray]:
    """Every pixel format into every input, in values and in codes."""
    rng = np.random.default_rng(4)
    out = {}
    for height, width in CAMERA:
        for format in FORMATS:
            matrix, range_ = ("bt709", "full") if format in ("uyvy", "nv21") else ("bt601", "limited")
            layout = PixelLayout(format, width, height, matrix, range_)
            strides = [int(np.prod(shape[1:])) + 16 for shape in layout.plane_shapes]
            ends = [stride * shape[0] for stride, shape in zip(strides, layout.plane_shapes, strict=True)]
            buffer = rng.integers(0, 256, sum(ends), dtype=np.uint8)
            pixels = Pixels.view(buffer, layout, strides, [sum(ends[:i]) for i in range(len(ends))])
            for name, rule in RULES.items():
                for code, quant in ({"values": None, **QUANTS}).items():
                    made = plan(rule, layout, quant if rule.dtype == DType.float32 else None)
                    tensor = np.empty(made.out_shape, made.out_dtype)
                    made.run(pixels, tensor)
                    out[f"letterbox {format} {name} {code} {width}x{height}"] = tensor
    return out


def heads() -> dict[str, DetectHead]:
    """One head of each family, strides 8 and 16, five classes."""
    classes = 5

    def levels(split: tuple[int, int | None, int], anchors: int = 0) -> tuple[HeadLevel, ...]:
        box, objectness, start = split
        sizes = tuple((10.0 + 7 * a, 13.0 + 5 * a) for a in range(anchors))
        return tuple(
            HeadLevel(
                stride,
                Channels(f"p{stride}", box),
                Channels(f"p{stride}", start),
                None if objectness is None else Channels(f"p{stride}", objectness),
                sizes,
            )
            for stride in (8, 16)
        )

    columns = ("cx", "cy", "w", "h", "obj", "cls*")
    return {
        "yolox": DetectHead("yolox", classes, levels((0, 4, 5))),
        "yolov5": DetectHead("yolov5", classes, levels((0, 4, 5), anchors=3)),
        "yolov8": DetectHead("yolov8", classes, levels((0, None, 64)), bins=16, cell_offset=0.5),
        "nanodet": DetectHead("nanodet", classes, levels((0, None, 32)), bins=8),
        "fastestdet": DetectHead("fastestdet", classes, levels((1, 0, 5))),
        "rows": DetectHead("rows", classes, rows="rows", columns=columns),
    }


def _decode() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    out = {}
    for family, head in heads().items():
        if family == "rows":
            tensors = {"rows": (rng.random((1, 120, 10)) * 1.2).astype(np.float32)}
        else:
            channels = {"yolov5": 3 * 10, "yolov8": 69, "nanodet": 37}.get(family, 10)
            tensors = {
                f"p{s}": (rng.random((1, channels, HEIGHT // s, WIDTH // s)) * 12 - 6).astype(np.float32)
                for s in (8, 16)
            }
        for threshold in (0.0, 0.3):
            boxes, scores, classes = decode(tensors, head, WIDTH, HEIGHT, threshold)
            for part, value in (("boxes", boxes), ("scores", scores), ("classes", classes)):
                out[f"decode {family} {threshold} {part}"] = value.copy()
            found = Decoder(head, WIDTH, HEIGHT).detect(tensors, threshold, 0.65, 100, MAPPING)
            for part, value in zip(("boxes", "scores", "classes"), found, strict=True):
                out[f"detect {family} {threshold} {part}"] = value
    return out


def _block_conv() -> dict[str, np.ndarray]:
    """Sums of integers below 2^24: any order gives the same float."""
    rng = np.random.default_rng(9)
    out = {}
    for kernel, stride, size in ((3, 1, (13, 21)), (3, 2, (16, 24)), (1, 1, (9, 7)), (3, 1, (1, 2))):
        keep = (rng.random((3, 2, kernel, kernel)) < 0.4).repeat(8, 0).repeat(4, 1)[:19]
        weight = (rng.integers(-127, 128, keep.shape) * keep).astype(np.int8)
        bias = rng.integers(-5000, 5000, 19).astype(np.int32)
        codes = rng.integers(0, 256, (8, *size)).astype(np.uint8)
        scale = rng.uniform(1e-4, 1e-2, 19).astype(np.float32)
        for relu in (False, True):
            label = f"block_conv {kernel}/{stride} {size} {'relu ' if relu else ''}"
            how = {"size": size, "stride": (stride, stride), "padding": (kernel // 2,) * 4, "relu": relu}
            out[label + "int8"] = BlockConv8(weight, bias, scale, 7, 100, **how)(codes)
            values = weight.astype(np.float32), bias.astype(np.float32)
            for block in (8, 1):
                layer = BlockConv(*values, block=block, **how)
                out[f"{label}float32 {block}"] = layer(codes.astype(np.float32) - 128)
    return out


def _nms() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    corner = (rng.random((400, 2)) * 80).astype(np.float32)
    boxes = np.concatenate([corner, corner + (rng.random((400, 2)) * 30).astype(np.float32)], axis=1)
    scores = (rng.integers(0, 50, 400) / 50).astype(np.float32)  # with ties
    classes = rng.integers(0, 3, 400).astype(np.int32)
    return {f"nms {iou}": nms(boxes, scores, classes, iou, 100).copy() for iou in (0.0, 0.45, 0.65, 1.0)}


def _boxes3d() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    low, span = (-8, -8, -2, 0.1, 0.1, 0.1, -8), (16, 16, 4, 6, 3, 3, 16)
    boxes = (rng.random((150, 7)) * span + low).astype(np.float32)
    boxes[100:] = np.round(boxes[100:])  # edges that coincide, sizes of 0
    boxes[140:, :6] = boxes[:10, :6]
    scores = (rng.integers(0, 50, 150) / 50).astype(np.float32)  # with ties
    classes = rng.integers(0, 3, 150).astype(np.int32)
    out = {"bev_iou": bev_iou(boxes, boxes), "iou_3d": iou_3d(boxes, boxes)}
    out |= {f"nms_rotated {iou}": nms_rotated(boxes, scores, classes, iou, 100) for iou in (0.0, 0.2, 1.0)}
    return out | {
        f"nms_circle {radius}": nms_circle(boxes, scores, classes, radius, 100) for radius in (0.5, 3)
    }


def _peaks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    heat = (rng.random((3, 37, 61)) * 12 - 9).astype(np.float32)
    heat[1] = np.round(heat[1])  # plateaus
    maps = [rng.random((channels, 37, 61)).astype(np.float32) for channels in (2, 1)]
    out = {}
    for threshold in (0.0, 0.1, 0.9):
        found = peaks(heat, maps, threshold=threshold, limit=200, window=(3, 3, 1))
        for part in ("scores", "cells", "values"):
            out[f"peaks {threshold} {part}"] = getattr(found, part)
    return out

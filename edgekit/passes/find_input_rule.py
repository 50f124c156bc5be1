"""How the picture must be put into the network: the family's habit, corrected by what the graph shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, input_size, only_user, shape
from edgekit.passes.states import picture
from edgekit.tasks.detect.spec import DetectHead
from edgekit.tasks.preprocess import ImagePreprocess

_IMAGENET = np.array([0.485, 0.456, 0.406])
"""Mean of ImageNet pixels, R G B, 0..1."""


def find_input_rule(model: ir.Model, head: DetectHead | None) -> tuple[ImagePreprocess | None, str]:
    """(rule, one line that explains it). None when neither family nor graph tells.

    Habits: YOLOX `preproc` (0..255 BGR, top-left letterbox), Ultralytics `LetterBox` (0..1 RGB,
    centred), NanoDet (stretched BGR, ImageNet mean and std), FastestDet (stretched BGR, 0..1).
    Evidence: constants that the graph itself subtracts from or multiplies with its input.
    """
    height, width = input_size(model)
    if (shape(picture(model)) or ())[1:2] != (3,):
        return None, "input rule: the input has not 3 channels; declare the preprocessing"
    rules = {
        "yolox": ImagePreprocess(width, height),
        "yolov5": _ultralytics(width, height),
        "yolov8": _ultralytics(width, height),
        "nanodet": ImagePreprocess(
            width,
            height,
            resize="stretch",
            mean=(103.53, 116.28, 123.675),
            std=(57.375, 57.12, 58.395),
        ),
        "fastestdet": ImagePreprocess(width, height, resize="stretch", std=(255.0, 255.0, 255.0)),
    }
    family = head.family if head is not None else ""
    rule = rules.get(family)
    normalised = _normalisation(model)
    if normalised is None:
        if rule is None:
            return None, "input rule: neither the head nor the graph tells it; declare the preprocessing"
        return rule, f"input rule: as {family} networks are trained: {_text(rule)}"
    scale, offset = normalised
    base = rule or _ultralytics(width, height)
    # 0..255 in, about -3..3 out: the graph divides by some 50 to 255 itself
    level = 1.0 if float(np.abs(scale).max()) < 0.1 else 255.0
    rule = replace(base, mean=(0.0, 0.0, 0.0), std=(level, level, level))
    mean = -offset / scale * (1.0 if level == 255.0 else 1 / 255.0)  # in 0..1
    for color, order in (("rgb", _IMAGENET), ("bgr", _IMAGENET[::-1])):
        if np.allclose(mean, order, atol=2e-3):
            rule = replace(rule, color=color)  # type: ignore[arg-type]
    return rule, f"input rule: the graph normalises its input itself, so: {_text(rule)}"


def _ultralytics(width: int, height: int) -> ImagePreprocess:
    return ImagePreprocess(width, height, resize="letterbox-center", color="rgb", std=(255.0, 255.0, 255.0))


def _text(rule: ImagePreprocess) -> str:
    shown = [f"{rule.resize} to {rule.width}x{rule.height}", rule.color]
    shown.append("mean " + "/".join(f"{m:g}" for m in rule.mean))
    shown.append("std " + "/".join(f"{s:g}" for s in rule.std))
    if rule.resize != "stretch":
        shown.append(f"pad {rule.pad_value}")
    return ", ".join(shown)


def _normalisation(model: ir.Model) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, t), float64 [3], of s * x + t applied to the input before anything else; None without."""
    value = picture(model)
    scale, offset = np.ones(3), np.zeros(3)
    found = False
    while True:
        node = only_user(value)
        if node is None or node.op_type not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
            break
        first = node.inputs[0] is value
        data = constant(node.inputs[1 if first else 0])
        if data is None or (not first and node.op_type in ("Div", "Sub")):
            break
        full = data.reshape((1,) * (4 - data.ndim) + data.shape) if data.ndim <= 4 else data
        if full.ndim != 4 or full.shape[0] != 1 or full.shape[1] not in (1, 3) or full.shape[2:] != (1, 1):
            break
        c = np.broadcast_to(full.reshape(-1).astype(np.float64), (3,))
        if node.op_type in ("Mul", "Div"):
            c = c if node.op_type == "Mul" else 1 / c
            scale, offset = scale * c, offset * c
        else:
            offset = offset + (c if node.op_type == "Add" else -c)
        value, found = node.outputs[0], True
    return (scale, offset) if found and (scale != 0).all() else None

"""Repairs on trained networks: on new pictures no output may get worse, and the gain is printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import CalibrationError
from edgekit.frontends import onnx as frontend
from edgekit.passes import prepare
from edgekit.quant import repair
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place, prepared
from edgekit.quant.rules import rules_for
from edgekit.target import Target
from tests.helpers import ROOT, shared_data

Feeds = list[dict[str, np.ndarray]]
REPAIRS = ("adaround", "bias_correction", "split_channels")


def report(name: str, model: ir.Model, feeds: Feeds, new: Feeds) -> dict[str, repair.Gain]:
    model = prepared(model)
    rules = rules_for("onnxruntime", Target.load("rpi5"))
    annotated = place(model, calibrate(model, feeds), rules, Choices())
    gains = {}
    for kind in REPAIRS:
        _, gain = repair.apply(kind, annotated, model, feeds, check=new)
        print(f"{name:12s} {kind:16s} {gain.before:6.2f} -> {gain.after:6.2f} dB, {gain.changed} nodes")
        gains[kind] = gain
    return gains


def pictures(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    """RGB [1, 3, size, size] in 0..255."""
    import cv2

    files = sorted(folder.glob("*.jpg"))
    for i in np.linspace(0, len(files) - 1, count).astype(int):
        picture = cv2.resize(cv2.imread(str(files[i])), (size, size))
        yield np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32)


def test_yolo_lite() -> None:
    """The detector of apps/detect on streets drawn for the purpose."""
    from edgekit.synth.street import StreetWorld
    from edgekit.toolchain.data import fed

    found = prepare(frontend.load(str(ROOT / "apps/detect/yolo_lite.onnx")), check=False)
    assert found.preprocess is not None
    drawn = [StreetWorld(seed, 640, 360).frame(3).image for seed in range(900, 907)]
    name = found.model.graph.inputs[0].name
    feeds = [{name: fed(picture, found.preprocess)} for picture in drawn]
    gains = report("yolo_lite", found.model, feeds[:4], feeds[4:])
    assert gains["adaround"].decibels > 0.5
    assert all(g.decibels > -0.2 for g in gains.values()), gains


@pytest.mark.shared
def test_resnet8() -> None:
    data = shared_data()
    path = data / "models/cifar10_resnet8/resnet8_cifar10.onnx"
    model = prepare(frontend.load(str(path)), task="classify", check=False).model
    images = np.load(data / "cifar10_mini/cifar10_mini.npz")
    stack = next(images[k] for k in images if images[k].ndim == 4)
    rows = stack[:96].astype(np.float32).transpose(0, 3, 1, 2)
    feeds = [{model.graph.inputs[0].name: np.ascontiguousarray(x[None])} for x in rows]
    gains = report("resnet8", model, feeds[:64], feeds[64:])
    assert gains["adaround"].decibels > 2
    assert gains["bias_correction"].decibels > 1
    assert gains["split_channels"].decibels > -0.2


@pytest.mark.slow
@pytest.mark.shared
def test_fastestdet() -> None:
    data = shared_data()
    model = prepare(frontend.load(str(data / "models/fastestdet/FastestDet.onnx")), check=False).model
    name = model.graph.inputs[0].name
    feeds = [{name: x / 255} for x in pictures(data / "coco_mini/train", 8, 352)]
    new = [{name: x / 255} for x in pictures(data / "coco_mini/val_a", 4, 352)]
    gains = report("fastestdet", model, feeds, new)
    assert gains["adaround"].decibels > 0.2
    assert gains["bias_correction"].decibels > 0.2
    assert gains["split_channels"].decibels > -0.2


def test_no_pictures_no_repair() -> None:
    model = prepared(prepare(frontend.load(str(ROOT / "apps/detect/yolo_lite.onnx")), check=False).model)
    with pytest.raises(CalibrationError, match="no pictures"):
        repair.apply("adaround", model, model, [])

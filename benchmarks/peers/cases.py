"""The networks of the comparison: one prepared float graph each, the pictures it is calibrated and judged on."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import torch_networks as networks
from benchmarks.common import reference_data
from edgekit import frontends, host
from edgekit.backends.onnxruntime.lower import lower
from edgekit.kernels.letterbox import letterbox
from edgekit.optional import load_cv2
from edgekit.passes import prepare
from edgekit.picture import read_picture
from edgekit.synth.street import StreetWorld
from edgekit.tasks.detect.coco import COCO_CLASSES
from edgekit.tasks.detect.dataset import CocoSet, read_coco
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.toolchain.cache import sources

TRAINED = {
    "yolox_nano": "yolox_nano/yolox_nano.onnx",
    "fastestdet": "fastestdet/FastestDet.onnx",
}
"""Detectors with weights, in data/models beside the checkout."""
NAMES = (*TRAINED, *networks.NETWORKS)
STREETS = (1_500_000, 500_000)
"""Seeds of the streets that networks are calibrated and judged on where no pictures are given."""
SQNR_PICTURES = 16
PICTURE = networks.PICTURE
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product of the float graph, with the multiplications of one inference."""

    name: str
    weight: str
    macs: int


@dataclass(frozen=True)
class Case:
    """One network. `graph`: ONNX bytes, BatchNorm folded, head cut before its decode, every Conv and Gemm
    named `layer_<i>` and its weight `weight_<i>`. `feed`: uint8 [H, W, 3] BGR -> float32 [1, 3, h, w].

    spec: how a detector's outputs are decoded, None for a classifier. data: labelled pictures, or None.
    """

    name: str
    source: Path
    graph: bytes
    layers: tuple[Layer, ...]
    input: str
    outputs: tuple[str, ...]
    feed: Callable[[np.ndarray], np.ndarray]
    spec: DetectSpec | None
    data: CocoSet | None
    pictures: tuple[np.ndarray, ...]
    """For SQNR: never among the calibration pictures."""


@dataclass(frozen=True)
class Calibration:
    """Network inputs float32 [n, 3, h, w] to calibrate on, and what they are."""

    inputs: np.ndarray
    what: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.inputs).data).hexdigest()


def load(name: str) -> Case:
    """The case called `name`. Raises: FileNotFoundError for a trained model that is not beside the checkout."""
    trained = name in TRAINED
    source = reference_data() / "models" / TRAINED[name] if trained else networks.export(name)
    if not source.is_file():
        raise FileNotFoundError(
            f"network {name}: {source} is not there. Put the reference data beside the checkout"
        )
    detector = trained or name in networks.DETECTORS
    prepared = prepare(frontends.load(source), task="detect" if detector else "classify")
    (payload,) = lower(prepared.model, host.detect(), "float32")
    graph, layers = name_layers(payload.data)
    spec, data = None, None
    if detector:
        assert prepared.head is not None and prepared.preprocess is not None, "a known family"
        spec = DetectSpec(prepared.preprocess, prepared.head, COCO_CLASSES)
        rule = spec.preprocess

        def feed(image: np.ndarray) -> np.ndarray:
            x = np.empty(payload.inputs[0].shape, np.float32)
            letterbox(image, rule, x)
            return x
    else:

        def feed(image: np.ndarray) -> np.ndarray:
            return networks.network_input(networks.NETWORKS[name], image)

    if trained:
        folder = reference_data() / "coco_mini"
        data = read_coco(folder / "instances_val_a.json", folder / "val_a", labels=COCO_CLASSES)
        pictures = tuple(read_picture(p.path) for p in data.images[:SQNR_PICTURES])
    else:
        pictures = street(STREETS[1], SQNR_PICTURES)
    return Case(
        name,
        source,
        graph,
        layers,
        payload.inputs[0].name,
        tuple(o.name for o in payload.outputs),
        feed,
        spec,
        data,
        pictures,
    )


def street(seed: int, count: int) -> tuple[np.ndarray, ...]:
    """Synthetic street pictures, uint8 [360, 640, 3] BGR."""
    return tuple(StreetWorld(seed + i, *PICTURE).frame(45).image for i in range(count))


def calibration(case: Case, folder: Path | None, count: int) -> Calibration:
    """Pictures through the case's own input rule.

    folder: `count` of its pictures in name order, evenly spaced; None: synthetic streets.
    Raises: ValueError for a folder without pictures, or with one that the case is judged on.
    """
    if folder is None:
        images: Sequence[np.ndarray] = street(STREETS[0], count)
        what = f"{count} synthetic streets from seed {STREETS[0]}"
    else:
        files = chosen_files(folder, count)
        judged = (
            {hashlib.sha256(p.path.read_bytes()).digest() for p in case.data.images} if case.data else set()
        )
        both = [p.name for p in files if hashlib.sha256(p.read_bytes()).digest() in judged]
        if both:
            raise ValueError(f"calibration {folder}: {both[0]} is also judged on, expected other pictures")
        images, what = [read_picture(p) for p in files], f"{len(files)} pictures of {folder.name}"
    return Calibration(np.concatenate([case.feed(image) for image in images]), what)


def chosen_files(folder: Path, count: int) -> list[Path]:
    """`count` pictures of a folder, evenly spaced in name order. Raises: ValueError when there is none."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise ValueError(f"calibration {folder}: holds no pictures")
    return [files[i * len(files) // count] for i in range(count)] if count < len(files) else files


def calibration_folder(folder: Path | None, count: int, cache: Path) -> Path:
    """The very pictures of `calibration` as files in a folder of their own under `cache`, for a command line.

    Raises: ValueError as `calibration`.
    """
    files = [] if folder is None else chosen_files(folder, count)
    state = hashlib.sha256(f"{STREETS[0]} {count} {PICTURE}".encode() if folder is None else b"")
    for file in files:
        state.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    if folder is None:  # a new artist draws new pictures
        state.update(sources("synth").encode())
    made = cache / state.hexdigest()[:16]
    if made.is_dir():
        return made
    work = made.with_suffix(f".{os.getpid()}.tmp")
    work.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, work / file.name)
    for i, image in enumerate(street(STREETS[0], count) if folder is None else ()):
        ok = load_cv2("draw pictures").imwrite(str(work / f"{i:04}.png"), image)
        assert ok, "a valid picture encodes"
    work.rename(made)
    return made


def name_layers(data: bytes) -> tuple[bytes, tuple[Layer, ...]]:
    """Give every Conv, Gemm and MatMul with constant weights a name that survives what quantizers do."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    weights = {t.name: t for t in model.graph.initializer}
    known = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    layers, renamed = [], {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        number = len(layers)
        node.name, old = f"layer_{number:03}", node.input[1]
        if old not in renamed:
            renamed[old] = weights[old].name = f"weight_{number:03}"
        node.input[1] = renamed[old]
        size = [int(d) for d in weights[old].dims]
        # per output element: input channels of its group x kernel; a matrix product: the shared axis
        inner = (
            int(np.prod(size[1:]))
            if node.op_type == "Conv"
            else int(np.prod(size)) // shapes[node.output[0]][-1]
        )
        layers.append(Layer(node.name, renamed[old], int(np.prod(shapes[node.output[0]])) * inner))
    for node in model.graph.node:  # weights that several layers share
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True), tuple(layers)


def layers_in(text: str, layers: Sequence[Layer]) -> set[int]:
    """Indices of the layers that a tensor's or operator's name tells of."""
    found = {int(number) for number in re.findall(r"(?:layer|weight)_(\d{3})", text)}
    return {i for i in found if i < len(layers)}


def sqnr(reference: Sequence[Mapping[str, np.ndarray]], got: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Signal over error in dB: per output over all pictures, then the mean of the outputs.

    0 dB where an output is not finite: nothing of the signal is left.
    """
    values = []
    for name in reference[0]:
        signal = sum(float((r[name].astype(np.float64) ** 2).sum()) for r in reference)
        error = sum(
            float(((g[name] - r[name]).astype(np.float64) ** 2).sum())
            for r, g in zip(reference, got, strict=True)
        )
        finite = np.isfinite(error)
        values.append(0.0 if not finite else 200.0 if error == 0 else 10 * np.log10(signal / error))
    return float(np.mean(values))


def top1_agreement(reference: Sequence[Mapping[str, Any]], got: Sequence[Mapping[str, Any]]) -> float:
    """Share of pictures on which a classifier's largest output is the float network's."""
    same = [
        all(int(r[n].argmax()) == int(g[n].argmax()) for n in r) for r, g in zip(reference, got, strict=True)
    ]
    return float(np.mean(same))

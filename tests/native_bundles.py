"""Small bundles of the native engine, made by hand: a detector and a classifier with random weights, for tests of the C library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit.backends.base import Payload, Ports
from edgekit.backends.native import engine
from edgekit.backends.native.format import Builder, Dtype, Op, OpType, encode
from edgekit.bundle import golden_bytes, golden_path, make_variant, write_bundle
from edgekit.input_codes import input_codes
from edgekit.manifest import Golden, GoldenTensor, Manifest, Segment
from edgekit.schema import to_json
from edgekit.spec import DType, TensorSpec
from edgekit.tasks.classify.spec import ClassifySpec
from edgekit.tasks.detect.spec import Channels, DetectHead, DetectSpec, Family, HeadLevel
from edgekit.tasks.preprocess import ImagePreprocess

CLASSES = 5
EVIDENCE = {"note": "weights are random"}


def _input(b: Builder, rule: ImagePreprocess, codes: bool, taken: bool = False) -> int:
    """The picture as codes: those of the port (one a level), or made from its float32. taken: these at the port."""
    shape = (1, rule.height, rule.width, 3)
    seen = shape if rule.layout == "NHWC" else None
    if codes:
        picture = b.tensor(shape, external=True)
        b.port("images", picture, False, seen)
        return picture
    span = [(level - m) / s for m, s in zip(rule.mean, rule.std, strict=True) for level in (0, 255)]
    scale = (max(span) - min(span)) / 255
    zero = int(np.clip(round(-min(span) / scale), 0, 255))
    if taken:
        picture = b.tensor(shape, scale=scale, zero=zero, external=True)
        b.port("images", picture, False, seen)
        return picture
    floats = b.tensor(shape, Dtype.f32, external=True)
    b.port("images", floats, False, seen)
    picture = b.tensor(shape, scale=scale, zero=zero)
    b.op(Op(OpType.quantize, (floats,), picture, scalars=(1 / scale,), name="quantize"))
    return picture


def _conv(
    b: Builder, source: int, out: int, side: int, channels: int, rng: np.random.Generator, spread: float
) -> None:
    """A side x side convolution with that stride, whose float32 results lie mostly within +-spread."""
    c = b.tensors[source].shape[3]
    weights = rng.integers(-127, 128, (channels, side, side, c)).astype(np.int8)
    bias = rng.integers(-1000, 1000, channels).astype(np.int32)
    zero = b.tensors[source].zero
    bias -= ((128 - zero) * weights.astype(np.int64).sum((1, 2, 3))).astype(np.int32)
    deviation = 73 * 60 * np.sqrt(side * side * c)
    multipliers = rng.uniform(0.5, 1.5, channels).astype(np.float32) * np.float32(spread / deviation)
    b.op(
        Op(
            OpType.conv, (source,), out, kernel=(side, side), stride=(side, side), name=f"conv{side}",
            constants=(weights, bias, multipliers),
        )
    )  # fmt: skip


def detector(
    rule: ImagePreprocess, family: Family = "yolox", seed: int = 0, codes: bool = False, taken: bool = False
) -> tuple[bytes, DetectSpec]:
    """A payload and its pipeline: one convolution per level straight from the picture; family yolox, yolov5, yolov8,
    nanodet, fastestdet or rows. codes, taken: of `_input`."""
    rng = np.random.default_rng(seed)
    b = Builder()
    picture = _input(b, rule, codes, taken)
    bins = 8 if family in ("yolov8", "nanodet") else 0
    box = 4 * bins if bins else 4
    object_at = 1 if family in ("yolox", "yolov5", "fastestdet") else 0
    anchors = ((10.0, 13.0), (30.5, 61.0)) if family == "yolov5" else ()
    each = box + object_at + CLASSES
    levels = []
    labels = tuple(f"class {i}" for i in range(CLASSES))
    if family == "rows":
        side = 16
        h, w = rule.height // side, rule.width // side
        buffer = b.buffer(4 * h * w * (5 + CLASSES), external=True)
        grid = b.tensor((1, h, w, 5 + CLASSES), Dtype.f32, buffer=buffer)
        raw = b.tensor((1, h, w, 5 + CLASSES), Dtype.f32)
        _conv(b, picture, raw, side, 5 + CLASSES, rng, 1.0)
        from edgekit.backends.native.format import Act

        b.op(Op(OpType.unary_f32, (raw,), grid, act=Act.sigmoid, name="sigmoid"))
        rows = b.tensor((1, 1, h * w, 5 + CLASSES), Dtype.f32, buffer=buffer)
        b.port("rows", rows, True, (1, h * w, 5 + CLASSES), False)
        head = DetectHead(
            "rows", CLASSES, rows="rows", columns=("cx", "cy", "w", "h", "obj", "cls*"), normalized=True
        )
        return encode(b.program()), DetectSpec(rule, head, labels, 0.3, 0.5)
    for side in (8, 16, 32):
        h, w = rule.height // side, rule.width // side
        count = each * max(1, len(anchors))
        out = b.tensor((1, h, w, count), Dtype.f32, external=True)
        _conv(b, picture, out, side, count, rng, 2.0)
        name = f"level_{side}"
        b.port(name, out, True)
        levels.append(
            HeadLevel(
                side, Channels(name, 0), Channels(name, box + object_at),
                Channels(name, box) if object_at else None, anchors,
            )
        )  # fmt: skip
    head = DetectHead(family, CLASSES, tuple(levels), bins, 0.5 if family == "yolov8" else 0.0)
    return encode(b.program()), DetectSpec(rule, head, labels, 0.5, 0.45, 40)


def classifier(
    rule: ImagePreprocess, seed: int = 0, activation: str = "softmax"
) -> tuple[bytes, ClassifySpec]:
    """A payload and its pipeline: one convolution as large as the picture."""
    b = Builder()
    picture = _input(b, rule, False)
    assert rule.width == rule.height
    out = b.tensor((1, 1, 1, 12), Dtype.f32, external=True)
    _conv(b, picture, out, rule.width, 12, np.random.default_rng(seed), 2.0)
    b.port("logits", out, True, (1, 12), False)
    labels = tuple(f"kind {i}" for i in range(12))
    return encode(b.program()), ClassifySpec(rule, "logits", labels, activation)  # type: ignore[arg-type]


def write(
    path: Path,
    payload: bytes,
    spec: DetectSpec | ClassifySpec,
    *,
    beside: Sequence[Payload] = (),
    options: dict[str, object] | None = None,
) -> Path:
    """The bundle of one payload, with golden values that its own engine gives. beside: variants before it. options: of its
    variant; inputs that these name as codes are float32 in the plan."""
    loaded = engine.NativeExecutable(payload)
    session = loaded.bind()
    rng = np.random.default_rng(1)
    rule = spec.preprocess
    inputs, outputs, files = {}, {}, {}
    variant = make_variant("network", "own", Payload("native", "int8", "ek", payload, (), (), options or {}))
    own = Ports.of(variant)
    for name, array in session.inputs.items():
        levels = rng.integers(0, 256, array.shape)
        shape = (1, 1, 1, 3) if rule.layout == "NHWC" else (1, 3, 1, 1)
        real = ((levels - np.reshape(rule.mean, shape)) / np.reshape(rule.std, shape)).astype(np.float32)
        taken = name in own.codes
        inputs[name] = real if taken or array.dtype == np.float32 else levels.astype(np.uint8)
        array[...] = input_codes(real, own.codes[name]) if taken else inputs[name]
    session.run()
    for name, array in session.outputs.items():
        outputs[name] = array.copy()
    tensors = [
        TensorSpec(name, DType(str(array.dtype)), array.shape, "NCHW" if array.ndim == 4 else "")
        for name, array in {**inputs, **outputs}.items()
    ]
    payloads = [*beside, Payload("native", "int8", "ek", payload, (), (), options or {})]
    variants = []
    for i, p in enumerate(payloads):
        variant = make_variant("network", f"v{i}", p)
        variants.append(variant)
        files[variant.path] = bytes(p.data)
    golden: dict[str, list[GoldenTensor]] = {"input": [], "output": []}
    for side, arrays in (("input", inputs), ("output", outputs)):
        for i, (name, array) in enumerate(arrays.items()):
            files[golden_path(side, i)] = golden_bytes(array)
            golden[side].append(GoldenTensor(name, golden_path(side, i), atol=1e-5))
    manifest = Manifest(
        schema_version=1,
        model="hand-made",
        task=spec.task,
        target="any",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        tensors=tuple(tensors),
        plan=(Segment("network", tuple(inputs), tuple(outputs), tuple(variants)),),
        pipeline=to_json(spec),
        payload_digest="",
        golden=Golden(tuple(golden["input"]), tuple(golden["output"])),
        files={},
        provenance={"edgekit": "0"},
    )
    write_bundle(path, manifest, files, EVIDENCE)
    return path

"""The C library opens bundles and finds the same boxes as Python, to the bit."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.backends.base import Payload, Ports
from edgekit.backends.native import engine, library
from edgekit.errors import EdgekitError
from edgekit.kernels.letterbox import letterbox
from edgekit.pixels import PixelLayout, Pixels
from edgekit.spec import DType
from edgekit.tasks.classify.pipeline import ClassifyPipeline
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.preprocess import ImagePreprocess
from tests import native_bundles, native_c
from tests.native_c import Classifier, Detector, Failed, Picture, opened

FAMILIES = ("yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "rows")
RULES = {
    "letterbox": ImagePreprocess(96, 64),
    "center": ImagePreprocess(64, 96, "letterbox-center", color="rgb", std=(255.0, 255.0, 255.0)),
    "stretch": ImagePreprocess(
        64, 64, "stretch", mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395)
    ),
    "crop": ImagePreprocess(64, 64, "crop", color="rgb", shorter_side=73),
    "crop-plain": ImagePreprocess(96, 64, "crop", interpolation="area"),
    "crop-bottom": ImagePreprocess(96, 64, "crop-bottom", scaled_width=117, interpolation="area"),
    "area": ImagePreprocess(64, 64, interpolation="area", pad_value=3),
    "nhwc": ImagePreprocess(64, 64, layout="NHWC"),
}


def picture(layout: PixelLayout, seed: int) -> Pixels:
    """Blocks of noise: something that networks with random weights see things in."""
    rng = np.random.default_rng(seed)
    return Pixels.view(rng.integers(0, 256, layout.nbytes, dtype=np.uint8), layout)


def python_detects(payload: bytes, spec, pixels: Pixels, **limits):
    return DetectPipeline(spec, engine.NativeExecutable(payload).bind())(pixels, **limits)


def same(found, wanted) -> None:
    boxes, scores, classes = found
    assert len(wanted) > 0, "nothing found, nothing compared"
    np.testing.assert_array_equal(classes, wanted.classes)
    np.testing.assert_array_equal(scores.view(np.int32), wanted.scores.view(np.int32))
    np.testing.assert_array_equal(boxes.view(np.int32), wanted.boxes.view(np.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_those_of_python(tmp_path: Path, family) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"], family)
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        detector = Detector(bundle)
        for seed in range(3):
            pixels = picture(PixelLayout("bgr", 160 + 31 * seed, 120), seed)
            same(detector(pixels), python_detects(payload, spec, pixels))
        detector.limits(0.01, 0.2, 7)
        same(
            detector(pixels),
            python_detects(payload, spec, pixels, score_threshold=0.01, iou_threshold=0.2, max_detections=7),
        )
        detector.limits(0)
        same(detector(pixels), python_detects(payload, spec, pixels, score_threshold=0))
        detector.limits()
        same(detector(pixels), python_detects(payload, spec, pixels))
        assert len(detector.times()) == 3 and all(detector.times())
        detector.close()


@pytest.mark.parametrize("rule", RULES)
def test_every_way_into_the_input(tmp_path: Path, rule) -> None:
    payload, spec = native_bundles.detector(RULES[rule])
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        detector = Detector(bundle)
        seed = 0
        for size in ((640, 360), (77, 211), (128, 128), (40, 24), (1, 1), (192, 128), (61, 96)):
            for fmt in native_c.FORMATS_OF_C:
                width = size[0] + size[0] % 2 if fmt in ("yuyv", "uyvy") else size[0]
                matrix, range_ = (("bt601", "limited"), ("bt709", "full"), ("bt709", "limited"))[seed % 3]
                pixels = picture(PixelLayout(fmt, width, size[1], matrix, range_), seed)
                pipeline = DetectPipeline(spec, engine.NativeExecutable(payload).bind())
                wanted = pipeline(pixels, score_threshold=0.05)
                detector.limits(0.05)
                same(detector(pixels), wanted)
                same(detector(pixels), wanted)  # with the padding that is there
                seed += 1
        detector.close()


def test_codes_go_straight_into_an_input_of_bytes(tmp_path: Path) -> None:
    rule = ImagePreprocess(64, 64, dtype=DType.uint8)
    payload, spec = native_bundles.detector(rule, codes=True)
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        bundle.test()
        detector = Detector(bundle)
        pixels = picture(PixelLayout("nv12", 320, 240), 5)
        same(detector(pixels), python_detects(payload, spec, pixels))
        detector.close()


@pytest.mark.parametrize("rule", ["letterbox", "stretch", "crop-plain"])
@pytest.mark.parametrize("fmt", ["bgr", "nv12", "grey"])
def test_the_port_takes_the_codes_that_the_engine_would_make(tmp_path: Path, rule: str, fmt: str) -> None:
    """The same boxes from a payload whose float32 input is quantized inside, and from one that takes the codes."""
    inside, spec = native_bundles.detector(RULES[rule])
    taken, _ = native_bundles.detector(RULES[rule], taken=True)
    (port, *_) = engine.NativeExecutable(taken).inputs
    assert port.quant is not None
    options = Ports(codes={"images": port.quant}).to_options()
    path = native_bundles.write(tmp_path / "a.edge", taken, spec, options=options)
    pixels = picture(PixelLayout(fmt, 190, 110), 7)
    wanted = python_detects(inside, spec, pixels, score_threshold=0.05)
    with opened(path) as bundle:
        bundle.test()
        detector = Detector(bundle)
        detector.limits(0.05)
        same(detector(pixels), wanted)
        detector.close()
    with edgekit.load(path) as found:  # self-tested from float32
        pipeline = found.pipeline()
        assert pipeline.session.inputs["images"].dtype == np.uint8
        boxes = pipeline(pixels, score_threshold=0.05)
        same((boxes.boxes, boxes.scores, boxes.classes), wanted)
        session, shown = (
            found.session(),
            np.zeros((1, 3, *pipeline.session.inputs["images"].shape[2:]), np.float32),
        )
        letterbox(pixels, spec.preprocess, shown)
        session.write("images", shown)
        np.testing.assert_array_equal(session.inputs["images"], pipeline.session.inputs["images"])


def test_codes_at_the_port_are_those_that_the_manifest_says(tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"], taken=True)
    path = native_bundles.write(
        tmp_path / "a.edge", payload, spec, options={"codes": {"images": ["uint8", 0.5, 3]}}
    )
    with pytest.raises(EdgekitError, match="images: expected float32"):
        edgekit.load(path, self_test=False)
    with (
        pytest.raises(Failed, match=r"input 'images': the payload has codes .* its options do not say"),
        opened(path),
    ):
        pass


def test_planes_anywhere(tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"])
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        detector = Detector(bundle)
        rng = np.random.default_rng(3)
        image = rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)
        flipped = Pixels.bgr(image[::-1])  # rows upwards in memory
        same(detector(flipped), python_detects(payload, spec, flipped))
        for fmt in ("nv12", "i420"):  # planes that are not told follow each other
            pixels = picture(PixelLayout(fmt, 130, 90), 3)
            p = Picture.of(pixels)
            for i in range(1, len(pixels.planes)):
                p.plane[i] = None
            p.stride[:] = [0, 0, 0]
            same(detector(p), python_detects(payload, spec, pixels))
        buffer = rng.integers(0, 256, 160 * 90 * 2, dtype=np.uint8)
        padded = Pixels.view(buffer, PixelLayout("nv12", 130, 90), (160, 160))
        same(detector(padded), python_detects(payload, spec, padded))
        detector.close()


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_classes_are_those_of_python(tmp_path: Path, activation) -> None:
    rule = ImagePreprocess(32, 32, "crop", color="rgb", mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    payload, spec = native_bundles.classifier(rule, activation=activation)
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        assert bundle.facts["task"] == "classify" and bundle.labels == list(spec.labels)
        bundle.test()
        classifier = Classifier(bundle)
        for seed in range(5):
            pixels = picture(PixelLayout("rgb", 50, 40), seed)
            wanted = ClassifyPipeline(spec, engine.NativeExecutable(payload).bind())(pixels)
            classes, scores, all_scores = classifier(pixels)
            np.testing.assert_array_equal(classes, wanted.classes)
            np.testing.assert_allclose(scores, wanted.scores, rtol=1e-6)  # numpy's exp and libm's
            np.testing.assert_allclose(all_scores, wanted.all_scores, rtol=1e-6, atol=1e-9)
        with pytest.raises(Failed, match="its task is 'classify'"):
            Detector(bundle)
        classifier.close()


def test_what_a_bundle_says(tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"])
    other = Payload("onnxruntime", "float32", "onnx", b"not looked at", (), ())
    path = native_bundles.write(tmp_path / "a.edge", payload, spec, beside=(other,))
    for source in (path, path.read_bytes()):
        with opened(source) as bundle:
            facts = dict(bundle.facts)
            assert len(facts.pop("payload_digest")) == 71
            assert facts == {
                "model": "hand-made", "task": "detect", "target": "any", "variant": "v1", "precision": "int8",
                "width": 96, "height": 64, "classes": 5,
            }  # fmt: skip
            assert bundle.labels == list(spec.labels)
            assert native_c.lib().ek_bundle_label(bundle.handle, 5) == b""
            assert native_c.lib().ek_bundle_engine(bundle.handle)
            bundle.test()
    with opened(path, "v1"):
        pass
    with pytest.raises(Failed, match="variant 'v0'") as failed, opened(path, "v0"):
        pass
    assert failed.value.status == native_c.BAD_ARGUMENT


def test_detectors_outlive_their_bundle_and_share_it(tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"])
    path = native_bundles.write(tmp_path / "a.edge", payload, spec)
    options = library.Options(ctypes.sizeof(library.Options), 2, b"scalar", 0, library.BY_DEFAULT)
    with opened(path, options=options) as bundle:
        detectors = [Detector(bundle) for _ in range(2)]
    path.unlink()
    for seed, detector in enumerate(detectors):
        pixels = picture(PixelLayout("bgr", 100, 100), seed)
        same(detector(pixels), python_detects(payload, spec, pixels))
        detector.close()


def test_pictures_that_are_none(tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(RULES["letterbox"])
    with opened(native_bundles.write(tmp_path / "a.edge", payload, spec)) as bundle:
        detector = Detector(bundle)
        pixels = picture(PixelLayout("nv12", 64, 64), 0)
        good = Picture.of(pixels)
        for field, value, problem in (
            ("size", 3, "size 3"),
            ("format", 10, "unknown format 10"),
            ("width", 0, "0x64"),
            ("height", 65537, "64x65537"),
            ("matrix", 2, "matrix 2"),
            ("range", 9, "range 9"),
            ("plane", (ctypes.c_void_p * 3)(None, 1, 1), "plane 0 is null"),
            ("stride", (ctypes.c_ssize_t * 3)(63, 64, 0), "63 bytes apart, expected at least 64"),
            ("stride", (ctypes.c_ssize_t * 3)(64, -10, 0), "-10 bytes apart"),
        ):
            bad = Picture.from_buffer_copy(good)
            setattr(bad, field, value)
            with pytest.raises(Failed) as failed:
                detector(bad)
            assert failed.value.status == native_c.BAD_ARGUMENT and problem in failed.value.line, failed.value
        odd = Picture.of(picture(PixelLayout("yuyv", 64, 64), 0))
        odd.width = 63
        with pytest.raises(Failed, match="even width"):
            detector(odd)
        same(detector(pixels), python_detects(payload, spec, pixels))
        for limits in ((1.5, 0.5, 1), (0.5, float("nan"), 1), (0.5, 0.5, 100001)):
            with pytest.raises(Failed, match="limits"):
                detector.limits(*limits)
        detector.close()
    lib = native_c.lib()
    handle = ctypes.c_void_p()
    assert lib.ek_bundle_open(None, None, None, ctypes.byref(handle)) == native_c.BAD_ARGUMENT
    assert lib.ek_detector_create(None, ctypes.byref(handle)) == native_c.BAD_ARGUMENT
    assert lib.ek_bundle_classes(None) == 0 and lib.ek_bundle_describe(None) == b"{}"
    for close in (lib.ek_bundle_close, lib.ek_detector_close, lib.ek_classifier_close):
        close(None)


def test_a_payload_that_computes_something_else(tmp_path: Path) -> None:
    from tests.bundle_samples import files_of, rebuild

    payload, spec = native_bundles.detector(RULES["letterbox"])
    files = files_of(native_bundles.write(tmp_path / "a.edge", payload, spec))
    golden = np.frombuffer(files["golden/output_0.bin"], np.float32).copy()
    golden[10] += 1
    files["golden/output_0.bin"] = golden.tobytes()
    manifest = json.loads(files["manifest.json"])
    from hashlib import sha256

    from edgekit.schema import canonical_json

    manifest["files"]["golden/output_0.bin"]["sha256"] = sha256(golden.tobytes()).hexdigest()
    files["manifest.json"] = canonical_json(manifest, "")
    with opened(rebuild(files)) as bundle:
        with pytest.raises(Failed, match="output 'level_8': 1 of 960 values differ") as failed:
            bundle.test()
        assert failed.value.status == native_c.WRONG_RESULT

"""`Decoder.detect`, decoding, suppression and the way back to the picture in one native call, at a real network's size:
8400 cells in planes longer than the kernel's tiles, more candidates than its batches, every memory layout."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgekit.kernels.decode import Decoder
from edgekit.tasks.detect.spec import Channels, DetectHead, HeadLevel
from tests.test_kernels import using

SIZE = (640, 640)
STRIDES = (8, 16, 32)
MAPPING = np.array([[0, 12, 0, 12], [0.5, 0.5, 0.5, 0.5], [1280, 720, 1280, 720]], np.float32)
Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def head(family: str, classes: int) -> DetectHead:
    levels = tuple(
        HeadLevel(
            s,
            Channels(f"box{s}"),
            Channels(f"cls{s}"),
            None if family == "yolov8" else Channels(f"obj{s}"),
        )
        for s in STRIDES
    )
    bins = 16 if family == "yolov8" else 0
    return DetectHead(family, classes, levels, bins=bins, cell_offset=0.5 if bins else 0.0)  # type: ignore[arg-type]


def outputs(family: str, classes: int, memory: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    result = {}
    for s in STRIDES:
        n = SIZE[0] // s
        channels = {"box": 64 if family == "yolov8" else 4, "cls": classes}
        if family != "yolov8":
            channels["obj"] = 1
        for name, count in channels.items():
            values = rng.normal(-2 if name != "box" else 0, 2, (1, count, n, n)).astype(np.float32)
            odd = rng.random(values.shape)
            values[odd < 0.001] = np.nan
            values[odd > 0.999] = np.float32(2.5)  # ties
            if memory == "NHWC":
                values = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            if memory == "padded":  # rows further apart than they are long
                values = np.pad(values, ((0, 0), (0, 0), (0, 0), (0, 3)))[..., :n]
            if memory == "strided":  # neither classes nor cells are neighbours
                values = np.repeat(values, 2, axis=3)[..., ::2]
            result[f"{name}{s}"] = values
    return result


def same(a: Found, b: Found) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("family", ["yolox", "yolov8", "fastestdet"])
@pytest.mark.parametrize("memory", ["NCHW", "NHWC", "padded", "strided"])
def test_native_is_the_reference(family: str, memory: str) -> None:
    classes = 19  # no multiple of a vector's lanes
    rng = np.random.default_rng(classes)
    rule, given = head(family, classes), outputs(family, classes, memory, rng)
    threshold = 0.93 if family == "yolov8" else 0.4
    for options in ({}, {"clip": False, "all_classes": True}):
        with using("numpy"):
            expected = Decoder(rule, *SIZE).detect(given, threshold, 0.6, 5000, MAPPING, **options)
        assert len(expected[1]) > 300, "the case shows little"
        for isa in ("auto", "portable"):
            with using("native"):
                decoder = Decoder(rule, *SIZE, isa=isa)
                got = decoder.detect(given, threshold, 0.6, 5000, MAPPING, **options)
                same(got, expected)
                # bound tensors are read anew, results are the caller's own
                kept = [a.copy() for a in got]
                for tensor in given.values():
                    tensor += np.float32(0)
                same(decoder.detect(given, threshold, 0.6, 5000, MAPPING, **options), expected)
                decoder.detect(given, 0.9, 0.1, 1, MAPPING)
                same(got, tuple(kept))  # type: ignore[arg-type]


def test_other_tensors_are_bound_anew() -> None:
    rng = np.random.default_rng(1)
    rule = head("yolox", 3)
    first, second = (outputs("yolox", 3, "NCHW", rng) for _ in range(2))
    with using("native"):
        decoder = Decoder(rule, *SIZE)
        a, b = (decoder.detect(o, 0.4, 0.6, 5000, MAPPING) for o in (first, second))
        again = decoder.detect(first, 0.4, 0.6, 5000, MAPPING)
    assert len(a[1]) != len(b[1]) or a[0].tobytes() != b[0].tobytes()
    same(a, again)


def test_threads_with_decoders_of_their_own_agree() -> None:
    rng = np.random.default_rng(2)
    rule, given = head("yolov8", 20), outputs("yolov8", 20, "NCHW", rng)
    found: list[Found] = []

    def work() -> None:
        decoder = Decoder(rule, *SIZE)
        found.extend(decoder.detect(given, 0.5, 0.6, 5000, MAPPING) for _ in range(5))

    with using("native"):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert len(found) == 15
    for f in found:
        same(f, found[0])


def test_minus_zero_becomes_zero_where_boxes_are_clipped() -> None:
    rule = DetectHead("rows", 1, rows="r", columns=("x1", "y1", "x2", "y2", "score"))
    given = {"r": np.array([[[-0.0, -5.0, 20.0, 9000.0, 0.9]]], np.float32)}
    mapping = np.array([[0] * 4, [1] * 4, [100, 50, 100, 50]], np.float32)
    for path in ("numpy", "native"):
        with using(path):
            boxes, _, _ = Decoder(rule, 100, 50).detect(given, 0.5, 0.5, 10, mapping)
        assert boxes.tobytes() == np.array([[0.0, 0.0, 20.0, 50.0]], np.float32).tobytes()

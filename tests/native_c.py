"""The half of edgekit.h that opens bundles, by ctypes: for tests."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_size_t,
    c_ssize_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.native import library
from edgekit.pixels import FORMATS, Pixels

OK, BAD_ARGUMENT, BAD_FILE, UNSUPPORTED, NO_MEMORY, IO, INTERNAL, WRONG_RESULT = range(8)


class Failed(Exception):
    """A status that is not EK_OK, with its line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(f"{status}: {line}")
        self.status, self.line = status, line


class Picture(ctypes.Structure):
    _fields_ = (
        ("size", c_uint32),
        ("format", c_uint32),
        ("width", c_uint32),
        ("height", c_uint32),
        ("plane", c_void_p * 3),
        ("stride", c_ssize_t * 3),
        ("matrix", c_uint32),
        ("range", c_uint32),
    )

    @staticmethod
    def of(pixels: Pixels) -> Picture:
        p = Picture(ctypes.sizeof(Picture))
        layout = pixels.layout
        p.format, p.width, p.height = FORMATS_OF_C.index(layout.format), layout.width, layout.height
        for i, plane in enumerate(pixels.planes):
            p.plane[i], p.stride[i] = plane.__array_interface__["data"][0], plane.strides[0]
        p.matrix, p.range = int(layout.matrix == "bt709"), int(layout.range == "full")
        return p


FORMATS_OF_C = ("bgr", "rgb", "bgra", "rgba", "grey", "yuyv", "uyvy", "nv12", "nv21", "i420")
assert set(FORMATS_OF_C) == set(FORMATS)


class Box(ctypes.Structure):
    _fields_ = (
        ("x1", c_float), ("y1", c_float), ("x2", c_float), ("y2", c_float), ("score", c_float), ("number", c_int32),
    )  # fmt: skip


class Class(ctypes.Structure):
    _fields_ = (("score", c_float), ("number", c_int32))


_lib: Any = None


def lib() -> Any:
    """The library, with argument types."""
    global _lib
    if _lib is None:
        _lib = ctypes.CDLL(str(library.path()))
        text = (c_char_p, ("describe", "label"))
        types: dict[str, tuple[Any, ...]] = {
            "ek_bundle_open": (c_char_p, c_char_p, c_void_p, POINTER(c_void_p)),
            "ek_bundle_open_bytes": (c_void_p, c_size_t, c_char_p, c_void_p, POINTER(c_void_p)),
            "ek_bundle_close": (c_void_p,),
            "ek_bundle_describe": (c_void_p,),
            "ek_bundle_classes": (c_void_p,),
            "ek_bundle_label": (c_void_p, c_uint32),
            "ek_bundle_engine": (c_void_p,),
            "ek_bundle_test": (c_void_p,),
            "ek_detector_create": (c_void_p, POINTER(c_void_p)),
            "ek_detector_close": (c_void_p,),
            "ek_detector_limits": (c_void_p, c_float, c_float, c_uint32),
            "ek_detector_run": (c_void_p, POINTER(Picture), POINTER(POINTER(Box)), POINTER(c_uint32)),
            "ek_detector_times": (c_void_p, POINTER(c_uint64)),
            "ek_classifier_create": (c_void_p, POINTER(c_void_p)),
            "ek_classifier_close": (c_void_p,),
            "ek_classifier_run": (c_void_p, POINTER(Picture), POINTER(POINTER(Class)), POINTER(c_uint32)),
            "ek_classifier_scores": (c_void_p, POINTER(POINTER(c_float))),
            "ek_classifier_times": (c_void_p, POINTER(c_uint64)),
        }
        for name, arguments in types.items():
            function = getattr(_lib, name)
            function.argtypes = arguments
            function.restype = text[0] if name.endswith(text[1]) else c_uint32
        _lib.ek_bundle_engine.restype = c_void_p
        _lib.ek_bundle_close.restype = _lib.ek_detector_close.restype = _lib.ek_classifier_close.restype = (
            None
        )
        _lib.ek_last_error.restype, _lib.ek_last_error.argtypes = c_char_p, ()
    return _lib


def must(status: int) -> None:
    if status != OK:
        line = lib().ek_last_error().decode()
        assert line and "\n" not in line, "a failure says what it is, in one line"
        raise Failed(status, line)


class Bundle:
    """An open bundle; closed at the end of a `with` statement."""

    def __init__(self, handle: c_void_p, keep: Any = None) -> None:
        self.handle, self._keep = handle, keep
        self.facts = json.loads(lib().ek_bundle_describe(handle))
        self.labels = [
            lib().ek_bundle_label(handle, i).decode() for i in range(lib().ek_bundle_classes(handle))
        ]

    def test(self) -> None:
        must(lib().ek_bundle_test(self.handle))


@contextmanager
def opened(bundle: Path | bytes, variant: str | None = None, options: Any = None) -> Iterator[Bundle]:
    """A bundle by path or from memory. Raises: Failed."""
    handle = c_void_p()
    name = None if variant is None else variant.encode()
    given = None if options is None else ctypes.cast(byref(options), c_void_p)
    data: Any = None
    if isinstance(bundle, Path):
        status = lib().ek_bundle_open(str(bundle).encode(), name, given, byref(handle))
    else:
        data = (c_uint8 * max(1, len(bundle))).from_buffer_copy(bundle or b"\0")
        status = lib().ek_bundle_open_bytes(data, len(bundle), name, given, byref(handle))
    assert (status == OK) == bool(handle.value)
    must(status)
    try:
        yield Bundle(handle, data)
    finally:
        lib().ek_bundle_close(handle)


class Detector:
    def __init__(self, bundle: Bundle) -> None:
        self.handle = c_void_p()
        must(lib().ek_detector_create(bundle.handle, byref(self.handle)))

    def limits(self, score: float = -1, overlap: float = -1, most: int = 0) -> None:
        must(lib().ek_detector_limits(self.handle, score, overlap, most))

    def __call__(self, picture: Pixels | Picture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes [n, 4], scores, classes."""
        p = Picture.of(picture) if isinstance(picture, Pixels) else picture
        boxes, count = POINTER(Box)(), c_uint32()
        must(lib().ek_detector_run(self.handle, byref(p), byref(boxes), byref(count)))
        found = [boxes[i] for i in range(count.value)]
        return (
            np.array([[b.x1, b.y1, b.x2, b.y2] for b in found], np.float32).reshape(-1, 4),
            np.array([b.score for b in found], np.float32),
            np.array([b.number for b in found], np.int32),
        )

    def times(self) -> list[int]:
        values = (c_uint64 * 3)()
        must(lib().ek_detector_times(self.handle, values))
        return list(values)

    def close(self) -> None:
        lib().ek_detector_close(self.handle)


class Classifier:
    def __init__(self, bundle: Bundle) -> None:
        self.handle, self._count = c_void_p(), lib().ek_bundle_classes(bundle.handle)
        must(lib().ek_classifier_create(bundle.handle, byref(self.handle)))

    def __call__(self, pixels: Pixels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes, their scores, all scores."""
        found, count, scores = POINTER(Class)(), c_uint32(), POINTER(c_float)()
        p = Picture.of(pixels)
        must(lib().ek_classifier_run(self.handle, byref(p), byref(found), byref(count)))
        must(lib().ek_classifier_scores(self.handle, byref(scores)))
        best = [found[i] for i in range(count.value)]
        return (
            np.array([c.number for c in best], np.int32),
            np.array([c.score for c in best], np.float32),
            np.array(scores[: self._count], np.float32),
        )

    def close(self) -> None:
        lib().ek_classifier_close(self.handle)

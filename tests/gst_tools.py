"""Shared by the GStreamer tests: what they need, and pushing buffers of our own making into a pipeline."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import pytest

from edgekit.errors import MissingExtraError
from edgekit.runtime.sources import gst_native
from edgekit.runtime.sources.gst import GstSource
from tests.helpers import ROOT

PACKAGES = (ROOT / "tools/camera/packages.txt").read_text().split()


def need(*elements: str, libraries: tuple[str, ...] = ()) -> Any:
    """GStreamer with these elements; skips the test without them, fails it where EDGEKIT_REQUIRE_GST is set."""
    try:
        lib = gst_native.library()
        lacking = [e for e in elements if not lib.has(e)]
        for name in libraries:
            ctypes.CDLL(name)
    except (MissingExtraError, OSError) as error:
        lib, lacking = None, [str(error)]
    if lacking:
        reason = f"needs {', '.join(lacking)}: apt install {' '.join(PACKAGES)}"
        if os.environ.get("EDGEKIT_REQUIRE_GST"):
            pytest.fail(reason)
        pytest.skip(reason, allow_module_level=True)
    return lib


def calls() -> tuple[Any, Any, Any]:
    """libgstreamer, libgstapp and libgstvideo with the functions that only tests call."""
    core, app, video = (ctypes.CDLL(f"libgst{n}-1.0.so.0") for n in ("reamer", "app", "video"))
    for library, name, result, arguments in (
        (core, "gst_buffer_new", c_void_p, ()),
        (core, "gst_allocator_alloc", c_void_p, (c_void_p, c_size_t, c_void_p)),
        (core, "gst_buffer_append_memory", None, (c_void_p, c_void_p)),
        (core, "gst_buffer_fill", c_size_t, (c_void_p, c_size_t, c_void_p, c_size_t)),
        (core, "gst_memory_map", c_int, (c_void_p, ctypes.POINTER(gst_native.MapInfo), c_int)),
        (core, "gst_memory_unmap", None, (c_void_p, ctypes.POINTER(gst_native.MapInfo))),
        (app, "gst_app_src_push_buffer", c_int, (c_void_p, c_void_p)),
        (app, "gst_app_src_end_of_stream", c_int, (c_void_p,)),
        (
            video,
            "gst_buffer_add_video_meta_full",
            c_void_p,
            (c_void_p, c_int, c_int, c_uint, c_uint, c_uint, c_void_p, c_void_p),
        ),
        (video, "gst_video_format_from_string", c_int, (ctypes.c_char_p,)),
    ):
        call = getattr(library, name)
        call.restype, call.argtypes = result, arguments
    return core, app, video


def memories(parts: list[bytes]) -> tuple[int, list[int]]:
    """A GstBuffer of one memory per part, and where each lies."""
    core, _, _ = calls()
    buffer, at, places = core.gst_buffer_new(), 0, []
    for part in parts:
        memory = core.gst_allocator_alloc(None, len(part), None)
        info = gst_native.MapInfo()
        assert core.gst_memory_map(memory, ctypes.byref(info), gst_native.MAP_READ)
        places.append(info.data)
        core.gst_memory_unmap(memory, ctypes.byref(info))
        core.gst_buffer_append_memory(buffer, memory)
        assert core.gst_buffer_fill(buffer, at, part, len(part)) == len(part)
        at += len(part)
    return buffer, places


def describe(buffer: int, format: str, size: tuple[int, int], offsets: list[int], strides: list[int]) -> None:
    """Say by GstVideoMeta where the planes of a buffer lie."""
    _, _, video = calls()
    number = video.gst_video_format_from_string(format.encode())
    place = (c_size_t * 4)(*offsets)
    stride = (c_int * 4)(*strides)
    assert video.gst_buffer_add_video_meta_full(buffer, 0, number, *size, len(offsets), place, stride)


class Pushed(GstSource):
    """A pipeline from `appsrc name=in` that is given its buffers before it starts."""

    def __init__(self, uri: str, buffers: list[int], flags: int = 0) -> None:
        self.buffers, self.flags = buffers, flags
        super().__init__(uri)

    def _prepare(self) -> None:
        super()._prepare()
        _, app, _ = calls()
        entry = self._lib.gst_bin_get_by_name(self._pipeline, b"in")
        for i, buffer in enumerate(self.buffers):
            found = gst_native.Buffer.from_address(buffer)
            found.pts, found.mini_object.flags = i * 40_000_000, found.mini_object.flags | self.flags
            assert app.gst_app_src_push_buffer(entry, buffer) == 0
        app.gst_app_src_end_of_stream(entry)
        self._lib.gst_object_unref(entry)


NO_TIME = c_uint64(-1).value

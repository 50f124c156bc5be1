"""The parts of GStreamer 1.x that a source needs, through ctypes: its C interface is stable, its Python one is not
packaged for every interpreter and copies what it maps.

Structures are those of the public headers (gstbuffer.h, gstmemory.h, gstmessage.h, video-info.h, video-frame.h, gstpad.h).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulong, c_void_p
from typing import Any

from edgekit.errors import MissingExtraError, StreamError

PACKAGES = "libgstreamer1.0-0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
NONE = 2**64 - 1
"""GST_CLOCK_TIME_NONE, GST_BUFFER_OFFSET_NONE."""
NULL, PAUSED, PLAYING = 1, 3, 4
FAILURE, SUCCESS, ASYNC, NO_PREROLL = 0, 1, 2, 3
"""What a change of state comes to."""
ERROR, WARNING = 1 << 1, 1 << 2
"""Kinds of messages on the bus."""
FORMAT_TIME = 3
MAP_READ = 1
CORRUPTED = 1 << 8
HELD = 6
"""Buffers that we ask a source to have beyond its own need: two that wait in the appsink, two with readers."""
_PLANES = 4
_PARSE_FATAL_ERRORS = 1
_PROBE_QUERY = 1 << 9 | 1 << 12
_PROBE_OK, _PROBE_HANDLED = 1, 4


class MiniObject(ctypes.Structure):
    _fields_ = (
        ("type", c_size_t),
        ("refcount", c_int),
        ("lockstate", c_int),
        ("flags", c_uint),
        ("copy", c_void_p),
        ("dispose", c_void_p),
        ("free", c_void_p),
        ("priv_uint", c_uint),
        ("priv_pointer", c_void_p),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        ("mini_object", MiniObject),
        ("pool", c_void_p),
        ("pts", c_uint64),
        ("dts", c_uint64),
        ("duration", c_uint64),
        ("offset", c_uint64),
        ("offset_end", c_uint64),
    )


class Memory(ctypes.Structure):
    _fields_ = (("mini_object", MiniObject), ("allocator", c_void_p))


class _Object(ctypes.Structure):
    """GstObject with the GObject it begins with."""

    _fields_ = (
        ("g_class", c_void_p),
        ("ref_count", c_uint),
        ("qdata", c_void_p),
        ("lock", c_uint64),
        ("name", c_char_p),
        ("parent", c_void_p),
        ("flags", c_uint),
        ("control_bindings", c_void_p),
        ("control_rate", c_uint64),
        ("last_sync", c_uint64),
        ("reserved", c_void_p),
    )


class Allocator(ctypes.Structure):
    _fields_ = (("object", _Object), ("mem_type", c_char_p))


class Message(ctypes.Structure):
    _fields_ = (
        ("mini_object", MiniObject),
        ("type", c_int),
        ("timestamp", c_uint64),
        ("src", c_void_p),
        ("seqnum", ctypes.c_uint32),
    )


class GError(ctypes.Structure):
    _fields_ = (("domain", ctypes.c_uint32), ("code", c_int), ("message", c_char_p))


class MapInfo(ctypes.Structure):
    _fields_ = (
        ("memory", c_void_p),
        ("flags", c_int),
        ("data", c_void_p),
        ("size", c_size_t),
        ("maxsize", c_size_t),
        ("user_data", c_void_p * 4),
        ("reserved", c_void_p * 4),
    )


class VideoInfo(ctypes.Structure):
    _fields_ = (
        ("finfo", POINTER(c_int)),
        ("interlace_mode", c_int),
        ("flags", c_int),
        ("width", c_int),
        ("height", c_int),
        ("size", c_size_t),
        ("views", c_int),
        ("chroma_site", c_int),
        ("range", c_int),
        ("matrix", c_int),
        ("transfer", c_int),
        ("primaries", c_int),
        ("par_n", c_int),
        ("par_d", c_int),
        ("fps_n", c_int),
        ("fps_d", c_int),
        ("offset", c_size_t * _PLANES),
        ("stride", c_int * _PLANES),
        ("reserved", c_void_p * 4),
    )


class VideoFrame(ctypes.Structure):
    _fields_ = (
        ("info", VideoInfo),
        ("flags", c_int),
        ("buffer", c_void_p),
        ("meta", c_void_p),
        ("id", c_int),
        ("data", c_void_p * _PLANES),
        ("map", MapInfo * _PLANES),
        ("reserved", c_void_p * 4),
    )


class _ProbeInfo(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("id", c_ulong),
        ("data", c_void_p),
        ("offset", c_uint64),
        ("size", c_uint),
    )


class _Query(ctypes.Structure):
    _fields_ = (("mini_object", MiniObject), ("type", c_int))


class _Value(ctypes.Structure):
    _fields_ = (("g_type", c_size_t), ("data", c_uint64 * 2))


_PROBE = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(_ProbeInfo), c_void_p)

# library -> function -> (result, arguments)
_FUNCTIONS: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libgstreamer-1.0.so.0": {
        "gst_init_check": (c_int, (c_void_p, c_void_p, POINTER(POINTER(GError)))),
        "gst_version_string": (c_void_p, ()),
        "gst_parse_context_new": (c_void_p, ()),
        "gst_parse_context_free": (None, (c_void_p,)),
        "gst_parse_context_get_missing_elements": (c_void_p, (c_void_p,)),
        "gst_parse_launch_full": (c_void_p, (c_char_p, c_void_p, c_int, POINTER(POINTER(GError)))),
        "gst_pipeline_get_type": (c_size_t, ()),
        "gst_pipeline_use_clock": (None, (c_void_p, c_void_p)),
        "gst_object_ref_sink": (c_void_p, (c_void_p,)),
        "gst_object_unref": (None, (c_void_p,)),
        "gst_object_get_name": (c_void_p, (c_void_p,)),
        "gst_mini_object_ref": (c_void_p, (c_void_p,)),
        "gst_mini_object_unref": (None, (c_void_p,)),
        "gst_bin_get_by_name": (c_void_p, (c_void_p, c_char_p)),
        "gst_bin_iterate_recurse": (c_void_p, (c_void_p,)),
        "gst_iterator_next": (c_int, (c_void_p, POINTER(_Value))),
        "gst_iterator_resync": (None, (c_void_p,)),
        "gst_iterator_free": (None, (c_void_p,)),
        "gst_element_factory_find": (c_void_p, (c_char_p,)),
        "gst_element_get_type": (c_size_t, ()),
        "gst_element_get_factory": (c_void_p, (c_void_p,)),
        "gst_element_get_bus": (c_void_p, (c_void_p,)),
        "gst_element_get_base_time": (c_uint64, (c_void_p,)),
        "gst_element_get_static_pad": (c_void_p, (c_void_p, c_char_p)),
        "gst_element_set_state": (c_int, (c_void_p, c_int)),
        "gst_element_get_state": (c_int, (c_void_p, c_void_p, c_void_p, c_uint64)),
        "gst_util_set_object_arg": (None, (c_void_p, c_char_p, c_char_p)),
        "gst_bus_timed_pop_filtered": (POINTER(Message), (c_void_p, c_uint64, c_int)),
        "gst_message_parse_error": (None, (c_void_p, POINTER(POINTER(GError)), POINTER(c_void_p))),
        "gst_message_parse_warning": (None, (c_void_p, POINTER(POINTER(GError)), POINTER(c_void_p))),
        "gst_resource_error_quark": (ctypes.c_uint32, ()),
        "gst_stream_error_quark": (ctypes.c_uint32, ()),
        "gst_core_error_quark": (ctypes.c_uint32, ()),
        "gst_system_clock_obtain": (c_void_p, ()),
        "gst_clock_get_time": (c_uint64, (c_void_p,)),
        "gst_pad_get_current_caps": (c_void_p, (c_void_p,)),
        "gst_pad_add_probe": (c_ulong, (c_void_p, c_int, _PROBE, c_void_p, c_void_p)),
        "gst_caps_to_string": (c_void_p, (c_void_p,)),
        "gst_query_type_get_name": (c_char_p, (c_int,)),
        "gst_query_parse_allocation": (None, (c_void_p, POINTER(c_void_p), POINTER(c_int))),
        "gst_query_add_allocation_meta": (None, (c_void_p, c_size_t, c_void_p)),
        "gst_query_add_allocation_pool": (None, (c_void_p, c_void_p, c_uint, c_uint, c_uint)),
        "gst_sample_get_buffer": (c_void_p, (c_void_p,)),
        "gst_sample_get_caps": (c_void_p, (c_void_p,)),
        "gst_sample_get_segment": (c_void_p, (c_void_p,)),
        "gst_segment_to_running_time": (c_uint64, (c_void_p, c_int, c_uint64)),
        "gst_buffer_n_memory": (c_uint, (c_void_p,)),
        "gst_buffer_peek_memory": (c_void_p, (c_void_p, c_uint)),
    },
    "libgstapp-1.0.so.0": {
        "gst_app_sink_try_pull_sample": (c_void_p, (c_void_p, c_uint64)),
        "gst_app_sink_is_eos": (c_int, (c_void_p,)),
    },
    "libgstbase-1.0.so.0": {
        "gst_base_src_get_buffer_pool": (c_void_p, (c_void_p,)),
    },
    "libgstvideo-1.0.so.0": {
        "gst_video_info_from_caps": (c_int, (POINTER(VideoInfo), c_void_p)),
        "gst_video_format_to_string": (c_char_p, (c_int,)),
        "gst_video_meta_api_get_type": (c_size_t, ()),
        "gst_video_frame_map": (c_int, (POINTER(VideoFrame), POINTER(VideoInfo), c_void_p, c_int)),
        "gst_video_frame_unmap": (None, (POINTER(VideoFrame),)),
    },
    "libgobject-2.0.so.0": {
        "g_type_check_instance_is_a": (c_int, (c_void_p, c_size_t)),
        "g_value_get_object": (c_void_p, (POINTER(_Value),)),
        "g_value_unset": (None, (POINTER(_Value),)),
    },
    "libglib-2.0.so.0": {
        "g_free": (None, (c_void_p,)),
        "g_error_free": (None, (c_void_p,)),
        "g_strfreev": (None, (c_void_p,)),
    },
}


class Library:
    """GStreamer, started. Its functions are attributes; arguments are addresses, bytes and integers."""

    def __init__(self) -> None:
        for name, functions in _FUNCTIONS.items():
            try:
                library = ctypes.CDLL(name)
            except OSError:
                raise MissingExtraError(
                    name, "camera", "read GStreamer pipelines", f"Run: apt install {PACKAGES}"
                ) from None
            for function, (result, arguments) in functions.items():
                try:
                    call = getattr(library, function)
                except AttributeError:
                    raise StreamError(
                        f"library {name}: too old, it has no {function}. Install GStreamer 1.16 or newer"
                    ) from None
                call.restype, call.argtypes = result, arguments
                setattr(self, function, call)
        error = POINTER(GError)()
        if not self.gst_init_check(None, None, ctypes.byref(error)):
            raise StreamError(f"GStreamer: cannot start: {self.take_error(error)[2]}. Run: gst-inspect-1.0")
        self.version = self.take_text(self.gst_version_string()).removeprefix("GStreamer ")
        self._answer = _PROBE(self._allocation)  # the pads keep its address: it lives as long as we do

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # what is not in the table; tells mypy that the rest is

    def take_text(self, address: int | None) -> str:
        """A C string that is ours to free."""
        if not address:
            return ""
        text = ctypes.string_at(address).decode(errors="replace")
        self.g_free(address)
        return text

    def take_error(self, error: Any) -> tuple[int, int, str]:
        """(domain, code, text) of a GError that is ours to free."""
        if not error:
            return 0, 0, "unknown reason"
        found = error.contents
        result = found.domain, found.code, (found.message or b"").decode(errors="replace")
        self.g_error_free(error)
        return result

    def parse(self, text: str) -> tuple[int | None, str, list[str]]:
        """The element that a description makes (our reference), else why not, and which elements are missing."""
        context = self.gst_parse_context_new()
        error = POINTER(GError)()
        try:
            found = self.gst_parse_launch_full(
                text.encode(), context, _PARSE_FATAL_ERRORS, ctypes.byref(error)
            )
            missing = self._strings(self.gst_parse_context_get_missing_elements(context))
        finally:
            self.gst_parse_context_free(context)
        if found:
            self.gst_object_ref_sink(found)
        if error or not found:
            if found:
                self.gst_object_unref(found)
            return None, self.take_error(error)[2], [m for m in missing if not self.has(m)]
        return found, "", []

    def _strings(self, address: int | None) -> list[str]:
        if not address:
            return []
        array = ctypes.cast(address, POINTER(c_char_p))
        found: list[str] = []
        while (item := array[len(found)]) is not None:
            found.append(item.decode(errors="replace"))
        self.g_strfreev(address)
        return found

    def elements(self, container: int) -> list[tuple[int, str]]:
        """(address, factory's name) of all elements of a bin; the addresses are borrowed from the bin."""
        iterator, value = self.gst_bin_iterate_recurse(container), _Value()
        found: list[tuple[int, str]] = []
        while (step := self.gst_iterator_next(iterator, ctypes.byref(value))) in (1, 2):  # ok, resync
            if step == 2:
                self.gst_iterator_resync(iterator)
                found.clear()
                continue
            element = self.g_value_get_object(ctypes.byref(value))
            found.append((element, self.factory(element)))
            self.g_value_unset(ctypes.byref(value))
        self.gst_iterator_free(iterator)
        return found

    def factory(self, element: int | None) -> str:
        """The kind of an element, as descriptions name it; empty for none."""
        factory = self.gst_element_get_factory(element) if element else None
        return self.take_text(self.gst_object_get_name(factory)) if factory else ""

    def has(self, element: str) -> bool:
        """Whether elements of this kind can be made."""
        factory = self.gst_element_factory_find(element.encode())
        if factory:
            self.gst_object_unref(factory)
        return bool(factory)

    def message(self, bus: int, wait_ns: int = 0) -> tuple[bool, str, str, int, int, str, str] | None:
        """The next error or warning; others are thrown away, or the bus would grow without bound.

        (is an error, element's name, its kind, domain, code, text, details)
        """
        found = self.gst_bus_timed_pop_filtered(bus, wait_ns, ERROR | WARNING)
        if not found:
            return None
        severe = bool(found.contents.type & ERROR)
        parse = self.gst_message_parse_error if severe else self.gst_message_parse_warning
        error, details = POINTER(GError)(), c_void_p()
        parse(found, ctypes.byref(error), ctypes.byref(details))
        source = found.contents.src
        name = self.take_text(self.gst_object_get_name(source)) if source else ""
        # only elements have a factory; bins and pipelines are elements too, pads are not
        kind = self.factory(source) if source and self.is_element(source) else ""
        domain, code, text = self.take_error(error)
        self.gst_mini_object_unref(found)
        return severe, name, kind, domain, code, text, self.take_text(details.value)

    def references(self, instance: int) -> int:
        """How many hold an object."""
        return int(_Object.from_address(instance).ref_count)

    def is_element(self, instance: int) -> bool:
        return bool(self.g_type_check_instance_is_a(instance, self.gst_element_get_type()))

    def is_pipeline(self, instance: int) -> bool:
        return bool(self.g_type_check_instance_is_a(instance, self.gst_pipeline_get_type()))

    def accept_padded_rows(self, pad: int) -> None:
        """Answer the ALLOCATION queries of `pad`: GstVideoMeta is understood, and some buffers stay with us.

        An appsink says neither before 1.24, and then sources and decoders whose rows are padded copy every picture
        into packed ones before they hand it over.
        """
        self.gst_pad_add_probe(pad, _PROBE_QUERY, self._answer, None, None)

    def _allocation(self, pad: int, info: Any, data: int) -> int:
        """Runs in GStreamer's thread, when a format is agreed on; never per picture."""
        query = info.contents.data
        kind = ctypes.cast(query, POINTER(_Query)).contents.type
        if self.gst_query_type_get_name(kind) != b"allocation":
            return _PROBE_OK
        caps, need_pool = c_void_p(), c_int()
        self.gst_query_parse_allocation(query, ctypes.byref(caps), ctypes.byref(need_pool))
        video = VideoInfo()
        if not caps.value or not self.gst_video_info_from_caps(ctypes.byref(video), caps):
            return _PROBE_OK
        self.gst_query_add_allocation_meta(query, self.gst_video_meta_api_get_type(), None)
        self.gst_query_add_allocation_pool(query, None, video.size, HELD, 0)
        return _PROBE_HANDLED


@functools.cache
def library() -> Library:
    """GStreamer, loaded and started on first use. Raises: MissingExtraError, StreamError."""
    return Library()

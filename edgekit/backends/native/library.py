"""The engine's shared library, by ctypes: `include/edgekit.h` as Python sees it. Standard library only."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from edgekit.errors import BundleError, EdgekitError, MissingExtraError, UsageError

FILE = "libedgekit.so"
VARIABLE = "EDGEKIT_NATIVE_LIBRARY"
"""Path of another build of the library, e.g. one with sanitizers."""

OK, BAD_ARGUMENT, BAD_FILE, UNSUPPORTED = 0, 1, 2, 3
BY_DEFAULT = 0xFFFFFFFF


class Options(ctypes.Structure):
    """`ek_options`."""

    _fields_ = (
        ("size", c_uint32),
        ("threads", c_uint32),
        ("isa", c_char_p),
        ("keep", c_uint32),
        ("spin_us", c_uint32),
    )


class Port(ctypes.Structure):
    """`ek_port`."""

    _fields_ = (
        ("name", c_char_p),
        ("dtype", c_uint32),
        ("output", c_uint32),
        ("rank", c_uint32),
        ("shape", c_uint32 * 8),
        ("channels_last", c_uint32),
        ("scale", c_float),
        ("zero", c_int32),
        ("next", c_int32),
        ("bytes", c_size_t),
    )


_FUNCTIONS = {
    "ek_engine_open": (c_void_p, c_size_t, POINTER(Options), POINTER(c_void_p)),
    "ek_engine_ports": (c_void_p, POINTER(c_uint32)),
    "ek_engine_port": (c_void_p, c_uint32, POINTER(Port)),
    "ek_session_create": (c_void_p, POINTER(c_void_p)),
    "ek_session_memory": (c_void_p, c_uint32, POINTER(c_void_p)),
    "ek_session_bind": (c_void_p, c_uint32, c_void_p),
    "ek_session_run": (c_void_p,),
    "ek_session_turn": (c_void_p,),
    "ek_session_reset": (c_void_p,),
    "ek_session_tensor": (c_void_p, c_uint32, POINTER(c_void_p)),
    "ek_session_profile": (c_void_p, c_uint32),
    "ek_session_times": (c_void_p, POINTER(c_uint64), c_uint32),
}


def path() -> Path:
    """Where the library is, or would be."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path(__file__).resolve().parents[2] / FILE


@functools.cache
def _open(file: str) -> ctypes.CDLL:
    library = ctypes.CDLL(file)
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_uint32
    library.ek_last_error.argtypes, library.ek_last_error.restype = (), c_char_p
    library.ek_engine_describe.argtypes, library.ek_engine_describe.restype = (c_void_p,), c_char_p
    for name in ("ek_engine_close", "ek_session_close"):
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p,), None
    return library


def load() -> ctypes.CDLL:
    """The library with its functions declared. Raises: MissingExtraError where it was not built."""
    file = path()
    try:
        return _open(str(file))
    except OSError as error:
        raise MissingExtraError(
            FILE,
            "native",
            "run this bundle",
            f"Build it with a C++17 compiler: pip install edgekit ({error})",
        ) from None


def checked(library: ctypes.CDLL, status: int, what: str) -> None:
    """Raises for a status other than OK: UsageError for arguments, BundleError for files, else EdgekitError."""
    if status == OK:
        return
    text = library.ek_last_error().decode(errors="replace")
    kind: type[EdgekitError] = {
        BAD_ARGUMENT: UsageError,
        BAD_FILE: BundleError,
        UNSUPPORTED: BundleError,
    }.get(status, EdgekitError)
    raise kind(f"{what}: {text.removeprefix('payload: ')}")

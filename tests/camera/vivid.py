"""Controls of vivid, the kernel's virtual camera, by name: patterns, colours and faults to inject.

Speaks to the kernel by itself, so that a mistake in edgekit's own structures cannot hide here.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct

_QUERYCTRL, _QUERYMENU, _S_CTRL = 0xC0445624, 0xC02C5625, 0xC008561C
_NEXT = 0x80000000
_QUERY, _MENU = struct.Struct("II32siiiiIII"), struct.Struct("=II32sI")


class Vivid:
    """One camera's controls. Opens the node for each call: vivid plugs an unplugged camera in again when the
    last process has closed it."""

    def __init__(self, path: str) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            self._ids = dict(_controls(fd))
        finally:
            os.close(fd)

    def set(self, name: str, value: int | str = 1) -> None:
        """name: in small letters with `_`; value: a number, or an entry of a menu by its text."""
        fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        try:
            number = _entries(fd, self._ids[name])[value] if isinstance(value, str) else value
            fcntl.ioctl(fd, _S_CTRL, struct.pack("Ii", self._ids[name], number))
        finally:
            os.close(fd)

    press = set
    """Of a button."""


def _controls(fd: int):
    at = 0
    while True:
        query = bytearray(_QUERY.pack(at | _NEXT, 0, b"", 0, 0, 0, 0, 0, 0, 0))
        try:
            fcntl.ioctl(fd, _QUERYCTRL, query)
        except OSError:
            return
        at, _, name, *_ = _QUERY.unpack(query)
        text = name.split(b"\0")[0].decode()
        yield re.sub("[^a-z0-9]+", "_", text.lower()).strip("_"), at


def _entries(fd: int, control: int) -> dict[str, int]:
    found = {}
    for index in range(64):
        entry = bytearray(_MENU.pack(control, index, b"", 0))
        try:
            fcntl.ioctl(fd, _QUERYMENU, entry)
        except OSError:
            continue
        found[_MENU.unpack(entry)[2].split(b"\0")[0].decode()] = index
    return found

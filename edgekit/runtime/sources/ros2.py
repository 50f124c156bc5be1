"""ROS 2 pictures out of a bag: `sensor_msgs/msg/Image` and `CompressedImage` in CDR, without a ROS installation.

Sources: the message definitions of ros2/common_interfaces; OMG DDSI-RTPS 2.5, 10.2 (encapsulation), and
CDR in CORBA 3.3 part 2, 9.3 (alignment counts from behind the four bytes of the encapsulation).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

IMAGE, COMPRESSED_IMAGE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


@dataclass(frozen=True)
class Picture:
    """A picture message of either ecosystem. encoding: of raw pixels; empty where `data` is compressed (JPEG, PNG)."""

    data: memoryview
    encoding: str = ""
    width: int = 0
    height: int = 0
    step: int = 0
    stamp_ns: int = 0

    @property
    def compressed(self) -> bool:
        return not self.encoding


class _Cdr:
    def __init__(self, data: memoryview) -> None:
        if len(data) < 4 or data[0] != 0 or data[1] not in (0, 1):
            raise ValueError("not plain CDR")
        self._order = "<" if data[1] else ">"
        self._data = data[4:]
        self._at = 0

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._at += -self._at % size
        (value,) = struct.unpack_from(self._order + kind, self._data, self._at)
        self._at += size
        return int(value)

    def block(self) -> memoryview:
        length = self.number("I")
        if length > len(self._data) - self._at:
            raise ValueError("message is cut short")
        self._at += length
        return self._data[self._at - length : self._at]

    def text(self) -> str:
        return bytes(self.block()[:256]).rstrip(b"\0").decode(errors="replace")


def read(schema: str, data: memoryview) -> Picture:
    """Raises: ValueError for bytes that are no such message."""
    try:
        cdr = _Cdr(data)
        seconds, nanoseconds = cdr.number("i"), cdr.number("I")
        stamp = seconds * 10**9 + nanoseconds
        cdr.text()  # frame_id
        if schema == COMPRESSED_IMAGE:
            cdr.text()  # format: the data tell it themselves
            return Picture(cdr.block(), stamp_ns=stamp)
        height, width, encoding = cdr.number("I"), cdr.number("I"), cdr.text()
        cdr.number("B")  # is_bigendian: of no meaning for single bytes
        step = cdr.number("I")
        return Picture(cdr.block(), encoding or "?", width, height, step, stamp)
    except struct.error:
        raise ValueError("message is cut short") from None

"""MCAP files read so that no file does harm: bounded memory, checked lengths, damage left out."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edgekit.errors import UsageError, printable
from edgekit.runtime.mcap_file import (
    CHANNEL,
    CHUNK,
    DATA_END,
    FOOTER,
    MAGIC,
    MESSAGE,
    SCHEMA,
    STATISTICS,
    load_mcap,
)

MAX_RECORD = 1 << 30
"""Largest record or chunk (unpacked) that is read."""
_MAX_SMALL = 1 << 24
"""Largest schema, channel or summary record that is read."""


@dataclass(frozen=True)
class Topic:
    """A channel and its schema. encoding: of the messages (`json`, `protobuf`, `cdr`)."""

    name: str
    encoding: str
    schema: str
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """data: a view of the chunk as it was read; it stays."""

    topic: Topic
    channel: int
    sequence: int
    log_ns: int
    publish_ns: int
    data: memoryview


class McapReader:
    """The messages of one file in the order they were written, up to the last whole chunk.

    problems: what could not be read, one text each, the first 100.
    Raises: UsageError for a file that is missing, unreadable or no MCAP file; MissingExtraError.
    """

    def __init__(self, path: Path) -> None:
        self._r = load_mcap("replay")
        self.path = path
        self.problems: list[str] = []
        self._schemas: dict[int, str] = {}
        self.topics: dict[int, Topic] = {}
        """By channel number, as met so far."""
        try:
            self._file: BinaryIO = path.open("rb")
            try:
                self._size = os.fstat(self._file.fileno()).st_size
                magic = self._file.read(len(MAGIC))
            except BaseException:
                self._file.close()
                raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"recording {printable(path)}: {reason}. Check the path") from None
        if magic != MAGIC:
            self._file.close()
            got = "an empty file" if not magic else "other bytes"
            raise UsageError(
                f"recording {printable(path)}: not an MCAP file, expected its eight magic bytes, got {got}. "
                "Give a file that the .mcap sink or ros2 bag wrote"
            )

    def close(self) -> None:
        self._file.close()

    def rewind(self) -> None:
        """Start again from the first message."""
        self._file.seek(len(MAGIC))

    def _problem(self, text: str) -> None:
        if len(self.problems) < 100:
            self.problems.append(text)

    def messages(self) -> Iterator[Message]:
        """From where the file stands. Memory: one record or chunk at a time."""
        try:
            yield from self._messages()
        except OSError as error:
            self._problem(f"cannot be read on: {error.strerror or error}")

    def _messages(self) -> Iterator[Message]:
        while True:
            at = self._file.tell()
            head = self._file.read(9)
            if len(head) < 9:
                self._problem(f"has no end: {at} bytes are readable (power lost, or still being written)")
                return
            opcode, length = struct.unpack("<BQ", head)
            if opcode in (DATA_END, FOOTER):
                return
            if length > self._size - at - 9:
                self._size = os.fstat(self._file.fileno()).st_size  # it may have grown
                if length > self._size - at - 9:
                    self._problem(f"ends inside a record: {at} bytes are readable (power lost, or damaged)")
                    return
            limit = MAX_RECORD if opcode in (CHUNK, MESSAGE) else _MAX_SMALL
            if opcode not in (SCHEMA, CHANNEL, MESSAGE, CHUNK) or length > limit:
                if length > limit:
                    self._problem(f"record at byte {at} left out: {length} bytes, expected at most {limit}")
                self._file.seek(length, os.SEEK_CUR)
                continue
            data = bytearray(length)
            if self._file.readinto(data) != length:  # type: ignore[attr-defined]
                self._problem(f"ends inside a record: {at} bytes are readable (power lost, or damaged)")
                return
            view = memoryview(data)
            if opcode == CHUNK:
                try:
                    unpacked = self._unpack(view)
                except ValueError as error:
                    self._problem(f"chunk at byte {at} left out: {error}")
                    continue
                yield from self._records(unpacked, at)
            else:
                yield from self._record(opcode, view, at)

    def _unpack(self, chunk: memoryview) -> memoryview:
        """The records of a chunk. Raises: ValueError."""
        if len(chunk) < 40:
            raise ValueError("cut short")
        _, _, size, crc, name_length = struct.unpack_from("<QQQII", chunk)
        if name_length > len(chunk) - 40:
            raise ValueError("damaged head")
        name = bytes(chunk[32 : 32 + name_length])
        (stored,) = struct.unpack_from("<Q", chunk, 32 + name_length)
        data = chunk[40 + name_length :]
        if stored != len(data):
            raise ValueError("damaged head")
        if size > MAX_RECORD:
            raise ValueError(f"{size} bytes unpacked, expected at most {MAX_RECORD}")
        if name == b"zstd":
            data = memoryview(_unzstd(data, size))
        elif name == b"lz4":
            data = memoryview(_unlz4(data, size))
        elif name:
            raise ValueError(f"compression {printable(name.decode(errors='replace'))[:20]!r} is not known")
        if len(data) != size:
            raise ValueError("damaged, its size is not as said")
        if crc and zlib.crc32(data) != crc:
            raise ValueError("damaged, its checksum is wrong")
        return data

    def _records(self, data: memoryview, chunk: int) -> Iterator[Message]:
        at = 0
        while at + 9 <= len(data):
            opcode, length = struct.unpack_from("<BQ", data, at)
            at += 9
            if length > len(data) - at:
                self._problem(f"chunk at byte {chunk} is damaged inside")
                return
            yield from self._record(opcode, data[at : at + length], chunk)
            at += length

    def _record(self, opcode: int, data: memoryview, at: int) -> Iterator[Message]:
        if opcode == MESSAGE and len(data) >= 22:
            channel, sequence, log_ns, publish_ns = struct.unpack_from("<HIQQ", data)
            topic = self.topics.get(channel)
            if topic is not None:
                yield Message(topic, channel, sequence, log_ns, publish_ns, data[22:])
        elif opcode in (SCHEMA, CHANNEL):
            try:
                self._learn(opcode, data)
            except (struct.error, ValueError, EOFError) as error:
                self._problem(f"record at byte {at} left out: {error}")

    def _learn(self, opcode: int, data: memoryview) -> None:
        """Remember a schema's name or a channel. Raises: ValueError, struct.error."""
        from mcap.data_stream import ReadDataStream
        from mcap.exceptions import McapError

        stream = ReadDataStream(io.BytesIO(data))
        try:
            if opcode == SCHEMA:
                schema = self._r.Schema.read(stream)
                self._schemas[schema.id] = schema.name[:256]
                return
            channel = self._r.Channel.read(stream)
        except McapError:
            raise ValueError("cut short") from None
        name = self._schemas.get(channel.schema_id, "")
        self.topics[channel.id] = Topic(
            channel.topic[:1024], channel.message_encoding[:64], name, channel.metadata
        )

    def summary(self) -> dict[int, tuple[Topic, int]] | None:
        """(topic, number of messages) by channel, from the end of the file; None where it has none.

        Also gives `span_ns`, the time between the first and the last message. The place in the file is kept.
        """
        at = self._file.tell()
        try:
            return self._summary()
        except (OSError, ValueError, struct.error):
            return None
        finally:
            self._file.seek(at)

    span_ns = 0

    def _summary(self) -> dict[int, tuple[Topic, int]] | None:
        from mcap.data_stream import ReadDataStream

        self._file.seek(-37, os.SEEK_END)
        foot = self._file.read(37)
        opcode, length, start, offsets, _ = struct.unpack_from("<BQQQI", foot)
        if foot[29:] != MAGIC or (opcode, length) != (FOOTER, 20) or not 0 < start <= offsets < self._size:
            return None
        counts: dict[int, int] = {}
        self._file.seek(offsets)
        groups = self._file.read(min(self._size - 37 - offsets, 4096))
        for place in range(0, len(groups) - 25, 26):
            _, length, kind, begin, size = struct.unpack_from("<BQBQQ", groups, place)
            if length != 17 or size > _MAX_SMALL or begin + size > self._size:
                return None
            if kind not in (SCHEMA, CHANNEL, STATISTICS):
                continue
            self._file.seek(begin)
            data = memoryview(self._file.read(size))
            if kind != STATISTICS:
                for _ in self._records(data, begin):
                    pass
                continue
            statistics = self._r.Statistics.read(ReadDataStream(io.BytesIO(data[9:])))
            counts = dict(statistics.channel_message_counts)
            self.span_ns = max(0, statistics.message_end_time - statistics.message_start_time)
        return {number: (topic, counts.get(number, 0)) for number, topic in self.topics.items()}


def _unzstd(data: memoryview, size: int) -> bytes:
    """Unpack at most `size` bytes, whatever the data say of themselves. Raises: ValueError."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as stream:
            return bytes(stream.read(size + 1))  # one more shows that there is more
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"damaged zstd data ({error})") from None


def _unlz4(data: memoryview, size: int) -> bytes:
    import lz4.frame  # type: ignore[import-untyped,import-not-found,unused-ignore]

    try:
        return bytes(lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1))
    except (RuntimeError, EOFError, MemoryError) as error:
        raise ValueError(f"damaged lz4 data ({error})") from None

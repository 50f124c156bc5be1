"""MCAP files: written so that what is on the disk is readable at any moment, read so that no file does harm.

The `mcap` package writes and reads the records; the frame of a chunk is handled here, because its writer
takes four copies of every picture and its reader trusts the lengths in a file.
Source: mcap.dev/spec (records, chunks, summary section).
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from edgekit.errors import MissingExtraError, UsageError, printable

MAGIC = b"\x89MCAP0\r\n"
CHUNK_BYTES = 1 << 20
"""A chunk is written when it holds so much."""
CHUNK_SECONDS = 1.0
"""A chunk is written, and the file brought to the disk, after so long at most."""
MAX_RECORD = 1 << 30
"""Largest record or chunk (unpacked) that is read."""
_MAX_SMALL = 1 << 24
"""Largest schema, channel or summary record that is read."""
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _DATA_END = 1, 2, 3, 4, 5, 6, 15
_CHUNK_INDEX, _STATISTICS, _METADATA_INDEX = 8, 11, 13
_VECTORS = 512
"""Buffers of one writev: POSIX promises 16, Linux takes 1024."""

Piece = bytes | bytearray | memoryview


def load_mcap(purpose: str) -> Any:
    """The module `mcap.records`. Raises: MissingExtraError ("needed to <purpose>") when it is not installed."""
    try:
        import mcap.records
    except ImportError:
        raise MissingExtraError("mcap", "mcap", purpose) from None
    return mcap.records


class McapWriter:
    """One file, made new under its final name; whole chunks are on the disk within `CHUNK_SECONDS`.

    Used by one thread; a second one of its own writes a chunk that has waited too long and calls
    fdatasync, so that a slow disk does not hold up the first. Memory: one chunk, and under 200 bytes for
    each chunk written (the index at the end of the file).

    Raises: OSError when the system refuses; what was written by then stays whole and readable.
    """

    def __init__(self, path: Path, library: str, metadata: dict[str, dict[str, str]]) -> None:
        self._r = load_mcap("record")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags, 0o666)
        self.size = 0
        """Bytes in the file."""
        self._schemas: list[Any] = []
        self._channels: list[Any] = []
        self._pieces: list[Piece] = []
        self._length = 0
        self._times: dict[int, list[tuple[int, int]]] = {}
        self._begun = 0.0
        self._chunks = 0
        self._counts: dict[int, int] = {}
        self._start, self._end = 2**64 - 1, 0
        self._indexes = self._builder()
        self._failed: OSError | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        head = self._builder()
        self._r.Header(profile="", library=library).write(head)
        metadata_indexes = []
        for name, entries in metadata.items():
            before = head.count
            self._r.Metadata(name=name, metadata=entries).write(head)
            metadata_indexes.append(
                self._r.MetadataIndex(offset=len(MAGIC) + before, length=head.count - before, name=name)
            )
        self._metadata_indexes = metadata_indexes
        try:
            self._append([MAGIC, head.end()])
        except OSError:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                path.unlink()  # nothing of worth is in it
            raise
        self._thread = threading.Thread(target=self._keep_safe, name="edgekit-mcap", daemon=True)
        self._thread.start()

    def _builder(self) -> Any:
        from mcap.data_stream import RecordBuilder

        return RecordBuilder()

    def schema(self, name: str, encoding: str, data: bytes) -> int:
        """Declare a schema; its number."""
        record = self._r.Schema(id=len(self._schemas) + 1, name=name, encoding=encoding, data=data)
        self._schemas.append(record)
        self._declare(record)
        return len(self._schemas)

    def channel(self, topic: str, encoding: str, schema: int, metadata: dict[str, str]) -> int:
        """Declare a channel; its number."""
        record = self._r.Channel(
            id=len(self._channels) + 1,
            topic=topic,
            message_encoding=encoding,
            schema_id=schema,
            metadata=metadata,
        )
        self._channels.append(record)
        self._declare(record)
        return len(self._channels)

    def _declare(self, record: Any) -> None:
        builder = self._builder()
        record.write(builder)
        with self._lock:
            self._put([builder.end()])

    def add(self, channel: int, sequence: int, log_ns: int, publish_ns: int, pieces: Sequence[Piece]) -> None:
        """Add a message, its data in pieces. They are borrowed until the chunk is written: see `flush`."""
        length = 22 + sum(map(len, pieces))
        log_ns, publish_ns = (min(max(v, 0), 2**64 - 1) for v in (log_ns, publish_ns))
        head = struct.pack("<BQHIQQ", _MESSAGE, length, channel, sequence & 0xFFFFFFFF, log_ns, publish_ns)
        with self._lock:
            self._times.setdefault(channel, []).append((log_ns, self._length))
            self._put([head, *pieces])
            if self._length >= CHUNK_BYTES:
                self._write_chunk()

    def flush(self) -> None:
        """Write the chunk in progress: afterwards no piece is borrowed any more."""
        with self._lock:
            self._write_chunk()

    def _put(self, pieces: list[Piece]) -> None:
        if not self._pieces:
            self._begun = time.monotonic()
        self._pieces += pieces
        self._length += sum(map(len, pieces))

    def _write_chunk(self) -> None:
        if self._failed is None and not self._times:
            return  # declarations wait for the first message
        pieces, length, times = self._pieces, self._length, self._times
        self._pieces, self._length, self._times = [], 0, {}
        if self._failed is not None:
            raise self._failed
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        start = min(t for entries in times.values() for t, _ in entries)
        end = max(t for entries in times.values() for t, _ in entries)
        # opcode, length; start, end, unpacked size, crc, no compression, size
        head = struct.pack("<BQQQQIIQ", _CHUNK, 40 + length, start, end, length, crc, 0, length)
        chunk_bytes, at = len(head) + length, self.size
        tail = self._builder()
        offsets = {}
        for channel, entries in times.items():
            offsets[channel] = at + chunk_bytes + tail.count
            self._r.MessageIndex(channel_id=channel, records=sorted(entries)).write(tail)
        index_bytes = tail.count
        try:
            self._append([head, *pieces, tail.end()])
        except OSError as error:
            self._failed = error
            raise
        self._r.ChunkIndex(
            message_start_time=start,
            message_end_time=end,
            chunk_start_offset=at,
            chunk_length=chunk_bytes,
            message_index_offsets=offsets,
            message_index_length=index_bytes,
            compression="",
            compressed_size=length,
            uncompressed_size=length,
        ).write(self._indexes)
        self._chunks += 1
        self._start, self._end = min(self._start, start), max(self._end, end)
        for channel, entries in times.items():
            self._counts[channel] = self._counts.get(channel, 0) + len(entries)

    def _append(self, pieces: Sequence[Piece]) -> None:
        """Write all of `pieces`, or nothing: a full disk takes a part first, which is taken back."""
        left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        total = sum(map(len, left))
        try:
            while left:
                done = os.writev(self._fd, left[:_VECTORS])
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if done:
                    left[0] = left[0][done:]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)
            raise
        self.size += total

    def _keep_safe(self) -> None:
        while not self._stop.wait(CHUNK_SECONDS / 2):
            try:
                with self._lock:
                    if self._failed is not None:
                        return
                    if self._times and time.monotonic() - self._begun > CHUNK_SECONDS / 2:
                        self._write_chunk()
                _to_disk(self._fd)
            except OSError as error:
                with self._lock:
                    self._failed = self._failed or error
                return

    def finish(self) -> None:
        """Write what is left and the summary, and close. Raises: OSError; the chunks before stay readable."""
        self._stop.set()
        self._thread.join(timeout=30)
        try:
            with self._lock:
                failed = self._failed
                if failed is None:
                    self._write_chunk()
                else:
                    self._pieces, self._times, self._failed = [], {}, None
                self._append([self._summary()])
                _to_disk(self._fd)
                if failed is not None:
                    raise failed
        finally:
            os.close(self._fd)

    def _summary(self) -> bytes:
        r, out = self._r, self._builder()
        r.DataEnd(data_section_crc=0).write(out)
        skip = out.count
        begin = self.size + skip
        offsets: list[Any] = []

        def note(opcode: int, at: int) -> None:
            offsets.append(
                r.SummaryOffset(group_opcode=opcode, group_start=self.size + at, group_length=out.count - at)
            )

        def group(records: Sequence[Any]) -> None:
            if records:
                at = out.count
                for record in records:
                    record.write(out)
                note(_opcode(records[0]), at)

        group(self._schemas)
        group(self._channels)
        group(
            [
                r.Statistics(
                    message_count=sum(self._counts.values()),
                    schema_count=len(self._schemas),
                    channel_count=len(self._channels),
                    attachment_count=0,
                    metadata_count=len(self._metadata_indexes),
                    chunk_count=self._chunks,
                    message_start_time=self._start if self._chunks else 0,
                    message_end_time=self._end,
                    channel_message_counts=self._counts,
                )
            ]
        )
        if self._chunks:
            at = out.count
            out.write(self._indexes.end())
            note(_CHUNK_INDEX, at)
        group(self._metadata_indexes)
        offset_start = self.size + out.count
        for record in offsets:
            record.write(out)
        body: bytes = out.end()
        foot = struct.pack("<BQQQ", _FOOTER, 20, begin, offset_start)
        crc = zlib.crc32(foot, zlib.crc32(body[skip:]))
        return body + foot + struct.pack("<I", crc) + MAGIC


def _to_disk(fd: int) -> None:
    """Wait until the file's data are on the disk. Raises: OSError."""
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync


def _opcode(record: Any) -> int:
    return {"Schema": _SCHEMA, "Channel": _CHANNEL, "Statistics": _STATISTICS}.get(
        type(record).__name__, _METADATA_INDEX
    )


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
            if opcode in (_DATA_END, _FOOTER):
                return
            if length > self._size - at - 9:
                self._size = os.fstat(self._file.fileno()).st_size  # it may have grown
                if length > self._size - at - 9:
                    self._problem(f"ends inside a record: {at} bytes are readable (power lost, or damaged)")
                    return
            limit = MAX_RECORD if opcode in (_CHUNK, _MESSAGE) else _MAX_SMALL
            if opcode not in (_SCHEMA, _CHANNEL, _MESSAGE, _CHUNK) or length > limit:
                if length > limit:
                    self._problem(f"record at byte {at} left out: {length} bytes, expected at most {limit}")
                self._file.seek(length, os.SEEK_CUR)
                continue
            data = bytearray(length)
            if self._file.readinto(data) != length:  # type: ignore[attr-defined]
                self._problem(f"ends inside a record: {at} bytes are readable (power lost, or damaged)")
                return
            view = memoryview(data)
            if opcode == _CHUNK:
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
        if opcode == _MESSAGE and len(data) >= 22:
            channel, sequence, log_ns, publish_ns = struct.unpack_from("<HIQQ", data)
            topic = self.topics.get(channel)
            if topic is not None:
                yield Message(topic, channel, sequence, log_ns, publish_ns, data[22:])
        elif opcode in (_SCHEMA, _CHANNEL):
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
            if opcode == _SCHEMA:
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
        if foot[29:] != MAGIC or (opcode, length) != (_FOOTER, 20) or not 0 < start <= offsets < self._size:
            return None
        counts: dict[int, int] = {}
        self._file.seek(offsets)
        groups = self._file.read(min(self._size - 37 - offsets, 4096))
        for place in range(0, len(groups) - 25, 26):
            _, length, kind, begin, size = struct.unpack_from("<BQBQQ", groups, place)
            if length != 17 or size > _MAX_SMALL or begin + size > self._size:
                return None
            if kind not in (_SCHEMA, _CHANNEL, _STATISTICS):
                continue
            self._file.seek(begin)
            data = memoryview(self._file.read(size))
            if kind != _STATISTICS:
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

"""MCAP files written so that what is on the disk is readable at any moment."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.runtime.mcap_file import (
    CHANNEL,
    CHUNK,
    CHUNK_INDEX,
    FOOTER,
    MAGIC,
    MESSAGE,
    METADATA_INDEX,
    SCHEMA,
    STATISTICS,
    load_mcap,
)

CHUNK_BYTES = 1 << 20
"""A chunk is written when it holds so much."""
CHUNK_SECONDS = 1.0
"""A chunk is written, and the file brought to the disk, after so long at most."""
_VECTORS = 512
"""Buffers of one writev: POSIX promises 16, Linux takes 1024."""

Piece = bytes | bytearray | memoryview


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
        head = struct.pack("<BQHIQQ", MESSAGE, length, channel, sequence & 0xFFFFFFFF, log_ns, publish_ns)
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
        head = struct.pack("<BQQQQIIQ", CHUNK, 40 + length, start, end, length, crc, 0, length)
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
            note(CHUNK_INDEX, at)
        group(self._metadata_indexes)
        offset_start = self.size + out.count
        for record in offsets:
            record.write(out)
        body: bytes = out.end()
        foot = struct.pack("<BQQQ", FOOTER, 20, begin, offset_start)
        crc = zlib.crc32(foot, zlib.crc32(body[skip:]))
        return body + foot + struct.pack("<I", crc) + MAGIC


def _to_disk(fd: int) -> None:
    """Wait until the file's data are on the disk. Raises: OSError."""
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync


def _opcode(record: Any) -> int:
    return {"Schema": SCHEMA, "Channel": CHANNEL, "Statistics": STATISTICS}.get(
        type(record).__name__, METADATA_INDEX
    )

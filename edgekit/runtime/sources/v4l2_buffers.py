"""The driver's buffers: mapped once, lent to readers as views, queued again when the last reader lets go."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

from edgekit.errors import EdgekitError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Lease
from edgekit.runtime.sources import v4l2_abi as abi
from edgekit.runtime.sources.v4l2_device import Device, PictureFormat, buffer_for

IO = {"mmap": abi.MEMORY_MMAP, "dmabuf": abi.MEMORY_MMAP, "userptr": abi.MEMORY_USERPTR}
"""How buffers are shared with the driver. dmabuf: its own buffers, exported as descriptors that a GPU can import."""

Allocator = Callable[[int], np.ndarray]
"""Bytes -> uint8 [bytes] that begins on a page and stays where it is."""


def pages(nbytes: int) -> np.ndarray:
    """Memory of our own that begins on a page, zeroed. Shared, so that a fork does not move it from under the driver."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class BufferLease(Lease):
    """The lease of one buffer of one pool."""

    __slots__ = ("index", "pool")

    def __init__(self, pool: BufferPool, index: int) -> None:
        super().__init__(lambda: pool.give_back(index))
        self.pool = pool
        self.index = index


class BufferPool:
    """The buffers of one opening of a device, which it owns: closing the pool closes the device.

    A buffer is with the driver or leased. Leases end on any thread, also after `close`; the pixels are
    views that keep their mapping alive, so a reader never touches memory that is gone.

    failed: why a buffer could not be given back, which the reading thread raises. Words only: an exception
        would keep the callers' frames alive, and with them a mapping of a device that is gone.
    Raises: SourceLost, StreamError, UsageError; nothing stays open then.
    """

    def __init__(
        self, device: Device, form: PictureFormat, io: str, count: int, allocator: Allocator
    ) -> None:
        self.device = device
        self.form = form
        self.io = io
        self.memory = IO[io]
        self.failed = ""
        self.leased: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._descriptors: list[tuple[int, ...]] = []
        self._blocks: list[list[np.ndarray]] = []
        self._pixels: list[Pixels] = []
        self._used = _needed(form)
        try:
            self.count = self._request(count)
            if self.count < 2:
                raise UsageError(
                    f"camera {device.path}: gave {self.count} of {count} buffers, expected at least 2"
                )
            for index in range(self.count):
                self._blocks.append(self._attach(index, allocator))
                self._pixels.append(self._view(index, (0,) * len(form.sizes)))
            for index in range(self.count):
                self._queue(index)
            device.ioctl(abi.STREAMON, ctypes.c_int(device.type), "starting")
        except BaseException:
            self.close()
            raise

    def _request(self, count: int) -> int:
        request = abi.RequestBuffers(count=count, type=self.device.type, memory=self.memory)
        try:
            self.device.ioctl(abi.REQBUFS, request, f"asking for {self.io} buffers")
        except EdgekitError:
            if self._offered() and not self._offered() & (1 << (0 if self.memory == abi.MEMORY_MMAP else 1)):
                raise UsageError(
                    f"camera {self.device.path}: driver {self.device.driver} has no io={self.io}. Use io=mmap"
                ) from None
            raise
        return int(request.count)

    def _offered(self) -> int:
        """V4L2_BUF_CAP_SUPPORTS_*: bit 0 MMAP, bit 1 USERPTR; 0 where the kernel does not say."""
        request = abi.RequestBuffers(count=0, type=self.device.type, memory=abi.MEMORY_MMAP)
        try:
            abi.ioctl(self.device.fd, abi.REQBUFS, request)
        except OSError:
            return 0
        return int(request.capabilities)

    def _attach(self, index: int, allocator: Allocator) -> list[np.ndarray]:
        """Memory of one buffer, uint8 [bytes] for each of its memory planes."""
        planes = (abi.Plane * abi.MAX_PLANES)()
        buffer = buffer_for(self.device, self.memory, index, planes)
        self.device.ioctl(abi.QUERYBUF, buffer, "asking for a buffer")
        number = len(self.form.sizes)
        if self.device.separate:
            lengths = [planes[i].length for i in range(number)]
            offsets = [planes[i].m.mem_offset for i in range(number)]
        else:
            lengths, offsets = [buffer.length], [buffer.m.offset]
        if self.io == "userptr":
            return [self._own(size, allocator) for size in self.form.sizes]
        if self.io == "mmap":
            return [self._map(self.device.fd, n, at) for n, at in zip(lengths, offsets, strict=True)]
        descriptors: list[int] = []
        self._descriptors.append(())
        for plane in range(number):
            export = abi.ExportBuffer(
                type=self.device.type, index=index, plane=plane, flags=os.O_CLOEXEC | os.O_RDWR
            )
            try:
                abi.ioctl(self.device.fd, abi.EXPBUF, export)
            except OSError as error:
                raise UsageError(
                    f"camera {self.device.path}: driver {self.device.driver} cannot export its buffers "
                    f"({error.strerror}). Use io=mmap"
                ) from None
            descriptors.append(export.fd)
            self._descriptors[-1] = tuple(descriptors)
        return [self._map(fd, n, 0) for fd, n in zip(descriptors, lengths, strict=True)]

    def _map(self, fd: int, length: int, offset: int) -> np.ndarray:
        # read-only: a reader that draws into its frame would draw into everyone's
        try:
            return np.frombuffer(
                mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset), np.uint8
            )
        except OSError as error:
            raise self.device.failure(error, "mapping its buffers") from None

    def _own(self, size: int, allocator: Allocator) -> np.ndarray:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        block = allocator(size)
        address = int(block.__array_interface__["data"][0])
        if block.dtype != np.uint8 or block.ndim != 1 or block.size < size or address % mmap.PAGESIZE:
            raise UsageError(
                f"camera {self.device.path}: allocator: expected uint8 [{size}] that begins on a page, got "
                f"{block.dtype} {list(block.shape)} at {address:#x}"
            )
        return block

    def _view(self, index: int, data_offsets: tuple[int, ...]) -> Pixels:
        form, planes = self.form, []
        for shape, stride, start, memory in zip(
            form.layout.plane_shapes, form.strides, form.offsets, form.memory, strict=True
        ):
            inner = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(1, len(shape)))
            try:
                plane = np.ndarray(
                    shape,
                    np.uint8,
                    self._blocks[index][memory],
                    start + data_offsets[memory],
                    (stride, *inner),
                )
            except ValueError:
                raise UsageError(
                    f"camera {self.device.path}: its buffer of {self._blocks[index][memory].size} bytes does not hold "
                    f"{form.layout.width}x{form.layout.height} {form.layout.format} with rows {stride} bytes apart"
                ) from None
            plane.flags.writeable = False
            planes.append(plane)
        return Pixels(tuple(planes), form.layout)

    # ---- to and from the driver

    def _queue(self, index: int) -> None:
        planes = (abi.Plane * abi.MAX_PLANES)()
        buffer = buffer_for(self.device, self.memory, index, planes)
        if self.device.separate:
            buffer.length = len(self.form.sizes)
        if self.io == "userptr":
            for memory, block in enumerate(self._blocks[index]):
                address = int(block.__array_interface__["data"][0])
                if self.device.separate:
                    planes[memory].m.userptr, planes[memory].length = address, block.size
                else:
                    buffer.m.userptr, buffer.length = address, block.size
        self.device.ioctl(abi.QBUF, buffer, "giving a buffer back")

    def take(self) -> tuple[abi.Buffer, Pixels, bool] | None:
        """The oldest filled buffer: what the driver says of it, its picture, whether it is whole; None when
        there is none yet. It is leased from now on. Raises: SourceLost."""
        planes = (abi.Plane * abi.MAX_PLANES)()
        buffer = buffer_for(self.device, self.memory, 0, planes)
        try:
            abi.ioctl(self.device.fd, abi.DQBUF, buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.device.failure(error, "streaming") from None
        index = int(buffer.index)
        with self._lock:
            self.leased.add(index)
        pixels, used = self._pixels[index], [int(buffer.bytesused)]
        starts = [0] * len(self.form.sizes)
        if self.device.separate:
            used = [int(planes[i].bytesused) for i in range(len(starts))]
            starts = [int(planes[i].data_offset) for i in range(len(starts))]
            if any(starts):  # a header before the picture, which may differ from frame to frame
                pixels = self._view(index, tuple(starts))
        whole = all(u >= at + need for u, at, need in zip(used, starts, self._used, strict=True))
        self._sync(index, 0)
        return buffer, pixels, whole and not buffer.flags & abi.BUF_FLAG_ERROR

    def lease(self, index: int) -> BufferLease:
        return BufferLease(self, index)

    def give_back(self, index: int) -> None:
        """The last reader let go: the driver may fill the buffer again. Any thread; never raises."""
        with self._lock:
            self.leased.discard(index)
            if self._closed:
                self._close_descriptors(index)
                return
            try:
                self._sync(index, abi.DMA_BUF_SYNC_END)
                self._queue(index)
            except EdgekitError as error:
                self.failed = self.failed or str(error)

    def _sync(self, index: int, end: int) -> None:
        for fd in self.descriptors(index):
            flags = ctypes.c_uint64(abi.DMA_BUF_SYNC_READ | end)
            try:
                abi.ioctl(fd, abi.DMA_BUF_SYNC, flags)
            except OSError as error:
                raise self.device.failure(error, "synchronising a buffer") from None

    def descriptors(self, index: int) -> tuple[int, ...]:
        """DMABUF descriptors of one buffer, one for each memory plane; empty unless io=dmabuf."""
        return self._descriptors[index] if self._descriptors else ()

    def _close_descriptors(self, index: int) -> None:
        for fd in self.descriptors(index):
            os.close(fd)
        if self._descriptors:
            self._descriptors[index] = ()

    def close(self) -> None:
        """Stop, and let go of the device. Leased buffers stay readable; their descriptors close with their leases."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for request, argument in (
                (abi.STREAMOFF, ctypes.c_int(self.device.type)),
                # frees the driver's queue even while leased buffers are mapped, so that the device can be opened anew
                (abi.REQBUFS, abi.RequestBuffers(count=0, type=self.device.type, memory=self.memory)),
            ):
                try:
                    abi.ioctl(self.device.fd, request, argument)
                except OSError:  # the device is gone or was never started; closing it frees everything
                    continue
            for index in range(len(self._descriptors)):
                if index not in self.leased:
                    self._close_descriptors(index)
            self._pixels.clear()
            self._blocks.clear()
            self.device.close()


def _needed(form: PictureFormat) -> list[int]:
    """Bytes from the begin of each memory plane to the end of the picture in it."""
    needed = [0] * len(form.sizes)
    for shape, stride, start, memory in zip(
        form.layout.plane_shapes, form.strides, form.offsets, form.memory, strict=True
    ):
        end = start + stride * (shape[0] - 1) + int(np.prod(shape[1:]))
        needed[memory] = max(needed[memory], end)
    return needed

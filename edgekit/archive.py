"""The container of a bundle: a canonical stored zip file, or a folder of the same files.

Canonical means that names, sizes, checksums and their order determine every other byte. The
reader therefore derives the headers again and compares: a byte that differs anywhere between the
payloads, or a trick that zip tools disagree about, cannot pass. docs/bundle.md has the layout.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from edgekit.errors import BundleError, OutputError
from edgekit.manifest import CHECKSUM, EVIDENCE, MANIFEST, MAX_FILES, SIGNATURE, check_paths
from edgekit.schema import SchemaError, printable

ALIGN = 64
ALIGN_PAYLOAD = 16384
"""A multiple of 4096 and the page size of a Raspberry Pi 5 and of recent Android: a payload maps alone."""

MAX_BYTES = (1 << 32) - 1
"""Of a zip file: offsets have 32 bits. Larger bundles are folders."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_VERSION = 10  # plain stored files
_MADE_BY = 3 << 8 | 20  # Unix: the mode below is a Unix mode
_DATE = 1 << 5 | 1  # 1980-01-01 00:00, the first that a zip file can say
_MODE = (stat.S_IFREG | 0o644) << 16
_PADDING = 0xD935  # the extra field that Android's zipalign uses: alignment, then zeros


class Archive:
    """The files of an open bundle as views; nothing but the container is checked.

    `crcs`: what the zip file says about each file's CRC-32; empty for a folder.
    """

    def __init__(self, path: Path, views: dict[str, memoryview], crcs: dict[str, int], maps: list[mmap.mmap]):
        self.path = path
        self.views = views
        self.crcs = crcs
        self._maps = maps

    def close(self) -> None:
        """Drop the maps. Views and arrays still in use keep theirs alive until they are gone."""
        for view in self.views.values():
            with contextlib.suppress(BufferError):
                view.release()
        self.views.clear()
        for item in self._maps:
            with contextlib.suppress(BufferError):
                item.close()
        self._maps.clear()


def order(names: Iterable[str]) -> list[str]:
    """Names in the order of the file: the manifest and what belongs to it first, the payloads last."""
    head = {MANIFEST: 0, CHECKSUM: 1, SIGNATURE: 2, EVIDENCE: 3}
    return sorted(names, key=lambda name: (head.get(name, len(head)), name))


# --- layout of the zip file --------------------------------------------------------------------


def _local(name: str, size: int, crc: int, position: int) -> bytes:
    """Local header of `name` at `position`, padded so that the data after it is aligned."""
    align = ALIGN_PAYLOAD if name.startswith("segments/") else ALIGN
    start = position + _LOCAL.size + len(name) + 6
    padding = -start % align
    extra = struct.pack("<3H", _PADDING, 2 + padding, align) + bytes(padding)
    head = _LOCAL.pack(b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, size, size, len(name), len(extra))
    return head + name.encode("ascii") + extra


def _central(name: str, size: int, crc: int, position: int) -> bytes:
    fields = (_MADE_BY, _VERSION, 0, 0, 0, _DATE, crc, size, size, len(name), 0, 0, 0, 0, _MODE, position)
    return _CENTRAL.pack(b"PK\1\2", *fields) + name.encode("ascii")


def _end(count: int, size: int, position: int) -> bytes:
    return _END.pack(b"PK\5\6", 0, 0, count, count, size, position, 0)


def zip_chunks(files: Mapping[str, bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of the zip file that holds `files`, piece by piece.

    Raises: BundleError for unsafe names, and when the file would pass 4 GiB.
    """
    try:
        check_paths(files.keys())
    except SchemaError as error:
        raise BundleError(f"bundle: {error}") from None
    position, central = 0, b""
    for name in order(files):
        data = files[name]
        crc = zlib.crc32(data)
        if position + len(data) + len(name) + 2 * ALIGN_PAYLOAD > MAX_BYTES - len(central):
            raise BundleError("bundle: larger than 4 GiB, which a zip file cannot hold. Write it as a folder")
        head = _local(name, len(data), crc, position)
        central += _central(name, len(data), crc, position)
        yield head
        yield data
        position += len(head) + len(data)
    yield central + _end(len(files), len(central), position)


# --- reading -----------------------------------------------------------------------------------


def open_archive(path: Path) -> Archive:
    """Map the zip file or the folder at `path`.

    Raises: BundleError when it is missing, unreadable, unsafe or not in canonical form.
    """
    where = f"bundle {printable(str(path), 200)}"
    try:
        if path.is_dir():
            return _open_folder(path, where)
        return _open_zip(path, where)
    except FileNotFoundError:
        raise BundleError(f"{where}: no such file. Check the path, or build it with: edgekit build") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise BundleError(f"{where}: cannot be read: {reason}") from None


def _open_zip(path: Path, where: str) -> Archive:
    view, item = _map(path, MAX_BYTES, where)
    maps = [] if item is None else [item]
    try:
        entries = _entries(view, where)
    except BaseException:
        view.release()
        for item in maps:
            item.close()
        raise
    views = {name: view[start : start + size].toreadonly() for name, (start, size, _) in entries.items()}
    return Archive(path, views, {name: crc for name, (_, _, crc) in entries.items()}, maps)


def _map(path: Path, limit: int, where: str, flags: int = 0) -> tuple[memoryview, mmap.mmap | None]:
    """The bytes of a regular file. O_NONBLOCK: a FIFO must not hang; small files are read, not mapped."""
    flags |= os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{where}: not a regular file")
        if info.st_size > limit:
            raise BundleError(f"{where}: {info.st_size} bytes, expected at most {limit}")
        if info.st_size < 1 << 16:
            with os.fdopen(os.dup(fd), "rb") as file:
                return memoryview(file.read(1 << 16)), None
        item = mmap.mmap(fd, info.st_size, access=mmap.ACCESS_READ)
        return memoryview(item), item
    finally:
        os.close(fd)


def _entries(data: memoryview, where: str) -> dict[str, tuple[int, int, int]]:
    """Name -> (start, size, crc) of every file; every byte that is not a file's is compared."""
    size = len(data)
    if size < _END.size:
        raise BundleError(f"{where}: {size} bytes, too short for a bundle. Copy or build it again")
    if bytes(data[:4]) != b"PK\3\4":
        raise BundleError(
            f"{where}: not a bundle, expected a zip file that starts with 'PK', got {_start(data)}"
        )
    tail = _END.unpack(data[size - _END.size :])
    if tail[0] != b"PK\5\6":
        raise BundleError(
            f"{where}: damaged: its end is missing or something follows it. Copy or build it again"
        )
    count, table_size, table = tail[4], tail[5], tail[6]
    if 0xFFFF in tail[1:5] or 0xFFFFFFFF in tail[5:7]:
        raise BundleError(f"{where}: uses zip64, which bundles do not")
    if count > MAX_FILES:
        raise BundleError(f"{where}: {count} files, expected at most {MAX_FILES}")
    if table + table_size != size - _END.size:
        raise BundleError(f"{where}: damaged: the file table does not fill the end. Copy or build it again")
    if bytes(data[size - _END.size :]) != _end(count, table_size, table):
        raise BundleError(
            f"{where}: damaged or altered: end record is not in canonical form. Copy or build it again"
        )
    files: dict[str, tuple[int, int]] = {}
    position = table
    for _ in range(count):
        name, length, crc, position = _read_central(data, position, size - _END.size, where)
        if name in files:
            raise BundleError(f"{where}: file name {name!r}: there twice")
        files[name] = (length, crc)
    try:
        check_paths(files.keys())
    except SchemaError as error:
        raise BundleError(f"{where}: {error}") from None
    if list(files) != order(files):
        raise BundleError(f"{where}: altered: files are not in canonical order")
    return _walk(data, files, table, where)


def _start(data: memoryview) -> str:
    return bytes(data[:4]).hex(" ")


def _read_central(data: memoryview, position: int, end: int, where: str) -> tuple[str, int, int, int]:
    """(name, size, crc, next position) of one record of the file table, with tricks told apart."""
    if position + _CENTRAL.size > end or bytes(data[position : position + 4]) != b"PK\1\2":
        raise BundleError(f"{where}: damaged: file table is cut short. Copy or build it again")
    fields = _CENTRAL.unpack(data[position : position + _CENTRAL.size])
    flags, method, crc, packed, size, name_size = fields[3], fields[4], *fields[7:11]
    raw = bytes(data[position + _CENTRAL.size : min(end, position + _CENTRAL.size + name_size)])
    name = printable(raw.decode("latin-1"), 100)
    mode = stat.S_IFMT(fields[15] >> 16)
    if flags & 1:
        raise BundleError(f"{where}: file {name!r} is encrypted, which bundles do not allow")
    if method != 0:
        raise BundleError(
            f"{where}: file {name!r} is compressed (method {method}), bundles hold stored files only"
        )
    if 0xFFFFFFFF in (packed, size):
        raise BundleError(f"{where}: file {name!r} uses zip64, which bundles do not")
    if mode == stat.S_IFLNK:
        raise BundleError(f"{where}: file {name!r} is a link, which bundles do not allow")
    if mode == stat.S_IFDIR or raw.endswith(b"/"):
        raise BundleError(f"{where}: {name!r} is a folder entry, which bundles do not have")
    if size > len(data):
        raise BundleError(f"{where}: file {name!r} claims {size} bytes, the bundle has {len(data)}")
    if not raw.isascii():
        raise BundleError(f"{where}: file name {name!r}: expected ASCII")
    name = raw.decode("ascii")
    length = _CENTRAL.size + name_size
    if bytes(data[position : position + length]) != _central(name, size, crc, fields[16]):
        raise BundleError(
            f"{where}: damaged or altered: table entry of {printable(name, 100)!r} is not in canonical form"
        )
    return name, size, crc, position + length


def _walk(
    data: memoryview, files: dict[str, tuple[int, int]], table: int, where: str
) -> dict[str, tuple[int, int, int]]:
    """Place the files one after the other as the writer does and compare all that lies between them."""
    entries: dict[str, tuple[int, int, int]] = {}
    position, record = 0, table
    for name, (size, crc) in files.items():
        head = _local(name, size, crc, position)
        start = position + len(head)
        if start + size > table:
            raise BundleError(
                f"{where}: damaged: file {name!r} runs into the file table. Copy or build it again"
            )
        wanted = _central(name, size, crc, position)
        if bytes(data[position:start]) != head or bytes(data[record : record + len(wanted)]) != wanted:
            raise BundleError(f"{where}: damaged or altered: header of {name!r} is not in canonical form")
        entries[name] = (start, size, crc)
        position, record = start + size, record + len(wanted)
    if position != table:
        raise BundleError(f"{where}: damaged or altered: {table - position} bytes belong to no file")
    return entries


def newer_schema(path: Path) -> int | None:
    """The schema version that the manifest of an unreadable bundle claims, if that can be found out at all.

    A later schema may change the container; its readers must still be told so. Looks at the
    place where every version keeps the manifest, trusts nothing, returns None when in doubt.
    """
    try:
        file = path / MANIFEST if path.is_dir() else path
        with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            data = stream.read(1 << 20)
    except (OSError, ValueError):
        return None
    if not path.is_dir():
        at = data.find(MANIFEST.encode()) - _LOCAL.size
        if at < 0:
            return None
        sig, _, _, method, _, _, _, packed, _, name_size, extra_size = _LOCAL.unpack(
            data[at : at + _LOCAL.size]
        )
        if sig != b"PK\3\4":
            return None
        start = at + _LOCAL.size + name_size + extra_size
        data = data[start : start + packed] if packed else data[start:]
        if method == zlib.DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, 1 << 20)
            except zlib.error:
                return None
    # canonical JSON sorts its keys: match the key text, since the end may be cut off
    found = re.search(rb'"schema_version"\s*:\s*([1-9][0-9]{0,5})\s*[,}]', data)
    return int(found.group(1)) if found else None


def _open_folder(path: Path, where: str) -> Archive:
    names = _list_folder(path, where)
    try:
        check_paths(names)
    except SchemaError as error:
        raise BundleError(f"{where}: {error}") from None
    views: dict[str, memoryview] = {}
    maps: list[mmap.mmap] = []
    for name in names:
        view, item = _map(path / name, 1 << 40, f"{where}: file {name!r}", getattr(os, "O_NOFOLLOW", 0))
        views[name] = view.toreadonly()
        if item is not None:
            maps.append(item)
    return Archive(path, views, {}, maps)


def _list_folder(path: Path, where: str) -> list[str]:
    """Relative names of all files below `path`. Links, devices and empty folders are refused."""
    names: list[str] = []
    todo = [""]
    while todo:
        folder = todo.pop()
        empty = True
        with os.scandir(path / folder) as entries:
            for entry in entries:
                empty = False
                name = f"{folder}{entry.name}"
                if entry.is_symlink():
                    raise BundleError(f"{where}: file {name!r} is a link, which bundles do not allow")
                if entry.is_dir(follow_symlinks=False):
                    if name.count("/") >= 8:
                        raise BundleError(f"{where}: folder {name!r} lies too deep")
                    todo.append(name + "/")
                elif entry.is_file(follow_symlinks=False):
                    names.append(name)
                else:
                    raise BundleError(f"{where}: {name!r} is not a regular file")
                if len(names) + len(todo) > 2 * MAX_FILES:
                    raise BundleError(f"{where}: more than {MAX_FILES} files. Is it a bundle?")
        if empty and folder:
            raise BundleError(f"{where}: folder {folder!r} is empty, expected only the files of the bundle")
    return order(names)


# --- writing -----------------------------------------------------------------------------------


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview], what: str) -> None:
    """Write a file so that `path` holds all of it or what it held before, also after a crash.

    Raises: OutputError, one line, when the disk is full, read-only and so on; nothing is left then.
    """
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OutputError(f"{what} {path}: cannot be written: a folder of that name is there")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(fd, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(what, path, error) from None


def write_folder(path: Path, files: Mapping[str, bytes | memoryview], what: str) -> None:
    """Write `files` as a folder at `path`, whole or not at all. The caller has made sure that what
    lies there may be replaced.

    Raises: OutputError, one line; nothing is left then.
    """
    mark = f"{os.getpid()}.{os.urandom(4).hex()}.tmp"
    temporary, old = (
        path.with_name(f".{path.name[:80]}.{mark}"),
        path.with_name(f".{path.name[:80]}.old.{mark}"),
    )
    try:
        check_paths(files.keys())
        try:
            temporary.mkdir(parents=True)
            for name in order(files):
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as file:
                    file.write(files[name])
                    file.flush()
                    os.fsync(file.fileno())
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
        _sync_folder(path.parent)
    except SchemaError as error:
        raise BundleError(f"bundle: {error}") from None
    except OSError as error:
        raise write_error(what, path, error) from None


def write_error(what: str, path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # mkdir's word for a file where a folder is needed
        reason = f"{error.filename} is not a folder" if error.filename else "Not a directory"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    step = "Free space there or choose another folder" if full else "Choose another folder"
    return OutputError(f"{what} {path}: cannot be written: {reason}. {step}")


def check_writable(folder: Path) -> None:
    """Could files be written into `folder`, made first where needed? Leaves nothing behind.

    Raises: OutputError. A disk may still fill up later; this catches what cannot work from the start.
    """
    made: list[Path] = []
    try:
        missing = folder
        while not os.path.lexists(missing) and missing != missing.parent:
            made.append(missing)
            missing = missing.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if not isinstance(error, OSError):
            error = OSError(errno.EINVAL, str(error))
        raise write_error("folder", folder, error) from None
    finally:
        for new in made:  # deepest first
            with contextlib.suppress(OSError, ValueError):
                new.rmdir()


def _sync_folder(path: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder go without."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

"""Compiled engines and timing caches on disk: written atomically, checked before use, bounded.

A cache never fails a load: what cannot be read is built again, what cannot be written is not kept, both
with a warning. Files are private to the user, for TensorRT trusts an engine that it loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

_MAGIC = b"edgekit-cache-1 "
_HEADER = len(_MAGIC) + 64 + 1
MAX_BYTES = 4 << 30
MAX_FILES = 64


def default_dir() -> Path:
    """`$EDGEKIT_CACHE`, else `edgekit` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("EDGEKIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "edgekit"


def key(*facts: object) -> str:
    """File name for what `facts` decide: 32 hexadecimal digits of SHA-256."""
    return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:32]


class Cache:
    """Files `<name>` in `folder`: a header with the SHA-256 of the content, then the content."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.max_files = max_files

    def read(self, name: str) -> bytes | None:
        """The content, None if there is none or it is damaged (with a warning; the file then goes)."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(
                f"cache {path}: cannot be read ({error.strerror}); compiling again", RuntimeWarning, 2
            )
            return None
        content = data[_HEADER:]
        if data[:_HEADER] != _header(content):
            warnings.warn(f"cache {path}: is damaged; compiling again", RuntimeWarning, 2)
            self.drop(name)
            return None
        with contextlib.suppress(OSError):  # the age decides what is dropped first
            os.utime(path)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Keeps `content`, then drops the files longest unused beyond the bounds."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".writing-")  # mode 0600
            with os.fdopen(handle, "wb") as file:
                file.write(_header(content))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
            temporary = None
            self._trim(name)
        except OSError as error:
            warnings.warn(
                f"cache {self.folder}: cannot be written ({error.strerror}); not kept", RuntimeWarning, 2
            )
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def drop(self, name: str) -> None:
        """Removes a file that proved useless."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _trim(self, newest: str) -> None:
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may drop it meanwhile
                stat = path.stat()
                files.append((path.name == newest, stat.st_mtime_ns, stat.st_size, path))
        files.sort(reverse=True)
        total = 0
        for i, (is_newest, _, size, path) in enumerate(files):
            total += size
            if not is_newest and (total > self.max_bytes or i >= self.max_files):
                self.drop(path.name)


def _header(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n"

"""These tests run on a kernel with real V4L2 cameras (`make test-camera`), four of vivid's; see tools/camera/test.sh."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.camera.vivid import Vivid

USB, BOARD, MULTIPLANAR, HDMI = (f"/dev/video{n}" for n in range(4))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "VM_OUT" in os.environ:
        return
    for item in items:
        if Path(__file__).parent in Path(str(item.fspath)).parents:
            item.add_marker(pytest.mark.skip(reason="needs a kernel with virtual cameras: make test-camera"))


def open_files() -> list[str]:
    """What this process has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    # GLib's threads of its own, which GStreamer starts, wake each other by these and come and go
    return sorted(name for name in names if name != "anon_inode:[eventfd]")


def mappings(of: str) -> list[range]:
    """Address ranges of this process that map a file whose name begins with `of`."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(of):
            first, last = fields[0].split("-")
            found.append(range(int(first, 16), int(last, 16)))
    return found


def driver_mappings() -> list[range]:
    return mappings("/dev/video") + mappings("/dmabuf")


@pytest.fixture
def vivid() -> Iterator[Callable[[str], Vivid]]:
    """Controls of a camera by its path; those set by the test are put back."""
    used: dict[str, _Restoring] = {}
    yield lambda path: used.setdefault(path, _Restoring(path))
    for camera in used.values():
        camera.restore()


class _Restoring(Vivid):
    USUAL = {  # noqa: RUF012
        "test_pattern": 0,
        "osd_text_mode": 0,
        "percentage_of_dropped_buffers": 0,
        "timestamp_source": 0,
        "wrap_sequence_number": 0,
        "colorspace": "sRGB",
        "y_cbcr_encoding": 0,
        "quantization": 0,
    }

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._set: set[str] = set()

    def set(self, name: str, value: int | str = 1) -> None:
        super().set(name, value)
        self._set.add(name)

    press = set

    def restore(self) -> None:
        for name in self._set & self.USUAL.keys():
            super().set(name, self.USUAL[name])


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Whatever a test does, it leaves no descriptor and no mapping of a camera behind."""
    before = open_files()
    yield
    gc.collect()
    assert driver_mappings() == []
    assert open_files() == before


@pytest.fixture(scope="session")
def prepared() -> Path:
    """Files that tools/camera/prepare.py wrote on the host (bundles)."""
    folder = Path(os.environ.get("VM_FILES") or "/nonexistent")
    if not folder.is_dir() or not any(folder.iterdir()):
        pytest.skip("no prepared files: tools/camera/prepare.py makes them")
    return folder

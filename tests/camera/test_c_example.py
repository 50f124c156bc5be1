"""examples/c/detect.c reads a camera by itself: boxes of its frames, from the driver's buffers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgekit.tasks.preprocess import ImagePreprocess
from tests import native_bundles
from tests.camera.conftest import MULTIPLANAR, USB
from tests.test_native_example import program, run

__all__ = ["program"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    payload, spec = native_bundles.detector(ImagePreprocess(64, 64))
    return native_bundles.write(tmp_path_factory.mktemp("bundle") / "a.edge", payload, spec)


def test_boxes_of_a_camera(program: Path, bundle: Path) -> None:
    for _ in range(2):  # the device is given back
        done = run(program, "-s", 0.3, bundle, USB, 3)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert len(lines) > 3 and all(words[0] == USB and len(words) == 8 for words in lines)
        assert "ms network" in done.stderr


def test_a_camera_that_it_does_not_know(program: Path, bundle: Path) -> None:
    done = run(program, bundle, MULTIPLANAR, 1)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"detect: {MULTIPLANAR}: ")
    with subprocess.Popen([str(program), "-q", str(bundle), USB, "100000"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        done = run(program, bundle, USB, 1)
        holder.kill()
    assert done.returncode == 1 and "busy" in done.stderr.lower()

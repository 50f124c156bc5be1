"""examples/c: compiled against the header and the library alone, it prints the boxes that Python finds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgekit.backends.native import engine, library
from edgekit.pixels import PixelLayout, Pixels
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.preprocess import ImagePreprocess
from tests import native_bundles
from tests.helpers import ROOT

HEADER = ROOT / "edgekit/backends/native/include"


def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("needs a C compiler")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    shutil.copy(library.path(), folder / "libedgekit.so")
    words = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-I", str(HEADER), str(ROOT / "examples/c/detect.c")]
    words += ["-L", str(folder), "-ledgekit", "-Wl,-rpath,$ORIGIN", "-o", str(folder / "detect")]
    subprocess.run([compiler(), *words], check=True, timeout=120)
    return folder / "detect"


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, timeout=60)


def test_the_header_is_plain_c_and_plain_cpp(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text('#include "edgekit.h"\nint version = EK_VERSION;\n')
    for language, standard in (("c", "c99"), ("c++", "c++98")):
        words = [
            "-x",
            language,
            f"-std={standard}",
            "-pedantic",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-long-long",
            "-fsyntax-only",
        ]
        subprocess.run([compiler(), *words, "-I", str(HEADER), str(tmp_path / "a.c")], check=True, timeout=60)


def test_it_prints_the_boxes_of_files(program: Path, tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(ImagePreprocess(64, 64))
    bundle = native_bundles.write(tmp_path / "a.edge", payload, spec)
    rng = np.random.default_rng(0)
    colours, grey = (
        rng.integers(0, 256, (50, 70, 3), dtype=np.uint8),
        rng.integers(0, 256, (40, 30), dtype=np.uint8),
    )
    (tmp_path / "a.ppm").write_bytes(b"P6\n# made by hand\n70 50\n255\n" + colours.tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 30 40 255\n" + grey.tobytes())
    layout = PixelLayout("nv12", 61, 43)
    frame = rng.integers(0, 256, layout.nbytes, dtype=np.uint8)
    (tmp_path / "c.raw").write_bytes(frame.tobytes())
    pipeline = DetectPipeline(spec, engine.NativeExecutable(payload).bind())
    wanted = []
    for name, pixels in (
        ("a.ppm", Pixels.bgr(colours, "rgb")),
        ("b.pgm", Pixels.bgr(grey, "grey")),
        ("c.raw", Pixels.view(frame, layout)),
    ):
        for box, score, _, label in pipeline(pixels, score_threshold=0.4):
            numbers = " ".join(f"{x:.2f}" for x in box)
            wanted.append(f"{tmp_path / name} {numbers} {score:.4f} {label}")
    done = run(
        program, "-s", 0.4, bundle, tmp_path / "a.ppm", tmp_path / "b.pgm", f"nv12:61x43:{tmp_path / 'c.raw'}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == wanted
    assert len(wanted) > 10 and '"variant": "v0"' in done.stderr and "ms network" in done.stderr


def test_it_says_what_is_wrong(program: Path, tmp_path: Path) -> None:
    payload, spec = native_bundles.detector(ImagePreprocess(32, 32))
    bundle = native_bundles.write(tmp_path / "a.edge", payload, spec)
    (tmp_path / "short.ppm").write_bytes(b"P6 70 50 255\n" + bytes(100))
    (tmp_path / "short.raw").write_bytes(bytes(100))
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(100))
    for words, line in (
        ((), "detect: usage: "),
        ((tmp_path / "none.edge", "x"), "No such file"),
        ((tmp_path / "short.ppm", "x"), "not a bundle"),
        ((bundle, tmp_path / "none.ppm"), "No such file"),
        ((bundle, tmp_path / "short.ppm"), "too short"),
        ((bundle, tmp_path / "deep.ppm"), "no PPM file"),
        ((bundle, tmp_path / "short.raw"), "no PPM file"),
        ((bundle, f"nv12:64x64:{tmp_path / 'short.raw'}"), "too short"),
        ((bundle, f"xyz:64x64:{tmp_path / 'short.raw'}"), "unknown format"),
        ((bundle, "/dev/video99"), "/dev/video99"),
    ):
        done = run(program, *words)
        assert done.returncode == 1 and done.stdout == "" and line in done.stderr, (words, done)

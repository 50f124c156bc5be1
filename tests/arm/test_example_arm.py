"""The C example on the boards prints the boxes that Python found on the workstation, number by number."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit.bundle import Bundle

PROGRAM = Path(edgekit.__file__).parents[1] / "examples" / "detect"
"""Compiled by tools/arm/cross.sh; links libedgekit and libc only."""


def test_it_prints_the_boxes_of_python(
    expected: Path, records: list[dict[str, Any]], frames: list[np.ndarray], tmp_path: Path
) -> None:
    files = [(tmp_path / f"{number}.raw", tmp_path / f"{number}.ppm") for number in range(len(frames))]
    sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames]
    for (raw, ppm), frame, size in zip(files, frames, sizes, strict=True):
        raw.write_bytes(frame.tobytes())
        ppm.write_bytes(f"P6 {size.replace('x', ' ')} 255\n".encode() + frame[:, :, ::-1].tobytes())
    native = [record for record in records if record["backend"] == "native"]
    assert native, "no bundle with a payload of edgekit's own engine"
    for record in native:
        with Bundle.open(expected / record["path"]) as bundle:
            labels = bundle.manifest.pipeline["labels"]
        for which, begin in ((0, "bgr:{}:"), (1, "")):
            paths = [str(pair[which]) for pair in files]
            given = [begin.format(size) + path for size, path in zip(sizes, paths, strict=True)]
            words = [PROGRAM, "-s", str(record["threshold"]), expected / record["path"], *given]
            ran = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, ran.stderr
            want = [
                f"{path} {' '.join(f'{x:.2f}' for x in box)} {score:.4f} {labels[cls]}"
                for path, found in zip(paths, record["detections"], strict=True)
                for box, score, cls in zip(found["boxes"], found["scores"], found["classes"], strict=True)
            ]
            assert ran.stdout.splitlines() == want and len(want) > 5

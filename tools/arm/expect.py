"""expect.py FOLDER BUNDLE...: what the emulated boards must reproduce, found on this machine.

Writes into FOLDER frames.npz (pictures), bundles.json (per bundle its detections on them) and kernels.npz
(kernel results by their numpy definitions). tests/arm compares.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FRAMES = "synthetic://street?seed=11&frames=2&size=640x360"
THRESHOLD = 0.05
"""Low, so that there is much to compare."""


def frames() -> list[np.ndarray]:
    """A few pictures of the procedural street, uint8 [H, W, 3] BGR."""
    import edgekit

    with edgekit.open_source(os.environ.get("EDGEKIT_ARM_FRAMES", FRAMES), limit=2) as source:
        return [np.array(frame.image) for frame in source]


def main(folder: Path, paths: list[Path]) -> None:
    os.environ["EDGEKIT_KERNELS"] = "numpy"
    import edgekit
    from tests.arm import cases

    folder.mkdir(parents=True, exist_ok=True)
    pictures = frames()
    np.savez(folder / "frames.npz", **{f"{i:03d}": p for i, p in enumerate(pictures)})
    np.savez(folder / "kernels.npz", **cases.results())
    records = {}
    for path in paths:
        shutil.copy(path, folder / path.name)
        with edgekit.load(path, threads=1) as engine:
            detections = [engine.predict(picture, score_threshold=THRESHOLD) for picture in pictures]
            records[engine.manifest.target] = {
                "path": path.name,
                "threshold": THRESHOLD,
                "detections": [
                    {"boxes": d.boxes.tolist(), "scores": d.scores.tolist(), "classes": d.classes.tolist()}
                    for d in detections
                ],
            }
        print(f"arm: {path.name}: {sum(map(len, detections))} detections here", file=sys.stderr)
    (folder / "bundles.json").write_text(json.dumps(records))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])

"""expect.py FOLDER BUNDLE...: what the emulated boards must reproduce, found on this machine.

Writes into FOLDER frames.npz (pictures), bundles.json (per bundle and variant its detections on them),
outputs.npz (the raw outputs on them) and kernels.npz (kernel results by their numpy definitions). tests/arm
compares. A BUNDLE may be NAME=PATH: it is copied as NAME.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

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


def main(folder: Path, paths: list[str]) -> None:
    os.environ["EDGEKIT_KERNELS"] = "numpy"
    import edgekit
    from edgekit.bundle import Bundle
    from tests.arm import cases

    folder.mkdir(parents=True, exist_ok=True)
    pictures = frames()
    np.savez(folder / "frames.npz", **{f"{i:03d}": p for i, p in enumerate(pictures)})
    np.savez(folder / "kernels.npz", **cases.results())
    records: list[dict[str, Any]] = []
    outputs: dict[str, np.ndarray] = {}
    for given in paths:
        name, _, path = given.rpartition("=")
        name = name or Path(path).name
        shutil.copy(path, folder / name)
        with Bundle.open(folder / name) as bundle:
            target = bundle.manifest.target
            variants = [variant for _, variant in bundle.manifest.variants()]
        for variant in variants:
            with edgekit.load(folder / name, threads=1, variant=variant.name) as engine:
                pipeline, found = engine.pipeline(), []
                for number, picture in enumerate(pictures):
                    found.append(pipeline(picture, score_threshold=THRESHOLD))
                    for output, array in pipeline.session.outputs.items():
                        outputs[f"{name} {variant.name} {number} {output}"] = np.array(array)
            records.append(
                {
                    "path": name,
                    "target": target,
                    "variant": variant.name,
                    "backend": variant.backend,
                    "precision": variant.precision,
                    "threshold": THRESHOLD,
                    "detections": [
                        {
                            "boxes": d.boxes.tolist(),
                            "scores": d.scores.tolist(),
                            "classes": d.classes.tolist(),
                        }
                        for d in found
                    ],
                }
            )
            print(f"arm: {name} {variant.name}: {sum(map(len, found))} detections here", file=sys.stderr)
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "bundles.json").write_text(json.dumps(records))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), sys.argv[2:])

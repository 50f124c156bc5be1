"""expect_video.py FOLDER: a small online video network, for the boards to run frame by frame and clip by clip.

Writes into FOLDER stream.edge (one frame and states) and clip.edge (all frames at once), float32 for ONNX Runtime
and LiteRT, and clips.npz: clips, float32 [N, T, 3, H, W], and the clip model's logits [N, T, K] on this machine.
tests/arm/test_video.py compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BACKBONE, WIDTH, SIZE, FRAMES, CLASSES = "mobilenet_v2", 0.25, 32, 8, 12
BOARD = "rpi4"
"""The float payloads of both boards are the same."""


def main(folder: Path) -> None:
    from benchmarks import video_bundles as bundles
    from edgekit import passes
    from edgekit.passes import probe
    from edgekit.passes.streamify import streamify
    from edgekit.synth.gestures import GestureWorld
    from edgekit.target import Target

    folder.mkdir(parents=True, exist_ok=True)
    clip = bundles.clip_of(bundles.settled(BACKBONE, SIZE, WIDTH, CLASSES), SIZE, FRAMES)
    target = Target.load(BOARD)
    for name, graph in (("stream", streamify(clip).model), ("clip", clip)):
        graph = passes.prepare(graph, task="none").model
        payloads = {b: bundles.payload(graph, b, "float32", SIZE, target) for b in ("onnxruntime", "litert")}
        bundles.write(folder / f"{name}.edge", graph, payloads, target=BOARD)
    world = GestureWorld(17, SIZE, SIZE)
    clips = np.stack([bundles.normalised(world.clip(i, FRAMES)[0]) for i in (1, 5, 11)])
    rows = np.stack([probe.evaluate(clip, {"clip": frames})["logits"] for frames in clips])
    np.savez(folder / "clips.npz", clips=clips, rows=rows)
    print(f"arm: {BACKBONE} at {SIZE}x{SIZE}: {len(clips)} clips of {FRAMES} frames", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

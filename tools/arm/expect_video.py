"""expect_video.py FOLDER: a small online video network, for the boards to run frame by frame and clip by clip.

Writes into FOLDER stream.edge (one frame and states) and clip.edge (all frames at once), float32 for ONNX Runtime
and LiteRT, and clips.npz: clips, float32 [N, T, 3, H, W], and the clip model's logits [N, T, K] on this machine.
And int8.edge, the same network as `edgekit build` makes it, whose states are codes, with built.npz: pictures, uint8
[N, T, H, W, 3] BGR, and by the variant's name what its pipeline gave for each here, float32 [N, T, K].
tests/arm/test_video.py compares.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

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
    build(folder, clip)
    print(f"arm: {BACKBONE} at {SIZE}x{SIZE}: {len(clips)} clips of {FRAMES} frames", file=sys.stderr)


def build(folder: Path, clip: ir.Model) -> None:
    """int8.edge and built.npz."""
    import edgekit
    from edgekit.models.tsm import MEAN, STD
    from edgekit.synth.gestures import GestureWorld

    os.environ["EDGEKIT_ARM_DIR"] = str(folder / "none")  # instructions are counted by tests/test_tune_arm.py
    (folder / "net.onnx").write_bytes(ir.to_proto(clip).SerializeToString())
    rule = {
        "resize": "stretch",
        "color": "rgb",
        "mean": tuple(255 * m for m in MEAN),
        "std": tuple(255 * s for s in STD),
    }
    (bundle,) = edgekit.build(
        folder / "net.onnx",
        "rpi5",
        task="video",
        precision="int8",
        quantization="minmax",
        preprocess=rule,
        video={"dt_s": 0.1},
        calibration=f"synthetic://gestures?clips=6&seed=1000000&size={SIZE}",
        out=folder,
        allow_drop=True,  # random weights: what is compared is machines
    )
    bundle.path.rename(folder / "int8.edge")
    world = GestureWorld(18, SIZE, SIZE)
    pictures = np.stack([world.clip(i, FRAMES)[0] for i in (2, 7)])
    found = {"pictures": pictures}
    for _, variant in bundle.manifest.variants():
        with edgekit.load(folder / "int8.edge", threads=1, variant=variant.name) as engine:
            pipeline, rows = engine.pipeline(), []
            for frames in pictures:
                pipeline.reset()
                rows.append([pipeline(frame).logits.copy() for frame in frames])
        found[variant.name] = np.array(rows)
    np.savez(folder / "built.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

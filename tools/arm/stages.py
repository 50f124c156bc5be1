"""stages.py BUNDLE FRAMES.npz: instructions per stage of one detection, on an emulated board.

Run as ARM_COUNT=FILE armpython stages.py ...; prints one JSON object. Counts repeat to a fraction of a percent;
they know nothing of caches, memory or how many instructions a core issues at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import numpy as np

import edgekit
from edgekit.kernels.letterbox import letterbox
from edgekit.tasks.picture_input import only_input

CLASSES = ("all", "simd", "load_store", "dot", "mmla", "sve")
STAGES = ("preprocess", "engine", "decode")
_libc = ctypes.CDLL(None)


def mark(tag: int) -> None:
    """Have count.c write the counts so far."""
    _libc.lseek(-77, ctypes.c_long(tag), 0)


def main(bundle: str, frames: str) -> None:
    with np.load(frames, allow_pickle=False) as data:
        picture = data[sorted(data.files)[0]]
    with edgekit.load(bundle, threads=1, self_test=False) as engine:
        pipeline = engine.pipeline()
        pipeline(picture)  # tables and caches are made at the first call
        tensor, quant = only_input(pipeline.session, "a detector has one input")
        mark(0)
        placement = letterbox(picture, pipeline.spec.preprocess, tensor, quant=quant)
        mark(1)
        pipeline.session.run()
        mark(2)
        pipeline._postprocess(pipeline.session.outputs, placement, picture.shape[:2])
        mark(3)
        target = engine.manifest.target
    with open(os.environ["ARM_COUNT"], encoding="utf-8") as file:
        marks = [json.loads(line) for line in file][-4:]
    stages = {stage: {c: marks[i + 1][c] - marks[i][c] for c in CLASSES} for i, stage in enumerate(STAGES)}
    print(json.dumps({"board": os.environ.get("ARM_DEVICE"), "target": target, "instructions": stages}))


if __name__ == "__main__":
    main(*sys.argv[1:])

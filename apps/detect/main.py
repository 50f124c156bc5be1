"""The shipped detector in a robot's loop: frames in, boxes out, late results not hidden.

python apps/detect/main.py BUNDLE.edge "synthetic://street?seed=7&frames=200"
"""

from __future__ import annotations

import sys

import edgekit


def main(bundle: str, source: str) -> None:
    engine = edgekit.load(bundle)  # digests, compile if the board needs it, self-test
    detect = engine.pipeline()  # this thread's buffers
    with engine, edgekit.open_source(source) as frames:
        for frame in frames:
            with frame:
                detections = detect(frame.image)
            found = ", ".join(f"{label} {score:.2f}" for _, score, _, label in detections.above(0.5))
            print(f"{frame.seq:5d}  age {frame.age_ms():6.1f} ms  {found or '-'}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])

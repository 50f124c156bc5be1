"""Frames per second of the street's rig on one core, as one JSON line.

    python benchmarks/synth_rig.py [--frames 30] [--width 256 --height 144] [--rings 32 --azimuths 720]

Draws consecutive frames of ten streets after one warm-up frame each: once the LiDAR alone (`sweeps`), once with all six
cameras and labels (`frames`). Rates count the time of this process only, so other programs do not enter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import commit
from edgekit.synth.street_rig import RigWorld, Spinner


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=30, help="frames of each street")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--rings", type=int, default=32)
    parser.add_argument("--azimuths", type=int, default=720)
    args = parser.parse_args()
    spinner = Spinner(rings=args.rings, azimuths=args.azimuths)
    spent = {"sweeps": [], "frames": []}
    points = boxes = 0
    for seed in range(10):
        world = RigWorld(seed, width=args.width, height=args.height, spinner=spinner)
        for kind, sensors in (("sweeps", ("lidar",)), ("frames", None)):
            world.frame(0, sensors)
            start = time.process_time()
            for index in range(1, args.frames + 1):
                frame = world.frame(index, sensors)
            spent[kind].append((time.process_time() - start) / args.frames)
        points += len(frame.points)
        boxes += len(frame.truth)
    report = {"benchmark": "synth_rig", "commit": commit(), "size": [args.width, args.height]}
    report |= {
        "rays": [args.rings, args.azimuths],
        "streets": 10,
        "points": points // 10,
        "boxes": boxes / 10,
    }
    for kind, seconds in spent.items():
        report[f"{kind}_per_cpu_second"] = round(len(seconds) / sum(seconds), 1)
        report[f"{kind}_slowest"] = round(1 / max(seconds), 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

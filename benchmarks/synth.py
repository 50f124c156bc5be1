"""Frames per second of the procedural street on one core, as one JSON line.

    python benchmarks/synth.py [--frames 120] [--width 640 --height 360]

Draws consecutive frames of ten streets (every weather and hour among them) after one warm-up frame
each, and reports the total, the slowest and the fastest street. `frames_per_cpu_second` counts the time
of this process only: the figure to look at while other programs run.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from edgekit.synth.street import StreetWorld


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=120, help="frames of each street")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    args = parser.parse_args()
    rates, spent, busy = [], 0.0, 0.0
    for seed in range(10):
        world = StreetWorld(seed, args.width, args.height)
        world.frame(0)
        start, cpu = time.perf_counter(), time.process_time()
        for index in range(1, args.frames + 1):
            world.frame(index)
        took = time.perf_counter() - start
        spent += took
        busy += time.process_time() - cpu
        rates.append(args.frames / took)
    total = args.frames * len(rates)
    report = {
        "benchmark": "synth",
        "size": [args.width, args.height],
        "frames": total,
        "frames_per_second": round(total / spent, 1),
        "frames_per_cpu_second": round(total / busy, 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""What a stream costs around its engine and kernels, and how old results are, with the machine quiet and busy.

    python benchmarks/stream.py BUNDLE.edge [--source URI] [--seconds 20] [--threads 1]

A live camera in memory (1280x720 at 30 frames/s; the pictures are drawn beforehand, so that a frame costs no
work) through `edgekit.stream`, first alone, then while another process keeps one core busy; both
turns repeated, interleaved. One JSON line:

overhead_ms: from when a frame is due to when the caller has its result, less preprocessing, engine and
    decoding: the wake-up of the reading thread (`transport_ms`), the hand-over (`wait_ms`), metrics, everything of ours.
age_ms: from when a frame is due to its result. `age_p99_ratio` = p99 of the age / (frame time + median engine time).
unaccounted_ms: what no stage claims of the age.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edgekit
from benchmarks.common import commit
from edgekit.runtime.bench import machine

SOURCE = "synthetic://street?live=1&frames=0&size=1280x720&fps=30&loop=60&format=yuyv"


def burn(core: int) -> None:
    """Keep one core busy until killed."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def turn(engine: edgekit.Engine, source: str, seconds: float, warmup: int = 30) -> dict[str, list[float]]:
    """Milliseconds per frame."""
    found: dict[str, list[float]] = {
        "overhead": [],
        "transport": [],
        "wait": [],
        "age": [],
        "engine": [],
        "kernels": [],
        "unaccounted": [],
    }
    drops = 0
    with edgekit.stream(engine, source) as stream:
        end = time.monotonic() + seconds
        for count, item in enumerate(stream):
            now = time.monotonic_ns()
            stages = item.stage_ns
            work = stages["preprocess"] + stages["engine"] + stages["decode"]
            if count >= warmup:
                found["overhead"].append((now - item.frame.taken_ns - work) / 1e6)
                found["age"].append(item.age_ms)
                found["transport"].append(stages["transport"] / 1e6)
                found["wait"].append(stages["wait"] / 1e6)
                found["engine"].append(stages["engine"] / 1e6)
                found["kernels"].append((stages["preprocess"] + stages["decode"]) / 1e6)
                found["unaccounted"].append(item.unaccounted_ns / 1e6)
            if time.monotonic() > end:
                break
        drops = sum(sum(c["drops"].values()) for c in stream.metrics.snapshot()["cameras"].values())
    found["drops"] = [float(drops)]
    return found


def summary(values: list[float]) -> dict[str, float]:
    at = np.percentile(values, [25, 50, 75, 99])
    return {
        f"{name}": round(float(v), 4) for name, v in zip(("p25", "median", "p75", "p99"), at, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--seconds", type=float, default=20, help="of each turn (default: 20)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {"quiet": {}, "one core busy": {}}
    with edgekit.load(args.bundle, threads=args.threads) as engine:
        period_ms = 1e3 / (edgekit.open_source(args.source.replace("loop=60", "loop=1")).fps or 30)
        for _ in range(args.turns):
            for condition, into in samples.items():
                burner = None
                if condition != "quiet":
                    core = max(os.sched_getaffinity(0))
                    burner = multiprocessing.get_context("spawn").Process(
                        target=burn, args=(core,), daemon=True
                    )
                    burner.start()
                    time.sleep(0.5)
                try:
                    for name, values in turn(engine, args.source, args.seconds).items():
                        into.setdefault(name, []).extend(values)
                finally:
                    if burner is not None:
                        burner.kill()
                        burner.join()
        row: dict[str, object] = {"benchmark": "stream", "bundle": args.bundle.name, "source": args.source}
        for condition, found in samples.items():
            engine_ms = float(np.median(found["engine"]))
            row[condition] = {
                "frames": len(found["age"]),
                "drops": int(sum(found["drops"])),
                "overhead_ms": summary(found["overhead"]),
                "transport_ms": summary(found["transport"]),
                "wait_ms": summary(found["wait"]),
                "age_ms": summary(found["age"]),
                "engine_ms": summary(found["engine"]),
                "kernels_ms": summary(found["kernels"]),
                "unaccounted_ms": summary(found["unaccounted"]),
                "age_p99_ratio": round(float(np.percentile(found["age"], 99)) / (period_ms + engine_ms), 4),
            }
        row["engine"] = engine.describe()
    print(json.dumps({**row, "commit": commit(), "machine": machine(args.threads)}))


if __name__ == "__main__":
    main()

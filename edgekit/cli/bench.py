"""Time a bundle on this machine: preprocessing, engine, decoding and their total."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from edgekit.cli.common import warn
from edgekit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--vs",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="time another bundle beside it, interleaved",
    )
    parser.add_argument(
        "--source",
        help="picture to use: a file or a synthetic:// URI (default: a synthetic street at 1280x720)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of the engine (default: its own choice)"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--variant", help="payload to use when the bundle has several")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    from edgekit.runtime.bench import STAGES, measure
    from edgekit.runtime.engine import load
    from edgekit.runtime.sources import open_source

    if args.runs < 1 or args.warmup < 0 or not 0 <= args.threads <= 1024:
        raise UsageError(
            "bench: --runs must be at least 1, --warmup at least 0, --threads between 0 and 1024"
        )
    uri = args.source or "synthetic://street?seed=1&frames=1&size=1280x720"
    with open_source(uri, limit=1) as source:
        frame = next(iter(source), None)
        if frame is None:
            raise UsageError(f"source {uri}: has no picture")
        image = np.array(frame.image)
    engines = []
    try:
        for path in (args.bundle, *args.vs):
            engines.append(load(path, threads=args.threads, variant=args.variant))
            warn(engines[-1].bundle)
        results = measure(engines, image, warmup=args.warmup, runs=args.runs, threads=args.threads)
    finally:
        for engine in engines:
            engine.close()
    first = results[0]
    if len(results) > 1:
        base = first["stages"]["total"]["median_ms"]
        first["vs"] = [
            {**other, "total_ratio": round(other["stages"]["total"]["median_ms"] / base, 4)}
            for other in results[1:]
        ]
    if args.json:
        print(json.dumps(first))
        return 0
    for result in results:
        print(f"{result['bundle']}  ({result['image'][0]}x{result['image'][1]}, {result['machine']['cpu']})")
        print(f"  {'stage':<12}{'median':>10}{'p95':>10}{'p99':>10}   ms")
        for stage in STAGES:
            row = result["stages"][stage]
            print(f"  {stage:<12}{row['median_ms']:>10.3f}{row['p95_ms']:>10.3f}{row['p99_ms']:>10.3f}")
        print(
            f"  peak memory {result['peak_rss_bytes'] / 2**20:.0f} MiB, copies {result['copies']['bytes_per_frame']} bytes a frame"
        )
    for other in first.get("vs", []):
        print(f"{other['bundle']} takes {other['total_ratio']:.2f} x the time of {first['bundle']}")
    return 0

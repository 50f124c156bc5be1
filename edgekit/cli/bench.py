"""Time a bundle on this machine: preprocessing, engine, decoding and their total."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.cli.common import add_engine_options, integer, print_json, ran, warn
from edgekit.errors import UsageError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle file (*.edge) or folder")
    parser.add_argument(
        "--vs",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="time another bundle beside it, call by call; may be given several times",
    )
    parser.add_argument(
        "--source",
        metavar="URI",
        help="picture to use: a file or a synthetic:// URI (default: a synthetic street at 1280x720)",
    )
    parser.add_argument(
        "--runs", type=integer("--runs", 1, 10**6), default=200, metavar="N", help="default: 200"
    )
    parser.add_argument(
        "--warmup",
        type=integer("--warmup", 0, 10**6),
        default=20,
        metavar="N",
        help="runs before the first that counts (default: 20)",
    )
    add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def subject(uri: str | None, rig: bool) -> Any:
    """The first picture of a source, or of one of a rig the moment that it shows. Raises: UsageError."""
    from edgekit.runtime.sources import open_source

    if uri is None:
        uri = (
            "synthetic://street-rig?seed=1&frames=1"
            if rig
            else "synthetic://street?seed=1&frames=1&size=1280x720"
        )
    with open_source(uri, limit=1) as source:
        frame = next(iter(source), None)
        if frame is None:
            raise UsageError(f"source {uri}: has no picture")
        if rig and frame.rig is None:
            raise UsageError(
                f"source {uri}: shows no rig, which this bundle needs. Give synthetic://street-rig"
            )
        return frame.rig if rig else np.array(frame.image)


def main(args: argparse.Namespace) -> int:
    from edgekit.runtime.bench import STAGES, measure
    from edgekit.runtime.engine import load

    engines = []
    try:
        for path in (args.bundle, *args.vs):
            engines.append(load(path, threads=args.threads, variant=args.variant))
            warn(engines[-1].bundle)
        image = subject(args.source, bool(getattr(engines[0].pipeline(), "takes_rigs", False)))
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
        print_json(first)
        return 0
    for result in results:
        print(
            f"{printable(result['bundle'])}  ({result['image'][0]}x{result['image'][1]}, {result['machine']['cpu']})"
        )
        print(f"  {'stage':<12}{'median':>10}{'p95':>10}{'p99':>10}   ms")
        for stage in STAGES:
            row = result["stages"][stage]
            print(f"  {stage:<12}{row['median_ms']:>10.3f}{row['p95_ms']:>10.3f}{row['p99_ms']:>10.3f}")
        steps = result.get("steps")
        for name, ms in ({} if steps is None else steps["median_ms"]).items():
            print(f"    {printable(name):<20}{ms:>9.3f}   {ran(result['engine'][name])}")
        if steps is None:
            print(f"  runs {'; '.join(map(ran, result['engine'].values()))}")
        else:
            print(
                f"  steps {steps['sum_ms']:.3f} ms in sum, {steps['span_ms']:.3f} ms from the first start to the last end"
            )
            for how, label in (("serial", "one after the other"), ("overlapped", "side by side")):
                if how in steps:
                    found = steps[how]
                    print(
                        f"  {label}: {found['wall_ms']:.3f} ms; the longest chain takes {found['critical_ms']:.3f} ms "
                        f"({' > '.join(map(printable, found['critical']))}), {found['rest_ms']:.3f} ms lie outside of steps"
                    )
        print(
            f"  peak memory {result['peak_rss_bytes'] / 2**20:.0f} MiB, copies {result['copies']['bytes_per_frame']} bytes a frame"
        )
    for other in first.get("vs", []):
        names = printable(other["bundle"]), printable(first["bundle"])
        print(f"{names[0]} takes {other['total_ratio']:.2f} x the time of {names[1]}")
    return 0

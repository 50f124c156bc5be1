"""Time every variant of a bundle on this machine and record the fastest, which later loads then use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgekit.cli.common import MAX_THREADS, integer, print_json, say, warn
from edgekit.errors import printable

DEFAULT_ROUNDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle file (*.edge) or folder")
    parser.add_argument(
        "--threads",
        type=integer("--threads", 0, MAX_THREADS),
        default=0,
        metavar="N",
        help="CPU threads, as the bundle will be loaded (default: 0, the library's choice)",
    )
    parser.add_argument(
        "--rounds",
        type=integer("--rounds", 1, 10**5),
        default=DEFAULT_ROUNDS,
        metavar="N",
        help=f"turns of each variant, interleaved; at most a minute in all (default: {DEFAULT_ROUNDS})",
    )
    parser.add_argument(
        "--board",
        metavar="BOARD",
        help="count instructions on this emulated ARM board instead (rpi4, rpi5, ...): a proxy, no timing, "
        "nothing is recorded. Needs tools/arm/setup.sh of a checkout",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    if args.board is not None:
        return _count(args)
    from edgekit.runtime.variants import tune

    result = tune(args.bundle, threads=args.threads, rounds=args.rounds, opened=warn, progress=_progress)
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _progress(done: float, text: str) -> None:
    say(f"{100 * done:3.0f} % {text}")


def _print(result: dict[str, Any]) -> None:
    device = result["device"]
    threads = device["threads"] or "the library's choice of"
    print(f"{printable(result['bundle'])} on {printable(device['cpu'])}, {threads} threads")
    for segment in result["segments"]:
        names = [printable(row["variant"]) for row in segment["variants"]]
        width = max(map(len, [*names, "variant"]))
        print(f"\n  {segment['segment']:<{width}}  {'median':>10}{'p25':>10}{'p75':>10}{'x best':>8}   ms")
        for name, row in zip(names, segment["variants"], strict=True):
            if row["median_ms"] is None:
                print(f"  {name:<{width}}  {row['status']}: {printable(row['why'])}")
                continue
            times = "".join(f"{row[key]:>10.3f}" for key in ("median_ms", "p25_ms", "p75_ms"))
            mark = "   <- runs here" if row["status"] == "chosen" else ""
            print(f"  {name:<{width}}  {times}{row['ratio']:>8.2f}{mark}")
        if len(names) == 1 or not result["record"]:
            print(f"  {printable(segment['chosen'])}: {printable(segment['why'])}")
    if result["record"]:
        print(f"\nrecorded in {printable(result['record'])}")
    else:
        print("\nnothing to choose, so nothing was recorded")


def _count(args: argparse.Namespace) -> int:
    from edgekit.toolchain.arm_count import CLASSES, count

    result = count(args.bundle, args.board)
    if args.json:
        print_json(result)
        return 0
    print(
        f"{printable(result['bundle'])} on an emulated {result['board']}: instructions per inference, millions"
    )
    print("A proxy: it knows nothing of caches, memory and how many a core issues at once.\n")
    width = max(len(printable(name)) for name in [*result["variants"], "variant"])
    print(f"  {'variant':<{width}}" + "".join(f"{name:>12}" for name in CLASSES))
    for name, row in result["variants"].items():
        if row["instructions"] is None:
            print(f"  {printable(name):<{width}}  {printable(row['problem'])}")
        else:
            figures = "".join(f"{row['instructions'][kind] / 1e6:>12.3f}" for kind in CLASSES)
            print(f"  {printable(name):<{width}}{figures}")
    return 0

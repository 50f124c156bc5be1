"""Compare two bundles, or a bundle and the ONNX model it came from, on the same pictures: outputs, layers,
results, accuracy, size and time. Differences are B minus A."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from edgekit.cli.common import MAX_THREADS, filled, integer, print_json, say
from edgekit.errors import UsageError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a", type=Path, metavar="A", help="bundle, or ONNX model or project: its float network"
    )
    parser.add_argument(
        "b", type=Path, metavar="B", help="what is compared with A, likewise; one is a bundle"
    )
    parser.add_argument(
        "--data", type=Path, metavar="LABELS", help="labels to measure both on, as for verify"
    )
    parser.add_argument(
        "--images",
        type=filled("--images"),
        metavar="DIR",
        help="folder of the labelled pictures; without --data pictures to compare on: a folder, a file or "
        "a synthetic:// URI (default: a synthetic street)",
    )
    parser.add_argument(
        "--limit", type=integer("--limit", 1), metavar="N", help="use only the first N pictures"
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a page with pictures side by side")
    for side in "ab":
        parser.add_argument(
            f"--variant-{side}",
            metavar="NAME",
            help=f"payload of {side.upper()} to use (default: the fastest)",
        )
    parser.add_argument(
        "--threads",
        type=integer("--threads", 0, MAX_THREADS),
        default=0,
        metavar="N",
        help="CPU threads of both (default: 0, the library's choice)",
    )
    parser.add_argument(
        "--rounds",
        type=integer("--rounds", 0, 10**5),
        default=40,
        metavar="N",
        help="turns of the timing, interleaved; 0 leaves it out (default: 40)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: UsageError, BundleError, ModelError, SelfTestError, OutputError."""
    from edgekit.toolchain.api import require_extras

    require_extras()
    from edgekit.dataset import check_pair
    from edgekit.toolchain.compare import Options, compare

    if args.data is not None:
        check_pair(args.data, None if args.images is None else Path(args.images))
    if args.html is not None and os.path.realpath(args.html) in map(os.path.realpath, (args.a, args.b)):
        raise UsageError(f"option --html {args.html}: is what is compared. Name another file")
    options = Options(
        args.data, args.images, args.limit, args.threads, (args.variant_a, args.variant_b), args.rounds
    )
    found = compare(args.a, args.b, options, _progress)
    if args.html is not None:
        from edgekit.toolchain.compare_page import write_page

        write_page(found, args.html)
    if args.json:
        print_json(found.record)
    else:
        _print(found.record)
        if args.html is not None:
            print(f"wrote {printable(args.html)}")
    return 0


def _progress(what: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{printable(what)} {done}/{of}", end="", file=sys.stderr, flush=True)
        if done >= of:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _print(r: dict[str, Any]) -> None:
    for key, letter in (("a", "A"), ("b", "B")):
        side = r[key]
        print(
            f"{letter}  {printable(side['path'])}: {printable(side['variant'])}, {printable(side['library'])}"
        )
        if side["warning"]:
            say(f"edgekit: warning: {letter}: {side['warning']}")
    for note in r["notes"]:
        say(f"edgekit: note: {note}")
    print(f"\noutputs on {r['pictures']['count']} pictures ({printable(r['pictures']['what'])})")
    if "not_compared" in r["outputs"]:
        print(f"  not compared: {printable(r['outputs']['not_compared'])}")
    for t in r["outputs"].get("tensors", ()):
        if t["max_abs"] is None:
            print(f"  {printable(t['tensor'])}: no finite values")
            continue
        sqnr = "exact" if t["max_abs"] == 0 else f"SQNR {t['sqnr_db']} dB"
        print(f"  {printable(t['tensor'])}: max {t['max_abs']:.4g}, mean {t['mean_abs']:.4g}, {sqnr}")
    found = r["results"]
    print(
        f"results\n  {found['unit']}: {found['matched']} of A's {found['a']} matched, {found['lost']} lost, {found['new']} new"
    )
    if found["score_shift_mean"] is not None:
        print(f"  score shift mean {found['score_shift_mean']:+.4f}, largest {found['score_shift_max']:.4f}")
    layers = r["layers"]
    if "not_compared" in layers:
        print(f"layers\n  not compared: {layers['not_compared']}")
    else:
        print(f"layers\n  {len(layers['layers'])} known, see --json or --html. {layers['note']}".rstrip())
    metric = r["metric"]
    if "not_measured" in metric:
        print(f"accuracy\n  not measured: {metric['not_measured']}")
    elif metric["difference"] is None:
        print("accuracy\n  not measured: the labelled pictures hold nothing to score")
    else:
        key, paired = metric["name"], metric["difference_interval95"]
        shown = f", 95 % {paired[0]:+.4f} to {paired[1]:+.4f}" if paired else ""
        print(
            f"accuracy on {metric['images']} {metric['of']}\n  {key} {metric['a'][key]:.4f} -> {metric['b'][key]:.4f}, "
            f"B - A {metric['difference']:+.4f}{shown}"
        )
    size, latency = r["size"], r["latency"]
    print(f"size\n  {size['a_bytes']} -> {size['b_bytes']} bytes, B / A {size['ratio']:.3f}")
    if "not_measured" in latency:
        print(f"time\n  not measured: {latency['not_measured']}")
        return
    print(f"time on {printable(latency['machine']['cpu'])}")
    for part, name in (("engine", "network"), ("total", "picture to result")):
        t = latency[part]
        print(
            f"  {name}: {t['a_ms']:.3f} -> {t['b_ms']:.3f} ms, B / A {t['ratio']:.3f} ({t['rounds']} rounds, interleaved)"
        )

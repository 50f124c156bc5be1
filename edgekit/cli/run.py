"""Run a bundle on pictures, folders, videos or a synthetic street; write boxes and annotated frames."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from edgekit.cli.common import warn
from edgekit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--source",
        required=True,
        metavar="URI",
        help="picture, folder, video or synthetic://street?seed=0&frames=100",
    )
    parser.add_argument(
        "--sink",
        action="append",
        default=[],
        metavar="FILE",
        help=".jsonl, .png, .jpg, .mp4 or a folder; may be given several times",
    )
    parser.add_argument("--score", type=float, help="lowest score to keep (default: the bundle's)")
    parser.add_argument("--limit", type=int, help="stop after this many frames")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--variant", help="payload to use when the bundle has several")
    parser.add_argument("--json", action="store_true", help="print one summary object on stdout")


def main(args: argparse.Namespace) -> int:
    from edgekit.runtime.engine import load
    from edgekit.runtime.sinks import open_sink
    from edgekit.runtime.sources import open_source

    if args.score is not None and not 0 <= args.score <= 1:
        raise UsageError(f"--score {args.score}: expected a number between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: expected at least 1")
    twice = {sink for sink in args.sink if args.sink.count(sink) > 1}
    if twice:
        raise UsageError(f"--sink {min(twice)}: given twice. Leave one out")
    frames = boxes = 0
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(args.source, limit=args.limit))
        engine = stack.enter_context(load(args.bundle, threads=args.threads, variant=args.variant))
        warn(engine.bundle)
        sinks = [stack.enter_context(open_sink(s, fps=source.fps)) for s in args.sink]
        detect = engine.pipeline()
        for frame in source:
            with frame:
                detections = detect(frame.image, score_threshold=args.score)
                age_ms = (time.monotonic_ns() - frame.captured_ns) / 1e6
                for sink in sinks:
                    sink.write(frame, detections, age_ms)
                frames += 1
                boxes += len(detections)
    skipped = [[path, reason] for path, reason in source.skipped]
    seconds = time.perf_counter() - started
    for _, reason in skipped:  # a reason names its file
        print(f"edgekit: warning: skipped {reason}", file=sys.stderr)
    if source.ignored:
        print(f"edgekit: note: {source.ignored} other files in {args.source}: ignored", file=sys.stderr)
    summary = {
        "frames": frames,
        "boxes": boxes,
        "seconds": round(seconds, 3),
        "skipped": skipped,
        "ignored": source.ignored,
        "sinks": args.sink,
    }
    if args.json:
        print(json.dumps(summary))
    else:
        rate = f"{frames / seconds:.1f} frames/s, all included" if seconds > 0 else ""
        print(
            f"{frames} frames, {boxes} boxes in {seconds:.1f} s ({rate})"
            + "".join(f"\n  {s}" for s in args.sink)
        )
    return 0

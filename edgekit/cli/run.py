"""Run a bundle on pictures, folders, videos or a synthetic street; write results and annotated frames."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from edgekit.cli.common import add_engine_options, fraction, integer, print_json, say, warn
from edgekit.errors import UsageError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit run m.host.edge --source photos/ --sink found.jsonl --sink shown/\n"
        "  edgekit run m.host.edge --source drive.mp4 --sink drive_boxes.mp4\n"
        "  edgekit run m.host.edge --source 'synthetic://street?frames=9' --sink a.png"
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle file (*.edge) or folder")
    parser.add_argument(
        "--source",
        required=True,
        metavar="URI",
        help="picture, folder of pictures, video file, or synthetic://street?seed=0&frames=100",
    )
    parser.add_argument(
        "--sink",
        action="append",
        default=[],
        metavar="FILE",
        help="where results go: .jsonl (boxes or classes), .png .jpg (annotated picture), .mp4 (annotated video) "
        "or a folder, named with a '/' at its end; may be given several times",
    )
    parser.add_argument(
        "--score",
        type=fraction("--score"),
        metavar="S",
        help="lowest score to keep, 0 to 1 (default: the bundle's)",
    )
    parser.add_argument(
        "--limit", type=integer("--limit", 1), metavar="N", help="stop after this many frames"
    )
    add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object")


def main(args: argparse.Namespace) -> int:
    from edgekit import tasks
    from edgekit.runtime.engine import load
    from edgekit.runtime.results import StreamResult
    from edgekit.runtime.sinks import open_sink
    from edgekit.runtime.sources import open_source

    twice = {sink for sink in args.sink if args.sink.count(sink) > 1}
    if twice:
        raise UsageError(f"option --sink {printable(min(twice))}: given twice. Leave one out")
    frames = found = 0
    started = time.perf_counter()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(args.source, limit=args.limit))
        engine = stack.enter_context(load(args.bundle, threads=args.threads, variant=args.variant))
        warn(engine.bundle)
        sinks = [stack.enter_context(open_sink(s, fps=source.fps)) for s in args.sink]
        pipeline = engine.pipeline()
        unit = tasks.task(engine.task).UNIT
        for frame in source:
            with frame:
                result = pipeline(frame.image, score_threshold=args.score)
                item = StreamResult(frame, result, time.monotonic_ns() - frame.captured_ns)
                for sink in sinks:
                    sink.write(item)
                frames += 1
                found += len(result)
    skipped = [[path, reason] for path, reason in source.skipped]
    seconds = time.perf_counter() - started
    for _, reason in skipped:  # a reason names its file
        say(f"edgekit: warning: skipped {reason}")
    if source.ignored:
        say(f"edgekit: note: {source.ignored} other files in {args.source}: ignored")
    summary = {
        "frames": frames,
        unit: found,
        "seconds": round(seconds, 3),
        "skipped": skipped,
        "ignored": source.ignored,
        "sinks": args.sink,
    }
    if args.json:
        print_json(summary)
    else:
        rate = f"{frames / seconds:.1f} frames/s, all included" if seconds > 0 else ""
        print(
            f"{frames} frames, {found} {unit} in {seconds:.1f} s ({rate})"
            + "".join(f"\n  {printable(s)}" for s in args.sink)
        )
    return 0

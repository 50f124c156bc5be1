"""The shipped gesture recogniser, live: frames in, what moves and since when out, and a page to watch it on.

edgekit app gesture --source v4l2:/dev/video0 --view :8080
edgekit app gesture --source "synthetic://gestures?live=1&frames=0&size=320x320" --view :8080
python apps/gesture/main.py --bundle tsm_gesture.rpi5.edge --source clip.mp4 --sink seen.mp4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import edgekit

WORLD = "synthetic://gestures?live=1&frames=0&size=320x320"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edgekit app gesture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bundle", help="bundle to run (default: the shipped recogniser, built for this machine)"
    )
    parser.add_argument(
        "--source", default=WORLD, help="camera, video or world (default: procedural gestures)"
    )
    parser.add_argument("--view", metavar="[HOST]:PORT", help="live page, e.g. :8080")
    parser.add_argument(
        "--sink", action="append", default=[], help="out.jsonl, out.mp4, out.mcap; several times"
    )
    parser.add_argument(
        "--stepping", choices=("plain", "hold", "resample", "reset"),
        help="where frames are missing or early (default: the bundle's)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="stop after this many frames")
    args = parser.parse_args(words)
    if args.limit is not None and args.limit < 1:  # now: the first run builds a bundle
        parser.error(f"--limit {args.limit}: expected at least 1")

    sinks = args.sink + ([f"view:{args.view}"] if args.view else [])
    bundle = args.bundle or edgekit.app_bundle("gesture", progress=_progress)
    with edgekit.stream(bundle, args.source, sinks=sinks, stepping=args.stepping, limit=args.limit) as stream:
        for sink in stream.sinks:
            if url := getattr(sink, "url", ""):
                print(f"live at {url}", flush=True)
        stream.metrics.on_event = lambda event: print(
            f"{event.where}: {event.name} {event.text}", file=sys.stderr, flush=True
        )
        for item in stream:  # the newest frame each time; valid until the next one is asked for
            result = item.result
            for edge in result.edges:
                ago = (result.taken_ns - edge.taken_ns) / 1e9
                print(f"{item.frame.seq:6d}  {edge.label} {edge.kind}ed {ago:.1f} s ago\033[K", flush=True)
            line = f"{item.frame.seq:6d}  age {item.age_ms:6.1f} ms  {result.caption()}\033[K"
            print(line, end="\r", flush=True)  # one line that changes; events stay
    print()
    return 0


def _progress(what: str, done: int, of: int) -> None:
    """Of the first run, which builds the bundle for this machine."""
    print(f"\r{what} {done}/{of}\033[K", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except edgekit.EdgekitError as error:
        sys.exit(f"gesture: {error}")

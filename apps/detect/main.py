"""The shipped detector, live: a camera in, boxes out, and a page to watch it on.

edgekit app detect --source v4l2:/dev/video0 --view :8080
edgekit app detect --source "synthetic://street?live=1&frames=0" --view :8080
python apps/detect/main.py --bundle yolo_lite.rpi5.edge --source usb:0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import edgekit

STREET = "synthetic://street?live=1&frames=0&loop=150"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edgekit app detect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bundle", help="bundle to run (default: the shipped detector, built for this machine)"
    )
    parser.add_argument(
        "--source", default=STREET, help="camera, video or world (default: a synthetic street)"
    )
    parser.add_argument("--view", metavar="[HOST]:PORT", help="live page, e.g. :8080")
    parser.add_argument(
        "--sink", action="append", default=[], help="out.jsonl, out.mp4, out.mcap; several times"
    )
    parser.add_argument("--score", type=float, default=0.4, help="lowest score to keep (default: 0.4)")
    parser.add_argument("--limit", type=int, help="stop after this many frames")
    args = parser.parse_args(words)
    if args.limit is not None and args.limit < 1:  # now: the first run builds a bundle
        parser.error(f"--limit {args.limit}: expected at least 1")

    sinks = args.sink + ([f"view:{args.view}"] if args.view else [])
    bundle = args.bundle or edgekit.app_bundle("detect", progress=_progress)
    with edgekit.stream(
        bundle, args.source, sinks=sinks, score_threshold=args.score, limit=args.limit
    ) as stream:
        for sink in stream.sinks:
            if url := getattr(sink, "url", ""):
                print(f"live at {url}", flush=True)
        stream.metrics.on_event = lambda event: print(
            f"{event.where}: {event.name} {event.text}", file=sys.stderr, flush=True
        )
        for item in stream:  # the newest frame each time; valid until the next one is asked for
            found = ", ".join(f"{label} {score:.2f}" for _, score, _, label in item.result)
            print(f"{item.frame.seq:6d}  age {item.age_ms:6.1f} ms  {found or '-'}", flush=True)
    return 0


def _progress(what: str, done: int, of: int) -> None:
    """Of the first run, which builds the bundle for this machine."""
    print(f"\r{what} {done}/{of}\033[K", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except edgekit.EdgekitError as error:
        sys.exit(f"detect: {error}")

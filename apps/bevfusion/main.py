"""Six cameras and a LiDAR in one view from above, live: boxes in metres out, and a page to watch it on.

edgekit app bevfusion --view :8080                      # a synthetic rig, every sensor a source of its own
edgekit app bevfusion --view :8080 --lose CAM_FRONT     # .. one of which is unplugged now and then
edgekit app bevfusion --moment frame.json --out seen.jpg            # one moment of a nuScenes-style file
edgekit app bevfusion --rig rig.toml --source lidar=URI --source CAM_FRONT=URI ..       # sensors of your own
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import edgekit
from edgekit.errors import UsageError

WORLD = "synthetic://street-rig?seed={seed}&live=1&frames=0&loop=100"
UNPLUGGED = "faulty:" + ";".join(f"unplug@{frame},4" for frame in range(40, 40_000, 80)) + "|"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edgekit app bevfusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", help="bundle to run (default: the shipped one, built for this machine)")
    parser.add_argument("--seed", type=int, default=20_000, help="street of the synthetic rig")
    parser.add_argument(
        "--lose", metavar="SENSOR", action="append", default=[], help="unplug this sensor now and then"
    )
    parser.add_argument(
        "--source", metavar="NAME=URI", action="append", default=[], help="a sensor of your own rig"
    )
    parser.add_argument("--rig", type=Path, help="calibration of your own rig (rig.toml)")
    parser.add_argument(
        "--moment", type=Path, metavar="FILE", help="one moment of a nuScenes-style info file instead"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bevfusion.jpg"), help="picture that --moment writes"
    )
    parser.add_argument("--score", type=float, default=0.3, help="least score of a box (default 0.3)")
    parser.add_argument("--view", metavar="[HOST]:PORT", help="live page, e.g. :8080")
    parser.add_argument(
        "--sink", action="append", default=[], help="out.jsonl, out.mp4, out.rrd, out.mcap; several times"
    )
    parser.add_argument("--limit", type=int, help="stop after this many results")
    args = parser.parse_args(words)

    sources = _sources(parser, args)
    bundle = args.bundle or edgekit.app_bundle("bevfusion", progress=_progress)
    if args.moment:
        return _moment(bundle, args.moment, args.out, args.score)
    sinks = args.sink + ([f"view:{args.view}"] if args.view else [])
    with edgekit.stream(bundle, sources, sinks=sinks, rig=args.rig, score_threshold=args.score) as stream:
        for sink in stream.sinks:
            if url := getattr(sink, "url", ""):
                print(f"live at {url}", flush=True)
        stream.metrics.on_event = lambda event: print(
            f"{event.where}: {event.name} {event.text}\033[K", file=sys.stderr, flush=True
        )
        for number, item in enumerate(stream, 1):  # valid until the next one is asked for
            line = f"{number:6d}  age {item.age_ms:6.1f} ms  {item.result.caption()}\033[K"
            print(line, end="\r", flush=True)
            if number == args.limit:
                break
    print()
    return 0


def _sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Every sensor's source, by name."""
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: expected at least 1")
    if args.source:
        pairs = [text.partition("=") for text in args.source]
        if not all(name and uri for name, _, uri in pairs):
            parser.error("--source: expected NAME=URI, as in lidar=scan.mcap")
        return {name: uri for name, _, uri in pairs}
    from edgekit.synth.street_rig import street_rig

    world = WORLD.format(seed=args.seed)
    sensors = [*street_rig().cameras, "lidar"]
    strange = sorted(set(args.lose) - set(sensors))
    if strange:
        parser.error(f"--lose {strange[0]}: no sensor of this rig, expected one of {', '.join(sensors)}")
    return {name: (UNPLUGGED if name in args.lose else "") + f"{world}&sensor={name}" for name in sensors}


def _moment(bundle: str | Path, file: Path, out: Path, score: float) -> int:
    """What the network finds in one recorded moment, with all sensors and with each kind alone, as a picture."""
    import dataclasses

    import cv2

    from edgekit.rig_files import read_nuscenes
    from edgekit.tasks.fusion.draw import draw

    frame = read_nuscenes(file)
    with edgekit.load(bundle) as engine:
        pipeline = engine.pipeline()
        for what, given in (
            ("all sensors", frame),
            ("LiDAR alone", dataclasses.replace(frame, shots={})),
            ("cameras alone", dataclasses.replace(frame, points=None, rings=None)),
        ):
            print(f"{what}: {pipeline(given, score_threshold=score).caption()}")
        found = pipeline(frame, score_threshold=score)
    if not cv2.imwrite(str(out), draw(frame, found)):
        raise UsageError(f"picture {out}: cannot be written. Give --out FILE.jpg in a folder that is there")
    print(f"picture: {out}")
    return 0


def _progress(what: str, done: int, of: int) -> None:
    """Of the first run, which builds the bundle for this machine."""
    print(f"\r{what} {done}/{of}\033[K", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except edgekit.EdgekitError as error:
        sys.exit(f"bevfusion: {error}")

"""Run bundles on cameras, videos, pictures or a synthetic street; write results, show them live."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edgekit.cli.common import add_engine_options, fraction, integer, one_of, print_json, say, warn
from edgekit.cli.rig_options import add_rig_options, named_sources, read_sync
from edgekit.errors import UsageError, printable
from edgekit.timebase import Policy

if TYPE_CHECKING:
    from edgekit.runtime.metrics import Event
    from edgekit.runtime.stream import Stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit run m.host.edge --source photos/ --sink found.jsonl --sink shown/\n"
        "  edgekit run m.host.edge --source drive.mp4 --sink drive_boxes.mp4\n"
        "  edgekit run m.host.edge --source v4l2:/dev/video0 --view :8080\n"
        "  edgekit run m.host.edge --source 'synthetic://street?live=1' --view :8080\n"
        "  edgekit run f.edge --rig rig.toml --source lidar=URI --source FRONT=usb:0"
    )
    parser.add_argument(
        "bundle",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="bundle file (*.edge) or folder; several share the source",
    )
    add_stream_options(parser)
    parser.add_argument(
        "--source",
        required=True,
        action="append",
        metavar="URI",
        help="v4l2:/dev/video0, usb:0, csi:0, rtsp://..., gst:PIPELINE, replay:FILE.mcap, picture, folder, video, "
        "or synthetic://street?seed=0&frames=100; NAME=URI names the camera, or the sensor of a rig; may be given several times",
    )
    add_rig_options(parser)
    add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object")


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that runs a stream, but for its bundles and sources."""
    parser.add_argument(
        "--sink",
        action="append",
        default=[],
        metavar="FILE",
        help="where results go: .jsonl (boxes or classes), .png .jpg (annotated picture), .mp4 (annotated video), "
        ".mcap (recording), rerun:FILE.rrd or a folder, named with a '/' at its end; may be given several times",
    )
    parser.add_argument(
        "--view",
        metavar="[HOST]:PORT",
        help="live page in the browser; this machine only, unless HOST says otherwise (then with a token)",
    )
    parser.add_argument("--metrics", metavar="[HOST]:PORT", help="serve metrics to Prometheus at /metrics")
    parser.add_argument(
        "--score",
        type=fraction("--score"),
        metavar="S",
        help="lowest score to keep, 0 to 1 (default: the bundle's)",
    )
    parser.add_argument(
        "--limit", type=integer("--limit", 1), metavar="N", help="stop after this many frames of each source"
    )
    parser.add_argument(
        "--policy",
        type=one_of("--policy", ("latest", "block")),
        metavar="P",
        help="latest: only the newest frame while the engine is busy; block: every frame (default: latest for live sources)",
    )
    parser.add_argument(
        "--stepping",
        type=one_of("--stepping", get_args(Policy)),
        metavar="P",
        help="network with state, when frames are missing or early: plain (a step per frame), hold, resample (keep the time "
        "base) or reset (default: the bundle's)",
    )


def open_stream(args: argparse.Namespace, bundles: list[Path], sources: list[str]) -> Stream:
    """The stream that the options ask for, its events told on stderr. Raises: as `edgekit.stream`."""
    from edgekit.runtime.stream import Stream

    sinks = [*args.sink]
    sinks += [f"view:{args.view}"] if args.view else []
    sinks += [f"prometheus:{args.metrics}"] if args.metrics else []
    twice = {sink for sink in sinks if sinks.count(sink) > 1}
    if twice:
        raise UsageError(f"option --sink {printable(min(twice))}: given twice. Leave one out")
    rig = getattr(args, "rig", None)
    stream = Stream(
        bundles,
        named_sources(sources),
        sinks=sinks,
        score_threshold=args.score,
        policy=args.policy,
        threads=args.threads,
        variant=args.variant,
        limit=args.limit,
        stepping=args.stepping,
        rig=rig,
        sync=read_sync(getattr(args, "sync", None)),
        watch_rig=rig is not None,
        lidar_budget_ms=getattr(args, "lidar_budget", None),
    )
    if any(source.live for source in stream.sources.values()):  # the errors of files are raised
        stream.metrics.on_event = _tell
    for engine in stream.engines.values():
        warn(engine.bundle)
    for sink in stream.sinks:
        url = getattr(sink, "url", "")
        if url:
            say(f"edgekit: live at {url}")
    return stream


def _tell(event: Event) -> None:
    if event.name == "engine-failed":  # comes as the error
        return
    say(
        f"edgekit: {event.seconds:.1f} s: {event.where}: {event.name}{': ' if event.text else ''}{event.text}"
    )


def main(args: argparse.Namespace) -> int:
    from edgekit import tasks
    from edgekit.cli.main import INTERRUPTED

    started = time.perf_counter()
    found, interrupted = 0, False
    with open_stream(args, args.bundle, args.source) as stream:
        unit = tasks.task(next(iter(stream.engines.values())).task).UNIT
        try:
            for item in stream:
                found += len(item.result)
        except KeyboardInterrupt:
            if not any(source.live for source in stream.sources.values()):
                raise
            interrupted = True  # how a live run ends
    seconds = time.perf_counter() - started
    summary = {**summarize(stream), unit: found, "seconds": round(seconds, 3), "sinks": args.sink}
    for source in stream.sources.values():
        if source.ignored:
            say(f"edgekit: note: {source.ignored} other files in {source.uri}: ignored")
    for _, reason in summary["skipped"]:  # a reason names its file
        say(f"edgekit: warning: skipped {reason}")
    if args.json:
        print_json(summary)
    else:
        rate = f"{summary['frames'] / seconds:.1f} frames/s, all included" if seconds > 0 else ""
        print(f"{summary['frames']} frames, {found} {unit} in {seconds:.1f} s ({rate})")
        for line in lines(summary):
            print(f"  {line}")
        for sink in args.sink:
            print(f"  {printable(sink)}")
    return INTERRUPTED if interrupted else 0


def summarize(stream: Stream) -> dict[str, Any]:
    """What a stream did, as JSON values."""
    snapshot = stream.metrics.snapshot()
    engines, cameras = snapshot["engines"], snapshot["cameras"]
    return {
        "frames": max((engine["results"] for engine in engines.values()), default=0),
        "age": {name: engine["age"] for name, engine in engines.items()},
        "drops": {name: camera["drops"] for name, camera in cameras.items() if camera["drops"]},
        "resets": {name: engine["resets"] for name, engine in engines.items() if engine["resets"]},
        "early_frames": {name: n for name, engine in engines.items() if (n := engine["early_frames"])},
        "missed_steps": {name: n for name, engine in engines.items() if (n := engine["missed_steps"])},
        "faults": {name: m["faults"] for name, m in {**engines, **cameras}.items() if m["faults"]},
        "missing": {name: rig["missing"] for name, engine in engines.items() if (rig := engine.get("rig"))},
        "skipped": [[path, reason] for s in stream.sources.values() for path, reason in s.skipped],
        "ignored": sum(source.ignored for source in stream.sources.values()),
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary's ages, drops, faults and resets of state for people."""
    text = [
        f"{name}: age p50 {age['p50_ms']:.1f} ms, p95 {age['p95_ms']:.1f} ms, p99 {age['p99_ms']:.1f} ms"
        for name, age in summary["age"].items()
        if age["count"]
    ]
    for what in ("drops", "faults"):
        for name, counts in summary[what].items():
            text.append(f"{name}: {what} " + ", ".join(f"{reason} {n}" for reason, n in counts.items()))
    for name, missing in summary["missing"].items():
        for sensor, why in missing.items():
            text.append(
                f"{name}: without {sensor} " + ", ".join(f"{reason} {n}" for reason, n in why.items())
            )
    for name, counts in summary["resets"].items():
        text.append(f"{name}: state reset " + ", ".join(f"{camera} {n}" for camera, n in counts.items()))
    for what in ("early_frames", "missed_steps"):
        for name, n in summary[what].items():
            text.append(f"{name}: {n} {what.replace('_', ' ')}")
    return text

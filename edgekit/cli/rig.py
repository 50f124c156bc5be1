"""Look at a rig: how its sensors are mounted, and whether pictures, points and labels agree with that."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekit.cli.common import filled, integer, one_of, print_json, say
from edgekit.cli.targets import table
from edgekit.errors import UsageError, printable
from edgekit.rig import Camera, Mount, Rig, RigFrame, in_picture
from edgekit.rig_check import CameraCheck, alarms, check, oddities
from edgekit.rig_files import read_frames
from edgekit.rig_fit import CONTROL, LEAST_POINTS, BoxFit, Summary, fit, summary

ACTIONS = ("show", "check", "tables")
FITS = 0.5
"""Median overlap with rectangles drawn on the pictures below which boxes and pictures are said not to agree."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "show   how every sensor is mounted and what it sees; with --out the sanity\n"
        "       picture: points coloured by depth and boxes on every camera's\n"
        "       picture, and the same from above\n"
        "check  what speaks against the calibration: edges in the pictures against\n"
        "       jumps in distance, boxes against the points in them, boxes against\n"
        "       rectangles in the pictures. Exit code 1 when something does\n"
        "tables what a bundle's view transform needs of a rig (which pixel and depth\n"
        "       falls into which cell): built ahead and kept in the cache, so that the\n"
        "       first frame does not wait for it\n"
        "\n"
        "PLACE is a rig's TOML file (its mounting alone), a recording of one (*.mcap),\n"
        "an info file of nuScenes or KITTI (*.json), a file of one KITTI frame\n"
        "(training/calib/000001.txt), or synthetic://street-rig?seed=7.\n"
        "\n"
        "examples:\n"
        "  edgekit rig show frame.json --out rig.png\n"
        "  edgekit rig check 'synthetic://street-rig?seed=7' --frames 20\n"
        "  edgekit rig tables rig.toml --bundle fusion.host.edge"
    )
    parser.add_argument("action", type=one_of("action", ACTIONS), metavar="show|check|tables")
    parser.add_argument("place", type=filled("PLACE"), metavar="PLACE", help="where the rig is described")
    parser.add_argument(
        "--frame",
        type=integer("--frame", 0),
        default=0,
        metavar="N",
        help="the first frame to look at (default: 0)",
    )
    parser.add_argument(
        "--frames",
        type=integer("--frames", 1, 10_000),
        default=0,
        metavar="N",
        help="how many frames to check, as many as there are (default: 20)",
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="write the sanity picture here (show)")
    parser.add_argument(
        "--width",
        type=integer("--width", 64, 4096),
        default=640,
        metavar="N",
        help="of each camera in it, pixels (default: 640)",
    )
    parser.add_argument("--bare", action="store_true", help="leave points off the pictures (show)")
    parser.add_argument("--boxes", action="store_true", help="print a line for every box and picture (check)")
    parser.add_argument("--bundle", type=Path, metavar="BUNDLE", help="whose tables are built (tables)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where they are kept (tables; default: edgekit's cache)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: UsageError, OutputError, MissingExtraError."""
    _refuse(args)
    return {"show": _show, "check": _check, "tables": _tables}[args.action](args)


def _refuse(args: argparse.Namespace) -> None:
    """Options of another action. Raises: UsageError."""
    owners = {
        "--out": ("show", args.out), "--bare": ("show", args.bare), "--frames": ("check", args.frames),
        "--boxes": ("check", args.boxes), "--bundle": ("tables", args.bundle), "--cache": ("tables", args.cache),
    }  # fmt: skip
    for option, (action, value) in owners.items():
        if value and action != args.action:
            raise UsageError(
                f"option {option}: means nothing to 'rig {args.action}', expected with 'rig {action}'"
            )
    if args.action == "tables" and args.bundle is None:
        raise UsageError("rig tables: expected --bundle BUNDLE, whose tables are to be built")


def _place(place: str, first: int) -> tuple[Rig, RigFrame | None]:
    """The rig that `place` describes, and frame `first` where there are frames. Raises: UsageError."""
    if Path(place).suffix.lower() == ".toml":
        return Rig.read(place), None
    frame = next(_frames(place, first, 1), None)
    if frame is None:
        raise UsageError(f"rig {printable(place)}: has no frame {first}")
    return frame.rig, frame


def _frames(place: str, first: int, count: int) -> Iterator[RigFrame]:
    """Frames of a recording or a synthetic rig. Raises: UsageError where there are none."""
    if Path(place).suffix.lower() == ".mcap" and "://" not in place and not place.startswith("replay:"):
        place = f"replay:{place}"
    if "://" not in place and not place.startswith("replay:"):
        yield from read_frames(place, first, count)
        return
    from edgekit.runtime.sources import open_source

    with open_source(place, limit=first + count) as source:
        for number, frame in enumerate(source):
            if frame.rig is None:
                raise UsageError(
                    f"source {printable(place)}: its frames come from no rig. Give a recording of one, or "
                    "synthetic://street-rig?seed=7"
                )
            if number >= first:
                yield frame.rig


# --- show ----------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    rig, frame = _place(args.place, args.frame)
    if frame is None and args.out is not None:
        raise UsageError(
            f"rig {printable(Path(args.place).name)}: holds no pictures to draw. Give a recording, or leave --out out"
        )
    if args.out is not None and frame is not None:  # what may fail comes before what is printed
        _draw(frame, args.out, args.width, not args.bare)
        say(f"wrote {args.out}")
    if args.json:
        print_json(_facts(rig, frame))
    else:
        print("\n".join(_page(rig, frame)))
    for line in oddities(rig, frame):
        say(f"edgekit: warning: {line}")
    return 0


def _draw(frame: RigFrame, path: Path, width: int, points: bool) -> None:
    from edgekit.optional import load_cv2
    from edgekit.runtime.sinks import pictures
    from edgekit.runtime.sinks.base import make_parent, write_whole
    from edgekit.tasks.fusion.draw import draw

    cv2 = load_cv2("draw a rig")
    if path.suffix.lower() not in pictures.SUFFIXES:
        raise UsageError(
            f"option --out {printable(path)}: expected a picture, one of {', '.join(pictures.SUFFIXES)}"
        )
    make_parent(path)
    ok, data = cv2.imencode(path.suffix.lower(), draw(frame, width=width, points=points))
    assert ok, "a picture of this size can be encoded"
    write_whole(path, bytes(data.tobytes()))


def _facts(rig: Rig, frame: RigFrame | None) -> dict[str, Any]:
    sensors = {
        "lidar": {"position": rig.lidar.position, **_looks(rig.lidar), "period_ms": rig.lidar.period_ms},
        **{
            name: {
                "position": camera.position,
                **_looks(camera),
                "width": camera.width,
                "height": camera.height,
                "sees_degrees": _sees(camera),
                "offset_ms": camera.offset_ms,
            }
            for name, camera in rig.cameras.items()
        },
    }
    facts: dict[str, Any] = {"rig": rig.name, "digest": rig.digest(), "sensors": sensors}
    if frame is not None:
        facts["frame"] = {
            "index": frame.index,
            "taken_ns": frame.taken_ns,
            "points": None if frame.points is None else len(frame.points),
            "boxes": None if frame.truth is None else len(frame.truth),
            "points_in_picture": _points_seen(frame),
            "missing": [name for name in rig.cameras if name not in frame.shots],
        }
    facts["warnings"] = oddities(rig, frame)
    return facts


def _page(rig: Rig, frame: RigFrame | None) -> Iterator[str]:
    cameras = len(rig.cameras)
    yield f"rig {rig.name}: a LiDAR and {cameras} camera{'s' * (cameras != 1)}, calibration {rig.digest()[:12]}"
    yield ""
    seen = {} if frame is None else _points_seen(frame)
    rows = [("SENSOR", "X Y Z", "LOOKS TO", "UP", "ROLL", "SEES", "PICTURE", "TAKEN", "POINTS")]
    for name, mount in (("lidar", rig.lidar), *rig.cameras.items()):
        turn = _looks(mount)
        row = (
            name,
            " ".join(f"{v:.2f}" for v in mount.position),
            _side(turn["looks_left_degrees"]),
            f"{turn['looks_up_degrees']:.1f}",
            f"{turn['roll_degrees']:.1f}",
        )
        if isinstance(mount, Camera):
            picture = f"{mount.width}x{mount.height}"
            wide, tall = _sees(mount)
            late = f"{mount.offset_ms:+.1f} ms"
            rows.append((*row, f"{wide:.1f} x {tall:.1f}", picture, late, str(seen.get(name, "-"))))
        else:
            count = "-" if frame is None or frame.points is None else str(len(frame.points))
            rows.append((*row, "around", "-", f"{rig.lidar.period_ms:g} ms", count))
    yield from table(rows)
    yield ""
    yield "X Y Z: metres ahead, to the left and up of the middle of the rear axle on the ground. Angles in degrees;"
    yield "a LiDAR looks along its x. TAKEN: a sweep's duration; a picture's time from the sweep's end."
    if frame is not None:
        yield (
            f"frame {frame.index}: {0 if frame.truth is None else len(frame.truth)} labelled boxes"
            + "".join(f", no picture of {name}" for name in rig.cameras if name not in frame.shots)
        )


def _looks(mount: Mount) -> dict[str, float]:
    """Where a camera's axis, or a LiDAR's x, points in the ego frame, and how it is rolled about it; degrees."""
    turn = mount.to_ego[:3, :3]
    if isinstance(mount, Camera):
        ahead, right = turn[:, 2], turn[:, 0]
    else:
        ahead, right = turn[:, 0], -turn[:, 1]
    return {
        "looks_left_degrees": round(math.degrees(math.atan2(ahead[1], ahead[0])), 3),
        "looks_up_degrees": round(math.degrees(math.asin(max(-1.0, min(1.0, ahead[2])))), 3),
        # the right hand side dips when it is rolled clockwise
        "roll_degrees": round(math.degrees(math.asin(max(-1.0, min(1.0, -right[2])))), 3),
    }


def _side(left: float) -> str:
    if abs(left) < 0.05:
        return "ahead"
    return f"{abs(left):.1f} {'left' if left > 0 else 'right'}"


def _sees(camera: Camera) -> tuple[float, float]:
    """Degrees across and up and down."""

    def angle(size: float, centre: float, focal: float) -> float:
        return round(math.degrees(math.atan2(centre, focal) + math.atan2(size - centre, focal)), 3)

    return angle(camera.width, camera.cx, camera.fx), angle(camera.height, camera.cy, camera.fy)


def _points_seen(frame: RigFrame) -> dict[str, int]:
    if frame.points is None:
        return {}
    return {
        name: int(in_picture(camera, *frame.project(name, frame.points)).sum())
        for name, camera in frame.rig.cameras.items()
    }


# --- check ---------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    if Path(args.place).suffix.lower() == ".toml":
        rig = Rig.read(args.place)
        warnings = oddities(rig, None)
        if args.json:
            print_json({"rig": rig.name, "frames": 0, "warnings": warnings})
        else:
            print("\n".join(warnings or [f"rig {rig.name}: nothing odd about its mounting. Frames say more"]))
        return 1 if warnings else 0
    seen: list[BoxFit] = []
    control: list[list[BoxFit]] = [[], []]
    odd: dict[str, None] = {}
    count = 0
    name = ""

    def passing() -> Iterator[RigFrame]:
        nonlocal count, name
        for frame in _frames(args.place, args.frame, args.frames or 20):
            count, name = count + 1, frame.rig.name
            odd.update(dict.fromkeys(oddities(frame.rig, frame)))
            seen.extend(fit(frame))
            for side, found in zip((CONTROL, -CONTROL), control, strict=True):
                found.extend(fit(frame, side))
            yield frame

    cameras = check(passing())
    every = summary(seen)
    # the better of the two sides: what the measure still says of a camera that is wrong
    sides = [summary(found) for found in control]
    worst = Summary(
        every.boxes, _most(s.on_points for s in sides), every.labels, _most(s.on_label for s in sides)
    )
    warnings = [*odd, *alarms(cameras)]
    if every.on_label is not None and every.on_label < FITS:
        warnings.append(
            f"rig: boxes overlap the rectangles on the pictures by {every.on_label:.2f} (median of {every.labels}), "
            f"expected {FITS:g} or more. Check the calibration and the boxes' convention"
        )
    if args.json:
        found: dict[str, Any] = {
            "rig": name,
            "frames": count,
            "cameras": [asdict(each) for each in cameras],
            "fit": asdict(every),
            "turned_degrees": CONTROL,
            "turned_fit": asdict(worst),
            "warnings": warnings,
        }
        print_json(found | ({"boxes": [asdict(each) for each in seen]} if args.boxes else {}))
    else:
        print("\n".join(_report(name, count, cameras, seen, every, worst, args.boxes)))
        for line in warnings:
            print(line)
    return 1 if warnings else 0


def _most(values: Iterator[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _report(
    name: str,
    count: int,
    cameras: list[CameraCheck],
    seen: list[BoxFit],
    every: Summary,
    worst: Summary,
    boxes: bool,
) -> Iterator[str]:
    yield f"rig {name}: {count} frame{'s' * (count != 1)}"
    yield ""
    rows: list[tuple[str, ...]]
    if boxes and seen:
        rows = [("FRAME", "CAMERA", "BOX", "LABEL", "POINTS", "ON POINTS", "ON LABEL")]
        for each in seen:
            rows.append(
                (
                    str(each.frame),
                    each.camera,
                    str(each.box),
                    each.label,
                    str(each.points),
                    _share(each.on_points),
                    _share(each.on_label),
                )
            )
        yield from table(rows)
        yield ""
    rows = [("CAMERA", "EDGES", "TURNED", "AT POINTS", "BOXES", "ON POINTS", "LABELS", "ON LABEL")]
    for camera in cameras:
        own = summary(each for each in seen if each.camera == camera.camera)
        rows.append(
            (
                camera.camera, camera.verdict, f"{camera.degrees:+.1f}" if camera.verdict != "unclear" else "-",
                str(camera.points), str(own.boxes), _share(own.on_points), str(own.labels), _share(own.on_label),
            )
        )  # fmt: skip
    rows.append(
        (
            "all",
            "",
            "",
            "",
            str(every.boxes),
            _share(every.on_points),
            str(every.labels),
            _share(every.on_label),
        )
    )
    rows.append(
        (
            f"turned {CONTROL:g}",
            "",
            "",
            "",
            str(worst.boxes),
            _share(worst.on_points),
            str(worst.labels),
            _share(worst.on_label),
        )
    )
    yield from table(rows)
    yield ""
    yield "EDGES: whether edges in the pictures lie where distances jump, and how many degrees to the right they do."
    yield f"ON POINTS: median overlap of boxes ({LEAST_POINTS} points or more) with the LiDAR points in them. ON LABEL: with"
    yield f"the rectangles that the labels have for the picture. turned {CONTROL:g}: the same for cameras turned by {CONTROL:g} degrees,"
    yield "the better side: what a wrong calibration would give."


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# --- tables --------------------------------------------------------------------------------------


def _tables(args: argparse.Namespace) -> int:
    from edgekit.backends.base import LoadOptions
    from edgekit.bundle import Bundle
    from edgekit.kernels import steps
    from edgekit.manifest import KernelStep
    from edgekit.tasks.fusion.calibration import Calibration
    from edgekit.tasks.fusion.pipeline import read_spec

    rig, _ = _place(args.place, args.frame)
    made: list[dict[str, Any]] = []
    with Bundle.open(args.bundle) as bundle:
        manifest = bundle.manifest
        name = printable(args.bundle.name)
        plan = [step for step in manifest.plan if isinstance(step, KernelStep)]
        pools = [step for step in plan if step.kernel == steps.PoolCameras.KERNEL]
        if not pools:
            raise UsageError(
                f"bundle {name}: has no view transform, so it needs no tables. Give one of the task fusion"
            )
        spec = read_spec(manifest)
        if not set(spec.cameras) & set(rig.cameras):
            raise UsageError(
                f"rig {rig.name}: has none of the cameras of bundle {name}, expected {', '.join(spec.cameras)}"
            )
        told = Calibration(rig, spec.cameras, spec.preprocess)
        tensors = {tensor.name: tensor for tensor in manifest.tensors}
        for step in pools:
            executable = steps.load(step, tensors, bundle.read, LoadOptions(cache_dir=args.cache))
            assert isinstance(executable, steps.PoolCameras)
            path = executable.table_path(told.intrinsics, told.camera_to_lidar)
            there = path.is_file()
            table = executable.table(told.intrinsics, told.camera_to_lidar).table
            made.append(
                {
                    "step": step.name,
                    "path": str(path),
                    "kept": path.is_file(),
                    "was_there": there,
                    "bytes": table.nbytes,
                    "points": table.points,
                    "of_points": math.prod(table.shape),
                    "cells": math.prod(table.grid),
                    "empty_cells": int((table.starts[1:] == table.starts[:-1]).sum()),
                }
            )
    lacking = [camera for camera in spec.cameras if camera not in rig.cameras]
    unused = [camera for camera in rig.cameras if camera not in spec.cameras]
    if args.json:
        print_json(
            {"rig": rig.name, "digest": rig.digest(), "tables": made, "missing": lacking, "unused": unused}
        )
    else:
        for each in made:
            how = (
                "was there"
                if each["was_there"]
                else "built"
                if each["kept"]
                else "built, but could not be kept"
            )
            print(
                f"{each['step']}: {each['points']} of {each['of_points']} points in {each['cells']} cells, "
                f"{each['bytes'] / 2**20:.1f} MiB, {how}"
            )
            print(f"  {each['path']}")
    for text, cameras in (("the rig lacks", lacking), ("not used by the network:", unused)):
        if cameras:
            say(f"edgekit: warning: {text} {', '.join(cameras)}")
    return 0 if all(each["kept"] for each in made) else 1

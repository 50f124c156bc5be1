"""Turn a model into proven bundles, one per target."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError
from edgekit.target import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="ONNX file, edgekit.toml or app folder (default: ./edgekit.toml, else the detector that ships with edgekit)",
    )
    parser.add_argument(
        "--target", required=True, metavar="T[,T]", help="boards to build for; see 'edgekit targets'"
    )
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "float16", "int8"])
    parser.add_argument(
        "--head",
        help="detector family when it is not found: yolox, yolov5, yolov8, nanodet, fastestdet, rows",
    )
    parser.add_argument("--columns", help="for --head rows: columns of the output, e.g. cx,cy,w,h,obj,cls*")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="INPUT=1x3x416x416", help="fix a dynamic input"
    )
    parser.add_argument("--calibration", metavar="FOLDER|SET", help="pictures for calibration (int8)")
    parser.add_argument(
        "--data", type=Path, metavar="INSTANCES.json", help="COCO annotations to prove the accuracy on"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the annotated pictures")
    parser.add_argument("--limit", type=int, help="use only the first N annotated pictures")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this Ed25519 private key (PEM)")
    parser.add_argument(
        "--allow-drop", action="store_true", help="write the bundle even when it misses its accuracy budget"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    from edgekit.toolchain.api import require_extras

    targets = [Target.load(name.strip()) for name in args.target.split(",") if name.strip()]
    if not targets:
        raise UsageError("--target: expected at least one name. See 'edgekit targets'")
    if len({t.name for t in targets}) != len(targets):
        raise UsageError(f"--target {args.target}: a target is given twice")
    require_extras()
    from edgekit.project import open_project, with_options
    from edgekit.toolchain.build import Options, build

    project = with_options(
        open_project(args.model),
        head=args.head,
        columns=tuple(c.strip() for c in args.columns.split(",")) if args.columns else (),
        classes=args.classes,
        calibration=args.calibration,
        data=args.data,
        images=args.images,
    )
    if args.dry_run:
        return dry_run(project, targets, args)
    options = Options(
        args.out,
        args.precision,
        args.sign,
        args.allow_drop,
        dict(parse_shape(text) for text in args.shape),
        args.limit,
    )
    with progress_bar() as progress:
        built = [b for entry in project.models for b in build(entry, targets, options, progress)]
    if args.json:
        rows = [
            {
                "path": str(b.path),
                "target": b.target,
                "model": b.model,
                "payload_digest": b.payload_digest,
                "bytes": b.bytes,
            }
            for b in built
        ]
        print(json.dumps({"bundles": rows}))
        return 0
    for b in built:
        print(f"{b.path}  {b.bytes / 2**20:.2f} MiB  {summary(b.evidence)}")
    return 0


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        shape = tuple(int(s) for s in sizes.lower().split("x"))
    except ValueError:
        shape = ()
    if not name or not shape or any(s < 1 for s in shape):
        raise UsageError(f"--shape {text}: expected INPUT=1x3x416x416")
    return name, shape


def dry_run(project: Any, targets: list[Target], args: argparse.Namespace) -> int:
    from edgekit.schema import to_json
    from edgekit.toolchain.build import plan

    plans = []
    for entry in project.models:
        for target in targets:
            backend, precision = plan(entry, target, args.precision)
            out = args.out / f"{entry.name}.{target.name}.edge"
            plans.append(
                {
                    "model": entry.name,
                    "source": str(entry.source),
                    "target": target.name,
                    "backend": backend,
                    "precision": precision,
                    "out": str(out),
                    "entry": json.loads(json.dumps(to_json(entry), default=str)),
                }
            )
    if args.json:
        print(json.dumps({"plan": plans}))
        return 0
    for p in plans:
        print(f"{p['model']} ({p['source']})\n  -> {p['out']}: {p['backend']}, {p['precision']}")
    return 0


def summary(evidence: dict[str, Any]) -> str:
    """The evidence in half a line."""
    metric = evidence["metric"]
    if "not_measured" in metric:
        agreement = evidence["agreement"]
        return f"{agreement['boxes_matched']} of {agreement['boxes_reference']} boxes as in float; accuracy not measured"
    shown = metric["payload"]["AP"]
    if shown is None:
        return "accuracy not measured (the pictures hold no labelled object)"
    return f"AP {shown:.3f} (float {metric['reference']['AP']:.3f}) on {metric['images']} pictures"


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A rich progress line on stderr when it is a terminal, plain lines of finished steps otherwise."""
    if not sys.stderr.isatty():
        last = ""

        def plain(what: str, done: int, of: int) -> None:
            nonlocal last
            if what != last:
                print(what, file=sys.stderr, flush=True)
                last = what

        yield plain
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=1)

        def show(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield show

"""Turn a model into proven bundles, one per target."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.archive import check_writable
from edgekit.cli import plans, quantization
from edgekit.cli.common import MAX_COUNT, filled, integer, one_of, print_json, say
from edgekit.errors import UsageError, printable
from edgekit.project import HEADS, PRECISIONS, QUANTIZATIONS, RESIZES
from edgekit.signing import check_private_key
from edgekit.spec import MAX_LANES, MAX_SECONDS, is_duration
from edgekit.target import Target
from edgekit.tasks import TASKS
from edgekit.tasks.video.spec import MAX_WINDOW

if TYPE_CHECKING:
    from edgekit.toolchain.build import Built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit build --target jetson-orin                the detector that ships here\n"
        "  edgekit build app/ --target host --dry-run        the plan of a project\n"
        "  edgekit build m.onnx --target rpi5,jetson-orin --classes names.txt\n"
        "  edgekit build m.onnx --target host --data instances.json --images pictures/\n"
        "  edgekit build c.onnx --target host --task classify --resize crop:256 \\\n"
        "      --color rgb --mean 127.5 --std 127.5 --data val/"
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="an .onnx file, an edgekit.toml or a folder that holds one, or a plan folder (default: ./edgekit.toml, "
        "else the detector that ships with edgekit)",
    )
    parser.add_argument(
        "--target", required=True, metavar="T[,T]", help="boards to build for; 'edgekit targets' lists them"
    )
    parser.add_argument(
        "--precision",
        type=one_of("--precision", PRECISIONS),
        default="auto",
        metavar="P",
        help="auto (each board's default), float32, float16, int8 (needs pictures to calibrate on) or dynamic "
        "(LiteRT: int8 weights, float activations)",
    )
    parser.add_argument("--out", type=filled("--out"), default="dist", metavar="DIR", help="default: dist")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this Ed25519 private key (PEM)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")

    model = parser.add_argument_group("when the model file does not say it all")
    model.add_argument(
        "--task",
        type=one_of("--task", TASKS),
        metavar="T",
        help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]} (default: detect; a plan folder says its own)",
    )
    model.add_argument(
        "--head", type=one_of("--head", HEADS), metavar="FAMILY", help=f"detector family: {', '.join(HEADS)}"
    )
    model.add_argument(
        "--columns",
        type=filled("--columns"),
        metavar="C,C",
        help="for --head rows: columns of the output, as cx,cy,w,h,obj,cls*",
    )
    add_picture_options(model)
    model.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="INPUT=1x3x416x416",
        help="size of an input that the file leaves open",
    )

    model.add_argument(
        "--batch",
        type=integer("--batch", 1, MAX_LANES),
        metavar="B",
        help="streams that one run takes, each in a lane of its own (default: 1)",
    )

    video = parser.add_argument_group("for --task video: a clip model, or a one-frame model with its states")
    video.add_argument(
        "--dt-s",
        type=seconds("--dt-s"),
        metavar="S",
        help="seconds between two frames of the clips it was trained on: the time base that a stream keeps",
    )
    video.add_argument(
        "--frames",
        type=integer("--frames", 1, MAX_WINDOW),
        metavar="T",
        help="frames of a clip, where the network's input does not say it",
    )
    video.add_argument(
        "--allow-bidirectional",
        action="store_true",
        help="convert a network that looks ahead: the present frame stands in for the next one, and the drop is measured",
    )

    proof = parser.add_argument_group("what the build is proven on")
    proof.add_argument(
        "--data",
        type=Path,
        metavar="LABELS",
        help="labels to measure the accuracy on: COCO json; for a classifier a folder per class, a table "
        "file,label (.csv, .jsonl) or arrays (.npz); for video a folder of <class>/<clip>, or clips as .npz; of a rig "
        "a KITTI folder, a nuScenes-style .json, or synthetic://street-rig?count=200",
    )
    proof.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures that the labels name"
    )
    proof.add_argument(
        "--limit", type=integer("--limit", 1), metavar="N", help="use only the first N annotated pictures"
    )
    proof.add_argument(
        "--calibration",
        type=filled("--calibration"),
        metavar="FOLDER|SET",
        help="pictures to calibrate int8 on, and to prove on where no labels are needed: a folder or a named set",
    )
    proof.add_argument(
        "--quantization",
        type=one_of("--quantization", QUANTIZATIONS),
        default="search",
        metavar="HOW",
        help="for int8: search (the default: repairs, float islands, within the accuracy budget), search+qat (trains "
        "weights and scales on the calibration pictures where the budget is missed, which takes minutes), qat (in any "
        "case), or one plain range scheme for everything: minmax, percentile, entropy, mse",
    )
    proof.add_argument(
        "--qat-steps",
        type=integer("--qat-steps", 1, MAX_COUNT),
        default=300,
        metavar="N",
        help="batches of that training (default: 300)",
    )
    proof.add_argument(
        "--weights-codec",
        type=filled("--weights-codec"),
        metavar="CODEC",
        help="store float32 weights in few bits, for a smaller download; decoded when the bundle is loaded, judged "
        "by the accuracy limits: kmeans-16, pow2-5, int4, ternary, binary, 2:4+int8, sparse+kmeans-16, ...",
    )
    proof.add_argument(
        "--allow-drop", action="store_true", help="write the bundle even when it misses its accuracy limits"
    )


def add_picture_options(group: Any) -> None:
    """--classes, and those that `input_rule` reads."""
    group.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line")
    group.add_argument(
        "--resize",
        type=filled("--resize"),
        metavar="HOW",
        help="how a picture fills the input: stretch, letterbox, letterbox-center, crop or crop:256 (shorter "
        "side to 256 pixels, then the middle). A classifier needs this and the next three",
    )
    group.add_argument(
        "--color", type=one_of("--color", ("rgb", "bgr")), metavar="ORDER", help="channels: rgb or bgr"
    )
    group.add_argument(
        "--mean",
        type=triple("--mean"),
        metavar="M[,M,M]",
        help="x = (pixel - mean) / std, in 8-bit levels: ImageNet's is 123.675,116.28,103.53",
    )
    group.add_argument(
        "--std",
        type=triple("--std"),
        metavar="S[,S,S]",
        help="255 for '/255'; ImageNet's is 58.395,57.12,57.375",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: UsageError, ModelError, LoweringError, EvidenceError, OutputError."""
    from edgekit.toolchain.api import require_extras

    targets = read_targets(args.target)
    shapes = dict(parse_shape(text) for text in args.shape)
    out = Path(args.out)
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
        task=args.task,
        preprocess=input_rule(args),
        video=video_options(args),
        batch=args.batch,
    )
    # what would fail only after minutes of work is asked for now
    if args.sign is not None:
        check_private_key(args.sign)
    if args.dry_run:
        return dry_run(project, targets, args)
    check_writable(out)
    options = Options(
        out,
        args.precision,
        args.sign,
        args.allow_drop,
        shapes,
        args.limit,
        args.quantization,
        args.qat_steps,
        args.weights_codec or "",
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
        print_json({"bundles": rows})
        return 0
    # what was assumed or could not be checked about the network, once for all its targets
    warned = {w for b in built for w in b.evidence.get("quantization", {}).get("warnings", ())}
    for note in dict.fromkeys(note for b in built for note in b.evidence["graph"]["notes"]):
        say(f"edgekit: {'warning' if note in warned else 'note'}: {note}")
    tell_quantization(built)
    for b in built:
        print(f"{printable(b.path)}  {b.bytes / 2**20:.2f} MiB  {summary(b.evidence)}")
    return 0


def tell_quantization(built: Sequence[Built]) -> None:
    """On stderr: what the search of each bundle saw (once where targets share it), and a line per variant."""
    searches: dict[tuple[str, ...], list[str]] = {}
    for b in built:
        lines = tuple(quantization.trials(b.evidence))
        if lines:
            searches.setdefault((b.model, *lines), []).append(b.target)
    for (model, *shown), targets in searches.items():
        say(f"{model} for {', '.join(targets)}: what the search saw, * kept")
        for line in shown:
            say(f"  {line}")
    for b in built:
        if "plan" in b.evidence:
            say(f"{b.model} for {b.target}: steps of the plan")
            for rows in (plans.steps(b.evidence), plans.path(b.evidence)):
                for line in quantization.aligned(rows):
                    say(f"  {line}")
        if "quantization" in b.evidence:
            say(f"{b.model} for {b.target}: variants")
            for line in quantization.aligned(quantization.variants(b.evidence)):
                say(f"  {line}")
            for name, why in quantization.left_out(b.evidence):
                say(f"  {name}: left out, {why}")


def read_targets(text: str) -> list[Target]:
    """The boards of `--target a,b`. Raises: UsageError."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(
            f"option --target {printable(text)[:80]!r}: an empty name, expected T or T,T. See 'edgekit targets'"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"option --target: {printable(twice[0])} is given twice. Name each board once")
    return [Target.load(name) for name in names]


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        shape = tuple(int(s) for s in sizes.lower().split("x", 16))
    except ValueError:
        shape = ()
    if not name or not shape or not all(1 <= s <= MAX_COUNT for s in shape):
        raise UsageError(f"option --shape {printable(text)[:80]}: expected INPUT=1x3x416x416")
    return name, shape


def triple(option: str) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: one number for all channels, or three. Raises: UsageError."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(",", 3))
        except ValueError:
            values = ()
        if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
            raise UsageError(
                f"option {option} {printable(text)[:60]}: expected a number, or three with commas"
            )
        return values * 3 if len(values) == 1 else values

    return parse


def input_rule(args: argparse.Namespace) -> dict[str, Any]:
    """--resize, --color, --mean and --std as fields of PreprocessHint. Raises: UsageError."""
    rule = {name: getattr(args, name) for name in ("color", "mean", "std")}
    if args.resize is not None:
        how, _, side = args.resize.partition(":")
        rule["resize"] = one_of("--resize", RESIZES)(how)
        if side and (how != "crop" or not side.isdecimal() or len(side) > 5):
            raise UsageError(
                f"option --resize {printable(args.resize)[:60]}: expected crop:PIXELS, as crop:256"
            )
        rule["shorter_side"] = int(side) if side else None
    return {name: value for name, value in rule.items() if value is not None}


def seconds(option: str) -> Callable[[str], float]:
    """An argparse type: seconds above 0. Raises: UsageError."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not is_duration(value):
            raise UsageError(
                f"option {option} {printable(text)[:60]}: expected seconds above 0 and at most {MAX_SECONDS:g}, as 0.1"
            )
        return value

    return parse


def video_options(args: argparse.Namespace) -> dict[str, Any]:
    """--dt-s, --frames and --allow-bidirectional as fields of VideoHint: those that were given."""
    given = {
        "dt_s": args.dt_s,
        "frames": args.frames,
        "allow_bidirectional": args.allow_bidirectional or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def dry_run(project: Any, targets: list[Target], args: argparse.Namespace) -> int:
    from edgekit.schema import to_json
    from edgekit.toolchain.build import plan

    plans = []
    for entry in project.models:
        for target in targets:
            backends, precision = plan(entry, target, args.precision)
            out = Path(args.out) / f"{entry.name}.{target.name}.edge"
            plans.append(
                {
                    "model": entry.name,
                    "source": str(entry.source),
                    "target": target.name,
                    "backend": backends[0],
                    "backends": list(backends),
                    "precision": precision,
                    "out": str(out),
                    "entry": json.loads(json.dumps(to_json(entry), default=str)),
                }
            )
    if args.json:
        print_json({"plan": plans})
        return 0
    for p in plans:
        print(f"{p['model']} ({printable(p['source'])})")
        print(f"  -> {printable(p['out'])}: {', '.join(p['backends'])}, {p['precision']}")
    return 0


def summary(evidence: dict[str, Any]) -> str:
    """The evidence in half a line."""
    metric = evidence["metric"]
    if "not_measured" in metric:
        agreement = evidence["agreement"]
        unit = agreement["unit"]
        matched, wanted = agreement[f"{unit}_matched"], agreement[f"{unit}_reference"]
        return f"{matched} of {wanted} {unit} as in float; accuracy not measured"
    name = metric["name"]
    shown = metric["payload"][name]
    if shown is None:
        return "accuracy not measured (the pictures hold no labelled object)"
    return f"{name} {shown:.3f} (float {metric['reference'][name]:.3f}) on {metric['images']} {metric['of']}"


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A rich progress line on stderr when it is a terminal, plain lines of finished steps otherwise."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        last = ""

        def plain(what: str, done: int, of: int) -> None:
            nonlocal last
            if what != last:
                say(what)
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
        TextColumn("{task.description}", markup=False),
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

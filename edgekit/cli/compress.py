"""Make a network smaller or faster by training it after a recipe: what comes out is ready for edgekit build."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.archive import check_writable
from edgekit.cli.build import add_picture_options, input_rule, progress_bar
from edgekit.cli.common import filled, integer, one_of, print_json, say
from edgekit.cli.targets import table
from edgekit.errors import UsageError, printable
from edgekit.project import PRECISIONS
from edgekit.tasks import TASKS

if TYPE_CHECKING:
    from edgekit.compression.job import Job
    from edgekit.compression.run import Compressed, Point
    from edgekit.project import ModelEntry

MAX_SEED = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit compress my-app --recipe finetune --out runs/mine --dry-run\n"
        "  edgekit compress my-app --recipe mine.toml --out runs/mine --target rpi5\n"
        "  edgekit compress net:make --recipe r.toml --out runs/mine --task classify \\\n"
        "      --input 1x3x32x32 --resize stretch --color rgb --mean 0 --std 255 \\\n"
        "      --train train/ --data val/\n"
        "  edgekit build runs/mine --target rpi5\n"
        "\n"
        "A run that was interrupted goes on when the same command is given again."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="an edgekit.toml or a folder that holds one, an .onnx file, or a function that makes a torch module "
        "(package.module:function)",
    )
    parser.add_argument(
        "--recipe",
        type=filled("--recipe"),
        metavar="R",
        help="a .toml file, or the name of a recipe that ships (without it: list them)",
    )
    parser.add_argument(
        "--out", type=filled("--out"), metavar="DIR", help="folder of the run and of what comes out"
    )
    parser.add_argument("--target", metavar="T", help="board to be fast on; 'edgekit targets' lists them")
    parser.add_argument(
        "--precision",
        type=one_of("--precision", [p for p in PRECISIONS if p != "auto"]),
        metavar="P",
        help="what it will run in there (default: the board's own)",
    )
    parser.add_argument(
        "--steps-scale",
        type=scale,
        default=1.0,
        metavar="X",
        help="times the batches of every training: 0.1 for a first look",
    )
    parser.add_argument(
        "--seed", type=integer("--seed", 0, MAX_SEED), metavar="N", help="in place of the recipe's"
    )
    parser.add_argument("--model", dest="only", metavar="NAME", help="which model, of a project with several")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")

    model = parser.add_argument_group("when no project file says it")
    model.add_argument(
        "--task", type=one_of("--task", TASKS), metavar="T", help="what the network is for (default: detect)"
    )
    model.add_argument("--input", type=sizes, default=(), metavar="1x3x32x32", help="input of a torch module")
    add_picture_options(model)
    data = parser.add_argument_group("what it learns from and is judged by")
    data.add_argument(
        "--train",
        type=Path,
        metavar="LABELS",
        help="labels to train on, as of --data: for a classifier a folder per class, a table or .npz; COCO json",
    )
    data.add_argument(
        "--train-images", type=Path, metavar="DIR", help="folder of the pictures that they name"
    )
    data.add_argument(
        "--data", type=Path, metavar="LABELS", help="labels to judge by: others than to train on"
    )
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures that they name")


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: UsageError, ModelError, CalibrationError, OutputError, EdgekitError."""
    from edgekit.toolchain.api import compression_job, require_extras, require_torch

    require_extras()
    require_torch()
    if args.recipe is None:
        return list_recipes(args.json)
    if args.model is None:
        raise UsageError(
            "argument MODEL: missing, expected a project, an .onnx file or package.module:function"
        )
    if args.out is None and not args.dry_run:
        raise UsageError("option --out: missing, expected a folder for the run. Give --out DIR")
    if args.out is not None:
        check_writable(Path(args.out))
    job = compression_job(
        args.model, args.recipe, args.target, only=args.only, precision=args.precision,
        steps_scale=args.steps_scale, seed=args.seed, task=args.task, classes=args.classes, preprocess=input_rule(args),
        input=args.input, train=args.train, train_images=args.train_images, data=args.data, images=args.images,
    )  # fmt: skip
    if args.dry_run:
        return dry_run(job, args.json)
    out = Path(args.out)
    try:
        with progress_bar() as progress:
            done = job.run(out, progress)
    except KeyboardInterrupt:
        say(f"edgekit: note: {out} keeps what was done: the same command goes on from there")
        raise
    if args.json:
        print_json({"folder": str(out), **done.summary})
        return 0
    print("\n".join(report(done, args.target, job.opened.entry)))
    return 0


def list_recipes(json: bool) -> int:
    """The recipes that ship, and the methods that one may be made of."""
    from edgekit.compression.recipe import methods, named_recipes, read_recipe

    found = {name: read_recipe(path) for name, path in named_recipes().items()}
    if json:
        print_json({"recipes": {n: r.table() for n, r in found.items()}, "methods": list(methods())})
        return 0
    print("\n".join(table([("RECIPE", "STEPS", ""), *(
        (name, " > ".join(step.method for step in r.steps), r.title) for name, r in found.items()
    )])))  # fmt: skip
    print(f"\nmethods for recipes of your own: {', '.join(methods())}")
    return 0


def dry_run(job: Job, json: bool) -> int:
    plan = job.table()
    if json:
        print_json({"plan": plan})
        return 0
    shape = "x".join(map(str, plan["input"]))
    where = f", for {plan['target']} in {plan['precision']}" if plan["target"] else ""
    print(
        f"{plan['name']}: {count(plan['parameters'])} parameters, {count(plan['macs'])} MACs at {shape}{where}"
    )
    facts = plan["data"]
    if "pictures" in facts:
        print(f"trained on {facts['pictures']} pictures, judged on {facts.get('judged_on', 'others')}")
    if plan["scratch"]:
        print(f"first trained for {plan['scratch']} batches, as it comes without weights")
    print(f"recipe {plan['recipe']['name']}, seed {plan['recipe']['seed']}:")
    for number, step in enumerate(plan["recipe"]["step"], 1):
        options = ", ".join(f"{k} = {printable(str(v))}" for k, v in step.items() if k != "method")
        print(f"  {number}. {step['method']}: {options}")
    return 0


def report(done: Compressed, target: str | None, entry: ModelEntry | None = None) -> list[str]:
    """Did it work, what did it cost, what comes next. entry: of the project, for what it accepts."""
    first, last = done.before, done.after
    name = done.summary["metric"]
    timed = all(p.latency_s is not None for p in done.points)
    head = ["STEP", name.upper(), "PARAMETERS", "MACS", "ZEROS", *(["ESTIMATED"] if timed else []), "TOOK"]
    rows = [tuple(head), *(tuple(_row(p, timed)) for p in done.points)]
    lines = [*table(rows), ""]
    change = 100 * (last.metric - first.metric)
    lines.append(
        f"{name} {first.metric:.4f} -> {last.metric:.4f} ({change:+.2f} points), {', '.join(_gains(first, last))}"
    )
    if entry is not None:
        limit = entry.accept.max_drop
        less = -change / 100 > limit
        lines.append(
            f"{'more' if less else 'not more'} than this project lets a build lose (max_drop, {100 * limit:g} points)"
            + ("; the build counts from the network as it is now" if less else "")
        )
    why = done.summary["facts"].get("latency", {}).get("not_estimated")
    if why is not None:
        lines.append(f"time on {target}: not estimated: {printable(why)}")
    elif timed:
        lines.append(
            f"times are estimates for {target} in {done.summary['precision']}, of the network alone (docs/estimate.md)"
        )
    lines.append("")
    lines.append(f"network  {printable(done.onnx)}")
    lines.append(f"plot     {printable(done.folder / 'accuracy.png')}")
    if (done.folder / "edgekit.toml").is_file():
        folder = shlex.quote(str(done.folder))
        lines.append(f"next     edgekit build {folder} --target {target or 'host'}")
    return lines


def _gains(first: Point, last: Point) -> list[str]:
    """What became less, as factors; what did not change is left out."""
    pairs = [
        ("fewer parameters", first.parameters, last.parameters),
        ("fewer MACs", first.macs, last.macs),
        ("fewer weights that are not zero", first.parameters * (1 - first.zeros), last.parameters * (1 - last.zeros)),
    ]  # fmt: skip
    if first.latency_s is not None and last.latency_s is not None:
        pairs.append(("faster by estimate", first.latency_s, last.latency_s))
    found = [f"{a / b:.2f} times {what}" for what, a, b in pairs if b and abs(a / b - 1) >= 0.005]
    return found or ["size and cost as before"]


def _row(point: Point, timed: bool) -> list[str]:
    took = "-" if point.seconds is None else duration(point.seconds)
    time = [f"{1e3 * (point.latency_s or 0):.3g} ms"] if timed else []
    cells = [
        point.stage,
        f"{point.metric:.4f}",
        count(point.parameters),
        count(point.macs),
        f"{point.zeros:.1%}",
    ]
    return [*cells, *time, took]


def count(value: float) -> str:
    """3 digits with k, M or G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def scale(text: str) -> float:
    """An argparse type: above 0. Raises: UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise UsageError(
            f"option --steps-scale {printable(text)[:40]}: expected a number above 0, at most 1000"
        )
    return value


def sizes(text: str) -> tuple[int, ...]:
    """An argparse type: 1x3x32x32. Raises: UsageError."""
    parts: Sequence[Any] = text.lower().split("x", 16)
    if not all(p.isascii() and p.isdecimal() and 0 < len(p) < 7 for p in parts) or len(parts) < 2:
        raise UsageError(f"option --input {printable(text)[:40]}: expected sizes, as 1x3x224x224")
    return tuple(map(int, parts))

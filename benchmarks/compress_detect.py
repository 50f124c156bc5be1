"""A detector beside the smaller one that a recipe made of it: accuracy, time here, instructions on an emulated board.

    python benchmarks/compress_detect.py street --cache runs/street --out runs/compress_street
    python benchmarks/compress_detect.py bccd --data ../shared/data/bccd --out runs/compress_bccd --scale 0.25 --speedup 3
    python benchmarks/compress_detect.py street --out runs/compress_street --dense apps/detect/yolo_lite.onnx \\
        --compressed apps/detect/yolo_lite_half.onnx                      # measures alone

street: the network of apps/detect on the procedural street (14,000 pictures to learn from), judged on pictures of streets
10000 and up. bccd: the same network first trained on blood cells (Shenggan/BCCD_Dataset, 205 photographs, Pascal VOC),
then compressed, judged on the 87 of its list `val`. Both by one recipe (--recipe), which is resumed where --out holds a
run of it that was interrupted. Blood cells need fewer batches (--scale); their pictures are smaller, what no channel takes away
is a larger part of the time, and more has to leave (--speedup).

Prints a JSON line each of: what the recipe did; AP50 and AP of both, float and INT8, with the 95 % interval of the
difference (paired bootstrap over pictures); milliseconds of both INT8 builds on this machine, interleaved, one thread, each
by the fastest of its backends; and instructions of both on the emulated pi5 (tools/arm/setup.sh), again by the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgekit  # noqa: E402
from benchmarks.common import commit, reference_data  # noqa: E402
from edgekit.dataset import DataSet  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from edgekit.project import ModelEntry, open_project  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402
from edgekit.target import Target  # noqa: E402

ROUNDS, RUNS, WARMUP = 60, 3, 3
BOARD = "rpi5"
CELLS = ("Platelets", "RBC", "WBC")
CELLS_SIZE = (192, 256)
SCRATCH = 1500
"""Batches that the street's network learns blood cells from, before anything is compressed."""


# --- the two networks -------------------------------------------------------------------------------


def street(args: argparse.Namespace) -> tuple[ModelEntry, Callable[[int], Any]]:
    """The entry of apps/detect, and its Problem for so many batches."""
    entry = open_project(ROOT / "apps" / "detect").models[0]

    def problem(steps: int) -> Any:
        from edgekit.compression.detect_problem import detect_problem
        from edgekit.models.detect_data import Batching, rendered

        data = rendered(args.cache, 1000, 14, 384, args.threads)
        options = Batching(steps=steps)
        return detect_problem(
            entry, data, options, pictures=args.pictures, identity={"streets": 1000, "frames": 14}
        )

    return entry, problem


def bccd(args: argparse.Namespace) -> tuple[ModelEntry, Callable[[int], Any]]:
    """An entry of blood cells, and its Problem; the network is that of the street with new outputs for classes."""
    from edgekit.models.voc import instances

    sets = {}
    for split in ("train", "val"):
        path = args.out / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(instances(args.data, split, CELLS)), encoding="utf-8")
        sets[split] = DataSet(data=path.resolve(), images=(args.data / "JPEGImages").resolve(), count=None)
    calibration = dataclasses.replace(sets["train"], count=128)
    entry = ModelEntry(
        "bccd",
        ROOT / "apps/detect/yolo_lite.onnx",
        classes=CELLS,
        calibration=calibration,
        evaluation=sets["val"],
    )

    def problem(steps: int) -> Any:
        import torch

        from edgekit.compression.detect_problem import detect_problem
        from edgekit.models.detect_data import Batching, pictures
        from edgekit.models.yolo_lite import load_onnx, remeasure, with_classes
        from edgekit.tasks.detect.dataset import read_coco

        torch.manual_seed(0)  # of the new outputs
        train = sets["train"]
        assert train.data is not None and train.images is not None
        labelled = read_coco(train.data, train.images, labels=CELLS)
        height, width = CELLS_SIZE
        options = Batching(
            steps=steps, width=width, height=height, crop_width=width, crop_height=height, upright=False
        )
        made = detect_problem(
            entry, pictures(labelled, CELLS_SIZE), options, pictures=args.pictures,
            model=with_classes(load_onnx(entry.source), len(CELLS)), identity={"digest": labelled.digest}, lr=1e-3,
        )  # fmt: skip
        remeasure(made.model, (made.batch(i)[0] for i in range(4)))
        return made

    return entry, problem


def compressed(
    args: argparse.Namespace, name: str, entry: ModelEntry, problem: Callable[[int], Any]
) -> tuple[Path, Path]:
    """(dense, compressed) networks, made now where the run is not whole."""
    import torch

    from edgekit.compression.recipe import read_recipe
    from edgekit.compression.run import compress

    torch.set_num_threads(args.threads)
    recipe = read_recipe(args.recipe)
    if args.scale != 1:
        recipe = recipe.scaled(args.scale)
    if args.speedup:
        pruned = [
            dataclasses.replace(step, options=dataclasses.replace(step.options, speedup=args.speedup))
            if step.method == "prune"
            else step
            for step in recipe.steps
        ]
        recipe = dataclasses.replace(recipe, steps=tuple(pruned))
    told = [0.0]

    def progress(what: str, done: int, of: int) -> None:
        if time.monotonic() > told[0] + 30:
            told[0] = time.monotonic()
            print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)

    dense = entry.source
    work = problem(recipe.batches)
    if name == "bccd":
        first = problem(args.scratch)
        rule = read_recipe(
            {
                "name": "dense",
                "step": [{"method": "finetune", "steps": args.scratch, "lr": first.lr, "ema": 0.99}],
            }
        )
        base = compress(first, rule, args.out / "dense", progress=progress)
        work, dense = dataclasses.replace(work, model=base.module), base.onnx
        line("trained", network=name, points=[dataclasses.asdict(p) for p in base.points])
    done = compress(work, recipe, args.out / "run", Target.load(BOARD), progress=progress)
    line("compressed", network=name, recipe=recipe.name, points=[dataclasses.asdict(p) for p in done.points])
    return dense, done.onnx


# --- measuring --------------------------------------------------------------------------------------


def built(entry: ModelEntry, source: Path, out: Path) -> dict[str, Path]:
    """INT8 bundles of `source` for this machine and the board, made once: target -> file."""
    from edgekit.toolchain import build as main_path

    entry = dataclasses.replace(entry, source=source, evaluation=None)
    found = {}
    for name in ("host", BOARD):
        folder = out / hashlib.sha256(source.read_bytes()).hexdigest()[:16] / name
        if not list(folder.glob("*.edge")):
            options = main_path.Options(folder, "int8", allow_drop=True)
            main_path.build(entry, [Target.load(name)], options, lambda *_: None)
        (found[name],) = folder.glob("*.edge")
    return found


def accuracy(
    entry: ModelEntry, models: Mapping[str, Path], bundles: Mapping[str, Path], pictures: int
) -> dict[str, Any]:
    """AP50 and AP of both networks in float and INT8, and what INT8 loses by compression, in points of AP50."""
    from edgekit.compression.detect_problem import measured
    from edgekit.tasks.detect.evaluate import evaluate_pipeline
    from edgekit.tasks.detect.metric import bootstrap, interval95
    from edgekit.tasks.detect.pipeline import DetectPipeline

    labels: list[Any] = []
    found: dict[str, Any] = {}
    rounds = {}
    for name, model in models.items():
        found[f"{name} float"] = measured(dataclasses.replace(entry, source=model), pictures, labels)
        with edgekit.load(bundles[name], threads=1) as engine:
            metric, results = evaluate_pipeline(cast(DetectPipeline, engine.pipeline()), labels[0])
            used = [variant.name for variant in engine.variants.values()]
        found[f"{name} int8"] = {key: metric[key] for key in ("AP50", "AP")}
        found[f"{name} variant"] = " ".join(used)
        rounds[name] = bootstrap(labels[0], results, rounds=200, at50=True)
    lost = [
        a - b
        for a, b in zip(rounds["dense"], rounds["compressed"], strict=True)
        if a is not None and b is not None
    ]
    drop = found["dense int8"]["AP50"] - found["compressed int8"]["AP50"]
    interval = interval95(lost)
    return {
        **found,
        "pictures": len(labels[0].images),
        "lost_points": round(100 * drop, 3),
        "lost_points_interval95": None if interval is None else [round(100 * v, 3) for v in interval],
    }


def times(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """Milliseconds per variant and network, one thread, interleaved, and the ratio of the fastest of each."""
    from edgekit.bundle import Bundle
    from edgekit.runtime.selftest import set_golden

    engines, runs = [], {}
    for name, path in bundles.items():
        with Bundle.open(path) as bundle:
            variants = dict.fromkeys(variant.name for _, variant in bundle.manifest.variants())
        for variant in variants:
            engine = edgekit.load(path, threads=1, variant=variant)
            session = engine.session()
            set_golden(engine.bundle, session)
            engines.append(engine)
            runs[name, variant] = session.run
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, keys = np.random.default_rng(0), list(runs)
    for turn in range(ROUNDS + WARMUP):
        for at in order.permutation(len(keys)):
            start = time.perf_counter()
            for _ in range(RUNS):
                runs[keys[at]]()
            if turn >= WARMUP:
                taken[keys[at]].append(1e3 * (time.perf_counter() - start) / RUNS)
    for engine in engines:
        engine.close()
    median = {key: float(np.median(values)) for key, values in taken.items()}
    best = {name: min((k for k in median if k[0] == name), key=lambda k: median[k]) for name in bundles}
    ratios = np.array(taken[best["dense"]]) / np.array(taken[best["compressed"]])
    quarters = np.percentile(ratios, [25, 50, 75])
    return {
        "ms": {" ".join(key): round(value, 4) for key, value in median.items()},
        "fastest": {name: key[1] for name, key in best.items()},
        "ratio": round(float(quarters[1]), 3),
        "ratio_quartiles": [round(float(quarters[0]), 3), round(float(quarters[2]), 3)],
    }


def instructions(bundles: Mapping[str, Path]) -> dict[str, Any]:
    """Instructions per inference on the emulated board, and the ratio of the best variant of each."""
    from edgekit.toolchain.arm_count import count

    try:
        found = {name: count(path, BOARD)["variants"] for name, path in bundles.items()}
    except EdgekitError as error:  # no emulator here
        return {"not_measured": str(error)}
    counts = {
        name: {
            v: row["instructions"]["all"] if row["instructions"] else row["problem"]
            for v, row in rows.items()
        }
        for name, rows in found.items()
    }
    least = {name: min(n for n in rows.values() if isinstance(n, int)) for name, rows in counts.items()}
    return {"instructions": counts, "ratio": round(least["dense"] / least["compressed"], 3)}


def line(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=("street", "bccd"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and of the bundles")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/street"), help="street: drawn pictures (3.5 GB)"
    )
    parser.add_argument(
        "--data", type=Path, default=reference_data() / "bccd", help="bccd: folder in VOC's format"
    )
    parser.add_argument("--recipe", default="detect-half", help="name or .toml file")
    parser.add_argument("--speedup", type=float, default=0.0, help="of the recipe's pruning, in its place")
    parser.add_argument("--scale", type=float, default=1.0, help="this share of the recipe's batches")
    parser.add_argument("--scratch", type=int, default=SCRATCH, help="bccd: batches of the dense network")
    parser.add_argument("--dense", type=Path, help="with --compressed: measure these alone")
    parser.add_argument("--compressed", type=Path)
    parser.add_argument("--pictures", type=int, default=512, help="to judge by, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=("accuracy", "host", "board"))
    args = parser.parse_args(argv)
    if (args.dense is None) != (args.compressed is None):
        parser.error("--dense and --compressed: expected both or neither")
    entry, problem = {"street": street, "bccd": bccd}[args.network](args)
    if args.dense is None:
        dense, small = compressed(args, args.network, entry, problem)
    else:
        dense, small = args.dense, args.compressed
    models = {"dense": dense, "compressed": small}
    bundles = {name: built(entry, model, args.out / "bundles") for name, model in models.items()}
    line(
        "from",
        commit=commit(),
        machine=machine(1),
        bytes={name: p.stat().st_size for name, p in models.items()},
    )
    host = {name: found["host"] for name, found in bundles.items()}
    if "accuracy" not in args.skip:
        line("accuracy", network=args.network, **accuracy(entry, models, host, args.pictures))
    if "host" not in args.skip:
        line("host", network=args.network, **times(host))
    if "board" not in args.skip:
        line(
            "board",
            network=args.network,
            board=BOARD,
            **instructions({n: f[BOARD] for n, f in bundles.items()}),
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgekitError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

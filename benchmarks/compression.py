"""What each compression method costs and gains, beside its trivial control, at equal budget.

    python benchmarks/compression.py --out runs/compression            # all rows, 3 seeds: under an hour on 2 cores
    python benchmarks/compression.py --out runs/compression --short    # a few rows, one seed: under 5 minutes
    python benchmarks/compression.py --out runs/compression --rows 'nm-*' --seeds 0
    python benchmarks/compression.py --out runs/compression --table    # only the table of what is there

Every row is a recipe (compression/recipe.py) over the same trained network of the same seed: ShapesNet on pictures of
shapes (synth/shapes.py), 2000 of them for judging by top-1; rows `detector-*`: YOLO-lite of apps/detect on 1400
pictures of the procedural street, judged by AP50 on 100 of other streets, first seed only. All rows of a group train
for as many batches; `control` rows have a random mask, random ranks, no teacher or random search in its place.
Columns: learned values that are not zero, multiply-accumulates (zeros counted), metric, its loss against the dense
network (which trained on for as many batches), and `time`: of ONNX Runtime, one thread, float32, as a share of the
dense network's, interleaved, median and quartiles. A zero saves no time there.

Writes results.jsonl (a line per row and seed with commit and machine; lines that are there are not computed again),
table.md and table.png to --out. Rows run side by side in as many processes as --jobs, times are taken at the end, alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from edgekit.host import usable_cores  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402

ROUNDS, RUNS, WARMUP = 40, 5, 5


@dataclass(frozen=True)
class Row:
    """name; group: rows that are compared; steps: of a recipe, as its TOML has them; control: the trivial one of its group.
    short: also in the short form. width: of a fresh network that takes the trained one's place (0 = none does), the trained
    one is its teacher. labels: pictures to train on (0 = all). network: shapes, or detector: YOLO-lite of apps/detect."""

    name: str
    group: str
    steps: tuple[Mapping[str, Any], ...]
    control: bool = False
    short: bool = False
    width: float = 0.0
    labels: int = 0
    network: str = "shapes"


@dataclass(frozen=True)
class Scale:
    """How long everything trains. base: batches of the dense network; tune: batches of each row afterwards."""

    base: int
    tune: int
    train: int
    test: int


TUNE = 400
"""Batches that every row trains after its network was changed; `dense` too."""


RATE = 1e-3
"""Peak learning rate of these batches, half of what suits from scratch."""


def _rows() -> tuple[Row, ...]:
    rows = [Row("dense", "dense", ({"method": "finetune", "steps": TUNE, "lr": RATE},), short=True)]

    def add(
        name: str, group: str, method: str, short: bool = False, control: bool = False, **options: Any
    ) -> None:
        width, labels = options.pop("width", 0.0), options.pop("labels", 0)
        if "draw" in options:
            options["control"] = options.pop("draw")
        step = {"method": method, "steps": TUNE, "lr": RATE, **options}
        rows.append(Row(name, group, (step,), control, short, width, labels))

    for share in (50, 75, 90):
        group, most = f"{share} % zeros", share == 75
        for draw in ("none", "random"):
            random, tail = draw == "random", "-random" if draw == "random" else ""
            for name, method in (("unstructured", "sparsify"), ("block-punched", "block-punch")):
                add(f"{name}-{share}{tail}", group, method, most, random, sparsity=share / 100, draw=draw)
            # filters: the share of channels that takes as many weights
            ratio = round(1 - (1 - share / 100) ** 0.5, 4)
            kind = "random" if random else "group_l2"
            add(
                f"filters-{share}{tail}",
                group,
                "prune",
                most,
                random,
                ratio=ratio,
                by="uniform",
                importance=kind,
            )
    for pattern in ("2:4", "1:8", "1:16"):
        name, most = pattern.replace(":", "to"), pattern == "1:8"
        for scheme in ("one-shot", "sr-ste", "maxq"):
            add(f"{name}-{scheme}", pattern, "nm", most, pattern=pattern, scheme=scheme)
        add(f"{name}-random", pattern, "nm", most, True, pattern=pattern, scheme="one-shot", draw="random")
    for kind in ("l1", "fpgm", "group_l2", "slimming", "taylor", "fisher", "random"):
        add(f"half-macs-{kind}", "pruned to half the MACs", "prune", kind in ("taylor", "random"), kind == "random",
            speedup=2.0, by="macs", importance=kind)  # fmt: skip
    for kind in ("svd", "data", "spatial", "tucker", "cp", "auto"):
        rate = {"lr": 5e-5} if kind == "cp" else {}
        add(f"rank-{kind}", "low rank, half the MACs", "lowrank", kind in ("tucker", "auto"), kind=kind, speedup=2.0,
            cost="macs", **rate)  # fmt: skip
    add(
        "rank-random",
        "low rank, half the MACs",
        "lowrank",
        False,
        True,
        ranks="random",
        speedup=2.0,
        cost="macs",
    )
    add("rank-random-factors", "low rank, half the MACs", "lowrank", True, True, random_factors=True, speedup=2.0,
        cost="macs")  # fmt: skip
    for codec in ("int4", "kmeans-16", "pow2-4", "ternary", "binary"):
        add(
            f"codec-{codec}",
            "weights on a codec's set",
            "codebook",
            codec in ("kmeans-16", "ternary"),
            codec=codec,
        )
    add(
        "codec-kmeans-16-random",
        "weights on a codec's set",
        "codebook",
        True,
        True,
        codec="kmeans-16",
        draw="random",
    )
    student: dict[str, Any] = {"width": 0.25, "labels": 800, "lr": 2e-3}
    group = "quarter-width student, 800 labels"
    add("labels-only", group, "distil", True, True, loss="none", **student)
    add("label-smoothing", group, "distil", False, True, loss="smooth", **student)
    add("kd", group, "distil", True, loss="kd", temperature=2.0, **student)
    add("dkd", group, "distil", loss="dkd", temperature=2.0, nckd=2.0, **student)
    add("hint", group, "distil", loss="none", hint=1.0, **student)
    add("relations", group, "distil", loss="none", relations=1.0, **student)
    return tuple(rows)


def _detector_rows() -> tuple[Row, ...]:
    """Of the detector that ships (apps/detect), all for a few hundred batches: enough to compare, not to ship."""
    group, rows = "detector", []

    def add(name: str, *steps: Mapping[str, Any], control: bool = False) -> None:
        rows.append(Row(f"detector-{name}", group, steps, control, network="detector"))

    tune = {"method": "finetune", "steps": TUNE, "lr": 5e-4, "ema": 0.98}
    teacher = {"method": "distil"}

    def pruned(importance: str) -> Mapping[str, Any]:
        return {
            "method": "prune",
            "importance": importance,
            "by": "macs",
            "speedup": 2.0,
            "granularity": 16,
            "steps": 0,
        }

    add("dense", tune)
    add("filters-taylor-teacher", teacher, pruned("taylor"), tune)
    add("filters-random-teacher", teacher, pruned("random"), tune, control=True)
    add("filters-taylor", pruned("taylor"), tune, control=True)
    for scheme, draw in (("one-shot", "none"), ("maxq", "none"), ("one-shot", "random")):
        step = {
            "method": "nm",
            "pattern": "2:4",
            "scheme": scheme,
            "steps": TUNE,
            "control": draw,
            "lr": 5e-4,
        }
        add(f"2to4-{'random' if draw == 'random' else scheme}", teacher, step, control=draw == "random")
    add(
        "rank-auto", teacher, {"method": "lowrank", "speedup": 1.5, "cost": "macs", "steps": TUNE, "lr": 5e-4}
    )
    return tuple(rows)


ROWS = _rows() + _detector_rows()
FULL = Scale(base=1500, tune=400, train=8000, test=2000)
SHORT = Scale(base=500, tune=80, train=4000, test=1000)


def key(row: Row, seed: int, scale: Scale) -> str:
    return json.dumps([row.name, row.steps, row.width, row.labels, seed, vars(scale)], sort_keys=True)


def run_row(job: tuple[Row, int, Scale, Path]) -> dict[str, Any]:
    """One row of one seed, from the dense network to its JSON line; leaves its ONNX file in the folder."""
    import torch

    from edgekit.compression.problem import macs, parameters, zeros
    from edgekit.compression.recipe import read_recipe
    from edgekit.compression.shapes_problem import ShapesNet, shapes_problem
    from edgekit.compression.work import begin

    row, seed, scale, folder = job
    torch.set_num_threads(1)
    if row.network == "detector":
        problem = detector(folder)
    else:
        problem = shapes_problem(
            seed=seed, steps=scale.base, train=scale.train, test=scale.test, cache=folder / "base"
        )
    began = time.monotonic()
    if row.labels:
        few = shapes_problem(problem.model, seed=seed, train=row.labels, test=scale.test)
        problem = dataclasses.replace(problem, batch=few.batch)
    work = begin(problem, seed=seed)
    if row.width:
        work.model = ShapesNet(row.width)
    recipe = read_recipe({"name": row.name, "seed": seed, "step": [dict(step) for step in row.steps]})
    recipe = recipe.scaled(scale.tune / TUNE)
    for stage, step in zip(recipe.stages(), recipe.steps, strict=True):
        work.enter(stage)
        step.run(work, step.options)
    name = f"{row.name}-{seed}.onnx"
    problem.write(work.model, folder / name)
    dense = parameters(work.model)
    return {
        "key": key(row, seed, scale), "row": row.name, "group": row.group, "control": row.control, "seed": seed,
        "network": row.network, "metric": next(iter(problem.evaluate(work.model).values())),
        "parameters": dense, "zeros": round(zeros(work.model), 4), "macs": macs(work.model, problem.example),
        "seconds": round(time.monotonic() - began, 1), "facts": work.facts, "onnx": name,
        "commit": commit(), "machine": machine(1),
    }  # fmt: skip


STREETS, FRAMES, PICTURES = 200, 7, 100


def detector(folder: Path) -> Any:
    """The Problem of apps/detect on a few streets, judged on pictures of others."""
    from edgekit.compression.detect_problem import detect_problem
    from edgekit.models.detect_data import Batching, rendered
    from edgekit.project import open_project

    entry = open_project(ROOT / "apps" / "detect").models[0]
    options = Batching(steps=TUNE, tail=0.0)
    data = rendered(folder / "streets", STREETS, FRAMES, options.width, 0)
    return detect_problem(entry, data, options, pictures=PICTURES)


def timed(folder: Path, names: Sequence[str], base: str) -> dict[str, list[float]]:
    """Time of each network as a share of `base`'s, in every round; interleaved, in random order, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    order = np.random.default_rng(0)
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for name in {base, *names}
    }
    (given,) = sessions[base].get_inputs()
    image = order.random(given.shape, np.float32)
    shares: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + WARMUP):
        taken = {}
        for name in order.permutation(list(sessions)):
            start = time.perf_counter()
            for _ in range(RUNS):
                sessions[name].run(None, {given.name: image})
            taken[name] = time.perf_counter() - start
        if turn >= WARMUP:
            for name in names:
                shares[name].append(taken[name] / taken[base])
    return shares


def with_times(lines: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The lines with `time` (median) and `quartiles` against the dense network of their seed."""
    for seed, network in sorted({(line["seed"], line["network"]) for line in lines}):
        mine = [line for line in lines if (line["seed"], line["network"]) == (seed, network)]
        base = next((line["onnx"] for line in mine if line["row"] in DENSE), None)
        if base is None:
            continue
        shares = timed(folder, [line["onnx"] for line in mine], base)
        for line in mine:
            low, middle, high = np.percentile(shares[line["onnx"]], [25, 50, 75])
            line["time"], line["quartiles"] = round(middle, 3), [round(low, 3), round(high, 3)]
    return lines


DENSE = ("dense", "detector-dense")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: rows in the order of ROWS, mean over seeds, with the standard deviation where there are several."""
    dense = {(line["seed"], line["network"]): line["metric"] for line in lines if line["row"] in DENSE}
    found = [
        "| group | row | nonzero | MACs | metric | loss, points | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        mine = [line for line in lines if line["row"] == row.name]
        if not mine:
            continue
        metric = 100 * np.array([line["metric"] for line in mine])
        loss = [
            100 * (dense[line["seed"], row.network] - line["metric"])
            for line in mine
            if (line["seed"], row.network) in dense
        ]
        times = [line["time"] for line in mine if "time" in line]
        cells = (
            row.group,
            row.name + (" (control)" if row.control else ""),
            f"{np.mean([line['parameters'] * (1 - line['zeros']) for line in mine]) / 1e3:.0f} k",
            f"{np.mean([line['macs'] for line in mine]) / 1e6:.1f} M",
            f"{metric.mean():.1f}" + (f" ± {metric.std(ddof=1):.1f}" if len(mine) > 1 else ""),
            f"{np.mean(loss):.1f}" if loss else "-",
            f"{np.mean(times):.2f}" if times else "-",
        )
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compression"))
    parser.add_argument("--short", action="store_true", help="a few rows, one seed, short trainings")
    parser.add_argument("--rows", default="*", help="names of rows, with * and ?, comma separated")
    parser.add_argument("--seeds", help="comma separated; default 0,1,2, or 0 with --short")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="rows at a time, a process each")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args(argv)
    scale = SHORT if args.short else FULL
    seeds = [int(s) for s in (args.seeds or ("0" if args.short else "0,1,2")).split(",")]
    wanted = args.rows.split(",")
    rows = [
        r for r in ROWS if any(fnmatch.fnmatchcase(r.name, w) for w in wanted) and (r.short or not args.short)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    known = {}
    if path.is_file():
        known = {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}
    jobs = [
        (row, seed, scale, args.out)
        for seed in seeds
        for row in rows
        if key(row, seed, scale) not in known
        and not args.table
        and (row.network == "shapes" or seed == seeds[0])
    ]
    jobs.sort(key=lambda job: job[0].network != "shapes")  # the detector's take longest: last
    if jobs:
        from rich.progress import track

        if any(row.network == "detector" for row, *_ in jobs):
            detector(args.out)  # draws its pictures
        seeds_to_train = sorted({seed for row, seed, *_ in jobs if row.network == "shapes"})

        with (
            multiprocessing.get_context("spawn").Pool(args.jobs) as pool,
            path.open("a", encoding="utf-8") as out,
        ):
            pool.starmap(trained, [(seed, scale, args.out) for seed in seeds_to_train])
            for line in track(
                pool.imap_unordered(run_row, jobs), total=len(jobs), description="rows", disable=None
            ):
                print(json.dumps(line), file=out, flush=True)
                known[line["key"]] = line
    lines = [known[k] for seed in seeds for row in rows if (k := key(row, seed, scale)) in known]
    lines = with_times(lines, args.out)
    for line in lines:
        print(json.dumps(line))
    text = table(lines)
    (args.out / "table.md").write_text(text)
    print(text, file=sys.stderr)
    return 0


def base(seed: int, scale: Scale, folder: Path) -> Any:
    """The Problem whose network the rows of this seed start from, trained once."""
    import torch

    from edgekit.compression.shapes_problem import shapes_problem

    torch.set_num_threads(1)
    return shapes_problem(
        seed=seed, steps=scale.base, train=scale.train, test=scale.test, cache=folder / "base"
    )


def trained(seed: int, scale: Scale, folder: Path) -> None:
    """`base`, in another process: what it returns stays there."""
    base(seed, scale, folder)


if __name__ == "__main__":
    sys.exit(main())

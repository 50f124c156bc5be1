"""What a search for widths and depths gains over its controls, and which block is best depends on what is counted.

    python benchmarks/compression_search.py --out runs/compression-search            # 3 seeds: some 20 minutes on 2 cores
    python benchmarks/compression_search.py --out runs/compression-search --short    # one seed: about two minutes
    python benchmarks/compression_search.py --out runs/compression-search --table    # only the tables of what is there

searches: one super-net of StagedNet a seed; within the same budget of estimated time on the board, with as many
evaluations, "evolution" and "random" look for a sub-net, "uniform" scales all widths alike; each is trained on for as many
batches. Sub-nets are judged on pictures that neither training nor the test has. blocks: StagedNet of every kind of block,
as wide as the same products, or the same estimated time, as the plain one allow; each trained from nothing for as long.

Writes results.jsonl (a line each; lines that are there are not computed again) and table.md to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from edgekit.compression import evolution, latency  # noqa: E402
from edgekit.compression.batchnorm import recalibrate  # noqa: E402
from edgekit.compression.problem import Problem, macs, parameters  # noqa: E402
from edgekit.compression.shapes_problem import shapes_problem  # noqa: E402
from edgekit.compression.supernet import Choice, Sandwich, SuperNet  # noqa: E402
from edgekit.compression.work import Work, begin  # noqa: E402
from edgekit.models.blocks import block, conv, residual  # noqa: E402
from edgekit.models.exporting import write_onnx  # noqa: E402
from edgekit.synth.shapes import CLASSES, shapes  # noqa: E402
from edgekit.target import Target  # noqa: E402

BOARD, PRECISION = "rpi5", "int8"
COSTED = torch.zeros(1, 3, 128, 128)
"""Time and products are those of a picture of this size: the pictures of the benchmark, 32 x 32, are so small that the
start of every layer would be most of the time."""
JUDGED_SEED = 2_000_000
"""Seed of the pictures on which sub-nets are judged."""
METHODS = ("uniform", "random", "evolution")
KINDS = ("plain", "group4", "separable", "inverted3", "shuffle", "ghost", "plain+se")
WIDTHS = (32, 64, 128)
DEPTHS = (2, 2, 1)


@dataclass(frozen=True)
class Scale:
    """How long everything takes. supernet, tune, blocks: batches; evaluations: sub-nets that a search judges, on `judged`
    pictures; budget: share of the whole's time."""

    supernet: int = 1200
    tune: int = 300
    blocks: int = 600
    evaluations: int = 100
    population: int = 20
    judged: int = 2000
    budget: float = 0.5
    train: int = 8000
    test: int = 2000


FULL = Scale()
SHORT = Scale(150, 40, 80, 16, 6, 500, 0.5, 2000, 500)


class StagedNet(nn.Module):
    """A stem, three stages of a block of stride 2 and residuals, mean over places, one Linear. width: of all channels.

    Input float32 [B, 3, 32, 32] in 0..1; output logits [B, 10]. kind: models.blocks.
    """

    def __init__(self, kind: str = "plain", width: float = 1.0) -> None:
        super().__init__()
        stem, *widths = (max(4, round(n * width / 4) * 4) for n in (16, *WIDTHS))
        self.stem = conv(3, stem)
        stages: list[nn.Module] = []
        before = stem
        for channels, depth in zip(widths, DEPTHS, strict=True):
            deeper = (residual(kind, channels) for _ in range(depth))
            stages.append(nn.Sequential(block(kind, before, channels, 2), *deeper))
            before = channels
        self.stage1, self.stage2, self.stage3 = stages
        self.head = nn.Linear(before, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage3(self.stage2(self.stage1(self.stem(images)))).mean((2, 3)))
        return logits


def write(net: nn.Module, path: Path) -> None:
    write_onnx(net, path, (COSTED,), ["images"], ["logits"])


def seconds(net: nn.Module) -> float:
    """Estimated on BOARD for a picture like COSTED."""
    return latency.Estimated(net, [], write, Target.load(BOARD), PRECISION)([])


# --- searches -------------------------------------------------------------------------------------------


def searches(seed: int, scale: Scale = FULL, methods: Sequence[str] = METHODS) -> Iterator[dict[str, Any]]:
    """A row for each method, after one training of a super-net."""
    began = time.monotonic()
    torch.manual_seed(seed)
    problem = shapes_problem(StagedNet(), seed=seed, train=scale.train, test=scale.test)
    work = begin(problem, seed=seed)
    net = SuperNet(work.model, problem.example, problem.head, part=lambda name: name)
    work.train(scale.supernet, lr=problem.lr, hooks=[Sandwich(net, problem, seed=seed)])
    known: dict[Choice, float] = {}

    def cost(choice: Choice) -> float:
        if choice not in known:
            known[choice] = seconds(net.extract(choice))
        return known[choice]

    score = judge(problem, net, scale)
    whole = cost(net.largest())
    budget = scale.budget * whole
    shared = {
        "seed": seed, "board": BOARD, "precision": PRECISION, "budget_s": budget, "whole_s": whole, "space": net.space.size,
        "supernet": problem.evaluate(net.model), "supernet_seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    for method in methods:
        began = time.monotonic()
        if method == "uniform":
            choice = evolution.scaled(net.space, cost, budget)
            found = evolution.Found(evolution.Scored(choice, score(choice), cost(choice)), ())
        else:
            found = evolution.search(
                net.space, score, cost, budget, method=method, evaluations=scale.evaluations,
                population=scale.population, seed=seed,
            )  # fmt: skip
        small = net.extract(found.best.choice)
        recalibrate(small, (problem.batch(i)[0] for i in range(4)))
        before = problem.evaluate(small)["top1"]
        tuned = Work(problem, small, work.teacher, seed=seed)
        tuned.enter("tune")
        tuned.train(scale.tune)
        yield {
            **shared, "row": method, "evaluations": len(found.seen) or 1, "seconds": found.best.cost,
            "judged_loss": -found.best.score, "before": before, **problem.evaluate(small),
            "macs": macs(small, COSTED), "parameters": parameters(small),
            "choice": net.space.named(found.best.choice), "took": round(time.monotonic() - began, 1),
        }  # fmt: skip


def judge(problem: Problem, net: SuperNet, scale: Scale) -> Callable[[Choice], float]:
    """The negative loss of a sub-net on pictures of their own, with statistics of four batches of the training."""
    pictures, labels = shapes(JUDGED_SEED, scale.judged)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).contiguous()
    wanted = torch.from_numpy(labels)
    seen = [problem.batch(i)[0] for i in range(4)]

    def score(choice: Choice) -> float:
        small = net.extract(choice).eval()
        recalibrate(small, seen)
        with torch.no_grad():
            losses = [
                problem.loss(small(part), truth)
                for part, truth in zip(images.split(500), wanted.split(500), strict=True)
            ]
        return -float(torch.stack(losses).mean())

    return score


# --- blocks ---------------------------------------------------------------------------------------------


def fitted(kind: str, goal: float, cost: Callable[[nn.Module], float]) -> float:
    """The width of a StagedNet of `kind` whose cost is the nearest to `goal`; cost grows with width."""
    widths = np.arange(0.25, 4.01, 0.125)
    low, high = 0, len(widths) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(StagedNet(kind, float(widths[middle]))) > goal else (middle, high)
    return float(min((widths[low], widths[high]), key=lambda w: abs(cost(StagedNet(kind, float(w))) - goal)))


def block_widths(kinds: Sequence[str] = KINDS) -> dict[tuple[str, str], float]:
    """(equal, kind) -> width, for equal "macs" and equal "time"."""
    problem = shapes_problem(StagedNet(), train=64, test=64)
    costs: dict[str, Callable[[nn.Module], float]] = {
        "macs": lambda net: macs(net, COSTED),
        "time": seconds,
    }
    return {
        (equal, kind): 1.0 if kind == "plain" else fitted(kind, cost(problem.model), cost)
        for equal, cost in costs.items()
        for kind in kinds
    }


def blocks(seed: int, scale: Scale = FULL, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, Any]]:
    """A row for each kind and what is equal; the plain one is trained once."""
    done: dict[tuple[str, float], dict[str, Any]] = {}
    for (equal, kind), width in block_widths(kinds).items():
        if (kind, width) not in done:
            began = time.monotonic()
            torch.manual_seed(seed)
            problem = shapes_problem(StagedNet(kind, width), seed=seed, train=scale.train, test=scale.test)
            work = begin(problem, seed=seed)
            work.train(scale.blocks, lr=problem.lr)
            recalibrate(
                work.model, (problem.batch(i)[0] for i in range(16))
            )  # short trainings are ahead of their norms
            done[kind, width] = {
                "seed": seed, "board": BOARD, "precision": PRECISION, "width": width, **problem.evaluate(work.model),
                "macs": macs(work.model, COSTED), "parameters": parameters(work.model),
                "seconds": seconds(work.model), "took": round(time.monotonic() - began, 1),
            }  # fmt: skip
        yield {"row": f"{equal} {kind}", **done[kind, width]}


# --- tables ---------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[int, Scale], Iterator[dict[str, Any]]]] = {"searches": searches, "blocks": blocks}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, means over seeds with their standard deviation."""
    found = []
    for part in PARTS:
        mine = [line for line in lines if line["part"] == part]
        if not mine:
            continue
        found += [
            f"| {part} | seeds | top-1 | before tuning | MACs | estimated on {BOARD}, {PRECISION} | evaluations |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(line["row"] for line in mine):
            rows = [line for line in mine if line["row"] == name]
            mean = {
                key: np.mean([row[key] for row in rows])
                for key in ("top1", "before", "macs", "seconds", "evaluations")
                if key in rows[0]
            }
            spread = f" ± {100 * np.std([r['top1'] for r in rows], ddof=1):.1f}" if len(rows) > 1 else ""
            before = f"{100 * mean['before']:.1f}" if "before" in mean else "-"
            found.append(
                f"| {name} | {len(rows)} | {100 * mean['top1']:.1f}{spread} | {before} | {mean['macs'] / 1e6:.2f} M | "
                f"{1e6 * mean['seconds']:.0f} us | {mean.get('evaluations', 1):.0f} |"
            )
        found.append("")
    return "\n".join(found) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compression-search"))
    parser.add_argument("--short", action="store_true", help="one seed, short trainings")
    parser.add_argument("--parts", default=",".join(PARTS), help="of searches, blocks")
    parser.add_argument("--seeds", help="comma separated; default 0,1,2, or 0 with --short")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    scale = SHORT if args.short else FULL
    seeds = [int(s) for s in (args.seeds or ("0" if args.short else "0,1,2")).split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for seed in seeds:
        for part in args.parts.split(","):
            key = json.dumps([part, seed, asdict(scale)])
            if args.table or any(line["key"] == key for line in lines):
                continue
            rows = [{"part": part, "key": key, "commit": commit(), **row} for row in PARTS[part](seed, scale)]
            with path.open("a", encoding="utf-8") as out:  # a part of a seed, whole or not at all
                out.writelines(json.dumps(row) + "\n" for row in rows)
            lines += rows
            for row in rows:
                print(json.dumps(row), flush=True)
    wanted = {json.dumps([part, seed, asdict(scale)]) for part in PARTS for seed in seeds}
    text = table([line for line in lines if line["key"] in wanted])
    (args.out / "table.md").write_text(text)
    print(text, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Weights in few bits (methods/codebook.py): accuracy at once and after training, beside bytes, on the shapes benchmark.

    python benchmarks/codebook.py [--seeds 0,1,2] [--steps 400] [--codecs kmeans-16,ternary,...] [--cache runs/compression/base]

Prints one JSON line per seed and codec: `top1` of the dense network (`dense`), of the one trained on for as many steps (`tuned`),
of the codec at once and trained; `bytes` of the layers it stores and `share` of their float32 size, `error`: relative L2 of
a layer's weights, at once. kmeans has a control: a codebook drawn at random in place of k-means, at once and trained
alike. Everything but the first and the last layer is stored so; 2000 pictures are judged on, one is 0.0005.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402

CODECS = (
    "kmeans-16", "kmeans-8", "kmeans-4", "int8", "int4", "int3", "pow2-5", "pow2-4", "ternary", "ternary-2", "binary",
)  # fmt: skip


def rows(problem: Any, steps: int, seed: int, names: tuple[str, ...] = CODECS) -> Iterator[dict[str, Any]]:
    """One row per codec; `problem.model` is trained."""
    from edgekit.compression.methods import codebook
    from edgekit.compression.work import begin

    dense = problem.evaluate(problem.model)["top1"]
    tuned = begin(problem, seed=seed)
    tuned.train(steps)
    after = problem.evaluate(tuned.model)["top1"]
    for name in names:
        row: dict[str, Any] = {"codec": name, "seed": seed, "steps": steps, "dense": dense, "tuned": after}
        controls = ("none", "random") if name.startswith("kmeans") else ("none",)
        for control in controls:
            for key, count in (("at_once", 0), ("trained", steps)):
                work = begin(problem, seed=seed)
                codebook.run(work, codebook.Options(codec=name, steps=count, control=control))
                row[key + ("_random" if control == "random" else "")] = problem.evaluate(work.model)["top1"]
                facts = work.facts["step"]
                if control == "none" and not count:
                    changed = facts["layers"].values()
                    row |= {"bytes": facts["bytes"], "share": round(facts["bytes"] / facts["of"], 4)}
                    row["error"] = {
                        "least": min(r["changed"] for r in changed),
                        "most": max(r["changed"] for r in changed),
                    }
        yield row


def main() -> None:
    from edgekit.compression.shapes_problem import shapes_problem

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--cache", type=Path, default=Path("runs/compression/base"))
    parser.add_argument("--base", type=int, default=1500, help="steps of the dense network")
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        problem = shapes_problem(seed=seed, steps=args.base, cache=args.cache)
        for row in rows(problem, args.steps, seed, tuple(args.codecs.split(","))):
            print(json.dumps({"benchmark": "codebook", **row, "commit": commit()}), flush=True)


if __name__ == "__main__":
    main()

"""What training wins back of the accuracy that quantization costs: YOLOX-nano at 8-bit and at 4-bit weights.

    python benchmarks/qat.py --network ../shared/data/models/yolox_nano/yolox_nano.onnx \
        --calibration ../shared/data/coco_mini/train --instances ../shared/data/coco_mini/instances_val_a.json \
        --images ../shared/data/coco_mini/val_a

One JSON line per case: the metric of the float network, of the network quantized after training (ptq) and of the one that
was trained on from there (qat), each on the integer payload that the host runs, and the share of the loss that came
back. Starts: `minmax`, what tools do by default; `search`, the best that edgekit finds with nothing back in float.
Pictures to learn on are those of the calibration, without labels; those that judge are others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from edgekit.backends.base import half  # noqa: E402
from edgekit.compression.fake_quant import FakeQuantized  # noqa: E402
from edgekit.compression.learn_steps import Lesson, imitate, learn  # noqa: E402
from edgekit.dataset import DataSet  # noqa: E402
from edgekit.project import open_project  # noqa: E402
from edgekit.quant import search  # noqa: E402
from edgekit.quant.rules import rules_for  # noqa: E402
from edgekit.quant.search import Look  # noqa: E402
from edgekit.target import Target  # noqa: E402
from edgekit.toolchain import build, quantize  # noqa: E402
from edgekit.toolchain.accuracy import metric  # noqa: E402
from edgekit.toolchain.data import pictures  # noqa: E402
from edgekit.toolchain.running import Subject, run_here  # noqa: E402

CASES = ("8:minmax", "8:search", "4:plan8", "4:search")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of pictures to learn on")
    parser.add_argument("--instances", type=Path, required=True, help="labels that judge (COCO)")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="weight bits:start, with commas between")
    parser.add_argument("--steps", type=int, default=Lesson.steps)
    parser.add_argument("--lr", type=float, default=Lesson.lr)
    parser.add_argument("--batch", type=int, default=Lesson.batch)
    parser.add_argument("--crop", type=int, default=Lesson.crop)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="judge on the first so many pictures")
    args = parser.parse_args()

    def progress(what: str, done: int, of: int) -> None:
        print(f"\r{what} {done}/{of}".ljust(79), end="", file=sys.stderr, flush=True)

    entry = dataclasses.replace(
        open_project(args.network).models[0], calibration=DataSet(images=args.calibration),
        evaluation=DataSet(data=args.instances, images=args.images),
    )  # fmt: skip
    target = Target.load("host")
    options = build.Options(out=Path("unused"))
    source = build.read(entry, options, progress)
    data = pictures(entry, source.spec, args.limit, progress)
    assert data.labelled is not None
    reference = run_here(build.lower(source, "onnxruntime", target, "float32"), source.states)
    known = quantize.calibrated(entry, source.spec, source.prepared.model, source.states, progress)

    def judged(model: Any) -> tuple[float, float]:
        (payload,) = half("onnxruntime", "lower").lower(model, target, "int8")
        found = metric(
            Subject(source.spec, reference, run_here(payload, source.states)), data.labelled, progress
        )  # type: ignore[arg-type]
        return found["reference"][found["name"]], found["payload"][found["name"]]

    for case in args.cases.split(","):
        bits, _, start = case.partition(":")
        lesson = Lesson(args.steps, args.lr, args.batch, args.crop, int(bits), seed=args.seed)
        eight = rules_for("onnxruntime", target)
        rules = dataclasses.replace(eight, weight_limit=min(eight.weight_limit, 2 ** (int(bits) - 1) - 1))
        problem = search.Problem(
            known.model,
            known.stats,
            eight if start == "plan8" else rules,
            *known.split(),
            known.restat,
            lambda _: Look(None),
        )
        begun = time.perf_counter()
        if start in ("search", "plan8"):
            ptq = search.integers(problem, progress)
        else:
            ptq = search.plain(problem, start)
        begin = ptq.model
        if start == "plan8":  # training goes on from the weights that were not rounded so far
            coarse = FakeQuantized(ptq.model, rules, int(bits)).learned()
            ptq = dataclasses.replace(ptq, model=coarse, error=search.error_of(problem, coarse))
        searched = time.perf_counter() - begun
        full, before = judged(ptq.model)
        begun = time.perf_counter()
        loss = imitate(source.spec, [str(v.name) for v in known.model.graph.outputs])
        model = learn(begin, ptq.exact, rules, known.feeds, lesson, loss=loss, progress=progress)
        learned = time.perf_counter() - begun
        _, after = judged(model)
        line = {
            "case": f"W{bits}A8", "start": start, "metric": {"float": full, "ptq": before, "qat": after},
            "recovered": round((after - before) / (full - before), 3) if full > before else None,
            "output_error": {"ptq": round(ptq.error, 5), "qat": round(search.error_of(problem, model), 5)},
            "lesson": dataclasses.asdict(lesson), "seconds": {"ptq": round(searched), "qat": round(learned)},
            "judged_on": len(data.labelled.images), "learned_on": known.feeds.provenance, "commit": commit(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

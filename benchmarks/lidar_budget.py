"""What each cut of a LiDAR's budget saves and costs (tasks/fusion/deadline.py): voxels, time of the encoder, average precision.

    python benchmarks/lidar_budget.py fusion.host.edge
    python benchmarks/lidar_budget.py runs/fusion/segments --moments "synthetic://street-rig?frames=100&worlds=50"

One line of JSON per cut: `voxels` (mean), `encoder_ms` (median), `mAP` with all sensors and `mAP_lidar` with the LiDAR alone,
each of the same moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.kernels.voxelize import voxelize
from edgekit.rig import RigFrame
from edgekit.tasks.fusion.dataset import read_set
from edgekit.tasks.fusion.deadline import Deadline
from edgekit.tasks.fusion.evaluate import evaluate
from edgekit.tasks.fusion.pipeline import FusionPipeline


@dataclasses.dataclass
class Changed:
    """Moments with something done to each."""

    labels: tuple[str, ...]
    frames: list[RigFrame]
    change: Callable[[int, RigFrame], RigFrame]

    @property
    def images(self) -> range:
        return range(len(self.frames))

    def read(self, index: int) -> RigFrame:
        return self.change(index, self.frames[index])


def opened(path: Path) -> FusionPipeline:
    """The pipeline of a bundle, or of a plan folder under onnxruntime."""
    if path.is_dir() and (path / "plan.json").is_file():
        from edgekit.models.bevfusion.segments import Segments
        from edgekit.schema import from_json
        from edgekit.tasks.fusion.spec import FusionSpec

        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
        session: Any = Segments(path)
        return FusionPipeline(from_json(FusionSpec, plan["pipeline"], "pipeline"), session)
    import edgekit

    pipeline: Any = edgekit.load(path).pipeline()
    assert isinstance(pipeline, FusionPipeline), f"{path} is no bundle of the task fusion"
    return pipeline


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="bundle, or plan folder")
    parser.add_argument("--moments", default="synthetic://street-rig?frames=100&worlds=50&seed=20000")
    args = parser.parse_args(argv)
    look = opened(args.model)
    assert look.spec.voxels is not None, "the bundle says nothing about its voxels"
    deadline = Deadline(look.spec.voxels)
    data = read_set(Path(args.moments), None, labels=look.spec.labels)
    frames = [data.read(i) for i in data.images]
    swept = [frame.points for frame in frames if frame.points is not None]
    ladders = [list(deadline.cuts(points, voxelize(points, deadline.grid))) for points in swept]
    assert len(ladders) == len(frames), "every moment needs its sweep"
    for step in range(-1, len(ladders[0])):

        def cut(index: int, frame: RigFrame, step: int = step) -> RigFrame:
            return frame if step < 0 else dataclasses.replace(frame, points=ladders[index][step].points)

        def alone(index: int, frame: RigFrame, step: int = step) -> RigFrame:
            return dataclasses.replace(cut(index, frame, step), shots={})

        times: list[float] = []

        def timed(done: int, total: int, times: list[float] = times) -> None:
            begun, ended = look.step_ns[look.spec.lidar_step]
            times.append((ended - begun) / 1e6)

        both, _ = evaluate(look, Changed(data.labels, frames, cut), progress=timed)
        lidar, _ = evaluate(look, Changed(data.labels, frames, alone))
        points = [cut(i, frame).points for i, frame in enumerate(frames)]
        voxels = [len(voxelize(p, deadline.grid).counts) for p in points if p is not None]
        line = {
            "cut": [] if step < 0 else list(ladders[0][step].notes),
            "voxels": round(statistics.mean(voxels)),
            "encoder_ms": round(statistics.median(times), 3),
            "mAP": round(both["mAP"], 4),
            "mAP_lidar": round(lidar["mAP"], 4),
            "moments": len(frames),
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""BEVFusion at its published size on a real nuScenes frame, on this machine's CPU: where time and memory go.

    python benchmarks/bevfusion_full.py [--rounds 3] [--threads 1,2] [--frame frame.json] [--keep FOLDER] [--torch]

Six pictures of 1600 x 900 scaled and cut to 704 x 256, ResNet-50, 118 depth bins, voxels of 0.075 m in 41 x 1440 x 1440,
a view from above of 360 x 360 cells for the cameras and 180 x 180 where sensors meet (`config.FULL`), float32. The frame is
that of the reference data beside the checkout (or $EDGEKIT_SHARED); its file holds one LiDAR sweep, not the ten that the
published network is given. Weights are random, of seed 0: what it costs depends on their shapes alone, except for
decoding, which sees more peaks than after training.

The network is exported in a process of its own (torch stays out of the figures) to a temporary folder and run as the plan
that a bundle holds: networks under onnxruntime, kernels between them, steps one after the other.

Prints a JSON line per number of threads (of networks and kernels alike). `stages`: median ms over rounds; `preprocess` is
six pictures, points and calibration into the plan's inputs, `camera` backbone and pyramid of all six, `fusion` fuser, decoder
and heads. `wall_ms`: the whole call, median; `remainder_ms`: what the stages of a round do not explain, the largest of
all rounds; above 2 % of its wall time it is an error (exit code 1). `table_ms`: building the association table, once per
calibration. `memory`: MiB, in the first call, which is not timed: for each stage `peak`, the most that was resident while it
ran, and `added`, how much more that is than before it; onnxruntime keeps what it takes, so later calls add next to nothing
(`warm_added_mib`, the most of any stage). `pool` builds the association table in that call. `plan_mib`: the plan's tensors;
`loaded_mib`: those and the networks, ready to run; `peak_mib`: the most resident at any time, loading included.
`lifted_mib`: what depth x feature would take, which is never made. With --torch: `difference`, the largest between the outputs
and those of the same network in torch / the largest value of that output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from benchmarks.overhead import machine  # noqa: E402
from edgekit.kernels.bev_pool import BevGrid, Frustum, Geometry, build  # noqa: E402
from edgekit.kernels.sparse_conv import encoder  # noqa: E402
from edgekit.kernels.voxelize import VoxelGrid, encoder_values, voxelize  # noqa: E402
from edgekit.models.bevfusion.segments import Arrays, Run, Segments  # noqa: E402
from edgekit.rig_files import read_nuscenes  # noqa: E402
from edgekit.schema import from_json  # noqa: E402
from edgekit.tasks.fusion.pipeline import FusionPipeline  # noqa: E402
from edgekit.tasks.fusion.spec import FusionSpec  # noqa: E402

MOST_REMAINDER = 0.02
"""Of a round's wall time."""
MIB = 1 << 20
_EXPORT = """
import sys, numpy, torch
from pathlib import Path
from edgekit.models.bevfusion.config import CONFIGS
from edgekit.models.bevfusion.export import export_segments
from edgekit.models.bevfusion.inputs import prepare
from edgekit.models.bevfusion.model import BEVFusion, collate
from edgekit.rig_files import read_nuscenes
config, folder, frame = CONFIGS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]
torch.manual_seed(0)
torch.set_num_threads(1)
model = BEVFusion(config).eval()
export_segments(model, folder)
if frame:
    with torch.no_grad():
        out = model(collate([prepare(read_nuscenes(frame[0]), config)], config))
    numpy.savez(folder / "torch.npz", **{name: value.numpy() for name, value in out.items()})
"""


def resident() -> tuple[int, int]:
    """(bytes resident now, the most since `forget_peak`)."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            found[key] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Measured(Segments):
    """A plan that tells voxelization from the encoder, and what each step takes of memory where asked to."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.voxels = 0
        self.voxelize_ns = 0
        self.memory: dict[str, dict[str, float]] | None = None
        self._before = 0
        super().__init__(folder, threads)

    def begin(self) -> None:
        if self.memory is not None:
            forget_peak()
            self._before = resident()[0]

    def end(self, stage: str) -> None:
        if self.memory is not None:
            _, peak = resident()
            self.memory[stage] = {
                "peak": round(peak / MIB, 1),
                "added": round(max(0, peak - self._before) / MIB, 1),
            }

    def run(self, done: Collection[str] = ()) -> None:
        if self.memory is None:
            super().run(done)
            return
        self.end("preprocess")
        names = [step["name"] for step in self.plan["steps"]]
        for name in names:
            self.begin()
            super().run([other for other in names if other != name])
            self.end(name)
        self.begin()

    def _kernel(self, step: dict[str, Any]) -> Run:
        if step["kernel"] != "lidar_encoder":
            return super()._kernel(step)
        options, threads = step["options"], self.threads
        grid = from_json(VoxelGrid, options["grid"], "grid")
        spec = from_json(encoder.EncoderSpec, options["encoder"], "encoder")
        with np.load(self.folder / step["weights"]) as found:
            ready = encoder.prepare(dict(found), spec)

        def encode(arrays: Arrays) -> None:
            points, count = (arrays[name] for name in step["inputs"])
            start = time.perf_counter_ns()
            voxels = voxelize(
                points[: count[0]], grid, max_points=options["max_points"],
                max_voxels=options["max_voxels"], threads=threads,
            )  # fmt: skip
            self.voxelize_ns, self.voxels = time.perf_counter_ns() - start, len(voxels.counts)
            values = encoder_values(voxels, grid, options["values"], spec.inputs)
            (out,) = step["outputs"]
            encoder.encode(ready, voxels.coordinates, values, out=arrays[out], threads=threads)

        return encode


def stages_of(pipeline: FusionPipeline, session: Measured) -> dict[str, int]:
    """Nanoseconds by stage of the last call, in the order of the plan."""
    found = {"preprocess": pipeline.stage_ns[0]}
    for name, (start, end) in session.step_ns.items():
        if name == "encoder":
            found["voxelize"] = session.voxelize_ns
            found["encoder"] = end - start - session.voxelize_ns
        else:
            found[name] = end - start
    return {**found, "decode": pipeline.stage_ns[2]}


def table_ms(session: Measured, threads: int) -> float:
    """Building the association table of the frame's calibration."""
    (step,) = (s for s in session.plan["steps"] if s.get("kernel") == "bev_pool")
    frustum = from_json(Frustum, step["options"]["frustum"], "frustum")
    grid = from_json(BevGrid, step["options"]["grid"], "grid")
    intrinsics, to_lidar = session.buffers["intrinsics"], session.buffers["camera_to_lidar"]
    start = time.perf_counter()
    build(Geometry(intrinsics, to_lidar, None, frustum, grid), threads)
    return (time.perf_counter() - start) * 1e3


def difference(folder: Path, found: dict[str, np.ndarray]) -> float | None:
    """From torch's outputs, relative to the largest value of each; None where they were not asked for."""
    if not (folder / "torch.npz").is_file():
        return None
    with np.load(folder / "torch.npz") as file:
        pairs = [(found[name], file[name]) for name in found]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def measure(folder: Path, frame_path: Path, threads: int, rounds: int) -> dict[str, Any]:
    frame = read_nuscenes(frame_path)
    before = resident()[0]
    start = time.perf_counter()
    session = Measured(folder, threads)
    spec = from_json(FusionSpec, session.plan["pipeline"], "pipeline")
    pipeline = FusionPipeline(spec, session)
    loaded_s, loaded = time.perf_counter() - start, resident()[0]
    load_peak = resident()[1]
    cold = session.memory = {}
    session.begin()
    result = pipeline(frame)
    session.end("decode")
    session.memory = None
    assert not result.missing, result.missing
    first = {name: session.outputs[name].copy() for name in session.outputs}
    walls, times, remainders = [], [], []
    for _ in range(rounds):
        start_ns = time.perf_counter_ns()
        pipeline(frame)
        walls.append(time.perf_counter_ns() - start_ns)
        times.append(stages_of(pipeline, session))
        remainders.append(walls[-1] - sum(times[-1].values()))
    same = all(np.array_equal(first[name], session.outputs[name]) for name in first)
    finite = all(bool(np.isfinite(array).all()) for array in session.outputs.values())
    warm = session.memory = {}
    session.begin()
    pipeline(frame)
    session.end("decode")
    median = {name: statistics.median(t[name] for t in times) / 1e6 for name in times[0]}
    depth, features = session.buffers["depth"], session.buffers["features"]
    worst = max(range(rounds), key=lambda i: abs(remainders[i]) / walls[i])
    return {
        "benchmark": "bevfusion_full", "threads": threads, "rounds": rounds,
        "points": len(frame.points) if frame.points is not None else 0, "sweeps": 1, "voxels": session.voxels,
        "boxes": len(result), "notes": result.notes, "stages": {name: round(ms, 2) for name, ms in median.items()},
        "sum_ms": round(sum(median.values()), 2), "wall_ms": round(statistics.median(walls) / 1e6, 2),
        "remainder_ms": round(remainders[worst] / 1e6, 3),
        "remainder_share": round(remainders[worst] / walls[worst], 5),
        "table_ms": round(table_ms(session, threads), 2), "load_s": round(loaded_s, 2),
        "memory": cold, "warm_added_mib": max(each["added"] for each in warm.values()),
        "plan_mib": round(sum(a.nbytes for a in session.buffers.values()) / MIB, 1),
        "loaded_mib": round((loaded - before) / MIB, 1),
        "peak_mib": max(round(load_peak / MIB, 1), *(e["peak"] for found in (cold, warm) for e in found.values())),
        "lifted_mib": round(depth.nbytes * features.shape[-1] / MIB, 1),
        "files_mib": {p.name: round(p.stat().st_size / MIB, 2) for p in sorted(folder.iterdir())},
        "same_bits": same, "difference": difference(folder, first), "finite": finite, "machine": machine(), "commit": commit(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("EDGEKIT_SHARED", ROOT.parent / "shared")) / "data"
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each in a process of its own")
    parser.add_argument("--frame", type=Path, default=data / "nuscenes_sample/frame.json")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="export here, or use what is there")
    parser.add_argument("--config", default="full", help="of models.bevfusion.config.CONFIGS")
    parser.add_argument("--torch", action="store_true", help="compare with the network in torch, too")
    parser.add_argument("--one", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.frame.is_file():
        print(f"benchmark: no frame at {args.frame}. Give one with --frame", file=sys.stderr)
        return 2
    if args.one:
        found = measure(args.one, args.frame, int(args.threads), max(1, args.rounds))
        print(json.dumps(found), flush=True)
        return 0 if abs(found["remainder_share"]) <= MOST_REMAINDER and found["finite"] else 1
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not (folder / "plan.json").is_file():
            command = [sys.executable, "-c", _EXPORT, args.config, str(folder)]
            command += [str(args.frame)] * args.torch
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        for threads in args.threads.split(","):
            own = [__file__, "--one", str(folder), "--threads", threads, "--rounds", str(args.rounds)]
            ran = subprocess.run([sys.executable, *own, "--frame", str(args.frame)], env=env, check=False)
            code = max(code, abs(ran.returncode))
    return code


if __name__ == "__main__":
    sys.exit(main())

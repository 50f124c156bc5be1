"""BEV pooling at BEVFusion's full geometry (6 cameras, 118 x 32 x 88 -> 360 x 360 x 80) beside two torch versions.

    python benchmarks/bev_pool.py [--repeats 9] [--threads 0] [--channels 80]

- `ours`: `BevPool` with the table at hand, as each frame runs; `ours rebuilt`: with the table built anew for the frame.
- `scatter`: torch with the association at hand: depth x feature materialised, `index_add_` to the cells, then channels first.
  Two ways, the faster one counts: points outside are left out first, or fall into a cell that is cut off.
- `cumsum`: torch as the first published implementation, from geometry to result: points, cells, ranks, sort, gather, cumulative
  sum over all points, differences at the ends of equal ranks.
- `copy`, `read`: one large array copied, and read, by as many threads.

All run in turn within one loop, in an order that moves on each time, after a warm-up, on the same `--threads` threads
(0: one per CPU of this process). Quick ones run five times a turn; a copy of `COPIED` bytes before each run of `ours` empties
the caches of its inputs; `ours warm` runs right after `ours`. Results must be those of reference.py to the bit (ours) or to
`off_max` (torch), else the benchmark fails; `off_max` is relative to the largest value.

Prints one JSON line. `ratio_scatter`, `ratio_cumsum`: median of theirs / median of ours, `_rebuilt` with the table built each
time. `bytes`: what pooling must move (depth, features and table read once, the result written once);
`bandwidth_share` = bytes per second by the rate of `copy` (bytes read + written). The rig is that of the real nuScenes
frame where the reference data lies beside the checkout, else six cameras of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, reference_data  # noqa: E402
from edgekit import kernels  # noqa: E402
from edgekit.kernels.bev_pool import BevPool, Geometry, build, cached, reference  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402

COPIED = 256 << 20
"""Bytes of the arrays that the bandwidth is measured on, and that a copy of empties the caches."""

# 1600x900 pictures to the network's 704x256: resize by 0.48, crop at (32, 176)
AUGMENTATION = np.array([[0.48, 0, -32], [0, 0.48, -176], [0, 0, 1]])


def rig() -> tuple[str, Geometry]:
    """What the geometry is of, and the geometry."""
    frame = reference_data() / "nuscenes_sample/frame.json"
    if frame.is_file():
        images = json.loads(frame.read_text())["data_list"][0]["images"].values()
        intrinsics = np.array([image["cam2img"] for image in images])[:, :3, :3]
        poses = np.linalg.inv(np.array([image["lidar2cam"] for image in images]))
        return "nuScenes frame", Geometry(intrinsics, poses, np.stack([AUGMENTATION] * 6))
    angles = np.deg2rad([0, -55, 55, 180, 110, -110])
    intrinsics, poses = [], []
    for k, angle in enumerate(angles):
        focal = 809.0 if k == 3 else 1266.0
        intrinsics.append([[focal, 0, 800], [0, focal, 450], [0, 0, 1]])
        pose = np.eye(4)
        c, s = np.cos(angle), np.sin(angle)
        pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
        pose[:3, 3] = [c, 0.5 * s, -0.3]
        poses.append(pose)
    return "six cameras", Geometry(np.array(intrinsics), np.array(poses), np.stack([AUGMENTATION] * 6))


class Torch:
    """Both torch versions, on the tensors of one frame."""

    def __init__(self, geometry: Geometry, depth: np.ndarray, features: np.ndarray, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.geometry = torch, geometry
        self.depth, self.features = torch.from_numpy(depth), torch.from_numpy(features)
        cells = torch.from_numpy(reference.cells(geometry).reshape(-1).astype(np.int64))
        self.kept = torch.nonzero(cells >= 0).reshape(-1)
        self.cells_kept = cells[self.kept]
        self.cells_all = torch.where(cells >= 0, cells, geometry.grid.cells)
        self.count, self.channels = geometry.grid.cells, features.shape[-1]
        to_ego = geometry.camera_to_ego
        self.undo = torch.from_numpy(np.linalg.inv(geometry.augmentation)).float()
        self.unproject = torch.from_numpy(to_ego[:, :3, :3] @ np.linalg.inv(geometry.intrinsics)).float()
        self.origin = torch.from_numpy(np.ascontiguousarray(to_ego[:, :3, 3])).float()
        (height, width), (rows, columns) = geometry.frustum.image, geometry.frustum.features
        z = torch.from_numpy(geometry.frustum.depths()).float()
        shape = (len(z), rows, columns)
        self.frustum = torch.stack(
            [
                torch.linspace(0, width - 1, columns).view(1, 1, -1).expand(shape),
                torch.linspace(0, height - 1, rows).view(1, -1, 1).expand(shape),
                z.view(-1, 1, 1).expand(shape),
            ],
            dim=-1,
        )

    def _lifted(self) -> Any:
        """[points, C]: each depth bin's weight times its pixel's feature."""
        return (self.depth.unsqueeze(-1) * self.features.unsqueeze(1)).view(-1, self.channels)

    def _planes(self, sums: Any) -> np.ndarray:
        rows, columns = self.geometry.grid.shape
        planes: np.ndarray = sums.view(rows, columns, -1).permute(2, 0, 1).contiguous().numpy()
        return planes[None]

    def scatter_kept(self) -> np.ndarray:
        sums = self.torch.zeros(self.count, self.channels)
        return self._planes(sums.index_add_(0, self.cells_kept, self._lifted()[self.kept]))

    def scatter_all(self) -> np.ndarray:
        sums = self.torch.zeros(self.count + 1, self.channels)
        return self._planes(sums.index_add_(0, self.cells_all, self._lifted())[:-1])

    def cumsum(self) -> np.ndarray:
        torch, grid = self.torch, self.geometry.grid
        points = torch.cat([self.frustum[..., :2], torch.ones_like(self.frustum[..., 2:])], dim=-1)
        points = torch.einsum("nij,dhwj->ndhwi", self.undo, points)
        points = points * self.frustum[None, ..., 2:]
        points = torch.einsum("nij,ndhwj->ndhwi", self.unproject, points) + self.origin.view(-1, 1, 1, 1, 3)
        low = torch.tensor([grid.x[0], grid.y[0], grid.z[0]])
        step = torch.tensor([grid.x[2], grid.y[2], grid.z[1] - grid.z[0]])
        index = ((points - low) / step).floor().long().view(-1, 3)
        nx, ny = grid.size
        kept = (index >= 0).all(dim=1) & (index[:, 0] < nx) & (index[:, 1] < ny) & (index[:, 2] < 1)
        x, index = self._lifted()[kept], index[kept]
        ranks = index[:, 1] * nx + index[:, 0]
        order = ranks.argsort()
        x, ranks = x[order], ranks[order]
        x = x.cumsum(0)
        last = torch.ones(len(x), dtype=torch.bool)
        last[:-1] = ranks[1:] != ranks[:-1]
        x, ranks = x[last], ranks[last]
        x = torch.cat([x[:1], x[1:] - x[:-1]])
        sums = torch.zeros(self.count, self.channels)
        sums[ranks] = x
        return self._planes(sums)


class Memory:
    """Large arrays that `threads` threads copy or read at once, each its share."""

    def __init__(self, threads: int) -> None:
        source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
        self._parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
        self._threads = ThreadPoolExecutor(threads)

    def copy(self) -> None:
        list(self._threads.map(lambda part: np.copyto(part[1], part[0]), self._parts))

    def read(self) -> None:
        list(self._threads.map(lambda part: part[0].view(np.int64).max(), self._parts))

    def close(self) -> None:
        self._threads.shutdown()


def on_lines(shape: tuple[int, ...]) -> np.ndarray:
    """float32 memory that begins where a cache line does, as engines allocate theirs."""
    count = int(np.prod(shape))
    memory = np.empty(4 * count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * count].view(np.float32).reshape(shape)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "median_ms": round(middle, 3), "q1_ms": round(low, 3), "q3_ms": round(high, 3), "min_ms": round(min(values), 3),
    }  # fmt: skip


def tables(geometry: Geometry, channels: int, threads: int) -> dict[str, float]:
    """Milliseconds to build the table, and to have a pool from a cached one; medians of seven."""
    with tempfile.TemporaryDirectory() as folder:
        cached(geometry, Path(folder))
        built = [timed(lambda: build(geometry, threads)) for _ in range(7)]
        loaded = [timed(lambda: cached(geometry, Path(folder))) for _ in range(7)]
        ready = [timed(lambda: BevPool(cached(geometry, Path(folder)), channels)) for _ in range(7)]
    return {
        "build_ms": round(statistics.median(built), 2),
        "build_numpy_ms": round(timed(lambda: reference.table(geometry)), 2),
        "load_ms": round(statistics.median(loaded), 2),
        "load_and_pool_ms": round(statistics.median(ready), 2),
    }


def measure(repeats: int, threads: int, channels: int) -> dict[str, Any]:
    name, geometry = rig()
    table_ms = tables(geometry, channels, threads)
    table = build(geometry, threads)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(table.shape, np.float32)
    depth = np.exp(logits - logits.max(axis=1, keepdims=True))
    depth /= depth.sum(axis=1, keepdims=True)
    cameras, _, height, width = table.shape
    features = on_lines((cameras, height, width, channels))
    rng.standard_normal(out=features, dtype=np.float32)
    pool = BevPool(table, channels)
    out = on_lines(pool.out_shape)
    first_ms = timed(lambda: pool.run(depth, features, out, threads=threads))
    expected = reference.pool(table.starts, table.runs, depth, features, np.ones(cameras, bool))
    expected = np.ascontiguousarray(expected.T).reshape(pool.out_shape)
    if out.tobytes() != expected.tobytes():
        raise SystemExit("ours is not reference.py")
    torch_ = Torch(geometry, depth, features, threads)
    peers = {"scatter kept": torch_.scatter_kept, "scatter all": torch_.scatter_all, "cumsum": torch_.cumsum}
    largest = float(np.abs(expected).max())
    off = {peer: float(np.abs(run() - expected).max()) / largest for peer, run in peers.items()}
    for peer, value in off.items():
        if value > (0.2 if peer == "cumsum" else 1e-4):
            raise SystemExit(f"{peer}: is off by {value} of the largest value")
    memory = Memory(threads)
    times: dict[str, list[float]] = {}

    def note(route: str, run: Callable[[], object]) -> None:
        times.setdefault(route, []).append(timed(run))

    def ours() -> None:
        for _ in range(5):
            note("copy", memory.copy)
            note("ours", lambda: pool.run(depth, features, out, threads=threads))
            note("ours warm", lambda: pool.run(depth, features, out, threads=threads))

    def rebuilt() -> None:
        note(
            "ours rebuilt",
            lambda: BevPool(build(geometry, threads), channels).run(depth, features, out, threads=threads),
        )

    def read() -> None:
        for _ in range(5):
            note("read", memory.read)

    routes: list[Callable[[], None]] = [ours, rebuilt, read]
    routes += [lambda peer=peer, run=run: note(peer, run) for peer, run in peers.items()]
    for k in range(repeats + 1):
        if k == 1:
            times.clear()  # warm by then
        for route in routes:
            route()
        routes = routes[1:] + routes[:1]
    memory.close()
    results = {route: summary(values) for route, values in times.items()}
    median = {route: result["median_ms"] for route, result in results.items()}
    scatter = min(("scatter kept", "scatter all"), key=lambda peer: median[peer])
    copy_rate, read_rate = 2 * COPIED / median["copy"] * 1e3, COPIED / median["read"] * 1e3
    moved = depth.nbytes + features.nbytes + table.nbytes + out.nbytes
    rate = moved / median["ours"] * 1e3
    return {
        "rig": name,
        "shape": [*table.shape, *geometry.grid.shape, channels],
        "points": geometry.points,
        "points_in_grid": table.points,
        "runs": len(table.runs),
        "table_bytes": table.nbytes,
        **table_ms,
        "first_run_ms": round(first_ms, 2),
        "repeats": repeats,
        "threads": threads,
        "times": results,
        "off_max": {peer: float(f"{value:.2g}") for peer, value in off.items()},
        "scatter": scatter,
        "ratio_scatter": round(median[scatter] / median["ours"], 1),
        "ratio_cumsum": round(median["cumsum"] / median["ours"], 1),
        "ratio_cumsum_rebuilt": round(median["cumsum"] / median["ours rebuilt"], 1),
        "bytes": moved,
        "gb_s": round(rate / 1e9, 2),
        "copy_gb_s": round(copy_rate / 1e9, 2),
        "read_gb_s": round(read_rate / 1e9, 2),
        "bandwidth_share": round(rate / copy_rate, 2),
        "bandwidth_share_warm": round(moved / median["ours warm"] * 1e3 / copy_rate, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--channels", type=int, default=80)
    args = parser.parse_args()
    threads = args.threads or len(os.sched_getaffinity(0))
    module = kernels.native()
    import torch

    result = {
        "benchmark": "bev_pool",
        **measure(args.repeats, threads, args.channels),
        "kernels": "numpy" if module is None else f"native/{module.isa}",
        "commit": commit(),
        "machine": machine(threads),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

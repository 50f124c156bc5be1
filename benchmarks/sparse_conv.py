"""The sparse LiDAR encoder of BEVFusion beside spconv's CPU wheel, on real sweeps.

    python benchmarks/sparse_conv.py [--rounds 12] [--threads 1] [--clouds PATH...] [--spconv PYTHON] [--spconv-threads 1]

Full nuScenes geometry (voxels of 0.075 m, 41 x 1440 x 1440, 21 convolutions), random weights, batch norm folded.
Clouds: the nuScenes sweep and KITTI scans in the reference data beside the checkout (or $EDGEKIT_SHARED); `.bin`
files of float32, five values a point if their size divides by 20 and the name has `LIDAR_TOP`, else four.
Timed from coordinates and features to the dense bird's-eye view, sites and rulebooks included, voxelization apart.

spconv runs in a process of its own (`bash benchmarks/peers/setup.sh spconv`, or `--spconv`), one waiting while the
other works, in turn within one loop. Prints one JSON line per cloud. `speedup`: spconv's time / ours, median over
rounds of each round's quotient; `cpu_speedup` by CPU time, which other work on the machine disturbs less;
`difference`: largest between the two results / largest value; `same_bits`: our float32 result had the same bits in
all rounds and for 1, 2 and 3 threads; `spconv_same_bits`: theirs in all rounds. With more than one thread that is
false (the sums of spconv 2.3.8 differ from run to run, in a single layer already), so it gets one unless
`--spconv-threads` says more: compare with `--threads 1`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, peers, reference_data  # noqa: E402
from benchmarks.overhead import machine  # noqa: E402
from edgekit.kernels import sparse_conv as sparse  # noqa: E402
from edgekit.kernels.sparse_conv import encoder  # noqa: E402
from edgekit.kernels.voxelize import NUSCENES, Voxels, voxelize  # noqa: E402


def read(path: Path) -> np.ndarray:
    """float32 [n, 5]: x, y, z, intensity, time since the sweep (0)."""
    raw = np.fromfile(path, np.float32)
    points = raw.reshape(-1, 5 if "LIDAR_TOP" in path.name and raw.size % 5 == 0 else 4)
    return np.concatenate([points[:, :4], np.zeros((len(points), 1), np.float32)], axis=1)


def reference_clouds() -> list[Path]:
    data = reference_data()
    return [
        *sorted((data / "nuscenes_sample").glob("*LIDAR_TOP*.bin")),
        *sorted((data / "kitti_velo10").glob("*.bin")),
    ]


class Spconv:
    """The peer's process."""

    def __init__(self, python: Path, folder: Path, weights: dict[str, np.ndarray], threads: int) -> None:
        spec = encoder.BEVFUSION
        layers = []
        folded: dict[str, np.ndarray] = {}
        for layer in spec.layers():
            norm = [weights[f"{layer.norm}.{p}"] for p in ("weight", "bias", "running_mean", "running_var")]
            name = layer.name
            folded[f"{name}.weight"], folded[f"{name}.bias"] = sparse.fold_batch_norm(
                weights[f"{name}.weight"], None, *norm, spec.eps
            )
            layers.append(
                {
                    "name": name, "inputs": layer.inputs, "outputs": layer.outputs, "window": layer.window,
                    "residual": layer.residual,
                }
            )  # fmt: skip
        (folder / "layers.json").write_text(
            json.dumps({"layers": layers, "shape": spec.shape}), encoding="utf-8"
        )
        np.savez(folder / "weights.npz", **folded)
        words = [str(ROOT / "benchmarks/peers/spconv_encoder.py"), "layers.json", "weights.npz", str(threads)]
        self._process = subprocess.Popen(
            [str(python), *words], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"spconv ended with {self._process.wait(30)}. Run bash benchmarks/peers/setup.sh spconv")
        return dict(json.loads(line))

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def compare(
    voxels: Voxels,
    peer: Spconv | None,
    folder: Path,
    made: dict[str, encoder.Encoder],
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    np.savez(folder / "cloud.npz", coordinates=voxels.coordinates, features=voxels.features)
    if peer is not None:
        peer.ask("load cloud.npz")
        peer.ask("run")
    wall: dict[str, list[float]] = {name: [] for name in (*made, "spconv")}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    seen, theirs_seen = set(), set()
    outputs = {}
    for number in range(rounds + 1):
        for name, network in made.items():
            outputs[name], w, c = timed(
                lambda network=network: encoder.encode(
                    network, voxels.coordinates, voxels.features, threads=threads
                )
            )
            if number:
                wall[name].append(w)
                cpu[name].append(c)
        seen.add(hashlib.sha256(outputs["float32"].tobytes()).hexdigest())
        if peer is not None:
            facts = peer.ask("run")
            theirs_seen.add(facts["sha256"])
            if number:
                wall["spconv"].append(facts["wall_ms"])
                cpu["spconv"].append(facts["cpu_ms"])
    for other in (1, 2, 3):
        again = encoder.encode(made["float32"], voxels.coordinates, voxels.features, threads=other)
        seen.add(hashlib.sha256(again.tobytes()).hexdigest())
    line: dict[str, Any] = {"same_bits": len(seen) == 1}
    for name in wall:
        if wall[name]:
            line[f"{name}_ms"] = round(statistics.median(wall[name]), 1)
            line[f"{name}_cpu_ms"] = round(statistics.median(cpu[name]), 1)
    exact = outputs["float32"].astype(np.float64)
    noise = np.square(outputs["int8"] - exact).sum() / np.square(exact).sum()
    line["int8_noise"] = float(f"{noise:.2g}")
    if peer is not None:
        for name in made:
            line[f"{name}_speedup"] = quotient(wall["spconv"], wall[name])
            line[f"{name}_cpu_speedup"] = quotient(cpu["spconv"], cpu[name])
        line["spconv_same_bits"] = len(theirs_seen) == 1
        peer.ask("save out.npy")
        theirs = np.load(folder / "out.npy").reshape(exact.shape)
        line["difference"] = float(f"{np.abs(theirs - exact).max() / np.abs(exact).max():.2g}")
    return line


def quotient(theirs: list[float], ours: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clouds", type=Path, nargs="*", default=None)
    parser.add_argument("--spconv-threads", type=int, default=1)
    parser.add_argument("--spconv", type=Path, default=peers() / "venv-spconv" / "bin" / "python")
    args = parser.parse_args()
    clouds = reference_clouds() if args.clouds is None else args.clouds
    if not clouds:
        sys.exit(
            "sparse_conv: no clouds. Put the reference data beside the checkout or name files with --clouds"
        )
    weights = encoder.random_weights()
    made = {"float32": encoder.prepare(weights)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer = (
            Spconv(args.spconv.absolute(), folder, weights, args.spconv_threads)
            if args.spconv.is_file()
            else None
        )
        if peer is None:
            print(f"no spconv at {args.spconv}: bash benchmarks/peers/setup.sh spconv", file=sys.stderr)
        for path in clouds:
            points = read(path)
            start = time.perf_counter()
            voxels = voxelize(points, NUSCENES, max_points=10, max_voxels=160_000, threads=args.threads)
            took = (time.perf_counter() - start) * 1e3
            scales = encoder.calibrate(made["float32"], [(voxels.coordinates, voxels.features)])
            made["int8"] = encoder.prepare(weights, scales=scales)
            line = {
                "benchmark": "sparse_conv", "cloud": path.name, "points": len(points),
                "voxels": len(voxels.counts), "threads": args.threads, "rounds": args.rounds,
                "voxelize_ms": round(took, 2),
                **compare(voxels, peer, folder, made, args.rounds, args.threads),
                "spconv": peer.facts["version"] if peer else None, "spconv_threads": args.spconv_threads,
                "isa": sparse.isas()[0] if sparse.isas() else "numpy",
                "machine": machine(), "commit": commit(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        if peer is not None:
            peer.close()


if __name__ == "__main__":
    main()

"""make bench: every benchmark in turn, alone on the machine; prints and appends JSON lines.

    python benchmarks/run.py [--out runs/bench.jsonl]

Ratios within one line are the result; milliseconds belong to the machine named in the line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import reference_data  # noqa: E402


def run(*words: str) -> str:
    """Standard output of a Python command in the checkout; its errors end the benchmark."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr.strip()}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.jsonl")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print(
            f"warning: load is {os.getloadavg()[0]:.1f}; timings beside other work mean little",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as folder, args.out.open("a", encoding="utf-8") as log:
        models = {"yolo_lite": ROOT / "apps" / "detect"}
        data = reference_data()
        if (data / "models").is_dir():
            models["yolox_nano"] = data / "models" / "yolox_nano" / "yolox_nano.onnx"
        commands = [
            ["benchmarks/overhead.py"],
            ["benchmarks/preprocess.py"],
            ["benchmarks/decode.py"],
            ["benchmarks/synth.py"],
            ["benchmarks/video.py"],
            ["benchmarks/video.py", "--size", "64", "--width", "0.5"],
            ["benchmarks/synth_rig.py"],
            ["benchmarks/bev_pool.py"],
            ["benchmarks/boxes3d.py"],
        ]
        if (data / "nuscenes_sample").is_dir() or (data / "kitti_velo10").is_dir():
            commands.append(["benchmarks/sparse_conv.py"])
        for model in models.values():
            words = ["-m", "edgekit", "build", str(model), "--target", "host", "--out", folder, "--json"]
            if model.is_dir():
                words += ["--limit", "4"]
            (built,) = json.loads(run(*words))["bundles"]
            commands.append(["benchmarks/session_overhead.py", built["path"]])
            if model.stem.startswith("yolox"):
                commands.append(["benchmarks/around_network.py", built["path"], str(model)])
            commands.append(["benchmarks/stream.py", built["path"], "--seconds", "10", "--turns", "2"])
            commands.append(["-m", "edgekit", "bench", built["path"], "--threads", "1", "--json"])
        gesture = ROOT / "apps" / "gesture"
        if gesture.is_dir():
            words = ["-m", "edgekit", "build", str(gesture), "--target", "host", "--out", folder, "--json"]
            (built,) = json.loads(run(*words))["bundles"]
            commands.append(["benchmarks/drops.py", built["path"]])
        for words in commands:
            for line in run(*words).splitlines():
                print(line, flush=True)
                log.write(line + "\n")


if __name__ == "__main__":
    main()

"""Session.run against a bare onnxruntime run with I/O binding of the same graph, interleaved in one process.

    python benchmarks/session_overhead.py BUNDLE.edge [--runs 400] [--threads 1]

Prints one JSON line: median of both in microseconds, the difference and the ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import onnxruntime

from edgekit.runtime.bench import machine
from edgekit.runtime.engine import load


def commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    engine = load(args.bundle, threads=args.threads)
    session = engine.session()
    (variant,) = engine.variants.values()
    config = onnxruntime.SessionOptions()
    config.intra_op_num_threads = args.threads
    bare = onnxruntime.InferenceSession(
        bytes(engine.bundle.read(variant.path)), config, providers=["CPUExecutionProvider"]
    )
    binding = bare.io_binding()
    keep = []
    rng = np.random.default_rng(0)
    for name, array in session.inputs.items():
        array[...] = rng.uniform(0, 255, array.shape).astype(array.dtype)
        keep.append(onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()))
        binding.bind_ortvalue_input(name, keep[-1])
    for name, array in session.outputs.items():
        keep.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array)))
        binding.bind_ortvalue_output(name, keep[-1])

    calls = {"session": session.run, "bare": lambda: bare.run_with_iobinding(binding)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(args.warmup + args.runs):
        order = list(calls) if i % 2 else list(calls)[::-1]
        for name in order:
            start = time.perf_counter_ns()
            calls[name]()
            if i >= args.warmup:
                samples[name].append((time.perf_counter_ns() - start) / 1e3)
    median = {name: float(np.median(values)) for name, values in samples.items()}
    # interleaved pairs: the median of the differences is less noisy than the difference of the medians
    paired = float(np.median(np.array(samples["session"]) - np.array(samples["bare"])))
    row = {
        "benchmark": "session_overhead",
        "bundle": args.bundle.name,
        "session_us": round(median["session"], 2),
        "bare_us": round(median["bare"], 2),
        "paired_difference_us": round(paired, 2),
        "ratio": round(median["session"] / median["bare"], 4),
        "iqr_us": {n: round(float(np.subtract(*np.percentile(v, [75, 25]))), 2) for n, v in samples.items()},
        "runs": args.runs,
        "commit": commit(),
        "machine": machine(args.threads),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

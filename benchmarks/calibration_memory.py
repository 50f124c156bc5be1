"""Memory of a calibration beside that of running the float network.

    python benchmarks/calibration_memory.py [--network yolov8n] [--size 640] [--pictures 256]

Each of the two runs in a process of its own, which reports its largest resident size (VmHWM of
/proc/self/status). `float`: ONNX Runtime's session at its defaults, one thread, pictures one at a
time. `calibrate`: `edgekit.quant.calibrate`, which opens the same network. Both read the network from
the same file, with random weights, and draw the same pictures of noise: memory does not depend on what
they show, and no range is taken from them. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MB = 1e6


def network(name: str, size: int, path: Path) -> None:
    """Write a network with random weights: a YOLO of benchmarks.shapes, or "chain", 12 equal layers."""
    from benchmarks import shapes
    from benchmarks.shapes.net import Net
    from edgekit.passes.graph import clean

    if name == "chain":
        net = Net(size, size)
        x = net.input
        for _ in range(12):
            x = net.conv(x, 32, 1)
        model = net.model([x])
    else:
        model = shapes.build(name, (size, size))
        # without its decoding, whose constants are placeholders: what a bare convolution gives is an output,
        # that of the sum over the bins of a box aside
        convs = [n.outputs[0] for n in model.graph if n.op_type == "Conv"]
        bare = [v for v in convs if not any(u.op_type in ("Sigmoid", "Relu") for u, _ in v.uses())]
        model.graph.outputs[:] = [v for v in bare if v.shape is not None and v.shape[1] != 1]
        clean(model)
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        shape = tensor.shape.numpy()
        fan = max(1, int(np.prod(shape[1:])))
        array = (rng.standard_normal(shape) * (2 / fan) ** 0.5).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, path)


def pictures(name: str, size: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield {name: rng.random((1, 3, size, size), np.float32)}


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("calibration_memory: /proc/self/status has no VmHWM. Run it on Linux")


def work(what: str, path: Path, size: int, count: int) -> dict[str, Any]:
    """One of the two runs, in this process."""
    start = time.perf_counter()
    found: dict[str, Any] = {"what": what}
    if what == "float":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for feed in pictures(session.get_inputs()[0].name, size, count):
            session.run(None, feed)
    else:
        from edgekit.quant.calibrate import calibrate

        model = ir.load(path)
        stats = calibrate(model, pictures(str(model.graph.inputs[0].name), size, count))
        found["values"] = len(stats)
        found["values_bytes"] = sum(s.count for s in stats.values()) // count * 4
    return {**found, "peak_bytes": peak_bytes(), "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="yolov8n")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--worker", choices=("float", "calibrate"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        if args.worker:  # writing it first adds a few MB to both alike
            network(args.network, args.size, path)
            print(json.dumps(work(args.worker, path, args.size, args.pictures)))
            return
        rows = {}
        for what in ("float", "calibrate"):
            options = ["--network", args.network, "--size", str(args.size), "--pictures", str(args.pictures)]
            command = [sys.executable, __file__, "--worker", what, *options]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            rows[what] = json.loads(
                subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
            )
    above = rows["calibrate"]["peak_bytes"] - rows["float"]["peak_bytes"]
    result = {
        "network": args.network,
        "size": args.size,
        "pictures": args.pictures,
        "float_mb": round(rows["float"]["peak_bytes"] / MB),
        "calibrate_mb": round(rows["calibrate"]["peak_bytes"] / MB),
        "above_float_mb": round(above / MB),
        "values": rows["calibrate"]["values"],
        "values_mb_per_picture": round(rows["calibrate"]["values_bytes"] / MB),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

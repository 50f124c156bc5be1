"""spconv's CPU kernels doing the layers of edgekit's sparse encoder; run by benchmarks/sparse_conv.py in the
environment that `benchmarks/peers/setup.sh spconv` makes.

    python benchmarks/peers/spconv_encoder.py LAYERS.json WEIGHTS.npz THREADS

Reads one command a line and answers each with one JSON line: `load CLOUD.npz` (coordinates, features),
`run`: {"wall_ms", "cpu_ms", "sha256"} of one pass from coordinates to the dense result, `save OUT.npy`.
Batch norm is folded as for edgekit; bias, residual and ReLU are done in place on the features by torch, because the
CPU kernels of spconv do not take them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import spconv
import spconv.pytorch as sparse
import torch


def modules(
    layers: list[dict[str, Any]], weights: dict[str, np.ndarray]
) -> list[tuple[dict[str, Any], Any, Any]]:
    made, stage = [], 0
    for layer in layers:
        ins, outs = layer["inputs"], layer["outputs"]
        if layer["window"] is None:
            # one rulebook for all submanifold layers of a resolution
            conv = sparse.SubMConv3d(ins, outs, 3, padding=1, bias=False, indice_key=f"stage{stage}")
        else:
            conv = sparse.SparseConv3d(ins, outs, *layer["window"], bias=False)
            stage += 1
        weight = weights[f"{layer['name']}.weight"].transpose(4, 0, 1, 2, 3)
        conv.weight.data = torch.from_numpy(np.ascontiguousarray(weight))
        made.append((layer, conv.eval(), torch.from_numpy(weights[f"{layer['name']}.bias"])))
    return made


def encode(layers: list[tuple[dict[str, Any], Any, Any]], x: Any) -> torch.Tensor:
    block = x
    for layer, conv, bias in layers:
        before, x = x, conv(x)
        features = x.features.add_(bias)
        if layer["residual"]:
            features.add_(block.features)
        x = x.replace_feature(features.relu_())
        block = before
    return x.dense()


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(sys.argv[3]))
    with np.load(sys.argv[2]) as weights:
        layers = modules(spec["layers"], dict(weights))
    answers, sys.stdout = sys.stdout, sys.stderr  # spconv prints of its own

    def answer(**facts: object) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    answer(version=spconv.__version__, torch=torch.__version__)
    coordinates = features = result = None
    with torch.no_grad():
        for line in sys.stdin:
            command, _, path = line.strip().partition(" ")
            if command == "load":
                with np.load(path) as cloud:
                    coordinates = torch.from_numpy(cloud["coordinates"])
                    features = torch.from_numpy(cloud["features"])
                answer(voxels=len(features))
            elif command == "run":
                wall, cpu = time.perf_counter(), time.process_time()
                x = sparse.SparseConvTensor(features, coordinates, spec["shape"], 1)
                result = encode(layers, x)
                spent = {
                    "wall_ms": (time.perf_counter() - wall) * 1e3,
                    "cpu_ms": (time.process_time() - cpu) * 1e3,
                }
                answer(**spent, sha256=hashlib.sha256(result.numpy().tobytes()).hexdigest())
            elif command == "save":
                np.save(path, result.numpy())
                answer(saved=path)


if __name__ == "__main__":
    main()

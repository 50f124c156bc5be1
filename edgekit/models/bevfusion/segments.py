"""A plan folder under onnxruntime, its steps one after the other with the kernels between them: what a device computes, for
tests and evaluation. It has what `tasks.fusion.pipeline` uses of a session."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.kernels.bev_pool import BevGrid, BevPool, Frustum, Geometry, Table, build
from edgekit.kernels.depth_raster import depth_raster
from edgekit.kernels.sparse_conv import encoder
from edgekit.kernels.voxelize import VoxelGrid, encoder_values, voxelize
from edgekit.schema import from_json

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], None]
"""Fills a step's outputs, which are among the arrays by name with its inputs."""


class Segments:
    """buffers: every tensor of the plan by name; inputs, outputs: those of the plan.

    Raises: OSError, KeyError or ValueError for files that are not there or say something else.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.plan, self.folder, self.threads = plan, folder, threads
        self.buffers: Arrays = {
            name: np.zeros(shape, np.dtype(dtype)) for name, (dtype, shape) in plan["inputs"].items()
        }
        models = {step["model"]: self._model(step["model"]) for step in plan["steps"] if "model" in step}
        for step in plan["steps"]:  # what kernels make has the shape of what takes it
            if "model" in step:
                model = models[step["model"]]
                for port in (*model.get_inputs(), *model.get_outputs()):
                    shape = [step.get("repeat", 1) * port.shape[0], *port.shape[1:]]
                    self.buffers.setdefault(port.name, np.zeros(shape, np.float32))
        self._runs: dict[str, Run] = {}
        for step in plan["steps"]:
            run: Run = _graph(models[step["model"]], step) if "model" in step else self._kernel(step)
            self._runs[step["name"]] = run
        self.inputs = {name: self.buffers[name] for name in plan["inputs"]}
        self.outputs = {name: self.buffers[name] for name in plan["outputs"]}
        self.step_ns: dict[str, tuple[int, int]] = {}

    def run(self, done: Collection[str] = ()) -> None:
        """All steps but those of `done`, whose outputs are there already; what is switched off of these is zeros, too."""
        self.step_ns = {}
        for step in self.plan["steps"]:
            there = step["name"] in done
            start = time.perf_counter_ns()
            when, slots = self._when(step), step.get("repeat", 1)
            if slots > 1:
                for slot in range(slots):
                    wanted = when is None or bool(when[slot])
                    if not (there and wanted):
                        self._slice(step, slot, wanted)
            elif when is None or when.any():
                if not there:
                    self._runs[step["name"]](self.buffers)
            else:
                for name in step["outputs"]:
                    self.buffers[name][...] = 0
            self.step_ns[step["name"]] = (start, time.perf_counter_ns())

    def run_slot(self, name: str, slot: int) -> None:
        """One slice of a repeated step."""
        self._slice(next(step for step in self.plan["steps"] if step["name"] == name), slot, True)

    def close(self) -> None:
        """Nothing is held."""

    def _when(self, step: dict[str, Any]) -> np.ndarray | None:
        return self.buffers[step["when"]].reshape(-1) if step.get("when") else None

    def _slice(self, step: dict[str, Any], slot: int, wanted: bool) -> None:
        names, slots = (*step["inputs"], *step["outputs"]), step["repeat"]
        part = {}
        for name in names:
            rows = len(self.buffers[name]) // slots
            part[name] = self.buffers[name][slot * rows : (slot + 1) * rows]
        if wanted:
            self._runs[step["name"]](part)
        else:
            for name in step["outputs"]:
                part[name][...] = 0

    def _model(self, name: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(
            str(self.folder / name), options, providers=["CPUExecutionProvider"]
        )

    def _kernel(self, step: dict[str, Any]) -> Run:
        options, threads = step.get("options", {}), self.threads
        if step["kernel"] == "depth_raster":
            return lambda arrays: _depth(step, arrays, threads)
        if step["kernel"] == "lidar_encoder":
            grid = from_json(VoxelGrid, options["grid"], "grid")
            spec = from_json(encoder.EncoderSpec, options["encoder"], "encoder")
            with np.load(self.folder / step["weights"]) as found:
                scales = options["scales"] if options["precision"] == "int8" else None
                ready = encoder.prepare(dict(found), spec, scales=scales)

            def encode(arrays: Arrays) -> None:
                points, count = (arrays[name] for name in step["inputs"])
                voxels = voxelize(
                    points[: count[0]], grid, max_points=options["max_points"],
                    max_voxels=options["max_voxels"], threads=threads,
                )  # fmt: skip
                values = encoder_values(voxels, grid, options["values"], spec.inputs)
                (out,) = step["outputs"]
                encoder.encode(ready, voxels.coordinates, values, out=arrays[out], threads=threads)

            return encode
        if step["kernel"] != "bev_pool":
            raise ValueError(f"step {step['name']}: unknown kernel {step['kernel']!r}")
        frustum = from_json(Frustum, options["frustum"], "frustum")
        cells = from_json(BevGrid, options["grid"], "grid")
        tables: dict[bytes, Table] = {}

        def pool(arrays: Arrays) -> None:
            depth, features, cameras, intrinsics, to_lidar = (arrays[name] for name in step["inputs"])
            key = intrinsics.tobytes() + to_lidar.tobytes()
            if key not in tables:
                tables.clear()
                tables[key] = build(Geometry(intrinsics, to_lidar, None, frustum, cells), threads)
            (out,) = step["outputs"]
            bev = BevPool(tables[key], features.shape[-1])
            bev.run(depth, features, arrays[out], cameras=(cameras != 0).tolist(), threads=threads)

        return pool


def _graph(model: Any, step: dict[str, Any]) -> Run:
    def run(arrays: Arrays) -> None:
        found = model.run(step["outputs"], {name: arrays[name] for name in step["inputs"]})
        for name, value in zip(step["outputs"], found, strict=True):
            np.copyto(arrays[name], value)

    return run


def _depth(step: dict[str, Any], arrays: Arrays, threads: int) -> None:
    points, count, matrices = (arrays[name] for name in step["inputs"])
    out = arrays[step["outputs"][0]]
    cameras, _, height, width = out.shape
    images = out.reshape(cameras, height, width)
    depth_raster(points[: count[0]], matrices, (height, width), images, threads=threads)

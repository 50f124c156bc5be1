"""The network as a plan folder: parts that engines run, kernels between them (docs/fusion.md, "Plan files").

| step | runs when | takes | gives |
|---|---|---|---|
| **camera.onnx**, once per camera | the camera is there | `images` [cam, 3, H, W] | `pyramid` [cam, F, h, w] |
| `depth_raster` (DepthLSS only) | there is a LiDAR | `points`, `point_count`, `projections` | `depth_images` [cam, 1, H, W] |
| **lift.onnx** | there is a camera | `pyramid`, `depth_images` | `depth` [cam, D, h, w], sums to 1; `features` [cam, h, w, C] |
| `bev_pool` | likewise | `depth`, `features`, `cameras`, `intrinsics`, `camera_to_lidar` | `camera_bev` [1, C, rows, columns] |
| `lidar_encoder`, **lidar_encoder.npz** | there is a LiDAR | `points`, `point_count` | `lidar_grid` [1, C * nz, rows, columns] |
| **lidar.onnx** (where there is a neck) | likewise | `lidar_grid` | `lidar_bev` [1, neck, rows, columns] |
| **fusion.onnx** | always | `camera_bev`, `lidar_bev`, `present` [1, 2] | `heat_<g>`, `box_<g>` (head.py), `segments` |

Depth images are in metres, 0 = none; `present` is of cameras and LiDAR, 1 = there. Without a neck `lidar_grid` is
`lidar_bev`. What does not run gives zeros. `segments.Segments` runs such a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.head import output_names, pipeline
from edgekit.models.bevfusion.lidar import weights
from edgekit.models.bevfusion.model import BEVFusion
from edgekit.models.exporting import write_onnx
from edgekit.schema import to_json

FORMAT, PLAN = "edgekit-plan-1", "plan.json"
CAMERA, LIFT, LIDAR, FUSION, ENCODER = (
    "camera.onnx", "lift.onnx", "lidar.onnx", "fusion.onnx", "lidar_encoder.npz"
)  # fmt: skip


class _Camera(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.backbone, self.pyramid = model.camera.backbone, model.camera.pyramid

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.pyramid(self.backbone(images))
        return features


class _Lift(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.lift = model.camera.lift

    def forward(self, pyramid: Tensor, depth_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        depth, features = self.lift(pyramid, depth_images)
        return depth.softmax(1), features.permute(0, 2, 3, 1).contiguous()


class _Fusion(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.model, self.names = model, output_names(model.config)

    def forward(self, camera_bev: Tensor, lidar_bev: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        out = self.model.judge(camera_bev, lidar_bev, present)
        return tuple(out[name] for name in self.names)


def export_segments(
    model: BEVFusion, folder: Path, opset: int = 17, *, score_threshold: float = 0.1
) -> dict[str, Any]:
    """Write the plan of a network into `folder`; returns what `plan.json` says.

    score_threshold: of the pipeline, unless a caller asks for another one.
    """
    config, training = model.config, model.training
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(1, 3, *config.camera.image)
    write_onnx(_Camera(model), folder / CAMERA, (images,), ["images"], ["pyramid"], opset=opset)
    height, width = config.camera.frustum.features
    lifted: tuple[Tensor, ...] = (torch.zeros(config.camera.count, config.camera.fpn, height, width),)
    if config.camera.lidar_depth:
        lifted = (*lifted, torch.zeros(config.camera.count, 1, *config.camera.image))
    names = ["pyramid", "depth_images"][: len(lifted)]
    write_onnx(_Lift(model), folder / LIFT, lifted, names, ["depth", "features"], opset=opset)
    grid, joint = torch.zeros(1, config.lidar.channels, *config.shape), "lidar_grid"
    if config.lidar.neck:
        write_onnx(model.neck, folder / LIDAR, (grid,), ["lidar_grid"], ["lidar_bev"], opset=opset)
        grid, joint = torch.zeros(1, config.lidar.neck, *config.shape), "lidar_bev"
    pooled = torch.zeros(1, config.camera.channels, *config.bev.pool.shape)
    example, outputs = (pooled, grid, torch.ones(1, 2)), output_names(config)
    write_onnx(
        _Fusion(model), folder / FUSION, example, ["camera_bev", joint, "present"], outputs, opset=opset
    )
    with (folder / ENCODER).open("wb") as file:
        np.savez(file, allow_pickle=False, **weights(model.encoder))
    plan = {
        "format": FORMAT,
        "task": "fusion",
        "inputs": inputs(config),
        "outputs": outputs,
        "steps": steps(config),
        "pipeline": to_json(pipeline(config, score_threshold)),
    }
    (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    model.train(training)
    return plan


def inputs(config: Config) -> dict[str, list[Any]]:
    """Plan inputs: [dtype, shape] by name."""
    cameras, points = config.camera.count, config.lidar.cloud
    found: dict[str, list[Any]] = {
        "images": ["float32", [cameras, 3, *config.camera.image]],
        "points": ["float32", [points, 5]],
        "point_count": ["int32", [1]],
        "projections": ["float32", [cameras, 3, 4]],
        "intrinsics": ["float32", [cameras, 3, 3]],
        "camera_to_lidar": ["float32", [cameras, 4, 4]],
        "cameras": ["float32", [cameras]],
        "lidar": ["float32", [1]],
        "present": ["float32", [1, 2]],
    }
    if not config.camera.lidar_depth:
        del found["projections"]
    return found


def steps(config: Config) -> list[dict[str, Any]]:
    """Steps in an order in which they can run."""
    lidar, seen = config.lidar, ["points", "point_count"]
    found: list[dict[str, Any]] = [
        {"name": "camera", "model": CAMERA, "inputs": ["images"], "outputs": ["pyramid"],
         "repeat": config.camera.count, "when": "cameras"},
    ]  # fmt: skip
    if config.camera.lidar_depth:
        found.append(
            {"name": "depth_raster", "kernel": "depth_raster", "inputs": [*seen, "projections"],
             "outputs": ["depth_images"], "when": "lidar"}
        )  # fmt: skip
    maps = ["depth", "features"]
    found += [
        {"name": "lift", "model": LIFT,
         "inputs": ["pyramid", "depth_images"][: 1 + config.camera.lidar_depth], "outputs": maps,
         "when": "cameras"},
        {"name": "pool", "kernel": "bev_pool", "inputs": [*maps, "cameras", "intrinsics", "camera_to_lidar"],
         "outputs": ["camera_bev"], "when": "cameras",
         "options": {"frustum": to_json(config.camera.frustum), "grid": to_json(config.bev.pool)}},
        {"name": "encoder", "kernel": "lidar_encoder", "weights": ENCODER, "inputs": seen,
         "outputs": ["lidar_grid"], "when": "lidar",
         "options": {
             "grid": to_json(lidar.grid), "max_points": lidar.max_points, "max_voxels": lidar.max_voxels,
             "values": lidar.values, "encoder": to_json(lidar.encoder), "precision": "float32",
         }},
    ]  # fmt: skip
    joint = "lidar_grid"
    if lidar.neck:
        joint = "lidar_bev"
        found.append(
            {"name": "lidar", "model": LIDAR, "inputs": ["lidar_grid"], "outputs": [joint], "when": "lidar"}
        )
    found.append(
        {"name": "fusion", "model": FUSION, "inputs": ["camera_bev", joint, "present"],
         "outputs": output_names(config)}
    )  # fmt: skip
    return found

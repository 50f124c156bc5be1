"""Plan folders for the tests: a small BEVFusion with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.export import _Fusion
from edgekit.models.bevfusion.head import output_names, pipeline
from edgekit.models.bevfusion.lidar import weights
from edgekit.models.bevfusion.model import BEVFusion
from edgekit.models.exporting import write_onnx
from edgekit.schema import to_json


class _Camera(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.net = model.camera

    def forward(self, images: Tensor) -> Tensor:
        return self.net.pyramid(self.net.backbone(images))


class _Lift(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.net = model.camera.lift

    def forward(self, pyramid: Tensor, depth_images: Tensor) -> tuple[Tensor, Tensor]:
        depth, features = self.net(pyramid, depth_images)
        return depth.softmax(1), features.permute(0, 2, 3, 1).contiguous()


def export(model: BEVFusion, folder: Path, max_points: int = 20000) -> Path:
    config: Config = model.config
    camera = config.camera
    folder.mkdir(parents=True, exist_ok=True)
    n, size = camera.count, camera.image
    rows, columns = camera.frustum.features
    write_onnx(_Camera(model), folder / "camera.onnx", (torch.zeros(1, 3, *size),), ["images"], ["pyramid"])
    given = (torch.zeros(n, camera.fpn, rows, columns), torch.zeros(n, 1, *size))
    write_onnx(_Lift(model), folder / "lift.onnx", given, ["pyramid", "depth_images"], ["depth", "features"])
    grid = torch.zeros(1, config.lidar.channels, *config.shape)
    write_onnx(model.neck, folder / "lidar.onnx", (grid,), ["lidar_grid"], ["lidar_bev"])
    above = torch.zeros(1, config.lidar.neck, *config.shape)
    pooled = torch.zeros(1, camera.channels, *config.bev.pool.shape)
    inputs, outputs = ["camera_bev", "lidar_bev", "present"], output_names(config)
    write_onnx(_Fusion(model), folder / "fusion.onnx", (pooled, above, torch.ones(1, 2)), inputs, outputs)
    np.savez(folder / "encoder.npz", allow_pickle=False, **weights(model.encoder))
    lidar, pool, frustum = config.lidar, config.bev.pool, camera.frustum
    tree: dict[str, Any] = {
        "format": "edgekit-plan-1",
        "task": "fusion",
        "inputs": {
            "images": ["float32", [n, 3, *size]],
            "points": ["float32", [max_points, 5]],
            "point_count": ["int32", [1]],
            "projections": ["float32", [n, 3, 4]],
            "intrinsics": ["float32", [n, 3, 3]],
            "camera_to_lidar": ["float32", [n, 4, 4]],
            "cameras": ["float32", [n]],
            "lidar": ["float32", [1]],
            "present": ["float32", [1, 2]],
        },
        "outputs": outputs,
        "steps": [
            {"name": "camera", "model": "camera.onnx", "inputs": ["images"], "outputs": ["pyramid"], "repeat": n, "when": "cameras"},
            {"name": "depth_raster", "kernel": "depth_raster", "inputs": ["points", "point_count", "projections"], "outputs": ["depth_images"], "when": "lidar"},
            {"name": "lift", "model": "lift.onnx", "inputs": ["pyramid", "depth_images"], "outputs": ["depth", "features"], "when": "cameras"},
            {"name": "pool", "kernel": "bev_pool", "inputs": ["depth", "features", "cameras", "intrinsics", "camera_to_lidar"], "outputs": ["camera_bev"], "when": "cameras",
             "options": {"frustum": to_json(frustum), "grid": to_json(pool)}},
            {"name": "encoder", "kernel": "lidar_encoder", "weights": "encoder.npz", "inputs": ["points", "point_count"], "outputs": ["lidar_grid"], "when": "lidar",
             "options": {"grid": to_json(lidar.grid), "max_points": lidar.max_points, "max_voxels": lidar.max_voxels, "values": lidar.values, "encoder": to_json(lidar.encoder)}},
            {"name": "lidar", "model": "lidar.onnx", "inputs": ["lidar_grid"], "outputs": ["lidar_bev"], "when": "lidar"},
            {"name": "fusion", "model": "fusion.onnx", "inputs": inputs, "outputs": outputs},
        ],
        "pipeline": to_json(pipeline(config)),
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return folder

"""The network as parts that engines run, with kernels between them.

| step | takes | gives |
|---|---|---|
| `depth_raster` | points, calibration | `depth_images` [cam, 1, H, W], metres, 0 = none |
| **camera.onnx** | `images` [n, 3, H, W], `depth_images` (DepthLSS only) | `depth` [n, D, h, w], sums to 1; `features` [n, h, w, C] |
| `bev_pool` | `depth`, `features` of all cameras, table of the rig | `camera_bev` [1, C, rows, columns] |
| `voxelize`, `sparse_conv` | points, **lidar_encoder.npz** | `lidar_grid` [1, C * nz, rows, columns] |
| **lidar.onnx** (where there is a neck) | `lidar_grid` | `lidar_bev` [1, neck, rows, columns] |
| **fusion.onnx** | `camera_bev`, `lidar_bev`, `present` [1, 2]: cameras, LiDAR; 1 = there | `heat_<g>`, `box_<g>` (head.py), `segments` |

Without a neck `lidar_grid` is `lidar_bev`. A camera that is missing is told to `bev_pool` (`cameras=`), a branch that is missing gives
zeros and 0 in `present`. `segments.json` lists the same for machines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.kernels.bev_pool import BevPool, Table
from edgekit.kernels.sparse_conv import encoder
from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.head import output_names
from edgekit.models.bevfusion.inputs import Sample
from edgekit.models.bevfusion.lidar import weights
from edgekit.models.bevfusion.model import BEVFusion
from edgekit.models.exporting import write_onnx

CAMERA, LIDAR, FUSION, ENCODER, STEPS = (
    "camera.onnx", "lidar.onnx", "fusion.onnx", "lidar_encoder.npz", "segments.json"
)  # fmt: skip


class _Camera(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.net = model.camera

    def forward(self, images: Tensor, depth_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        depth, features = self.net(images, depth_images)
        return depth.softmax(1), features.permute(0, 2, 3, 1).contiguous()


class _Fusion(nn.Module):
    def __init__(self, model: BEVFusion) -> None:
        super().__init__()
        self.model, self.names = model, output_names(model.config)

    def forward(self, camera_bev: Tensor, lidar_bev: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        out = self.model.judge(camera_bev, lidar_bev, present)
        return tuple(out[name] for name in self.names)


def export_segments(
    model: BEVFusion, folder: Path, cameras: int | None = None, opset: int = 17
) -> dict[str, Any]:
    """Write the parts into `folder`; returns what `segments.json` says.

    cameras: pictures that the camera network takes at once, all by default; 1 to run each when it comes.
    """
    config, training = model.config, model.training
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    n = config.camera.count if cameras is None else cameras
    images = torch.zeros(n, 3, *config.camera.image)
    example: tuple[Tensor, ...] = (images,)
    names = ["images"]
    if config.camera.lidar_depth:
        example, names = (images, images[:, :1]), ["images", "depth_images"]
    write_onnx(_Camera(model), folder / CAMERA, example, names, ["depth", "features"], opset=opset)
    grid = torch.zeros(1, config.lidar.channels, *config.shape)
    steps: list[dict[str, Any]] = [
        {"kernel": "depth_raster", "inputs": ["points"], "outputs": ["depth_images"]},
        {"model": CAMERA, "inputs": names, "outputs": ["depth", "features"]},
        {"kernel": "bev_pool", "inputs": ["depth", "features"], "outputs": ["camera_bev"]},
        {"kernel": "voxelize", "inputs": ["points"], "outputs": ["voxels"]},
        {"kernel": "sparse_conv", "weights": ENCODER, "inputs": ["voxels"], "outputs": ["lidar_grid"]},
    ]
    joint = "lidar_grid"
    if config.lidar.neck:
        write_onnx(model.neck, folder / LIDAR, (grid,), ["lidar_grid"], ["lidar_bev"], opset=opset)
        steps.append({"model": LIDAR, "inputs": ["lidar_grid"], "outputs": ["lidar_bev"]})
        grid, joint = torch.zeros(1, config.lidar.neck, *config.shape), "lidar_bev"
    pooled = torch.zeros(1, config.camera.channels, *config.bev.pool.shape)
    inputs, outputs = ["camera_bev", joint, "present"], output_names(config)
    write_onnx(
        _Fusion(model), folder / FUSION, (pooled, grid, torch.ones(1, 2)), inputs, outputs, opset=opset
    )
    steps.append({"model": FUSION, "inputs": inputs, "outputs": outputs})
    with (folder / ENCODER).open("wb") as file:
        np.savez(file, allow_pickle=False, **weights(model.encoder))
    found = {"config": config.name, "cameras": n, "steps": steps if config.camera.lidar_depth else steps[1:]}
    (folder / STEPS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    model.train(training)
    return found


class Segments:
    """The exported parts under onnxruntime with the kernels between: what a device computes, for tests and evaluation.

    Raises: OSError for files that are not there.
    """

    def __init__(self, folder: Path, config: Config, threads: int = 1) -> None:
        import onnxruntime

        def session(name: str) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            return onnxruntime.InferenceSession(
                str(folder / name), options, providers=["CPUExecutionProvider"]
            )

        self.config, self.threads = config, threads
        self.camera, self.fusion = session(CAMERA), session(FUSION)
        self.neck = session(LIDAR) if config.lidar.neck else None
        with np.load(folder / ENCODER) as found:
            self.encoder = encoder.prepare(dict(found), config.lidar.encoder)
        self.names = output_names(config)

    def __call__(self, sample: Sample, lost: Sequence[int] = ()) -> dict[str, np.ndarray]:
        """Raw outputs by name, float32 with a batch of one.  lost: cameras to do without, too."""
        there = sample.cameras.copy()
        there[list(lost)] = False
        cameras = self.pooled(sample, sample.table, there)
        above = self.above(sample)
        present = np.array([[there.any(), sample.lidar]], np.float32)
        joint = "lidar_bev" if self.neck else "lidar_grid"
        found = self.fusion.run(self.names, {"camera_bev": cameras, joint: above, "present": present})
        return dict(zip(self.names, found, strict=True))

    def pooled(self, sample: Sample, table: Table, there: np.ndarray) -> np.ndarray:
        """`camera_bev`."""
        channels = self.config.camera.channels
        if not there.any():
            return np.zeros((1, channels, *table.grid), np.float32)
        n = self.camera.get_inputs()[0].shape[0]
        given = {"images": sample.images}
        if self.config.camera.lidar_depth:
            given["depth_images"] = (
                sample.depth_images if sample.lidar else np.zeros_like(sample.depth_images)
            )
        parts = [
            self.camera.run(["depth", "features"], {name: a[i : i + n] for name, a in given.items()})
            for i in range(0, len(there), n)
        ]
        depth, features = (np.concatenate(column) for column in zip(*parts, strict=True))
        return BevPool(table, channels).run(depth, features, cameras=there.tolist(), threads=self.threads)

    def above(self, sample: Sample) -> np.ndarray:
        """`lidar_bev`, or `lidar_grid` where there is no neck."""
        channels = self.config.lidar.neck or self.config.lidar.channels
        if not sample.lidar:
            return np.zeros((1, channels, *self.config.shape), np.float32)
        grid = encoder.encode(self.encoder, sample.coordinates, sample.values, threads=self.threads)
        if self.neck is None:
            return grid
        found: np.ndarray = self.neck.run(None, {"lidar_grid": grid})[0]
        return found

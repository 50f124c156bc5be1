"""A small bundle with kernels and a network that is run slice by slice, for the tests and the fuzzer.

Its network's payload is noise: kernels alone can be run. Needs numpy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.base import Executable, LoadOptions, Payload
from edgekit.bundle import Bundle, golden_bytes, golden_path, make_variant, write_bundle
from edgekit.errors import BundleError, EdgekitError
from edgekit.kernels import steps
from edgekit.kernels.bev_pool import BevGrid, Frustum
from edgekit.kernels.sparse_conv.encoder import EncoderSpec, Stage, random_weights
from edgekit.kernels.voxelize import VoxelGrid
from edgekit.manifest import Golden, GoldenTensor, KernelStep, Manifest, Segment, kernel_path
from edgekit.runtime.selftest import golden_values
from edgekit.runtime.variants import load_kernels
from edgekit.schema import to_json
from edgekit.spec import DType, TensorSpec

CAMERAS, POINTS = 2, 64
SHAPES: dict[str, tuple[int, ...]] = {
    "images": (CAMERAS, 3, 8, 16), "points": (POINTS, 5), "point_count": (1,), "projections": (CAMERAS, 3, 4),
    "depth": (CAMERAS, 4, 2, 4), "features": (CAMERAS, 2, 4, 3), "cameras": (CAMERAS,),
    "intrinsics": (CAMERAS, 3, 3), "camera_to_lidar": (CAMERAS, 4, 4), "lidar": (1,),
    "depth_images": (CAMERAS, 1, 8, 16), "camera_bev": (1, 3, 8, 8), "lidar_grid": (1, 4, 4, 4), "seen": (CAMERAS, 5),
}  # fmt: skip
OUTPUTS = ("depth_images", "camera_bev", "lidar_grid", "seen")


def sample() -> tuple[Manifest, dict[str, bytes]]:
    """A manifest (files still empty) and its files."""
    rng = np.random.default_rng(5)
    spec = EncoderSpec((5, 8, 8), 5, (Stage(4, 1, 4), Stage(4, 1)), outputs=4)
    names, weights = steps.pack(random_weights(spec))
    encoder = {
        "grid": to_json(VoxelGrid((-4.0, -4.0, -2.0), (4.0, 4.0, 2.0), (1.0, 1.0, 1.0))), "encoder": to_json(spec),
        "values": "raw", "max_points": 3, "max_voxels": 50, "weights": names,
    }  # fmt: skip
    pool = {
        "frustum": to_json(Frustum((8, 16), (2, 4), (1.0, 5.0, 1.0))),
        "grid": to_json(BevGrid((-4.0, 4.0, 1.0), (-4.0, 4.0, 1.0), (-2.0, 2.0))),
    }
    noise = Payload("onnxruntime", "float32", "onnx", rng.bytes(900), (), ())
    variant = make_variant("net", "fp32", noise)
    seen = ("points", "point_count")
    plan = (
        Segment("net", ("images",), ("seen",), (variant,), repeat=CAMERAS, when="cameras"),
        KernelStep("raster", "depth_raster", (*seen, "projections"), ("depth_images",), when="lidar"),
        KernelStep(
            "pool", "bev_pool", ("depth", "features", "cameras", "intrinsics", "camera_to_lidar"), ("camera_bev",), pool
        ),
        KernelStep(
            "encoder", "lidar_encoder", seen, ("lidar_grid",), encoder, when="lidar",
            files={"weights": kernel_path("encoder", "weights")},
        ),
    )  # fmt: skip
    tensors = {
        n: TensorSpec(n, DType.int32 if n == "point_count" else DType.float32, s) for n, s in SHAPES.items()
    }
    files = {variant.path: noise.data, kernel_path("encoder", "weights"): weights}
    values = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items() if n not in OUTPUTS}
    values["points"] *= 2
    values["point_count"] = np.array([POINTS - 4], np.int32)
    look = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], np.float32)  # a camera's axes, level
    values["camera_to_lidar"] = np.stack([np.eye(4, dtype=np.float32)] * CAMERAS)
    values["camera_to_lidar"][0, :3, :3] = look
    values["camera_to_lidar"][1, :3, :3] = look @ np.diag([-1, 1, -1]).astype(np.float32)
    values["intrinsics"] = np.stack([np.array([[8, 0, 8], [0, 8, 4], [0, 0, 1]], np.float32)] * CAMERAS)
    values["projections"] = np.stack([np.hstack([look.T * 4, np.ones((3, 1))]).astype(np.float32)] * CAMERAS)
    values["cameras"] = np.ones(CAMERAS, np.float32)
    for step in plan[1:]:
        executable = steps.load(step, tensors, lambda path: memoryview(files[path]), LoadOptions(1))
        values |= run(executable, values)
    values["seen"] = np.zeros(SHAPES["seen"], np.float32)
    golden: dict[str, list[GoldenTensor]] = {"input": [], "output": []}
    for name, value in values.items():
        side = "output" if name in OUTPUTS else "input"
        golden[side].append(GoldenTensor(name, golden_path(side, len(golden[side]))))
        files[golden[side][-1].path] = golden_bytes(value)
    return Manifest(
        schema_version=1, model="kernels", task="none", target="host", inputs=tuple(n for n in SHAPES if n not in OUTPUTS),
        outputs=OUTPUTS, tensors=tuple(tensors.values()), plan=plan, pipeline={}, payload_digest="",
        golden=Golden(tuple(golden["input"]), tuple(golden["output"])), files={}, provenance={"edgekit": "0.1.0"},
    ), files  # fmt: skip


def write_kernels(path: Path, **options: Any) -> Path:
    """`sample` as a bundle at `path`; options as for `write_bundle`."""
    manifest, files = sample()
    write_bundle(path, manifest, files, {"metric": {"AP": 0.5, "moments": 3}}, **options)
    return path


def run(executable: Executable, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What it makes of `values`, where it is to be found; of zeros else."""
    binding = executable.bind()
    for name, array in binding.inputs.items():
        array[...] = values.get(name, 0)
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def check_kernels(bundle: Bundle, cache: Path) -> None:
    """Load every kernel of a bundle and run it on the golden inputs.

    Raises: BundleError unless each gives the golden outputs to the bit.
    """
    manifest = bundle.manifest
    values = {golden.tensor: golden_values(bundle, golden) for golden in manifest.golden.inputs}
    wanted = {golden.tensor: golden_values(bundle, golden) for golden in manifest.golden.outputs}
    for name, executable in load_kernels(bundle, LoadOptions(1, cache_dir=cache)).items():
        try:
            found = run(executable, values)
        except EdgekitError as error:
            raise BundleError(str(error)) from None
        for tensor, value in found.items():
            if tensor in wanted and value.tobytes() != wanted[tensor].tobytes():
                raise BundleError(f"step {name}: {tensor} differs from its golden values")

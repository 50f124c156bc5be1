"""A small BEVFusion as a bundle whose plan has networks and kernels, put together by hand."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgekit.backends.base import Executable, LoadOptions, Payload, half
from edgekit.bundle import golden_bytes, golden_path, make_variant, write_bundle
from edgekit.kernels import steps
from edgekit.kernels.letterbox import letterbox
from edgekit.manifest import Golden, GoldenTensor, KernelStep, Manifest, Segment, kernel_path
from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.export import export_segments
from edgekit.models.bevfusion.head import output_names, pipeline
from edgekit.models.bevfusion.inputs import calibration, rule
from edgekit.models.bevfusion.lidar import weights
from edgekit.rig import RigFrame
from edgekit.runtime.session import Session
from edgekit.schema import to_json
from edgekit.spec import DType, TensorSpec
from edgekit.target import Target
from tests.bevfusion_nets import TINY, frame, network

POINTS = 6000
SEGMENTS = ("camera", "lift", "lidar", "fusion")
HOST = ("onnxruntime", "float32")


@functools.lru_cache(1)
def models() -> dict[str, bytes]:
    """ONNX of the segments of TINY by name."""
    with tempfile.TemporaryDirectory() as folder:
        export_segments(network(TINY), Path(folder))
        return {name: (Path(folder) / f"{name}.onnx").read_bytes() for name in SEGMENTS}


@functools.lru_cache(16)
def payload(segment: str, backend: str, precision: str) -> Payload:
    """A segment lowered for a library."""
    import onnx

    from edgekit.passes import prepare

    model = prepare(ir.from_proto(onnx.load_from_string(models()[segment])), task="fusion").model
    (made,) = half(backend, "lower").lower(model, Target.load("host"), precision)
    return made


def shapes(config: Config = TINY) -> dict[str, TensorSpec]:
    """Every tensor of the plan."""
    camera, (h, w) = config.camera, config.camera.frustum.features
    n, bins, seen = camera.count, camera.frustum.bins, config.lidar.channels
    found: dict[str, tuple[int, ...]] = {
        "images": (n, 3, *camera.image), "points": (POINTS, 5), "point_count": (1,), "projections": (n, 3, 4),
        "intrinsics": (n, 3, 3), "camera_to_lidar": (n, 4, 4), "cameras": (n,), "lidar": (1,), "present": (1, 2),
        "pyramid": (n, camera.fpn, h, w), "depth_images": (n, 1, *camera.image), "depth": (n, bins, h, w),
        "features": (n, h, w, camera.channels), "camera_bev": (1, camera.channels, *config.bev.pool.shape),
        "lidar_grid": (1, seen, *config.shape), "lidar_bev": (1, config.lidar.neck or seen, *config.shape),
    }  # fmt: skip
    with torch.no_grad():
        out = network(config).judge(
            torch.zeros(found["camera_bev"]), torch.zeros(found["lidar_bev"]), torch.ones(1, 2)
        )
    found |= {name: tuple(out[name].shape) for name in output_names(config)}
    kinds = {"point_count": DType.int32}
    return {name: TensorSpec(name, kinds.get(name, DType.float32), shape) for name, shape in found.items()}


INPUTS = (
    "images", "points", "point_count", "projections", "intrinsics", "camera_to_lidar", "cameras", "lidar", "present",
)  # fmt: skip


def kernel_steps(config: Config = TINY) -> tuple[tuple[KernelStep, KernelStep, KernelStep], bytes]:
    """depth_raster, pool and encoder, and the encoder's weights."""
    names, data = steps.pack(weights(network(config).encoder))
    options = {
        "grid": to_json(config.lidar.grid), "encoder": to_json(config.lidar.encoder), "values": config.lidar.values,
        "max_points": config.lidar.max_points, "max_voxels": config.lidar.max_voxels, "weights": names,
    }  # fmt: skip
    pool = {"frustum": to_json(config.camera.frustum), "grid": to_json(config.bev.pool)}
    seen = ("points", "point_count")
    return (
        KernelStep("depth_raster", "depth_raster", (*seen, "projections"), ("depth_images",), when="lidar"),
        KernelStep(
            "pool", "bev_pool", ("depth", "features", "cameras", "intrinsics", "camera_to_lidar"), ("camera_bev",), pool,
            when="cameras",
        ),
        KernelStep(
            "encoder", "lidar_encoder", seen, ("lidar_grid",), options, when="lidar",
            files={"weights": kernel_path("encoder", "weights")},
        ),
    ), data  # fmt: skip


def manifest(
    variants: Mapping[str, Sequence[tuple[str, str]]] = {}, config: Config = TINY
) -> tuple[Manifest, dict[str, bytes]]:
    """The plan and its files, without golden values. variants: (library, precision) of segments, ONNX Runtime by default."""
    (raster, pool, encoder), data = kernel_steps(config)
    files = {encoder.files["weights"]: data}
    made = {}
    for segment in SEGMENTS:
        found = []
        for backend, precision in variants.get(segment, (HOST,)):
            lowered = payload(segment, backend, precision)
            found.append(make_variant(segment, f"{backend}-{precision}", lowered))
            files[found[-1].path] = lowered.data
        made[segment] = tuple(found)
    outputs = tuple(output_names(config))
    plan = (
        Segment(
            "camera", ("images",), ("pyramid",), made["camera"], repeat=config.camera.count, when="cameras"
        ),
        raster,
        Segment("lift", ("pyramid", "depth_images"), ("depth", "features"), made["lift"], when="cameras"),
        pool,
        encoder,
        Segment("lidar", ("lidar_grid",), ("lidar_bev",), made["lidar"], when="lidar"),
        Segment("fusion", ("camera_bev", "lidar_bev", "present"), outputs, made["fusion"]),
    )
    return Manifest(
        schema_version=1, model="tiny", task="fusion", target="host", inputs=INPUTS, outputs=outputs,
        tensors=tuple(shapes(config).values()), plan=plan, pipeline=to_json(pipeline(config)), payload_digest="", golden=Golden((), ()),
        files={}, provenance={},
    ), files  # fmt: skip


def feed(moment: RigFrame, config: Config = TINY) -> dict[str, np.ndarray]:
    """The inputs of the plan for a moment; zeros for sensors that are missing."""
    spec, rig = shapes(config), moment.rig
    given = {name: np.zeros(spec[name].shape, spec[name].dtype.value) for name in INPUTS}
    told = calibration(rig, config)
    given["intrinsics"][...] = told.intrinsics
    given["camera_to_lidar"][...] = told.camera_to_lidar
    given["projections"][...] = told.projections(moment)
    for i, name in enumerate(rig.cameras):
        if name in moment.shots:
            letterbox(moment.shots[name].image, rule(config.camera), given["images"][i : i + 1])
            given["cameras"][i] = 1
    if moment.points is not None:
        n = min(len(moment.points), POINTS)
        given["points"][:n], given["point_count"][0], given["lidar"][0] = moment.points[:n], n, 1
    given["present"][0] = given["cameras"].any(), given["lidar"][0]
    return given


def put(session: Session, given: Mapping[str, np.ndarray]) -> None:
    for name, array in given.items():
        session.inputs[name][...] = array


def executables(made: Manifest, files: Mapping[str, bytes], threads: int = 1) -> dict[str, Executable]:
    """The first variant of each segment and the kernels, loaded."""
    tensors = {tensor.name: tensor for tensor in made.tensors}
    options = LoadOptions(threads)
    found: dict[str, Executable] = {}
    for step in made.plan:
        if isinstance(step, KernelStep):
            found[step.name] = steps.load(step, tensors, lambda path: memoryview(files[path]), options)
        else:
            variant = step.variants[0]
            found[step.name] = half(variant.backend, "engine").load(
                memoryview(files[variant.path]), variant, options
            )
    return found


def write(
    path: Path,
    variants: Mapping[str, Sequence[tuple[str, str]]] = {},
    *,
    tolerance: float = 1e-4,
    **options: Any,
) -> Path:
    """The bundle, with golden values that its first variants gave for a frame of all sensors."""
    made, files = manifest(variants)
    given = feed(frame())
    with Session(made, executables(made, files)) as session:
        put(session, given)
        session.run()
        outputs = {name: array.copy() for name, array in session.outputs.items()}
    golden = [
        [
            GoldenTensor(name, golden_path(side, i), *((tolerance, tolerance) if side == "output" else ()))
            for i, name in enumerate(values)
        ]
        for side, values in (("input", given), ("output", outputs))
    ]
    for tensor in (*golden[0], *golden[1]):
        files[tensor.path] = golden_bytes({**given, **outputs}[tensor.tensor])
    made = dataclasses.replace(made, golden=Golden(tuple(golden[0]), tuple(golden[1])))
    write_bundle(path, made, files, {}, **options)
    return path

"""What a build asks of the task `fusion` (see edgekit.toolchain.tasks.ToolchainTask). Its source is a plan folder, which
says itself what a graph does not tell (docs/fusion.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.sparse_conv import encoder
from edgekit.kernels.voxelize import VoxelGrid, encoder_values, voxelize
from edgekit.passes import Prepared
from edgekit.project import ModelEntry
from edgekit.rig import RigFrame
from edgekit.schema import from_json
from edgekit.tasks.fusion.calibration import within
from edgekit.tasks.fusion.spec import FusionSpec, QueryHead

SEGMENT = "fusion"
NO_LABELS = "no labelled moments were given (--data synthetic://street-rig?frames=200, an info file or a KITTI folder)"
CLIPS = False
DEFAULT_SOURCE = "synthetic://street-rig"


def prepare_options(entry: ModelEntry) -> dict[str, Any]:
    """Raises: UsageError, as one graph does not say what a plan is."""
    _no_plan(entry)


def make_spec(entry: ModelEntry, prepared: Prepared) -> tuple[FusionSpec, str, str]:
    """Raises: UsageError, as `prepare_options`."""
    _no_plan(entry)


def _no_plan(entry: ModelEntry) -> NoReturn:
    raise UsageError(
        f"model {entry.name}: {entry.source.name} is one network, but the task fusion takes a plan folder. "
        "Give the folder that holds plan.json (docs/fusion.md)"
    )


def head_facts(spec: FusionSpec) -> dict[str, Any]:
    if isinstance(spec.head, QueryHead):
        return {"family": "queries", "classes": len(spec.labels)}
    return {"family": "centers", "groups": len(spec.head.groups), "classes": len(spec.labels)}


def int8_encoder(
    options: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    moments: Iterable[RigFrame],
    reach: float = 0.0,
) -> dict[str, Any]:
    """Options of a `lidar_encoder` step that runs in INT8: `precision` and the `scales` of its layers, each the largest
    magnitude over the moments' sweeps / 127.

    options, weights: of the float32 step.  moments: those without a sweep do not count.  reach: `FusionSpec.reach`.
    Raises: UsageError without a sweep, or for weights that do not fit.
    """
    grid = from_json(VoxelGrid, options["grid"], "encoder grid")
    spec = from_json(encoder.EncoderSpec, options["encoder"], "encoder")
    ready = encoder.prepare(weights, spec)

    def clouds() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for moment in moments:
            if moment.points is not None:
                found = voxelize(
                    within(moment.points, reach), grid, max_points=options["max_points"],
                    max_voxels=options["max_voxels"],
                )  # fmt: skip
                yield found.coordinates, encoder_values(found, grid, options["values"], spec.inputs)

    scales = encoder.calibrate(ready, clouds())
    last = ready.layers[-1].name  # its result is float32
    return {
        **options,
        "precision": "int8",
        "scales": {name: scale for name, scale in scales.items() if name != last},
    }

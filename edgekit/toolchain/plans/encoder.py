"""A sparse encoder in INT8, where the plan asks for it: `"precision": "int8"` in the options of a `lidar_encoder` step.

Scales that the plan does not give are calibrated on the moments that networks are calibrated on. The encoder stays float32
where its rounding alone does more to the outputs of the plan than that of a network may (`quantize.MAX_ERROR`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit.kernels.steps import LidarEncoder, unpack
from edgekit.manifest import KernelStep
from edgekit.quant.sensitivity import output_error
from edgekit.rig import RigFrame
from edgekit.toolchain.plans import quantize
from edgekit.toolchain.plans.moments import Moments
from edgekit.toolchain.plans.running import PlanRunning, Workshop
from edgekit.toolchain.plans.source import PlanSource
from edgekit.toolchain.tasks.fusion import int8_encoder

CHECKED = 6
"""Moments on which outputs are compared."""
SWEEPS = 24
"""Moments that scales are calibrated on, evenly spread."""


def wanted(source: PlanSource) -> list[KernelStep]:
    """The encoders that are to be INT8."""
    return [
        step
        for step in source.kernels.values()
        if step.kernel == LidarEncoder.KERNEL and step.options.get("precision") == "int8"
    ]


def in_float(source: PlanSource) -> PlanSource:
    """The plan with all encoders in float32: what everything is held against."""
    kernels = dict(source.kernels)
    for step in wanted(source):
        options = {k: v for k, v in step.options.items() if k not in ("precision", "scales")}
        kernels[step.name] = dataclasses.replace(step, options=options)
    return dataclasses.replace(source, kernels=kernels)


def calibrated(source: PlanSource, moments: Callable[[], Moments]) -> PlanSource:
    """The plan with the scales of its INT8 encoders. moments: for those that it gives none for.

    Raises: CalibrationError, UsageError as `moments`; UsageError for weights that do not fit.
    """
    kernels = dict(source.kernels)
    for step in wanted(source):
        if not step.options.get("scales"):
            found = moments()
            weights = unpack(step.options["weights"], memoryview(source.files[step.files["weights"]]))
            sweeps = (found.read(i) for i in _spread(len(found), SWEEPS))
            reach = float(source.file.pipeline.get("reach", 0.0))
            options = int8_encoder(step.options, weights, sweeps, reach)
            kernels[step.name] = dataclasses.replace(step, options=options)
    return dataclasses.replace(source, kernels=kernels)


def judged(
    source: PlanSource, floats: PlanRunning, frames: Sequence[RigFrame]
) -> tuple[PlanSource, dict[str, dict[str, Any]]]:
    """The plan with those of its INT8 encoders that do little enough to its outputs, the others in float32; and by step
    what was found out.

    floats: the float plan at work.  frames: to compare on, of which `CHECKED` are taken.
    """
    plain, kernels, facts = in_float(source), dict(source.kernels), {}
    frames = [frames[i] for i in _spread(len(frames), CHECKED)]
    exact = [_outputs(floats, frame) for frame in frames]
    for step in wanted(source):
        shop = Workshop(dataclasses.replace(plain, kernels={**plain.kernels, step.name: step}))
        try:
            with shop.opened(floats.payloads) as running:
                got = [_outputs(running, frame) for frame in frames]
        finally:
            shop.close()
        error = float(np.mean([output_error(x, y) for x, y in zip(exact, got, strict=True)]))
        kept = error <= quantize.MAX_ERROR
        facts[step.name] = {
            "precision": "int8" if kept else "float32",
            "error": error,
            "moments": len(frames),
        }
        if not kept:
            kernels[step.name] = plain.kernels[step.name]
            facts[step.name]["why"] = (
                f"INT8 left out: error of the plan's outputs {error:.4f}, at most {quantize.MAX_ERROR}"
            )
    return dataclasses.replace(source, kernels=kernels), facts


def _spread(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _outputs(running: PlanRunning, moment: RigFrame) -> dict[str, np.ndarray]:
    running.pipeline(moment)
    return {name: array.copy() for name, array in running.session.outputs.items()}

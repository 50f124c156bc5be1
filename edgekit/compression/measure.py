"""How long networks take on this machine, built as a bundle would be: exported, prepared, quantized, lowered."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from edgekit.backends.base import Payload
from edgekit.errors import ModelError, UsageError
from edgekit.target import Target

ROUNDS, WARMUP = 15, 3
CALIBRATION = 4
"""Pictures: ranges decide no time."""


def read(model: nn.Module, write: Callable[[nn.Module, Path], None]) -> ir.Model:
    """The graph of `model` as a build prepares it: decoding is cut off where there is any."""
    from edgekit import frontends
    from edgekit.passes import prepare

    with tempfile.TemporaryDirectory(prefix="edgekit-prune-") as folder:
        path = Path(folder) / "model.onnx"
        write(model, path)
        loaded = frontends.load(path)
    try:
        return prepare(loaded, check=False).model
    except ModelError:  # not a detector that edgekit knows: the network as it is
        return prepare(loaded, task="", check=False).model


def payload(graph: ir.Model, target: Target, backend: str, precision: str, pictures: Tensor) -> Payload:
    """A prepared graph in a library's own form. pictures: [n, ...] as the network's one input takes them, for ranges.

    Raises: UsageError for pictures that do not fit; LoweringError for operators that the library lacks.
    """
    from edgekit.backends.base import half
    from edgekit.passes.graph import shape
    from edgekit.quant.calibrate import calibrate
    from edgekit.quant.placement import place
    from edgekit.quant.rules import rules_for

    if precision == "int8":
        (source,) = graph.graph.inputs
        feeds = [{str(source.name): p[None].numpy().astype(np.float32)} for p in pictures[:CALIBRATION]]
        if shape(source) != feeds[0][str(source.name)].shape:
            raise UsageError(
                f"measured int8: the exported network takes {shape(source)}, expected "
                f"{feeds[0][str(source.name)].shape} as training does. Measure float32, or prune by the estimate"
            )
        graph = place(graph, calibrate(graph, feeds), rules_for(backend, target))
    found: Payload = half(backend, "lower").lower(graph, target, precision)[0]
    return found


def times(payloads: Sequence[Payload], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of a run of each on this machine, one thread, one after the other in every round."""
    from edgekit.toolchain.running import run_here

    running = [run_here(each, threads=1) for each in payloads]
    try:
        taken: list[list[float]] = [[] for _ in running]
        for number in range(rounds + WARMUP):
            for one, list_ in zip(running, taken, strict=True):
                start = time.perf_counter()
                one.binding.run()
                if number >= WARMUP:
                    list_.append(time.perf_counter() - start)
    finally:
        for one in running:
            one.binding.close()
    return [statistics.median(t) for t in taken]

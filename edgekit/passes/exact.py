"""Graphs run by onnxruntime as they are written: what passes are checked, calibrated and simulated with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgekit.errors import EdgekitError, MissingExtraError, ModelError


def open_session(data: bytes, purpose: str, *, arena: bool = True) -> Any:
    """A session of the ONNX file `data` without graph optimisation, on one CPU thread: every result is wanted as it is,
    with the same bits whatever else is in the graph (sums split over threads round otherwise).

    arena: keep freed memory for the next run; of many sessions that are open together it would add up.
    Raises: MissingExtraError ("needed to <purpose>") without onnxruntime, and its own errors (`refused`).
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingExtraError("onnxruntime", "build", purpose) from None
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not arena:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@contextmanager
def refused(problem: str = "run it", hint: str = "Simplify the network") -> Iterator[None]:
    """What onnxruntime raises within, of which kind ever, as ModelError: it cannot <problem>."""
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime raises its own kinds, all mean the same here
        text = " ".join(str(error).split())[:240]
        raise ModelError(f"model: onnxruntime cannot {problem}: {text}. {hint}") from None

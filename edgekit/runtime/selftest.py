"""The load-time self-test: an engine that computes something else, or far too slowly, is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgekit.errors import SelfTestError
from edgekit.manifest import GoldenTensor

LATENCY_FACTOR = 10.0
"""Best run here over the recorded median on the same CPU: beyond it something is broken (no SIMD
kernels, a debug build, emulation), not merely busy."""
LATENCY_RUNS = 5


def check_golden(bundle: str, rule: GoldenTensor, golden: np.ndarray, got: np.ndarray) -> None:
    """Compare an output with its golden values under `rule` (see manifest.GoldenTensor).

    Raises: SelfTestError naming the tensor, the worst difference and the tolerance.
    """
    if not np.isfinite(got).all():
        bad = int((~np.isfinite(got)).sum())
        raise SelfTestError(
            f"bundle {bundle}: self-test output {rule.tensor}: {bad} of {got.size} values are NaN or infinite. "
            "Build the bundle again for this board, or run 'edgekit doctor'"
        )
    want = golden.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - want)
    outside = difference > rule.atol + rule.rtol * np.abs(want)
    if outside.sum() > rule.allow * outside.size:
        raise SelfTestError(
            f"bundle {bundle}: self-test output {rule.tensor}: {int(outside.sum())} of {outside.size} values "
            f"differ from the golden ones, worst by {difference.max():.4g}, expected at most "
            f"{rule.atol:.4g} + {rule.rtol:.3g} x value. Build the bundle again for this board"
        )


def check_latency(bundle: str, evidence: Mapping[str, Any], run: Callable[[], None]) -> None:
    """Compare with the latency in the evidence, if it was measured on this kind of CPU.

    Raises: SelfTestError when the best of a few runs is slower than LATENCY_FACTOR times the median.
    """
    timing = evidence.get("timing") or {}
    recorded = timing.get("stages", {}).get("engine", {}).get("median_ms")
    if not isinstance(recorded, (int, float)) or timing.get("machine", {}).get("cpu") != cpu_name():
        return
    best = float("inf")
    for _ in range(LATENCY_RUNS):
        start = time.perf_counter()
        run()
        best = min(best, 1e3 * (time.perf_counter() - start))
        if best <= LATENCY_FACTOR * recorded:
            return
    raise SelfTestError(
        f"bundle {bundle}: self-test latency: {best:.2f} ms at best, expected under {LATENCY_FACTOR:.0f} x the "
        f"recorded {recorded:.2f} ms on this CPU. Run 'edgekit doctor'"
    )


def cpu_name() -> str:
    """Model name of this CPU, from the kernel."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    names = {key.strip(): value.strip() for key, value in lines.items()}
    return names.get("model name") or names.get("CPU part") or platform.machine()

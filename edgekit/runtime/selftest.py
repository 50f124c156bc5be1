"""The load-time self-test: an engine that computes something else, or far too slowly, is refused."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import SelfTestError
from edgekit.host import usable_cores
from edgekit.manifest import GoldenTensor
from edgekit.runtime.session import Session
from edgekit.runtime.state import convert

LATENCY_FACTOR = 10.0
"""Best run here over the recorded median on the same CPU: beyond it something is broken (no SIMD
kernels, a debug build, emulation), not merely busy."""
LATENCY_RUNS = 5
LATENCY_SECONDS = 1.0
"""At least so many runs and so long, until one is fast enough: on a busy machine many are slow, hardly all."""


def self_test(bundle: Bundle, session: Session, variants: Sequence[str], threads: int) -> None:
    """Golden input -> golden output within tolerance, no NaN, and the recorded latency within a factor.

    States start at their golden values where the bundle has some, else at their initial ones; afterwards
    the session is at its initial state.
    variants: names of the payloads that `session` runs; threads: as given to `load`.
    Raises: SelfTestError with the reason; StreamError when the session fails.
    """
    manifest, where = bundle.manifest, str(bundle.path)
    held = {spec.name: spec for spec in session.state_specs}
    written = {state.output: state for state in manifest.states}
    set_golden(bundle, session)
    session.run()
    for tensor in manifest.golden.outputs:
        if tensor.tensor in session.outputs:
            got = session.outputs[tensor.tensor]
        else:
            state = written[tensor.tensor]
            got = convert(session.states[state.name], held[state.name], state)
        check_golden(where, tensor, golden_values(bundle, tensor), got)
    recorded = recorded_latency(bundle.evidence, variants, threads)
    if recorded is not None:
        check_latency(where, recorded, session.run)
    session.reset()


def set_golden(bundle: Bundle, session: Session) -> None:
    """The golden input into `session`; states that have golden values to these, the others to their initial ones."""
    manifest = bundle.manifest
    held = {spec.name: spec for spec in session.state_specs}
    read = {state.input: state for state in manifest.states}
    session.reset()
    states = session.snapshot()
    for tensor in manifest.golden.inputs:
        value = golden_values(bundle, tensor)
        if tensor.tensor in read:
            state = read[tensor.tensor]
            states[state.name] = convert(value, state, held[state.name])
        else:
            session.write(tensor.tensor, value)
    session.restore(states)


def golden_values(bundle: Bundle, tensor: GoldenTensor) -> np.ndarray:
    """The values that the bundle holds for `tensor`, read-only, where they lie in the mapped file."""
    spec = bundle.manifest.tensor(tensor.tensor)
    dtype = np.dtype(spec.dtype.value).newbyteorder("<")
    return np.frombuffer(bundle.read(tensor.path), dtype).reshape(spec.shape)


def check_golden(bundle: str, rule: GoldenTensor, golden: np.ndarray, got: np.ndarray) -> None:
    """Compare an output with its golden values under `rule` (see manifest.GoldenTensor).

    Raises: SelfTestError naming the tensor, the worst difference and the tolerance.
    """
    what = f"bundle {bundle}: self-test output {rule.tensor}"
    for name, values, remedy in (
        ("golden", golden, "Build the bundle again"),
        ("computed", got, "Build the bundle again for this board, or run 'edgekit doctor'"),
    ):
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise SelfTestError(f"{what}: {bad} of {values.size} {name} values are NaN or infinite. {remedy}")
    want = golden.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - want)
    outside = int((difference > rule.atol + rule.rtol * np.abs(want)).sum())
    if outside > rule.allow * difference.size:
        raise SelfTestError(
            f"{what}: {outside} of {difference.size} values differ from the golden ones, worst by "
            f"{difference.max():.4g}, expected at most {rule.atol:.4g} + {rule.rtol:.3g} x value"
            + (f" in all but {rule.allow:g} of them" if rule.allow else "")
            + ". Build the bundle again for this board"
        )


def recorded_latency(evidence: Mapping[str, Any], variants: Sequence[str], threads: int) -> float | None:
    """Median milliseconds of the engine in the evidence, if they were measured under the conditions of
    here: this kind of CPU, as many cores and threads, these payloads. Else None: nothing can be said.

    `evidence` may be anything that JSON can say.
    """

    def table(tree: Any, key: str) -> Any:
        found = tree.get(key) if isinstance(tree, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    timing = table(evidence, "timing")
    median = table(table(timing, "stages"), "engine").get("median_ms")
    if isinstance(median, bool) or not isinstance(median, (int, float)):
        return None
    if {**table(timing, "machine"), **conditions(threads)} != table(timing, "machine"):
        return None
    return float(median) if list(variants) == [timing.get("payload", *variants[:1])] else None


def check_latency(bundle: str, recorded_ms: float, run: Callable[[], None]) -> None:
    """Raises: SelfTestError when the best of a few runs is slower than LATENCY_FACTOR times `recorded_ms`."""
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < LATENCY_RUNS or time.perf_counter() - begin < LATENCY_SECONDS:
        start = time.perf_counter()
        run()
        runs += 1
        best = min(best, 1e3 * (time.perf_counter() - start))
        if best <= LATENCY_FACTOR * recorded_ms:
            return
    raise SelfTestError(
        f"bundle {bundle}: self-test latency: {best:.3g} ms at best of {runs} runs, expected under "
        f"{LATENCY_FACTOR:.0f} x the recorded {recorded_ms:.3g} ms on this CPU. Run 'edgekit doctor'"
    )


def conditions(threads: int) -> dict[str, Any]:
    """What has to be equal for two timings to be comparable. `threads` 0 = the library's choice."""
    return {"cpu": cpu_name(), "arch": platform.machine(), "cores": usable_cores(), "threads": threads}


def cpu_name() -> str:
    """Model name of this CPU, from the kernel; on ARM its part number."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    names = {key.strip(): value.strip() for key, value in lines.items()}
    return names.get("model name") or names.get("CPU part") or platform.machine()

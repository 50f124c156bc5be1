"""Parses and builds one payload with TensorRT: the only place where its releases differ.

`trt` is the module itself: `tensorrt` 10.x or 11 on a Jetson, `tensorrt_rtx` where there is no GPU (it
builds ahead of time for `compute_capability`, so this code runs for real without a board).
"""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgekit.backends.tensorrt.plan import BuildPlan
from edgekit.errors import EdgekitError, LoweringError

Progress = Callable[[float, str], None]
_POLL_S = 0.05
_LOG_LINES = 50


@dataclass
class Log:
    """Errors and warnings that TensorRT reported, the last `_LOG_LINES` of each."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, is_error: bool, text: str) -> None:
        lines = self.errors if is_error else self.warnings
        lines.append(" ".join(text.split()))
        del lines[:-_LOG_LINES]

    def last_error(self) -> str:
        """The last error; complaints about a missing driver count only if there are no others."""
        telling = [e for e in self.errors if "cudaError 35" not in e and "cudaError 100" not in e]
        lines = telling or self.errors
        return lines[-1][:400] if lines else "no reason given"


@dataclass(frozen=True)
class Compiled:
    """`engine`: what `Runtime.deserialize_cuda_engine` takes. `timing_cache`: serialized, None if unused."""

    engine: Any
    nbytes: int
    seconds: float
    timing_cache: bytes | None
    warnings: tuple[str, ...]


def logger(trt: Any, log: Log) -> Any:
    """An `ILogger` that writes into `log`; it must outlive every object made with it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                log.add(severity <= trt.ILogger.ERROR, message)

    return Logger()


def compile_engine(
    trt: Any,
    onnx: bytes,
    plan: BuildPlan,
    *,
    progress: Progress | None = None,
    timing_cache: bytes | None = None,
    compute_capability: str | None = None,
) -> Compiled:
    """The serialized engine of `onnx` by `plan`.

    `progress(done, text)` is called from this thread with done rising from 0 to 1. Ctrl-C, or any exception
    from `progress`, cancels the build and comes through. `timing_cache`: None = none, b"" = a new one; one
    that does not fit is dropped with a warning in the result. `compute_capability` ("8.6"): for another GPU
    than this machine's, `tensorrt_rtx` only.
    Raises: LoweringError, one line with all parser errors or the builder's last one; EdgekitError when
    memory runs out.
    """
    log = Log()
    # what a refused network left in reference cycles is freed here: inside the library's constructors it deadlocks
    gc.collect()
    # TensorRT keeps bare pointers to logger and monitor: both must live as long as the builder
    sink = logger(trt, log)
    started = time.monotonic()
    builder = _make(lambda: trt.Builder(sink), "builder", log)
    # TensorRT 11 knows only strong typing and ignores the flag
    network = _make(lambda: builder.create_network(_strongly_typed(trt)), "network", log)
    parser = _make(lambda: trt.OnnxParser(network, sink), "parser", log)
    _parse(parser, network, onnx, log)
    _check_io(network, plan)
    config = _make(builder.create_builder_config, "configuration", log)
    _configure(trt, config, plan, compute_capability)
    if timing_cache is not None:
        _attach_timing_cache(config, timing_cache, log)
    monitor = Monitor()
    config.progress_monitor = _monitor(trt, monitor)
    engine = _build(builder, network, config, monitor, progress, log)
    return Compiled(
        engine=engine,
        nbytes=engine.nbytes,
        seconds=time.monotonic() - started,
        timing_cache=None if timing_cache is None else bytes(config.get_timing_cache().serialize()),
        warnings=tuple(log.warnings),
    )


def _make(create: Callable[[], Any], what: str, log: Log) -> Any:
    try:
        made = create()
    except TypeError as error:  # the binding's way to say that the library returned a null pointer
        made, reason = None, str(error)
    else:
        reason = "the library returned nothing"
    if made is None:
        raise EdgekitError(f"TensorRT: no {what}: {log.last_error() if log.errors else reason}")
    return made


def _strongly_typed(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, network: Any, onnx: bytes, log: Log) -> None:
    parsed = parser.parse(onnx)
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if errors:
        shown = dict.fromkeys(_parser_error(e) for e in errors)
        raise LoweringError(f"TensorRT: refuses the network: {'; '.join(shown)}")
    if not parsed:
        raise LoweringError(f"TensorRT: refuses the network: {log.last_error()}")
    if network.num_outputs == 0:  # an empty file parses without an error
        raise LoweringError("TensorRT: refuses the network: it has no outputs")


def _parser_error(error: Any) -> str:
    op, node = error.node_operator(), error.node_name()
    text = " ".join(error.desc().split())[:300]
    place = " ".join(part for part in (op, repr(node) if node else "") if part)
    return f"{place}: {text}" if place else text


def _check_io(network: Any, plan: BuildPlan) -> None:
    for ours, count, get in (
        (plan.inputs, network.num_inputs, network.get_input),
        (plan.outputs, network.num_outputs, network.get_output),
    ):
        want = {(io.name, tuple(io.shape)) for io in ours}
        have = {(t.name, tuple(t.shape)) for t in (get(i) for i in range(count))}
        if want != have:
            raise LoweringError(
                f"TensorRT: network has tensors {sorted(have)}, expected {sorted(want)} of its plan"
            )


def _configure(trt: Any, config: Any, plan: BuildPlan, compute_capability: str | None) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    config.builder_optimization_level = plan.optimization_level
    for flag, wanted in (("TF32", plan.tf32), ("SPARSE_WEIGHTS", plan.sparse_weights)):
        value = getattr(trt.BuilderFlag, flag)
        (config.set_flag if wanted else config.clear_flag)(value)
    if compute_capability is None:
        return
    name = "SM" + compute_capability.replace(".", "")
    known = getattr(trt, "ComputeCapability", None)
    if known is None or not hasattr(known, name):
        raise LoweringError(
            f"{trt.__name__} {trt.__version__}: cannot build for compute capability {compute_capability} "
            "without that GPU"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(known, name), 0):
        raise LoweringError(
            f"{trt.__name__} {trt.__version__}: refuses compute capability {compute_capability}"
        )


def _attach_timing_cache(config: Any, data: bytes, log: Log) -> None:
    cache = config.create_timing_cache(data)
    # strict: a cache of another GPU or release would time the wrong kernels
    if cache is None or not config.set_timing_cache(cache, False):
        log.add(False, "timing cache of another GPU or TensorRT: not used")
        config.set_timing_cache(config.create_timing_cache(b""), False)


@dataclass
class _Phase:
    parent: _Phase | None
    steps: int
    done: int = 0
    ended: float = 0.0
    """Share of the current step that ended sub-phases took."""
    child: _Phase | None = None

    share: float = 0.7
    """Part of what is left of a step that its next sub-phase is taken to fill; their number is not known."""

    def fraction(self) -> float:
        inner = 0.0 if self.child is None else (1 - self.ended) * self.share * self.child.fraction()
        return min(1.0, (self.done + min(0.99, self.ended + inner)) / self.steps)


class Monitor:
    """Turns TensorRT's nested phases into one rising number; thread-safe, no TensorRT types."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root = _Phase(None, 1, share=0.98)
        self._open: dict[str, _Phase] = {}
        self._best = 0.0
        self._text = "compiling"
        self.cancelled = False

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            above = self._open.get(parent or "", self._root)
            above.child = self._open[name] = _Phase(above, max(1, steps))
            self._text = name

    def step(self, name: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done, phase.ended, phase.child = min(step + 1, phase.steps), 0.0, None
        return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is not None and phase.parent is not None:
                phase.parent.ended += (1 - phase.parent.ended) * phase.parent.share
                phase.parent.child = None

    def read(self) -> tuple[float, str]:
        """(done in 0..1, name of the newest phase); done never falls."""
        with self._lock:
            self._best = max(self._best, min(0.99, self._root.fraction()))
            return self._best, self._text


def _monitor(trt: Any, monitor: Monitor) -> Any:
    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return monitor.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            monitor.finish(phase_name)

    return ProgressMonitor()


def _build(
    builder: Any, network: Any, config: Any, monitor: Monitor, progress: Progress | None, log: Log
) -> Any:
    """Builds in a second thread, so that Ctrl-C reaches this one and no Python exception is ever raised
    inside TensorRT's callbacks, which must not throw."""
    result: list[Any] = []
    failure: list[Exception] = []
    # not Thread.join: interrupted by Ctrl-C, it takes a running thread for ended (CPython issue 90882)
    finished = threading.Event()

    def work() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except Exception as error:  # noqa: BLE001 - handed to the calling thread below
            failure.append(error)
        finally:
            finished.set()

    if progress:
        progress(0.0, "compiling")
    threading.Thread(target=work, name="edgekit-tensorrt-build", daemon=True).start()
    try:
        while not finished.wait(_POLL_S):
            if progress:
                progress(*monitor.read())
    except BaseException:  # Ctrl-C or the callback's own error: stop the build, then let it through
        monitor.cancelled = True
        while not finished.is_set():  # leaving while TensorRT still works would crash the process
            with contextlib.suppress(KeyboardInterrupt):
                finished.wait()
        raise
    if failure:
        raise EdgekitError(f"TensorRT: build failed: {failure[0]}") from failure[0]
    if not result or result[0] is None:
        reason = log.last_error()
        if re.search(r"out\s*of\s*memory|insufficient memory", reason, re.IGNORECASE):
            raise EdgekitError(f"TensorRT: ran out of memory while building: {reason}. Close other programs")
        raise LoweringError(f"TensorRT: cannot build the network: {reason}")
    if progress:
        progress(1.0, "compiled")
    return result[0]

"""Device half: compiles a payload on its Jetson once, then runs it.

Imports the standard library and numpy; `tensorrt` comes with JetPack, CUDA through `cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import warnings
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from edgekit.backends.base import LoadOptions, Ports
from edgekit.backends.tensorrt import cuda
from edgekit.backends.tensorrt.cache import Cache, default_dir, key
from edgekit.backends.tensorrt.compile import Log, compile_engine, logger
from edgekit.backends.tensorrt.plan import BuildPlan, parse_version
from edgekit.errors import BundleError, EdgekitError, MissingExtraError, StreamError
from edgekit.manifest import Variant
from edgekit.schema import to_json
from edgekit.spec import DType, TensorSpec

JETSON_HINT = (
    "It comes with JetPack: sudo apt install tensorrt python3-libnvinfer. A virtual environment sees it "
    "only if made with: python3 -m venv --system-site-packages"
)


def load(data: bytes | memoryview, variant: Variant, options: LoadOptions) -> TensorRtExecutable:
    """Compiles the ONNX payload `data` by its plan, or takes the engine from the cache, and loads it.

    The first load on a board takes minutes; `options.progress` hears of it and Ctrl-C stops it. Engines
    are kept in `options.cache_dir` (default: `$EDGEKIT_CACHE`, else `~/.cache/edgekit`) by payload, plan,
    TensorRT release and GPU.
    Raises: MissingExtraError without tensorrt or a CUDA binding; BundleError when the board's TensorRT is
    too old or the plan unknown; LoweringError when TensorRT refuses the network; StreamError on CUDA errors.
    """
    plan = BuildPlan.from_options(variant.options)
    trt = _import_tensorrt()
    version = str(trt.__version__)
    if parse_version(version) < parse_version(plan.min_tensorrt):
        raise BundleError(
            f"bundle variant {variant.name}: needs TensorRT {plan.min_tensorrt} or newer, got {version}. "
            "Update JetPack (6.1 or newer)"
        )
    api = cuda.open_api()
    api.activate()
    device = api.device()
    gpu = (device.name, device.compute_capability, device.sms)
    cache = Cache((options.cache_dir or default_dir()) / "tensorrt")
    digest = options.cache_key or hashlib.sha256(data).hexdigest()
    plan_text = json.dumps(to_json(plan), sort_keys=True)
    name = f"{key(digest, plan_text, version, *gpu)}.engine"

    log = Log()
    sink = logger(trt, log)
    runtime = trt.Runtime(sink)
    if runtime is None:
        raise EdgekitError(f"TensorRT: no runtime: {log.last_error()}")
    facts: dict[str, Any] = {"engine": "cache"}
    kept = cache.read(name)
    engine = None if kept is None else runtime.deserialize_cuda_engine(kept)
    if kept is not None and engine is None:
        message = f"cache {name}: TensorRT refuses it ({log.last_error()}); compiling again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        cache.drop(name)
    if engine is None:
        blob, facts = _compile(trt, bytes(data), plan, version, gpu, cache, options)
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise EdgekitError(f"TensorRT: cannot load the engine that it just built: {log.last_error()}")
        cache.write(name, blob)
    executable = TensorRtExecutable(
        api,
        runtime,
        engine,
        plan,
        Ports.of(variant),
        log,
        sink,
        {
            "library": "tensorrt",
            "version": version,
            "gpu": device.name,
            "compute_capability": device.compute_capability,
            "sms": device.sms,
            "cuda": api.name,
            **facts,
        },
    )
    if options.progress:
        options.progress(1.0, "engine ready")
    return executable


def _import_tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: a library beneath it is missing
        reason = "" if isinstance(error, ModuleNotFoundError) else f"Importing it failed: {error}. "
        hint = reason + JETSON_HINT
        raise MissingExtraError("tensorrt", "tensorrt", "run this bundle", hint=hint) from None
    return tensorrt


def _compile(
    trt: Any,
    data: bytes,
    plan: BuildPlan,
    version: str,
    gpu: tuple[object, ...],
    cache: Cache,
    options: LoadOptions,
) -> tuple[bytes, dict[str, Any]]:
    timings = f"{key(version, *gpu)}.timing"
    report = options.progress
    compiled = compile_engine(
        trt,
        data,
        plan,
        # the last hundredth is for loading the engine
        progress=None if report is None else lambda done, text: report(done * 0.99, text),
        timing_cache=(cache.read(timings) or b"") if plan.timing_cache == "per-gpu" else None,
    )
    for text in compiled.warnings:
        if "timing cache" in text.lower():
            warnings.warn(f"TensorRT: {text}", RuntimeWarning, stacklevel=3)
    if compiled.timing_cache:
        cache.write(timings, compiled.timing_cache)
    return bytes(compiled.engine), {"engine": "built", "build_s": round(compiled.seconds, 3)}


class TensorRtExecutable:
    """A loaded engine, shared by sessions; each `bind` has its own context, stream and buffers."""

    def __init__(
        self,
        api: cuda.CudaApi,
        runtime: Any,
        engine: Any,
        plan: BuildPlan,
        ports: Ports,
        log: Log,
        sink: Any,
        facts: dict[str, Any],
    ) -> None:
        self._api = api
        self._runtime = runtime
        self._engine = engine
        self._log = log
        self._sink = sink  # TensorRT holds a bare pointer to it
        self._facts = facts
        self._bindings: list[TensorRtBinding] = []
        self._cuda_graph = "not run yet"
        self.inputs, self.outputs = (
            tuple(ports.shown(TensorSpec(io.name, DType(io.dtype), io.shape)) for io in side)
            for side in (plan.inputs, plan.outputs)
        )
        self._check(engine)

    def _check(self, engine: Any) -> None:
        """The engine's tensors are those of the plan. TensorRT names types FLOAT, HALF, INT32, ..."""
        have = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            dtype = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}.get(
                engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name.lower()
            )
            have[name] = (engine.get_tensor_mode(name).name, dtype, tuple(engine.get_tensor_shape(name)))
        want = {t.name: ("INPUT", t.dtype.value, t.shape) for t in self.inputs}
        want |= {t.name: ("OUTPUT", t.dtype.value, t.shape) for t in self.outputs}
        if have != want:
            raise BundleError(f"TensorRT: engine has tensors {have}, expected {want} of the bundle's plan")

    def bind(self) -> TensorRtBinding:
        """Buffers and context for one session. Raises: StreamError when memory runs out."""
        return self._bind({})

    def bind_turns(self, states: Mapping[str, str]) -> tuple[TensorRtTurn, TensorRtTurn]:
        """As `bind`, for a session whose states (input -> output) stay on the device: see backends.base.Turning."""
        binding = self._bind(states)
        return TensorRtTurn(binding, 0), TensorRtTurn(binding, 1)

    def _bind(self, states: Mapping[str, str]) -> TensorRtBinding:
        if self._engine is None:
            raise StreamError("TensorRT: the engine is closed")
        binding = TensorRtBinding(self, states)
        self._bindings.append(binding)
        return binding

    def close(self) -> None:
        """Closes every binding, then the engine. Closing twice is fine."""
        for binding in list(self._bindings):
            binding.close()
        # TensorRT wants them gone in this order
        self._engine = None
        self._runtime = None

    def describe(self) -> dict[str, Any]:
        """Library, GPU, where the engine came from and whether the last binding runs as a CUDA graph."""
        return {**self._facts, "cuda_graph": self._cuda_graph}


class TensorRtBinding:
    """Pinned host arrays, device buffers, one stream. The first `run` enqueues, the second records a CUDA
    graph, later ones launch it; without a graph each `run` enqueues.

    States (input -> output) stay on the device: their two buffers swap roles in runs of turn 1, for which
    there is a graph of its own, as a graph holds addresses."""

    def __init__(
        self, executable: TensorRtExecutable, states: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._executable: TensorRtExecutable | None = executable
        self._api = executable._api
        self._api.activate()
        self._states = dict(states)
        self._graphs: list[Any] = [None, None]  # by turn
        self._graph_tried = [False, False]
        self._runs = [0, 0]
        self._turn = 0  # the one that the context has the addresses of
        self._hosts: dict[str, tuple[int, int]] = {}
        self._stream: int | None = None
        self._device: list[int] = []
        self._context: Any = None
        self._addresses: dict[str, int] = {}
        self._uploads: list[tuple[int, int, int]] = []
        self._downloads: list[tuple[int, int, int]] = []
        inputs: dict[str, np.ndarray] = {}
        outputs: dict[str, np.ndarray] = {}
        try:
            self._stream = self._api.create_stream()
            self._context = executable._engine.create_execution_context()
            if self._context is None:
                raise StreamError(f"TensorRT: no execution context: {executable._log.last_error()}")
            for spec in executable.inputs:
                inputs[spec.name] = self._tensor(spec, self._uploads, spec.name not in states)
            for spec in executable.outputs:
                outputs[spec.name] = self._tensor(spec, self._downloads, spec.name not in states.values())
        except BaseException:
            self.close()
            raise
        self.inputs = MappingProxyType(inputs)
        self.outputs = MappingProxyType(outputs)

    def _tensor(self, spec: TensorSpec, copies: list[tuple[int, int, int]], copied: bool) -> np.ndarray:
        """Allocates both sides of a tensor; returns the host side. copied: with every run."""
        host, array = _pinned(self._api, spec)
        device = self._api.alloc(spec.nbytes)
        self._device.append(device)
        self._addresses[spec.name] = device
        self._hosts[spec.name] = host, spec.nbytes
        if copied:
            copies.append((host, device, spec.nbytes))
        self._place(spec.name, device)
        return array

    def _place(self, name: str, device: int) -> None:
        if not self._context.set_tensor_address(name, device):
            assert self._executable is not None
            raise StreamError(f"TensorRT: tensor {name!r} refused: {self._executable._log.last_error()}")

    def take_input(self, name: str) -> tuple[int, int]:
        """(device address, stream) of an input that the caller fills there from now on, by work on that stream.

        It is no longer copied from `inputs[name]`. `kernels.letterbox.cuda.CudaLetterbox.launch` writes to it.
        Raises: StreamError when closed.
        """
        if self._executable is None or self._stream is None:
            raise StreamError("TensorRT: the session is closed")
        address = self._addresses[name]
        self._uploads = [copy for copy in self._uploads if copy[1] != address]
        for turn, graph in enumerate(self._graphs):
            if graph is not None:  # it holds the copy: recorded anew by the next run
                self._api.activate()
                self._api.destroy_graph(graph)
                self._graphs[turn] = None
        self._graph_tried, self._runs = [False, False], [min(runs, 1) for runs in self._runs]
        return address, self._stream

    def move_states(self, turn: int, up: bool) -> None:
        """Copy what the next run, of this turn, reads as states: up to the device, else down to the host.

        Raises: StreamError on CUDA errors and when closed.
        """
        if self._executable is None or self._stream is None:
            raise StreamError("TensorRT: the session is closed")
        self._api.activate()
        for pair in self._states.items():
            name = pair[turn]
            host, nbytes = self._hosts[name]
            if up:
                self._api.to_device(self._addresses[name], host, nbytes, self._stream)
            else:
                self._api.to_host(host, self._addresses[name], nbytes, self._stream)
        self._api.synchronize(self._stream)

    def run(self) -> None:
        """Inputs to device, network, outputs to host; returns when the outputs are there.

        Raises: StreamError on CUDA or TensorRT errors and when closed.
        """
        self.run_turn(0)

    def run_turn(self, turn: int) -> None:
        """As `run`; in turn 1 states are read from the buffers that turn 0 writes, and the other way round."""
        if self._executable is None or self._stream is None:
            raise StreamError("TensorRT: the session is closed")
        self._api.activate()
        if self._states and turn != self._turn and self._graphs[turn] is None:
            for names in self._states.items():
                self._place(names[0], self._addresses[names[turn]])
                self._place(names[1], self._addresses[names[1 - turn]])
            self._turn = turn
        # recorded on the second run: the first lets TensorRT do what it does once, which cannot be recorded
        if self._runs[turn] == 1 and not self._graph_tried[turn]:
            self._record(turn)
        if self._graphs[turn] is not None:
            self._api.launch(self._graphs[turn], self._stream)
        else:
            self._enqueue()
        self._api.synchronize(self._stream)
        self._runs[turn] += 1

    def _enqueue(self) -> None:
        assert self._stream is not None
        for host, device, nbytes in self._uploads:
            self._api.to_device(device, host, nbytes, self._stream)
        if not self._context.execute_async_v3(self._stream):
            assert self._executable is not None
            raise StreamError(f"TensorRT: execution failed: {self._executable._log.last_error()}")
        for host, device, nbytes in self._downloads:
            self._api.to_host(host, device, nbytes, self._stream)

    def _record(self, turn: int) -> None:
        """Records the CUDA graph; when that fails the session goes on without, and `describe` says why."""
        assert self._stream is not None
        assert self._executable is not None
        self._graph_tried[turn] = True
        try:
            self._api.begin_capture(self._stream)
        except StreamError as error:
            self._executable._cuda_graph = f"off: {error}"
            return
        reason = ""  # as text: a kept exception would keep the frames of its traceback alive
        try:
            self._enqueue()
        except StreamError as error:
            reason = str(error)
        try:
            self._graphs[turn] = self._api.end_capture(self._stream)
        except StreamError as error:
            reason = reason or str(error)
        if reason and self._graphs[turn] is not None:
            self._api.destroy_graph(self._graphs[turn])
            self._graphs[turn] = None
        self._executable._cuda_graph = f"off: {reason}" if reason else "on"

    def close(self) -> None:
        """Frees everything; arrays still held by the caller keep their host memory until they go."""
        executable, self._executable = self._executable, None
        if executable is None:
            return
        # after a CUDA error every call fails, also these; what is left goes with the process
        free = contextlib.suppress(StreamError)
        with free:
            self._api.activate()
        if self._stream is not None:
            with free:
                self._api.synchronize(self._stream)
        for graph in self._graphs:
            if graph is not None:
                with free:
                    self._api.destroy_graph(graph)
        self._graphs, self._context = [None, None], None
        for pointer in self._device:
            with free:
                self._api.free(pointer)
        self._device = []
        if self._stream is not None:
            with free:
                self._api.destroy_stream(self._stream)
            self._stream = None
        self.inputs = self.outputs = MappingProxyType({})
        if self in executable._bindings:
            executable._bindings.remove(self)


class TensorRtTurn:
    """Every other run of a binding whose states stay on the device. Of these, `inputs` are a copy on the host,
    which `pull` and `push` bring up to date."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(self, binding: TensorRtBinding, turn: int) -> None:
        self._binding = binding
        self._turn = turn
        inputs, outputs = dict(binding.inputs), dict(binding.outputs)
        if turn:
            for source, target in binding._states.items():
                inputs[source], outputs[target] = outputs[target], inputs[source]
        self.inputs, self.outputs = MappingProxyType(inputs), MappingProxyType(outputs)

    def run(self) -> None:
        """As TensorRtBinding.run."""
        self._binding.run_turn(self._turn)

    def pull(self) -> None:
        """States as this run reads them, from the device to `inputs`. Raises: StreamError."""
        self._binding.move_states(self._turn, up=False)

    def push(self) -> None:
        """States from `inputs` to the device. Raises: StreamError."""
        self._binding.move_states(self._turn, up=True)

    def take_input(self, name: str) -> tuple[int, int]:
        """As TensorRtBinding.take_input, for both turns."""
        return self._binding.take_input(name)

    def close(self) -> None:
        """Closes the binding, and with it the other turn."""
        self._binding.close()


def _pinned(api: cuda.CudaApi, spec: TensorSpec) -> tuple[int, np.ndarray]:
    """(address, array) of page-locked memory that is freed when the last view of it goes."""
    pointer = api.alloc_host(spec.nbytes)
    memory = (ctypes.c_uint8 * spec.nbytes).from_address(pointer)
    # every numpy view holds `memory`, so none can outlive the allocation; at exit the driver frees it itself
    weakref.finalize(memory, api.free_host, pointer).atexit = False
    dtype = np.dtype(spec.dtype.value)
    array: np.ndarray = np.frombuffer(memoryview(memory), dtype).reshape(spec.shape)
    array[...] = 0
    return pointer, array

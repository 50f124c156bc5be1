"""The device half of the tensorrt backend against a fake board that enforces CUDA's and TensorRT's rules."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.backends.base import LoadOptions
from edgekit.backends.tensorrt import cuda, engine
from edgekit.backends.tensorrt.compile import Log, Monitor
from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, Io
from edgekit.errors import (
    BundleError,
    EdgekitError,
    LoweringError,
    MissingExtraError,
    StreamError,
    UsageError,
)
from edgekit.manifest import Variant
from tests import fake_tensorrt as fake
from tests.helpers import ROOT

SHAPE = (1, 3, 4, 4)
PLAN = BuildPlan(
    inputs=(Io("x", "float32", SHAPE),),
    outputs=(Io("y", "float32", SHAPE),),
    workspace_bytes=1 << 30,
    hardware=Hardware("Fake Orin", "8.7"),
)
DATA = fake.network([("x", SHAPE)], [("y", SHAPE)])


def variant(plan: BuildPlan = PLAN) -> Variant:
    return Variant(
        "v", "tensorrt", "float16", "onnx", "payloads/v.onnx", len(DATA), "sha256:0", plan.to_options()
    )


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine that must be empty again at the end of the test."""
    machine = fake.Machine()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_tensorrt(machine))
    monkeypatch.setattr(cuda, "open_api", lambda: fake.FakeCuda(machine))
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    yield machine
    machine.fail.clear()
    assert machine.idle(), f"left behind: {machine.leaks()}"


def load(progress=None, plan: BuildPlan = PLAN, data: bytes = DATA, **options):
    return engine.load(data, variant(plan), LoadOptions(progress=progress, **options))


def run_once(executable, value: float) -> float:
    binding = executable.bind()
    binding.inputs["x"][:] = value
    binding.run()
    result = float(binding.outputs["y"].mean())
    binding.close()
    return result


def test_first_run_enqueues_second_records_later_ones_launch(board) -> None:
    executable = load()
    binding = executable.bind()
    for i in range(5):
        binding.inputs["x"][:] = i
        binding.run()
        np.testing.assert_array_equal(binding.outputs["y"], np.full(SHAPE, 2 * i + 1, np.float32))
    assert board.executions == 5
    assert board.launches == 4
    assert executable.describe()["cuda_graph"] == "on"
    executable.close()


def test_run_allocates_nothing(board) -> None:
    executable = load()
    binding = executable.bind()
    binding.run()
    binding.run()
    board.calls.clear()
    binding.run()
    assert board.calls == ["launch", "synchronize"]
    executable.close()


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_an_input_that_the_caller_fills_on_the_device(board, runs: int) -> None:
    """After any number of runs: the host array no longer counts, and graphs go on, without its copy."""
    executable = load()
    binding = executable.bind()
    for _ in range(runs):
        binding.run()
    address, stream = binding.take_input("x")
    assert stream in board.streams
    binding.inputs["x"][:] = 100
    for i in range(4):
        board.device_range(address, 192).view(np.float32)[:] = i
        board.calls.clear()
        binding.run()
        assert (binding.outputs["y"] == 2 * i + 1).all()
        assert "to_device" not in board.calls
    assert board.calls == ["launch", "synchronize"]
    executable.close()
    with pytest.raises(StreamError, match="closed"):
        binding.take_input("x")


def test_without_a_graph_it_still_runs_and_says_why(board) -> None:
    board.sync_inside_execute = True
    executable = load()
    binding = executable.bind()
    for i in range(4):
        binding.inputs["x"][:] = i
        binding.run()
        assert binding.outputs["y"].mean() == 2 * i + 1
    assert board.launches == 0
    assert "off: " in executable.describe()["cuda_graph"]
    assert "capturing" in executable.describe()["cuda_graph"]
    assert board.calls.count("begin_capture") == 1
    executable.close()


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
def test_a_binding_without_graphs_runs(board, call: str) -> None:
    board.fail = {call}
    executable = load()
    assert [run_once(executable, v) for v in (1.0, 2.0)] == [3.0, 5.0]
    binding = executable.bind()
    for i in range(3):
        binding.inputs["x"][:] = i
        binding.run()
        assert binding.outputs["y"].mean() == 2 * i + 1
    assert executable.describe()["cuda_graph"].startswith("off: ")
    executable.close()


def test_sessions_have_their_own_buffers(board) -> None:
    executable = load()
    a, b = executable.bind(), executable.bind()
    a.inputs["x"][:], b.inputs["x"][:] = 1, 10
    for _ in range(3):
        a.run()
        b.run()
    assert (a.outputs["y"].mean(), b.outputs["y"].mean()) == (3, 21)
    a.close()
    b.run()
    assert b.outputs["y"].mean() == 21
    executable.close()


def test_sessions_run_in_their_own_threads(board) -> None:
    executable = load()
    results: dict[int, float] = {}

    def work(i: int) -> None:
        # recording is per thread in CUDA but per machine in the fake, so threads take turns
        with lock:
            results[i] = run_once(executable, float(i))

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: 2.0 * i + 1 for i in range(4)}
    executable.close()


def test_closing_twice_and_running_closed(board) -> None:
    executable = load()
    binding = executable.bind()
    binding.close()
    binding.close()
    with pytest.raises(StreamError, match="session is closed"):
        binding.run()
    executable.close()
    executable.close()
    with pytest.raises(StreamError, match="engine is closed"):
        executable.bind()


def test_arrays_outlive_their_session(board) -> None:
    executable = load()
    binding = executable.bind()
    binding.inputs["x"][:] = 4
    binding.run()
    kept = binding.outputs["y"][0, 1]
    executable.close()
    del binding, executable
    gc.collect()
    assert kept.mean() == 9  # else this reads freed memory
    assert len(board.host_memory) == 1
    del kept
    assert not board.host_memory


def test_progress_rises_from_0_to_1(board) -> None:
    seen: list[tuple[float, str]] = []
    load(lambda done, text: seen.append((done, text))).close()
    values = [done for done, _ in seen]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == 1
    seen.clear()
    load(lambda done, text: seen.append((done, text))).close()
    assert seen == [(1.0, "engine ready")]


def test_the_plan_reaches_the_builder(board) -> None:
    load(plan=replace(PLAN, tf32=True, workspace_bytes=123 << 20, optimization_level=4)).close()
    expected = {
        "limits": {"WORKSPACE": 123 << 20},
        "flags": ["TF32"],
        "level": 4,
        "timing": fake.TIMING_MAGIC,
    }
    assert board.last_plan == expected
    load(plan=replace(PLAN, timing_cache="off")).close()
    assert (board.last_plan["flags"], board.last_plan["timing"]) == ([], None)


# --- caches ---


def test_second_load_takes_the_engine_from_the_cache(board) -> None:
    first, second = load(), load()
    assert board.builds == 1
    assert first.describe()["engine"] == "built"
    assert second.describe()["engine"] == "cache"
    assert run_once(second, 3.0) == 7.0
    first.close()
    second.close()


def test_engines_are_kept_per_payload_plan_gpu_and_release(board) -> None:
    load().close()
    load(data=DATA + b" ").close()
    load(plan=replace(PLAN, tf32=True)).close()
    board.device = replace(board.device, sms=8)
    load().close()
    board.device = replace(board.device, name="Other")
    load().close()
    board.version = "10.4.0"
    sys.modules["tensorrt"].__version__ = board.version  # type: ignore[attr-defined]
    load().close()
    assert board.builds == 6
    load().close()
    assert board.builds == 6


def test_timing_cache_is_carried_on(board) -> None:
    load().close()
    load(data=DATA + b" ").close()
    assert board.last_plan["timing"] == fake.TIMING_MAGIC + b"+1"


def files(kind: str) -> list[Path]:
    return sorted((Path(os.environ["EDGEKIT_CACHE"]) / "tensorrt").glob(f"*.{kind}"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_engine_is_built_again(board, damage: str) -> None:
    load().close()
    (path,) = files("engine")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:90]), "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match="damaged"):
        executable = load()
    assert run_once(executable, 1.0) == 3.0
    executable.close()
    assert board.builds == 2
    load().close()
    assert board.builds == 2


def test_engine_that_tensorrt_refuses_is_built_again(board) -> None:
    load().close()
    (path,) = files("engine")
    engine.Cache(path.parent).write(path.name, b"intact file, but not an engine")
    with pytest.warns(RuntimeWarning, match="refuses it"):
        load().close()
    assert board.builds == 2


def test_bad_timing_cache_is_dropped_with_a_warning(board) -> None:
    load().close()
    (path,) = files("timing")
    engine.Cache(path.parent).write(path.name, b"from another GPU")
    with pytest.warns(RuntimeWarning, match="timing cache"):
        load(data=DATA + b" ").close()
    path.write_bytes(b"garbage")
    with pytest.warns(RuntimeWarning, match="damaged"):
        load(data=DATA + b"  ").close()
    assert board.builds == 3


def test_unwritable_cache_warns_and_runs(board, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="cannot be"):
        executable = load(cache_dir=blocked)
    assert run_once(executable, 1.0) == 3.0
    executable.close()


def test_cache_is_bounded_and_drops_the_longest_unused(tmp_path: Path) -> None:
    cache = engine.Cache(tmp_path, max_bytes=1000, max_files=3)
    for i in range(3):
        cache.write(f"f{i}", bytes([i]))
        os.utime(tmp_path / f"f{i}", (i, i))
    assert cache.read("f0") == b"\0"  # used: now the newest
    cache.write("f3", b"3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f0", "f2", "f3"]
    cache.write("big", b"b" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["big"]
    assert cache.read("big") == b"b" * 5000
    assert (tmp_path / "big").stat().st_mode & 0o077 == 0


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        engine.Cache(tmp_path).write("f", b"data")
    assert list(tmp_path.iterdir()) == []


# --- errors ---


def test_interrupt_cancels_the_build_and_keeps_nothing(board) -> None:
    def progress(done: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(progress)
    assert files("engine") == []
    load().close()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_stopping_waits_until_tensorrt_has_stopped(board, stop: type[BaseException]) -> None:
    board.build_until_cancelled = True

    def progress(done: float, text: str) -> None:
        if done > 0:
            raise stop

    with pytest.raises(stop):
        load(progress)
    assert board.cancellations == 1
    assert "edgekit-tensorrt-build" not in {t.name for t in threading.enumerate() if t.is_alive()}


def test_progress_of_nested_phases_never_falls() -> None:
    monitor = Monitor()
    seen = [monitor.read()[0]]

    def note() -> None:
        seen.append(monitor.read()[0])

    monitor.start("build", None, 4)
    for step in range(4):
        for child in ("graph", "timing"):  # names come again, in sequence
            monitor.start(child, "build", 10)
            for inner in range(10):
                assert monitor.step(child, inner)
                note()
            monitor.finish(child)
            note()
        if step < 3:  # the last step is left out: phases may end early
            assert monitor.step("build", step)
            note()
    monitor.finish("build")
    note()
    monitor.start("finish", None, 2)  # a second independent phase
    monitor.step("finish", 1)
    note()
    assert seen == sorted(seen)
    assert len(set(seen)) > 40
    assert 0.9 < seen[-1] < 1
    assert monitor.step("unknown", 3)
    monitor.finish("unknown")
    monitor.cancelled = True
    assert not monitor.step("build", 0)


def test_last_error_prefers_what_tells_more() -> None:
    log = Log()
    assert log.last_error() == "no reason given"
    log.add(True, "no\nrunner")
    log.add(True, "cudaError 35: driver version is insufficient")
    assert log.last_error() == "no runner"
    only = Log()
    only.add(True, "cudaError 35: driver version is insufficient")
    assert "cudaError 35" in only.last_error()


def test_parser_errors_come_all_in_one_line(board) -> None:
    board.parser_errors = [
        ("DeformConv", "n1", "Plugin\nnot found"),
        ("Det", "n2", "no importer"),
        ("", "", "x"),
    ]
    with pytest.raises(LoweringError) as caught:
        load()
    message = str(caught.value)
    assert message == (
        "TensorRT: refuses the network: DeformConv 'n1': Plugin not found; Det 'n2': no importer; x"
    )


def test_builder_without_a_result_gives_its_last_error(board) -> None:
    board.build_error = "NMS has no runners that implement it"
    with pytest.raises(LoweringError, match="cannot build the network: NMS has no runners"):
        load()
    board.build_error = "Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)"
    with pytest.raises(EdgekitError, match="ran out of memory") as caught:
        load()
    assert not isinstance(caught.value, LoweringError)


def test_network_unlike_its_plan_is_refused(board) -> None:
    with pytest.raises(LoweringError, match="expected"):
        load(data=fake.network([("x", (1, 3, 8, 8))], [("y", SHAPE)]))
    with pytest.raises(BundleError, match="build plan"):
        engine.load(DATA, replace(variant(), options={}), LoadOptions())
    options = PLAN.to_options()
    options["plan"]["dla"] = True
    with pytest.raises(BundleError, match="build plan"):
        engine.load(DATA, replace(variant(), options=options), LoadOptions())


def test_old_tensorrt_is_named(board) -> None:
    board.version = sys.modules["tensorrt"].__version__ = "8.6.2"  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match=r"needs TensorRT 10\.0 or newer, got 8\.6\.2"):
        load()


def test_out_of_memory_frees_what_was_taken(board) -> None:
    executable = load()
    board.memory_bytes = 4 * int(np.prod(SHAPE))  # room for one of two buffers
    with pytest.raises(StreamError, match="cudaMalloc of 192 bytes"):
        executable.bind()
    assert not board.device_memory
    assert not board.streams
    executable.close()


@pytest.mark.parametrize(
    "call", ["create_stream", "alloc_host", "create_execution_context", "set_tensor_address"]
)
def test_failing_bind_frees_what_was_taken(board, call: str) -> None:
    executable = load()
    board.fail = {call}
    with pytest.raises(StreamError):
        executable.bind()
    board.fail = set()
    assert run_once(executable, 1.0) == 3.0
    executable.close()


@pytest.mark.parametrize("call", ["to_device", "execute_async_v3", "to_host", "synchronize"])
def test_failing_run_says_so(board, call: str) -> None:
    executable = load()
    binding = executable.bind()
    board.fail = {call}
    with pytest.raises(StreamError, match="fail"):
        binding.run()
    board.fail = set()
    executable.close()


def test_missing_tensorrt_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"JetPack.*--system-site-packages") as caught:
        engine.load(DATA, variant(), LoadOptions())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError)


# --- the CUDA layer ---


def test_cuda_bindings_without_a_driver_say_so() -> None:
    """The real package: every call of the adapter exists, and errors carry CUDA's own words."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == 0 and count:
        pytest.skip("this machine has a GPU")
    with pytest.raises(StreamError, match="CUDA cudaGetDeviceCount: cudaError"):
        cuda.CudaBindings(runtime)
    api = cuda.CudaBindings.__new__(cuda.CudaBindings)
    api._rt = runtime
    calls = {
        "activate": (),
        "alloc": (64,),
        "free": (64,),
        "alloc_host": (64,),
        "free_host": (64,),
        "create_stream": (),
        "destroy_stream": (1,),
        "synchronize": (1,),
        "to_device": (64, 64, 8, 1),
        "to_host": (64, 64, 8, 1),
        "begin_capture": (1,),
        "end_capture": (1,),
        "launch": (1, 1),
        "destroy_graph": (1,),
        "device": (),
    }
    for name, args in calls.items():
        with pytest.raises(StreamError, match="CUDA cuda"):
            getattr(api, name)(*args)


class FakePycuda:
    """`pycuda.driver` as its documentation describes it, on a `fake.Machine`."""

    class Error(Exception):
        pass

    class device_attribute:
        MULTIPROCESSOR_COUNT = 16

    def __init__(self) -> None:
        self.machine = machine = fake.Machine()
        self.pushed: list[int] = []
        outer = self
        real = fake.FakeCuda(machine)

        class Memory:
            def __init__(self, nbytes: int) -> None:
                try:
                    self.pointer = real.alloc(nbytes)
                except StreamError as error:
                    raise FakePycuda.Error(str(error)) from None

            def __int__(self) -> int:
                return self.pointer

            def free(self) -> None:
                real.free(self.pointer)

        class Stream:
            def __init__(self) -> None:
                self.handle = real.create_stream()
                self.synchronize = lambda: real.synchronize(self.handle)

            def __del__(self) -> None:
                real.destroy_stream(self.handle)

        class Pagelocked:
            def __init__(self, nbytes: int) -> None:
                self.pointer = real.alloc_host(nbytes)
                self.__array_interface__ = {
                    "data": (self.pointer, False),
                    "shape": (nbytes,),
                    "typestr": "|u1",
                    "version": 3,
                }

            def free(self) -> None:
                real.free_host(self.pointer)

        class Context:
            def push(self) -> None:
                outer.pushed.append(threading.get_ident())

        class GpuDevice:
            def __init__(self, index: int) -> None:
                assert index == 0

            def retain_primary_context(self) -> Context:
                return Context()

            def name(self) -> str:
                return machine.device.name

            def compute_capability(self) -> tuple[int, int]:
                return 8, 7

            def get_attribute(self, attribute: int) -> int:
                return attribute

            def total_memory(self) -> int:
                return machine.device.memory_bytes

        def upload(device: int, source: np.ndarray, stream: Stream) -> None:
            real.to_device(device, source.ctypes.data, source.nbytes, stream.handle)

        def download(target: np.ndarray, device: int, stream: Stream) -> None:
            real.to_host(target.ctypes.data, device, target.nbytes, stream.handle)

        self.init = lambda: None
        self.Device, self.Stream, self.mem_alloc = GpuDevice, Stream, Memory
        self.memcpy_htod_async, self.memcpy_dtoh_async = upload, download
        self.pagelocked_empty = lambda n, dtype: np.asarray(Pagelocked(n))


def test_pycuda_runs_an_engine_without_graphs(board, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakePycuda()
    api = cuda.PyCuda(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_tensorrt(driver.machine))
    monkeypatch.setattr(cuda, "open_api", lambda: api)
    executable = load()
    binding = executable.bind()
    for i in range(3):
        binding.inputs["x"][:] = i
        binding.run()
        assert binding.outputs["y"].mean() == 2 * i + 1
    assert "pycuda" in executable.describe()["cuda_graph"]
    thread = threading.Thread(target=run_once, args=(executable, 1.0))
    thread.start()
    thread.join()
    assert len(driver.pushed) == 2  # once per thread
    driver.machine.memory_bytes = 0
    with pytest.raises(StreamError, match="mem_alloc of 192 bytes"):
        executable.bind()
    binding.close()
    executable.close()
    del binding, executable
    assert driver.machine.idle(), driver.machine.leaks()


def test_no_cuda_binding_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="cuda-bindings"):
        cuda.open_api()


def test_device_half_imports_only_numpy() -> None:
    code = (
        "import sys; import edgekit.backends.tensorrt.engine; "
        "bad = {'onnx', 'onnx_ir', 'torch', 'cv2', 'onnxruntime', 'tensorrt', 'cuda', 'pycuda'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_warnings_are_not_silent() -> None:
    """The tests above rely on warnings being errors."""
    with pytest.raises(RuntimeWarning):
        warnings.warn("x", RuntimeWarning, stacklevel=1)

"""kernels/letterbox/kernel.cu without a GPU: its arithmetic, compiled as C++ for this CPU, against reference.py; and
(marked nvidia) that NVIDIA's compiler takes it for the boards' GPUs. What neither shows is a launch on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, MissingExtraError, StreamError, UsageError
from edgekit.kernels import cuda
from edgekit.kernels.letterbox import LetterboxPlan
from edgekit.kernels.letterbox.cuda import BLOCK, CudaLetterbox, LetterboxTables, Parameters
from edgekit.pixels import FORMATS, PixelLayout, Pixels
from edgekit.spec import DType, QuantParams
from edgekit.tasks.preprocess import ImagePreprocess
from tests import cuda_cpu
from tests.cuda_cpu import address, compiled
from tests.test_kernels import using


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA source as a CPU library."""
    functions = {("Letterbox", Parameters): ("letterbox",)}
    return compiled("letterbox", tmp_path_factory.mktemp("cuda"), functions, with_int=("letterbox",))


def launch(library: ctypes.CDLL, p: Parameters, padded: bool = False) -> None:
    grid = (-(-p.width // BLOCK[0]), -(-p.height // BLOCK[1]))
    cuda_cpu.launch(library, "letterbox", grid, BLOCK, p, int(padded))


def test_arguments_that_are_not_the_struct_are_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What holds for the arguments of all kernels, as they would not compile."""
    names = [name for name, *_ in Parameters._fields_]
    at = names.index("in_width"), names.index("in_height")
    fields = list(Parameters._fields_)
    fields[at[0]], fields[at[1]] = fields[at[1]], fields[at[0]]
    exchanged = type("Exchanged", (ctypes.Structure,), {"_fields_": fields})
    short = type("Short", (ctypes.Structure,), {"_fields_": Parameters._fields_[:-2]})
    for mirror, problem in (
        (exchanged, "offsetof(Letterbox, in_height) == "),
        (short, "sizeof(Letterbox) == "),
    ):
        with pytest.raises(subprocess.CalledProcessError):
            compiled("letterbox", tmp_path, {("Letterbox", mirror): ()})
        assert problem in capfd.readouterr().err


@st.composite
def cases(draw: st.DrawFn) -> tuple[ImagePreprocess, QuantParams | None, Pixels]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    format = draw(st.sampled_from(FORMATS))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    if format in ("yuyv", "uyvy"):
        width += width % 2
    matrix, range_ = draw(st.sampled_from(("bt601", "bt709"))), draw(st.sampled_from(("full", "limited")))
    layout = PixelLayout(format, width, height, matrix, range_)
    planes = []
    for shape in layout.plane_shapes:
        row, spare = int(np.prod(shape[1:])), draw(st.integers(0, 9))
        # extremes show saturation, which random bytes seldom reach
        levels = rng.integers(0, 256, (shape[0], row + spare), np.uint8)
        levels = np.where(levels > 127, np.uint8(255), np.uint8(0)) if draw(st.booleans()) else levels
        inner = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(1, len(shape)))
        plane = np.lib.stride_tricks.as_strided(levels, shape, (row + spare, *inner))
        planes.append(plane[::-1] if draw(st.booleans()) else plane)
    dtype = draw(st.sampled_from((DType.float32, DType.float16, DType.uint8)))
    plain = dtype is DType.uint8
    spec = ImagePreprocess(
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(("letterbox", "letterbox-center", "stretch", "crop", "crop-bottom"))),
        draw(st.integers(0, 255)),
        draw(st.sampled_from(("bgr", "rgb"))),
        (0.0,) * 3 if plain else (123.7, 116.3, 103.5),
        (1.0,) * 3 if plain else (58.4, 57.1, 57.4),
        draw(st.sampled_from(("NCHW", "NHWC"))),
        dtype,
    )
    quant = draw(
        st.sampled_from(
            (None, QuantParams(DType.int8, (0.02,), (-3,)), QuantParams(DType.uint8, (1.0,), (0,)))
        )
    )
    return spec, quant, Pixels(tuple(planes), layout)


@settings(deadline=None, max_examples=400)
@given(case=cases())
def test_the_cuda_source_compiled_for_the_cpu_is_the_reference(
    emulated: ctypes.CDLL, case: tuple[ImagePreprocess, QuantParams | None, Pixels]
) -> None:
    spec, quant, pixels = case
    with using("numpy"):
        plan = LetterboxPlan(spec, pixels.layout, quant)
        expected = np.empty(plan.out_shape, plan.out_dtype)
        plan.run(pixels, expected)
    tables = LetterboxTables(spec, pixels.layout, quant)
    got = np.full(tables.out_shape, 77, tables.out_dtype)
    pitches = [plane.strides[0] for plane in pixels.planes]
    p = tables.parameters(address(tables.blob), pixels.addresses, pitches, address(got))
    launch(emulated, p)
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
    # with the padding in place only the picture is written
    launch(emulated, p, padded=True)
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def test_padding_that_is_there_is_left_alone(emulated: ctypes.CDLL) -> None:
    layout = PixelLayout("grey", 8, 4)
    tables = LetterboxTables(ImagePreprocess(8, 8, dtype=DType.uint8), layout)
    image, got = np.full((4, 8, 1), 9, np.uint8), np.full((1, 3, 8, 8), 55, np.uint8)
    launch(
        emulated, tables.parameters(address(tables.blob), [address(image)], [8], address(got)), padded=True
    )
    assert (got[:, :, :4] == 9).all() and (got[:, :, 4:] == 55).all()


def test_planes_that_do_not_fit() -> None:
    tables = LetterboxTables(ImagePreprocess(8, 8), PixelLayout("nv12", 8, 4))
    with pytest.raises(UsageError, match="expected 2 planes with their pitches, got 1 and 1"):
        tables.parameters(0, [0], [8], 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"edgekit\[tensorrt\]"):
        CudaLetterbox(ImagePreprocess(8, 8), PixelLayout("nv12", 8, 4))


def test_a_machine_without_a_gpu_says_so() -> None:
    pytest.importorskip("cuda.bindings.driver")
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvhost-gpu").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EdgekitError, match=r"NVIDIA's driver|CUDA cuInit"):
        CudaLetterbox(ImagePreprocess(8, 8), PixelLayout("nv12", 8, 4))


@pytest.mark.nvidia
@pytest.mark.parametrize("arch", ["sm_87", "sm_110"])
@pytest.mark.parametrize("kernel", cuda.names())
def test_nvrtc_compiles_it_for_the_boards(kernel: str, arch: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs NVIDIA's compiler: make test-nvidia")
    cubin = cuda.compile_kernel(kernel, arch)
    assert cubin[:4] == b"\x7fELF" and kernel.encode() in cubin


@pytest.mark.nvidia
def test_nvrtc_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs NVIDIA's compiler: make test-nvidia")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/kernel.cu").write_text(cuda.source("letterbox").read_text() + "\nint broken( {\n")
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    assert cuda.names() == ("broken",)
    with pytest.raises(StreamError, match=r"nvrtcCompileProgram of broken for sm_87: .*expected"):
        cuda.compile_kernel("broken", "sm_87")

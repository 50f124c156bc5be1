"""boxes3d/kernel.cu and peaks/kernel.cu without a GPU: compiled as C++ for this CPU, against their references. That
NVIDIA's compiler takes them is tested in test_kernels_cuda; a launch on a GPU is not."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.boxes3d import bev_iou, iou_3d
from edgekit.kernels.boxes3d import cuda as boxes_cuda
from edgekit.kernels.peaks import cuda as peaks_cuda
from edgekit.kernels.peaks import peaks, reference
from tests import cuda_cpu
from tests.cuda_cpu import address, compiled
from tests.test_kernels import using
from tests.test_kernels_boxes3d import box_sets
from tests.test_kernels_peaks import cases


def launch(
    library: ctypes.CDLL, p: ctypes.Structure, launches: Sequence[tuple[str, tuple[int, ...]]], step: int = 1
) -> None:
    for function, grid in launches:
        cuda_cpu.launch(library, function, grid, (boxes_cuda.BLOCK,), p, step=step)


@pytest.fixture(scope="module")
def boxes_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = {("Boxes3d", boxes_cuda.Parameters): ("boxes3d_prepare", "boxes3d")}
    return compiled("boxes3d", tmp_path_factory.mktemp("cuda"), functions)


@pytest.fixture(scope="module")
def peaks_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = {("PeakMaps", peaks_cuda.Parameters): ("peaks_clear", "peaks", "peaks_pick")}
    return compiled("peaks", tmp_path_factory.mktemp("cuda"), functions)


@settings(deadline=None, max_examples=150)
@given(a=box_sets(), b=box_sets(), three_d=st.booleans())
def test_overlap_is_the_reference(
    boxes_library: ctypes.CDLL, a: np.ndarray, b: np.ndarray, three_d: bool
) -> None:
    with using("numpy"):
        expected = (iou_3d if three_d else bev_iou)(a, b)
    got = np.full_like(expected, np.nan)
    prepared = np.full((len(a) + len(b)) * boxes_cuda.BOX_BYTES // 8, np.nan)
    p = boxes_cuda.Parameters(
        address(a), address(b), address(prepared), address(got), len(a), len(b), three_d
    )
    launch(boxes_library, p, boxes_cuda.launches(p))
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@settings(deadline=None, max_examples=250)
@given(case=cases(), step=st.integers(1, 10_000))
def test_peaks_are_the_reference(peaks_library: ctypes.CDLL, case: tuple, step: int) -> None:
    """In whatever order threads come, and so whatever the list of peaks looks like."""
    heat, maps, threshold, limit, window = case
    with using("numpy"):
        expected = peaks(heat, maps, threshold=threshold, limit=limit, window=window)
    windows = np.full(len(heat), window, np.int32) if isinstance(window, int) else np.array(window, np.int32)
    scores, cells = np.empty(limit, np.float32), np.empty((limit, 3), np.int32)
    values, found = np.empty((limit, sum(map(len, maps))), np.float32), np.full(1, 99, np.uint32)
    keys = np.zeros(heat.size, np.uint64)
    p = peaks_cuda.Parameters()
    p.heat, p.windows, p.keys, p.found = map(address, (heat, windows, keys, found))
    p.scores, p.cells, p.values = map(address, (scores, cells, values))
    p.map[: len(maps)], p.channels[: len(maps)] = [address(m) for m in maps], [len(m) for m in maps]
    p.maps, p.limit, p.capacity, p.low = len(maps), limit, len(keys), reference.cutoff(threshold)
    p.classes, p.height, p.width = heat.shape
    launch(peaks_library, p, peaks_cuda.launches(p), step)
    n = min(int(found[0]), limit)
    for got, wanted in ((scores, expected.scores), (cells, expected.cells), (values, expected.values)):
        np.testing.assert_array_equal(got[:n].view(np.uint32), wanted.view(np.uint32))


def test_more_peaks_than_there_is_room_for_are_counted(peaks_library: ctypes.CDLL) -> None:
    heat, windows = np.ones((1, 4, 8), np.float32), np.ones(1, np.int32)
    keys, found, scores = np.zeros(5, np.uint64), np.zeros(1, np.uint32), np.zeros(4, np.float32)
    cells, guard = np.zeros((4, 3), np.int32), np.zeros(1, np.uint64)
    p = peaks_cuda.Parameters(address(heat), address(windows))
    p.keys, p.found, p.scores, p.cells, p.values = map(address, (keys, found, scores, cells, guard))
    p.limit, p.capacity, p.low, p.classes, p.height, p.width = 4, 5, 0.0, 1, 4, 8
    launch(peaks_library, p, peaks_cuda.launches(p))
    assert found[0] == 32 and guard[0] == 0 and cells[:, 2].tolist() == [0, 1, 2, 3]


def test_wrong_arguments_are_refused_before_a_gpu_is_asked_for() -> None:
    for channels, rule in (
        ([1] * 9, {"threshold": 0.1, "limit": 5}),
        ([], {"threshold": 0.1, "limit": 5, "window": 2}),
        ([], {"threshold": 1.1, "limit": 5}),
        ([], {"threshold": 0.1, "limit": 5, "capacity": 4}),
    ):
        with pytest.raises(UsageError, match="peaks: expected"):
            peaks_cuda.CudaPeaks((2, 4, 4), channels, **rule)  # type: ignore[arg-type]

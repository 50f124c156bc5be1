"""CUDA sources compiled as C++ for this CPU: keywords and indices defined away, a loop over the threads in place of a
launch. What that does not show is a launch on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekit.kernels import cuda

_BEFORE = """
#define __device__
#define __global__
struct Index { unsigned x, y, z; };
static thread_local Index blockIdx, blockDim, threadIdx;
[[maybe_unused]] static unsigned atomicMin(unsigned* p, unsigned v) { const unsigned old = *p; *p = v < old ? v : old; return old; }
#include "kernel.cu"
template <class F> static void each_thread(const unsigned* grid, const unsigned* block, F f) {
    blockDim = {block[0], block[1], 1};
    for (unsigned i = 0; i < grid[0] * grid[1] * block[0] * block[1]; i++) {
        const unsigned b = i / (block[0] * block[1]), t = i % (block[0] * block[1]);
        blockIdx = {b % grid[0], b / grid[0], 0}, threadIdx = {t % block[0], t / block[0], 0};
        f();
    }
}
extern "C" {
"""


def compiled(kernel: str, folder: Path, struct: str, functions: Sequence[str], more: str = "") -> ctypes.CDLL:
    """`<kernel>/kernel.cu` as a library for `launch`; undefined behaviour (overflow, shifts) ends the process.

    struct: of the argument, whose size `size()` gives.  functions: those that take one `struct` by value.
    """
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    body = f"int size() {{ return int(sizeof({struct})); }}\n"
    for name in functions:
        body += (
            f"void run_{name}(const {struct}* p, const unsigned* grid, const unsigned* block) "
            f"{{ each_thread(grid, block, [&] {{ {name}(*p); }}); }}\n"
        )
    (folder / "shim.cpp").write_text(_BEFORE + body + more + "\n}\n")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-ffp-contract=off"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    include, out = f"-I{cuda.source(kernel).parent}", folder / "shim.so"
    subprocess.run([compiler, *flags, include, str(folder / "shim.cpp"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def launch(
    library: ctypes.CDLL,
    function: str,
    grid: Sequence[int],
    block: Sequence[int],
    parameters: ctypes.Structure,
    *more: int,
) -> None:
    """Run `function` for every thread of the grid, one after the other. more: further arguments of `run_<function>`."""
    sizes = [(ctypes.c_uint * 2)(*[*part, 1][:2]) for part in (grid, block)]
    getattr(library, f"run_{function}")(ctypes.byref(parameters), *sizes, *more)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])

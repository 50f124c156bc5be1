"""CUDA sources compiled as C++ for this CPU: keywords and indices defined away, a loop over the threads in place of a
launch. What that does not show is a launch on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekit.kernels import cuda

Struct = tuple[str, type[ctypes.Structure]]
"""A structure of kernel.cu, and what cuda.py says that it is."""

_BEFORE = """
#include <algorithm>
#include <cmath>
#include <cstddef>
#define __device__
#define __global__
struct Index { unsigned x, y, z; };
static thread_local Index blockIdx, blockDim, threadIdx;
template <class T> static T swapped(T* p, T v) { const T old = *p; *p = v; return old; }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return swapped(p, *p + v); }
inline unsigned atomicMin(unsigned* p, unsigned v) { return swapped(p, v < *p ? v : *p); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return swapped(p, *p | v); }
inline unsigned atomicCAS(unsigned* p, unsigned c, unsigned v) { return swapped(p, *p == c ? v : *p); }
inline int atomicExch(int* p, int v) { return swapped(p, v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int((signed char)(a >> 8 * i)) * int((signed char)(b >> 8 * i));
    return c;
}
#include "kernel.cu"
// every thread once, in an order that `step`, made coprime to their number, gives
template <class F> static void each_thread(const unsigned* grid, const unsigned* block, unsigned long step, F f) {
    blockDim = {block[0], block[1], 1};
    const unsigned long n = (unsigned long)grid[0] * grid[1] * block[0] * block[1];
    while (std::__gcd(step, n) != 1) step++;
    for (unsigned long i = 0; i < n; i++) {
        const unsigned long at = i * step % n, b = at / (block[0] * block[1]), t = at % (block[0] * block[1]);
        blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0]), 0};
        threadIdx = {unsigned(t % block[0]), unsigned(t / block[0]), 0};
        f();
    }
}
"""


def compiled(
    kernel: str,
    folder: Path,
    functions: Mapping[Struct, Sequence[str]],
    with_int: Collection[str] = (),
    more: str = "",
) -> ctypes.CDLL:
    """`<kernel>/kernel.cu` as a library for `launch`; undefined behaviour (overflow, shifts) ends the process.

    functions: those that take a structure by value, and, of `with_int`, an int after it.  A structure whose size or a
    field of which is not where cuda.py says does not compile: CalledProcessError.  more: further C functions.
    """
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    checks, body = "", ""
    for (struct, mirror), names in functions.items():
        checks += f"static_assert(sizeof({struct}) == {ctypes.sizeof(mirror)});\n"
        for field, *_ in mirror._fields_:
            checks += f"static_assert(offsetof({struct}, {field}) == {getattr(mirror, field).offset});\n"
        for name in names:
            body += (
                f"void run_{name}(const {struct}* p, const unsigned* grid, const unsigned* block, unsigned long step, "
                f"[[maybe_unused]] int more) {{ each_thread(grid, block, step, "
                f"[&] {{ {name}(*p{', more' if name in with_int else ''}); }}); }}\n"
            )
    (folder / "shim.cpp").write_text(f'{_BEFORE}{checks}extern "C" {{\n{body}{more}\n}}\n')
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
    more: int = 0,
    *,
    step: int = 1,
) -> None:
    """Run `function` for every thread of the grid, one after the other; `step` shuffles them. more: the int after the
    structure."""
    sizes = [(ctypes.c_uint * 2)(*[*part, 1][:2]) for part in (grid, block)]
    getattr(library, f"run_{function}")(ctypes.byref(parameters), *sizes, ctypes.c_ulong(step), more)


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array.__array_interface__["data"][0])

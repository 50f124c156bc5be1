#!/usr/bin/env python3
"""kernels.py

Compiles every CUDA kernel with the NVRTC of both JetPacks, without a GPU: CUDA 13's for sm_87 (Orin) and sm_110
(Thor), by the code that runs on a board, and CUDA 12.6's, which JetPack 6 has, for sm_87. Exit code: 0 all compiled, 1 not.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgekit.errors import EdgekitError
from edgekit.kernels import cuda


def nvrtc_12() -> ctypes.CDLL:
    """libnvrtc.so.12 of the wheel nvidia-cuda-nvrtc-cu12."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [p for f in folders for p in Path(f).glob("cuda_nvrtc/lib/libnvrtc.so.12")]
    if not found:
        raise EdgekitError("libnvrtc.so.12: not found. Run: pip install -r tools/nvidia/requirements.txt")
    return ctypes.CDLL(str(found[0]))


def compile_12(source: Path, arch: str) -> bytes:
    """`source` as a cubin by CUDA 12's NVRTC. Raises: EdgekitError with its log."""
    library, program, size = nvrtc_12(), ctypes.c_void_p(), ctypes.c_size_t()
    error = library.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
    )
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--fmad=false"]
    error = error or library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 3)(*options))
    if error:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise EdgekitError(f"NVRTC 12 for {arch}: error {error}: {log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def main() -> int:
    for kernel in cuda.names():
        jobs: list[tuple[str, str, Callable[[], bytes]]] = [
            ("CUDA 13", "sm_87", functools.partial(cuda.compile_kernel, kernel, "sm_87")),
            ("CUDA 13", "sm_110", functools.partial(cuda.compile_kernel, kernel, "sm_110")),
            ("CUDA 12.6", "sm_87", functools.partial(compile_12, cuda.source(kernel), "sm_87")),
        ]
        for release, arch, job in jobs:
            start = time.perf_counter()
            cubin = job()
            if cubin[:4] != b"\x7fELF" or kernel.encode() not in cubin:
                raise EdgekitError(f"{kernel}/kernel.cu: NVRTC of {release} for {arch} gave no cubin of it")
            seconds = time.perf_counter() - start
            print(f"{kernel}/kernel.cu for {arch} by NVRTC of {release}: {len(cubin)} bytes, {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgekitError as error:
        print(error, file=sys.stderr)
        sys.exit(1)

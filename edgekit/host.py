"""What this machine is, read from the operating system, and whether a bundle for some board runs on it.

Nothing is measured or guessed here: what the system does not state stays None. Linux (x86 and ARM) is
read from /proc and /sys, macOS from sysctl. Standard library only, so that devices can import it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.target import Cpu, Software, Target


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


ISA = {
    # our name: what Linux calls it in /proc/cpuinfo, all of them needed
    "sse4_1": ("sse4_1",),
    "avx": ("avx",),
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512f": ("avx512f",),
    "avx512bw": ("avx512bw",),
    "avx512vl": ("avx512vl",),
    "avx512_vbmi": ("avx512vbmi",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
    "neon": ("asimd",),
    "fp16": ("asimdhp", "fphp"),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
    "sve2": ("sve2",),
}
"""Every ISA feature a target file may name, the oldest first."""

# MIDR implementer and part -> core: /proc/cpuinfo of ARM has no model name (Linux asm/cputype.h)
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x4E, 0x004): "Carmel",
}

# core -> vector bits it multiplies and accumulates per cycle: memory, not checked
_SIMD_BITS = {
    "Cortex-A53": 64, "Cortex-A55": 128, "Cortex-A57": 128, "Cortex-A72": 128, "Cortex-A76": 256,
    "Cortex-A78": 256, "Cortex-A78AE": 256, "Cortex-X1": 512, "Cortex-A510": 128, "Cortex-A710": 256,
    "Cortex-X2": 512, "Cortex-A715": 256, "Cortex-X3": 512, "Cortex-A520": 128, "Cortex-A720": 256,
    "Cortex-X4": 512, "Neoverse-N1": 256, "Neoverse-V3AE": 512, "Carmel": 256,
}  # fmt: skip

_ROOT = Path("/")


def detect(root: Path = _ROOT) -> Target:
    """This machine as the target `host`. `root` stands for / (another file tree in tests).

    On a board that `targets/` knows (by /proc/device-tree/model) the GPU, DLA and bus bandwidth are
    taken from its file; elsewhere the bandwidth is None and there is no GPU: `host` is the CPU.
    Raises: UsageError where the system states neither its processors nor its memory.
    """
    cpus, source = _cpus(root)
    arch = _arch(root)
    memory, memory_source = _memory(root)
    known = board(root)
    backends: tuple[str, ...] = ("onnxruntime", "litert")
    if not backend_problem("native"):
        backends += ("native",)
    if known is not None and "tensorrt" in known.backends and not backend_problem("tensorrt"):
        backends = known.backends
    if arch == "x86_64" and not backend_problem("openvino"):
        backends += ("openvino",)
    precisions = {
        "onnxruntime": ("float32", "float16", "int8"),
        "litert": ("float32", "float16", "int8", "dynamic"),
        "openvino": ("float32", "int8"),
        "native": ("float32", "int8", "dynamic"),
        "tensorrt": ("float16", "float32", "int8"),
    }
    tile = 16 if "avx512f" in cpus[0].isa else 8
    model = device_model(root)
    host = Target(
        name="host",
        title=f"this machine: {model or cpus[0].name}",
        arch=arch,
        cpus=cpus,
        dram_bytes=memory,
        dram_bytes_per_s=None,
        backends=backends,
        precisions={b: precisions[b] for b in backends},
        channel_granularity={"float32": tile, "float16": tile, "int8": tile},
        software=(_software(root, known),),
        notes=("Memory bandwidth and TOPS are not stated by the system and were not measured.",),
        sources={
            "cpus": source,
            "dram_bytes": memory_source,
            "software": "detected: /etc/os-release, the running Python",
            "channel_granularity": "MLAS blocks channels by 16 with AVX-512, by 8 else: memory, not checked",
        },
    )
    if known is None:
        return host
    taken = {
        k: f"targets/{known.name}: {v}" for k, v in known.sources.items() if k.split(".")[0] in _BORROWED
    }
    return dataclasses.replace(
        host,
        dram_bytes_per_s=known.dram_bytes_per_s,
        gpu=known.gpu,
        dla=known.dla,
        power_modes=known.power_modes,
        channel_granularity=known.channel_granularity,
        notes=known.notes,
        sources={**host.sources, **taken},
    )


_BORROWED = ("dram_bytes_per_s", "gpu", "dla", "power_modes", "channel_granularity")


def device_model(root: Path = _ROOT) -> str | None:
    """The board's own name from the device tree, e.g. "Raspberry Pi 5 Model B Rev 1.0"."""
    text = _read(root / "proc/device-tree/model")
    return text.strip("\0 \n") or None if text else None


def board(root: Path = _ROOT) -> Target | None:
    """The file in `targets/` that describes this very board, by its device-tree name; None elsewhere."""
    model = device_model(root)
    if not model:
        return None
    for name in Target.names():
        if name != "host":
            target = Target.load(name)
            if any(pattern in model for pattern in target.device_tree_models):
                return target
    return None


def matches(target: Target, backends: Sequence[str] = (), root: Path = _ROOT) -> tuple[bool, str]:
    """Can this machine run a bundle built for `target` whose payloads are for `backends`?

    `backends` defaults to all that the target lists. Returns (runs, reason): (True, "") on such a
    board, (True, what differs) on another machine, which is worth a warning: payloads are portable, so
    results hold, but timings say nothing of the board, (False, what is missing) where none can run.
    """
    problems = {b: backend_problem(b) for b in backends or target.backends}
    if all(problems.values()):
        return False, "; ".join(f"{b}: {p}" for b, p in problems.items())
    if target.name == "host":
        return True, ""
    here = board(root)
    if here is not None and here.name == target.name:
        return True, ""
    machine = _arch(root)
    differs = []
    if machine != target.arch:
        differs.append(f"{target.arch} there, {machine} here")
    else:
        isa = _cpus(root)[0][0].isa
        missing = [f for f in target.cpus[0].isa if f not in isa]
        if missing:
            differs.append(f"no {', '.join(missing)} here")
    if here is not None:
        differs.append(f"this is {here.name}")
    elif target.gpu is not None and "tensorrt" in target.backends:
        differs.append("not that board")
    if not differs:
        return True, ""
    why = "; ".join(differs)
    return True, f"this machine is not that board ({why}); its results hold, its timings say nothing of it"


def backend_problem(backend: str) -> str:
    """Why `backend` cannot run on this machine, with the next step; "" when it can."""
    if backend == "onnxruntime":
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed. Run: pip install 'edgekit[onnxruntime]'"
        return ""
    if backend == "litert":
        if all(importlib.util.find_spec(name) is None for name in ("ai_edge_litert", "tflite_runtime")):
            return "ai-edge-litert is not installed. Run: pip install 'edgekit[litert]'"
        return ""
    if backend == "native":
        from edgekit.backends.native import library

        if not library.path().is_file():
            return (
                f"{library.FILE} was not built. Install a C++17 compiler and reinstall edgekit (in a checkout: python "
                "setup.py build_ext --inplace)"
            )
        return ""
    if backend == "openvino":
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed. Run: pip install 'edgekit[openvino]'"
        return ""
    if backend == "tensorrt":
        if cuda_devices() == 0:
            return "no CUDA GPU with its driver was found. Run the bundle on a Jetson"
        if importlib.util.find_spec("tensorrt") is None:
            return "tensorrt is not importable. Install JetPack's python3-libnvinfer for this Python"
        return ""
    return f"backend {backend!r} is unknown to this version of edgekit"


@functools.cache
def cuda_devices() -> int:
    """CUDA devices that the driver can use, 0 without a driver (cuInit, cuDeviceGetCount)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def l4t_release(root: Path = _ROOT) -> str | None:
    """NVIDIA's Linux release as "36.4.3", from /etc/nv_tegra_release; None elsewhere."""
    text = _read(root / "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _arch(root: Path) -> str:
    if root != _ROOT:  # a recorded file tree: ARM's cpuinfo says so itself
        return "aarch64" if "CPU implementer" in (_read(root / "proc/cpuinfo") or "") else "x86_64"
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _cpus(root: Path) -> tuple[tuple[Cpu, ...], str]:
    """Clusters of equal cores, the fastest first, and where that was read."""
    text = _read(root / "proc/cpuinfo")
    if text is None:
        if sys.platform == "darwin":
            return (_mac_cpu(),), "detected: sysctl"
        raise UsageError(
            f"target 'host': {root / 'proc/cpuinfo'} cannot be read, so the CPU is unknown. Name a target"
        )
    clusters: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for index, block in enumerate(b for b in text.split("\n\n") if re.search(r"^processor\s*:", b, re.M)):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        core = {key.strip(): value.strip() for key, value in pairs}
        clusters.setdefault(_core_name(core), []).append((int(core.get("processor", index)), core))
    if not clusters:
        raise UsageError(f"target 'host': {root / 'proc/cpuinfo'} lists no processor. Name a target")
    cpus = []
    for name, cores in clusters.items():
        cpu = root / f"sys/devices/system/cpu/cpu{cores[0][0]}"
        flags = set.intersection(
            *(set((c.get("flags") or c.get("Features") or "").split()) for _, c in cores)
        )
        khz = _read(cpu / "cpufreq/cpuinfo_max_freq")
        caches = _caches(cpu)
        cpus.append(
            Cpu(
                name=name,
                cores=len(cores),
                clock_hz=int(khz) * 1000.0 if khz else None,
                isa=tuple(ours for ours, needed in ISA.items() if flags.issuperset(needed)),
                l1d_bytes=caches.get(1, (None, 1))[0],
                l2_bytes=caches.get(2, (None, 1))[0],
                l2_cores=caches.get(2, (None, 1))[1],
                l3_bytes=caches.get(3, (None, 1))[0],
                simd_bits=_SIMD_BITS.get(name),
            )
        )
    cpus.sort(key=lambda c: -(c.clock_hz or 0))
    return tuple(cpus), "detected: /proc/cpuinfo, /sys/devices/system/cpu"


def _core_name(core: dict[str, str]) -> str:
    if "model name" in core and "CPU part" not in core:
        return core["model name"]
    try:
        key = int(core["CPU implementer"], 16), int(core["CPU part"], 16)
    except (KeyError, ValueError):
        return "unknown CPU"
    return _ARM_CORES.get(key, f"ARM core {key[0]:#x}/{key[1]:#x}")


def _caches(cpu: Path) -> dict[int, tuple[int, int]]:
    """Level -> (bytes, cores that share it), data and unified caches."""
    found = {}
    for index in sorted(cpu.glob("cache/index*")):
        level, kind, size = (_read(index / f) or "" for f in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KM]?)", size.strip())
        if level.strip().isdigit() and kind.strip() != "Instruction" and match:
            scale = {"": 1, "K": 1024, "M": 1024**2}[match[2]]
            found[int(level)] = (int(match[1]) * scale, _count(_read(index / "shared_cpu_list") or ""))
    return found


def _count(cpu_list: str) -> int:
    """Cores in a list such as "0-3,8"."""
    spans = [part.split("-") for part in cpu_list.strip().split(",") if part]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans) or 1


def _memory(root: Path) -> tuple[int, str]:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.M)
    if found:
        return int(found[1]) * 1024, "detected: /proc/meminfo (what the kernel left of it)"
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "detected: sysconf"
    except (ValueError, OSError):
        raise UsageError("target 'host': the system does not state its memory. Name a target") from None


def _software(root: Path, known: Target | None) -> Software:
    release = _read(root / "etc/os-release") or ""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.M)
    system = Software(
        os=pretty[1] if pretty else platform.platform(terse=True), python=platform.python_version()
    )
    l4t = l4t_release(root)
    image = next((s for s in known.software if l4t and s.l4t == l4t), None) if known else None
    if image is None:
        return dataclasses.replace(system, l4t=l4t)
    return dataclasses.replace(image, os=system.os, python=system.python)


def _mac_cpu() -> Cpu:
    import subprocess  # takes milliseconds that a device need not spend

    def ask(name: str) -> str:
        asked = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    arm = platform.machine() == "arm64"
    features = {"fp16": "FEAT_FP16", "dotprod": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}
    isa = ["neon"] if arm else []
    isa += [ours for ours, theirs in features.items() if arm and ask(f"hw.optional.arm.{theirs}") == "1"]
    isa += ["avx2"] if ask("hw.optional.avx2_0") == "1" else []
    return Cpu(ask("machdep.cpu.brand_string") or "Mac", os.cpu_count() or 1, None, tuple(isa))

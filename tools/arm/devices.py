"""The boards that `armpython` pretends to be: what their /proc/cpuinfo and /sys say, and qemu's CPU for them.

Inference libraries choose kernels by these files, so without them results and instruction counts would
follow the host. `devices.py DIR` writes one file tree per board into DIR; qemu's -L redirects reads to it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Linux names of CPU features (arch/arm64/include/uapi/asm/hwcap.h)
V8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
V8_2 = f"{V8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
V9 = f"{V8_2} asimdfhm dit uscat ilrcpc flagm i8mm bf16 sve sve2 svei8mm svebf16 bti"


@dataclass(frozen=True)
class Device:
    """A board of equal cores. `part`, `variant`, `revision`: the core's MIDR fields; caches in KiB.

    `l2_shared`: one L2 for all cores instead of one each. `qemu_cpu`: the nearest that qemu 7.2 emulates.
    """

    cores: int
    part: int
    variant: int
    revision: int
    features: str
    l1_kib: int
    l2_kib: int
    l3_kib: int
    mhz: int
    qemu_cpu: str
    l2_shared: bool = False


DEVICES = {
    "pi4": Device(4, 0xD08, 0, 3, V8_0, 32, 1024, 0, 1800, "cortex-a72", l2_shared=True),
    "pi5": Device(4, 0xD0B, 4, 1, V8_2, 64, 512, 2048, 2400, "cortex-a76"),
    # qemu 7.2 has no A78; the A76 has the same features, and libraries see the A78AE's number
    "orin": Device(12, 0xD42, 0, 1, V8_2, 64, 256, 6144, 2200, "cortex-a76"),
    # stands for Armv9 phones; SME off, for no such core has it
    "v9": Device(8, 0xD47, 2, 0, V9, 64, 512, 8192, 2800, "max,sme=off,pauth-impdef=on"),
}

ARM_LTD = 0x41
LINE_BYTES = 64
WAYS = 4


def files(device: Device) -> dict[str, str]:
    """Path below / -> text, for one board."""
    every = f"0-{device.cores - 1}"
    cpus = "sys/devices/system/cpu"
    out = {"proc/cpuinfo": "\n".join(_cpuinfo(device, core) for core in range(device.cores)) + "\n"}
    out |= {f"{cpus}/{name}": every for name in ("possible", "present", "online")}
    out[f"{cpus}/kernel_max"] = str(device.cores - 1)
    for core in range(device.cores):
        base = f"{cpus}/cpu{core}"
        out |= {f"{base}/{name}": value for name, value in _core(device, core, every).items()}
    return out


def _cpuinfo(device: Device, core: int) -> str:
    return (
        f"processor\t: {core}\n"
        "BogoMIPS\t: 108.00\n"
        f"Features\t: {device.features}\n"
        f"CPU implementer\t: {ARM_LTD:#x}\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: {device.variant:#x}\n"
        f"CPU part\t: {device.part:#x}\n"
        f"CPU revision\t: {device.revision}\n"
    )


def _core(device: Device, core: int, every: str) -> dict[str, str]:
    midr = ARM_LTD << 24 | device.variant << 20 | 0xF << 16 | device.part << 4 | device.revision
    khz = str(device.mhz * 1000)
    out = {
        "topology/physical_package_id": "0",
        "topology/core_id": str(core),
        "topology/cluster_id": "0",
        "topology/core_siblings": format((1 << device.cores) - 1, "x"),
        "topology/core_siblings_list": every,
        "topology/package_cpus_list": every,
        "topology/cluster_cpus_list": every,
        "topology/thread_siblings_list": str(core),
        "topology/core_cpus_list": str(core),
        "cpufreq/cpuinfo_max_freq": khz,
        "cpufreq/cpuinfo_min_freq": khz,
        "regs/identification/midr_el1": f"{midr:#018x}",
    }
    caches = [
        ("Data", 1, device.l1_kib, str(core)),
        ("Instruction", 1, device.l1_kib, str(core)),
        ("Unified", 2, device.l2_kib, every if device.l2_shared else str(core)),
        ("Unified", 3, device.l3_kib, every),
    ]
    for index, (kind, level, kib, shared) in enumerate(caches):
        if kib:
            values = {
                "type": kind,
                "level": str(level),
                "size": f"{kib}K",
                "shared_cpu_list": shared,
                "coherency_line_size": str(LINE_BYTES),
                "ways_of_associativity": str(WAYS),
                "number_of_sets": str(kib * 1024 // LINE_BYTES // WAYS),
            }
            out |= {f"cache/index{index}/{name}": value for name, value in values.items()}
    return out


def write(root: Path) -> None:
    """One tree per board below `root`, and `qemu-cpu`, the name to start qemu with."""
    for name, device in DEVICES.items():
        for path, text in {**files(device), "qemu-cpu": device.qemu_cpu}.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_text(text.rstrip("\n") + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

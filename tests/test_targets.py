"""Every board file, the detection of this machine, `edgekit targets`. New targets are picked up unasked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit import content, host
from edgekit.backends.base import BACKENDS
from edgekit.cli import targets as cli
from edgekit.errors import UsageError
from edgekit.schema import from_json, to_json
from edgekit.target import Target
from tests.helpers import ROOT

BOARDS = [name for name in Target.names() if name != "host"]
WITH_GPU = [name for name in BOARDS if Target.load(name).gpu]
WITH_MODES = [name for name in BOARDS if Target.load(name).power_modes]
UNSOURCED = ("name", "title", "arch", "backends", "precisions", "notes", "sources")


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(field path, value) of every stated fact of a target."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if (path or f.name not in UNSOURCED) and item is not None:
                yield from figures(item, f"{path}.{f.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from figures(item, f"{path}.{key}")
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from figures(item, f"{path}.{index}")
    elif value != ():
        yield path, value


@pytest.fixture(params=BOARDS)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def test_the_boards_that_were_promised_are_there() -> None:
    promised = "jetson-orin jetson-orin-nx-16 jetson-orin-nano-8 jetson-xavier-nx jetson-thor rpi4 rpi5"
    assert {*promised.split(), "android-arm64", "android-arm64-i8mm", "host"} <= set(Target.names())


def test_every_figure_has_a_source(target: Target) -> None:
    assert [path for path, _ in figures(target) if not target.source(path)] == []


def test_every_source_is_that_of_a_figure(target: Target) -> None:
    used = {target.source(path) for path, _ in figures(target)}
    assert [path for path, source in target.sources.items() if source not in used] == []


def test_a_computed_source_says_how(target: Target) -> None:
    for path, source in target.sources.items():
        assert len(source) >= 10, path
        assert not source.startswith("computed") or ":" in source, path


def test_name_is_the_folder(target: Target) -> None:
    assert (content.find("targets", target.name) or Path()).name == target.name


def test_units_are_sane(target: Target) -> None:
    gib = 1024**3
    assert target.dram_bytes_per_s is not None
    assert 1e9 <= target.dram_bytes_per_s <= 1000e9
    assert gib <= target.dram_bytes <= 1024 * gib
    for cpu in target.cpus:
        assert 1 <= cpu.cores <= 64
        assert cpu.clock_hz is not None
        assert 0.5e9 <= cpu.clock_hz <= 6e9
        assert cpu.l1d_bytes is None or 16 * 1024 <= cpu.l1d_bytes <= 256 * 1024
        assert cpu.l2_bytes is None or 128 * 1024 <= cpu.l2_bytes <= 32 * 1024**2
        assert cpu.l3_bytes is None or 1024**2 <= cpu.l3_bytes <= 256 * 1024**2
    assert [c.clock_hz for c in target.cpus] == sorted((c.clock_hz or 0 for c in target.cpus), reverse=True)
    for mode in target.power_modes:
        assert mode.watts is None or 1 <= mode.watts <= 200
        for clock in (mode.cpu_clock_hz, mode.gpu_clock_hz, mode.emc_clock_hz, mode.dla_clock_hz):
            assert clock is None or 0.1e9 <= clock <= 6e9


def test_backends_precisions_and_granularity(target: Target) -> None:
    assert target.backends
    assert set(target.backends) <= set(BACKENDS)
    assert set(target.precisions) == set(target.backends)
    for precisions in target.precisions.values():
        assert precisions
        assert set(precisions) <= {"float32", "float16", "int8", "dynamic"}
        assert set(precisions) - {"dynamic"} <= set(target.channel_granularity)  # dynamic: that of int8
    assert all(n in (1, 2, 4, 8, 16, 32, 64) for n in target.channel_granularity.values())


def test_isa_names_are_known_and_of_the_right_machine(target: Target) -> None:
    arm = {"neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2"}
    for cpu in target.cpus:
        assert set(cpu.isa) <= (arm if target.arch == "aarch64" else set(host.ISA) - arm)


@pytest.mark.parametrize("name", WITH_MODES)
def test_one_default_power_mode_within_the_board(name: str) -> None:
    target = Target.load(name)
    assert sum(m.default for m in target.power_modes) == 1
    assert target.default_power_mode is not None
    assert len({m.name for m in target.power_modes}) == len(target.power_modes)
    cores = sum(c.cores for c in target.cpus)
    for mode in target.power_modes:
        assert mode.cpu_cores is None or mode.cpu_cores <= cores
        assert mode.cpu_clock_hz is None or mode.cpu_clock_hz <= (target.cpus[0].clock_hz or 0)
        if target.gpu:
            assert mode.gpu_sms is None or mode.gpu_sms <= target.gpu.sms
            assert mode.gpu_clock_hz is None or mode.gpu_clock_hz <= target.gpu.clock_hz
        assert mode.dla_clock_hz is None or target.dla


@pytest.mark.parametrize("name", WITH_GPU)
def test_gpu_figures_are_dense_and_agree(name: str) -> None:
    gpu = Target.load(name).gpu
    assert gpu
    assert gpu.int8_tops
    assert gpu.fp16_tflops == pytest.approx(gpu.int8_tops / 2, rel=0.02)
    if gpu.compute_capability == "8.7":  # an Orin SM does 2048 dense INT8 MAC per clock
        assert gpu.int8_tops == pytest.approx(gpu.sms * gpu.clock_hz * 2048 * 2 / 1e12, rel=0.05)
    cores = {"7.2": 64, "8.7": 128, "11.0": 128}[gpu.compute_capability]
    assert gpu.fp32_tflops == pytest.approx(gpu.sms * cores * gpu.clock_hz * 2 / 1e12, rel=0.05)


def test_tensorrt_needs_an_image_that_carries_it(target: Target) -> None:
    carried = [int((s.tensorrt or "0").split(".")[0]) for s in target.software]
    assert ("tensorrt" in target.backends) == any(v >= 10 for v in carried)
    if "tensorrt" in target.backends:
        assert target.gpu
        assert target.gpu.check_capability, "nvcc's stand-in is needed by tools/nvidia"
        assert target.backends[0] == "tensorrt"


def test_software_is_newest_first(target: Target) -> None:
    releases = [tuple(map(int, s.l4t.split("."))) for s in target.software if s.l4t]
    assert releases == sorted(releases, reverse=True)


def test_round_trip(target: Target) -> None:
    assert from_json(Target, to_json(target), "again") == target


def test_the_longest_source_path_wins() -> None:
    target = dataclasses.replace(Target.load("rpi5"), sources={"cpus": "all", "cpus.0.isa": "one"})
    assert target.source("cpus.0.isa") == "one"
    assert target.source("cpus.0.clock_hz") == "all"
    assert target.source("dram_bytes") is None


# ---- faulty names and files


@pytest.mark.parametrize(
    "name", ["jetson-oriin", "", "..", "../targets/rpi5", "/etc", ".", "rpi5/", "RPI5\0"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown") as caught:
        Target.load(name)
    assert "\n" not in str(caught.value)


def test_unknown_name_suggests_the_near_one() -> None:
    with pytest.raises(UsageError, match="Did you mean 'jetson-orin'"):
        Target.load("jetson-oriin")


GOOD = (ROOT / "targets/rpi5/target.toml").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("title = ", "Invalid value"),
        ("title = 3", "expected a string"),
        (GOOD.replace("dram_bytes = 8", "dram_byte = 8"), "Did you mean 'dram_bytes'"),
        (GOOD.replace("cores = 4", "cores = 4.5"), "expected an integer"),
        (GOOD.replace("17.1e9", "nan"), "finite"),
        (
            GOOD.replace('backends = ["onnxruntime", "litert", "native"]', "backends = []"),
            "at least one backend",
        ),
        (
            GOOD.replace('onnxruntime = ["float32", "float16", "int8"]', "onnxruntime = []"),
            "no entry for backend",
        ),
        ("\xff", "cannot be used"),
    ],
)
def test_faulty_files(text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "targets" / "mine"
    folder.mkdir(parents=True)
    (folder / "target.toml").write_text(text, encoding="latin-1")
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path))
    with pytest.raises(UsageError, match=problem) as caught:
        Target.load("mine")
    assert "\n" not in str(caught.value)


def test_a_board_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "targets" / "mine"
    folder.mkdir(parents=True)
    (folder / "target.toml").write_text(GOOD)
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path))
    assert Target.load("mine").name == "mine"
    assert {"mine", "rpi5"} <= set(Target.names())


# ---- this machine


def test_host_is_this_machine() -> None:
    here = Target.load("host")
    assert here.name == "host"
    assert here.dram_bytes > 2**28
    assert sum(c.cores for c in here.cpus) >= 1
    assert here.dram_bytes_per_s is None or here.source("dram_bytes_per_s")
    assert [path for path, _ in figures(here) if not here.source(path)] == []


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def arm_core(index: int, part: int, features: str, implementer: int = 0x41) -> str:
    return (
        f"processor\t: {index}\nFeatures\t: {features}\nCPU implementer\t: {implementer:#x}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {part:#x}\nCPU revision\t: 1\n\n"
    )


MEMORY = {"proc/meminfo": "MemTotal:        8000000 kB\nMemFree: 1 kB\n"}
V8 = "fp asimd evtstrm aes cpuid"
V82 = V8 + " fphp asimdhp asimddp"


def cache(cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    base = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}/"
    values = {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}
    return {base + key: value + "\n" for key, value in values.items()}


def test_detects_a_raspberry_pi_5(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            **MEMORY,
            "proc/cpuinfo": "".join(arm_core(i, 0xD0B, V82) for i in range(4)),
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
            **cache(0, 0, 1, "Data", "64K", "0"),
            **cache(0, 1, 1, "Instruction", "32K", "0"),
            **cache(0, 2, 2, "Unified", "512K", "0"),
            **cache(0, 3, 3, "Unified", "2M", "0-3"),
        },
    )
    here = host.detect(root)
    (cpu,) = here.cpus
    assert (here.arch, here.dram_bytes, here.dram_bytes_per_s) == ("aarch64", 8_000_000 * 1024, 17.1e9)
    assert cpu == dataclasses.replace(Target.load("rpi5").cpus[0], isa=("neon", "fp16", "dotprod"))
    assert here.software[0].os.startswith("Debian")
    assert "rpi5" in (here.source("dram_bytes_per_s") or "")
    assert host.matches(Target.load("rpi5"), root=root) == (True, "")
    runs, why = host.matches(Target.load("rpi4"), root=root)
    assert runs
    assert "this is rpi5" in why
    assert "no i8mm, bf16 here" in host.matches(Target.load("android-arm64-i8mm"), root=root)[1]


def test_detects_clusters_and_what_all_their_cores_have(tmp_path: Path) -> None:
    cores = [arm_core(i, 0xD05, V82) for i in range(4)] + [
        arm_core(4, 0xD44, V82 + " i8mm"),
        arm_core(5, 0xD44, V82),
    ]
    clocks = {
        f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": f"{k}\n"
        for i, k in ((0, 1.8e6), (4, 2.84e6))
    }
    clocks = {name: f"{int(float(text))}\n" for name, text in clocks.items()}
    here = host.detect(tree(tmp_path, {**MEMORY, **clocks, "proc/cpuinfo": "".join(cores)}))
    assert [(c.name, c.cores) for c in here.cpus] == [("Cortex-X1", 2), ("Cortex-A55", 4)]
    assert here.cpus[0].isa == ("neon", "fp16", "dotprod")  # core 5 has no i8mm
    assert here.dram_bytes_per_s is None
    assert here.gpu is None


def test_detects_a_jetson_and_its_image(tmp_path: Path) -> None:
    files = {
        **MEMORY,
        "proc/cpuinfo": "".join(arm_core(i, 0xD42, V82) for i in range(12)),
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    }
    here = host.detect(tree(tmp_path, files))
    orin = Target.load("jetson-orin")
    assert here.gpu == orin.gpu
    assert (here.software[0].jetpack, here.software[0].tensorrt) == ("6.2", "10.3")
    assert here.cpus[0].name == "Cortex-A78AE"
    assert [path for path, _ in figures(here) if not here.source(path)] == []


def test_detects_x86(tmp_path: Path) -> None:
    flags = "fpu sse4_1 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512vbmi avx_vnni amx_int8"
    core = "processor\t: {}\nvendor_id\t: GenuineIntel\nmodel name\t: Some Xeon\nflags\t\t: " + flags + "\n\n"
    here = host.detect(tree(tmp_path, {**MEMORY, "proc/cpuinfo": core.format(0) + core.format(1)}))
    assert (here.arch, here.cpus[0].name, here.cpus[0].cores) == ("x86_64", "Some Xeon", 2)
    assert {"avx2", "avx512_vnni", "avx512_vbmi", "avx_vnni", "amx_int8"} <= set(here.cpus[0].isa)
    assert here.cpus[0].clock_hz is None
    assert here.channel_granularity["float32"] == 16


@pytest.mark.parametrize("cpuinfo", [None, "", "Hardware : none\n"])
def test_an_unreadable_machine_is_an_error_not_a_guess(cpuinfo: str | None, tmp_path: Path) -> None:
    root = tree(tmp_path, MEMORY if cpuinfo is None else {**MEMORY, "proc/cpuinfo": cpuinfo})
    with pytest.raises(UsageError, match="target 'host'"):
        host.detect(root)


def test_an_unknown_arm_core_keeps_its_number(tmp_path: Path) -> None:
    here = host.detect(tree(tmp_path, {**MEMORY, "proc/cpuinfo": arm_core(0, 0xFFF, V8, 0x61)}))
    assert here.cpus[0].name == "ARM core 0x61/0xfff"


def test_a_tensorrt_bundle_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cuda_devices", lambda: 0)
    runs, why = host.matches(Target.load("jetson-orin"), ["tensorrt"])
    assert not runs
    assert "no CUDA GPU" in why
    assert host.matches(Target.load("jetson-orin"), ["tensorrt", "onnxruntime"])[0]


def test_a_gpu_without_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cuda_devices", lambda: 1)
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert "python3-libnvinfer" in host.backend_problem("tensorrt")
    assert "pip install 'edgekit[onnxruntime]'" in host.backend_problem("onnxruntime")
    assert "unknown" in host.backend_problem("abacus")


def test_a_host_bundle_runs_here() -> None:
    assert host.matches(Target.load("host")) == (True, "")


# ---- edgekit targets


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.main(parser.parse_args(argv)) == 0
    return capsys.readouterr().out


def test_table_lists_every_board(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys).splitlines()
    assert lines[0].split() == ["NAME", "BOARD", "CPU", "GPU", "MEMORY", "BACKENDS"]
    assert [line.split()[0] for line in lines[1 : 1 + len(Target.names())]] == list(Target.names())


@pytest.mark.parametrize("name", Target.names())
def test_page_shows_every_fact_and_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = run(capsys, name)
    target = Target.load(name)
    for path, _ in figures(target):
        assert (target.source(path) or "") in page
    for note in target.notes:
        assert note in page
    assert "Measured here: nothing" in page


def test_page_states_units(capsys: pytest.CaptureFixture[str]) -> None:
    page = " ".join(run(capsys, "jetson-orin").split())
    for words in (
        "gpu.int8_tops 85.2 TOPS",
        "dram_bytes_per_s 204.8 GB/s",
        "gpu.clock_hz 1.3 GHz",
        "dram_bytes 64 GiB",
        "cpus.0.l2_bytes 256 KiB",
        "dla.int8_tops 52.5 TOPS",
    ):
        assert words in page


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    everything = json.loads(run(capsys, "--json"))["targets"]
    assert [t["name"] for t in everything] == list(Target.names())
    assert from_json(Target, json.loads(run(capsys, "rpi5", "--json")), "rpi5") == Target.load("rpi5")

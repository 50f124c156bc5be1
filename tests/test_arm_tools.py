"""tools/arm on the workstation: its board profiles, pins, counter, comparison and failure modes. No emulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import host
from edgekit.target import Target
from tests.arm.test_board import TARGETS
from tests.arm.test_bundles import unmatched
from tests.helpers import ROOT, load_script

ARM = ROOT / "tools" / "arm"


devices = load_script("tools/arm/devices.py", "arm_devices")


@pytest.mark.parametrize("name", devices.DEVICES)
def test_a_profile_is_the_board_of_its_target(name: str, tmp_path: Path) -> None:
    devices.write(tmp_path)
    (tmp_path / name / "proc/meminfo").write_text("MemTotal: 8000000 kB\n")
    (here,) = host.detect(tmp_path / name).cpus
    board = Target.load(TARGETS[name]).cpus[0]
    assert set(board.isa) <= set(here.isa)
    if name == "v9":  # stands for a class of phones, no one board
        assert "i8mm" in here.isa
        return
    assert here.isa == board.isa
    assert here.name == board.name
    assert (here.cores, here.clock_hz) == (board.cores, board.clock_hz)
    assert (here.l1d_bytes, here.l2_bytes, here.l2_cores) == (board.l1d_bytes, board.l2_bytes, board.l2_cores)
    assert here.l3_bytes == board.l3_bytes


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_arm_wheels_are_those_of_the_workstation() -> None:
    shared = pins(ROOT / "constraints.txt")
    arm = pins(ARM / "requirements.txt")
    assert all(arm.values())
    assert {name: version for name, version in arm.items() if shared.get(name, version) != version} == {}


def test_kernels_are_compiled_with_the_flags_of_setup_py() -> None:
    setup = (ROOT / "setup.py").read_text()
    listed = re.search(r"^FLAGS = \[(.*?)\]", setup, re.M)
    standard = re.search(r"cxx_std=(\d+)", setup)
    assert listed
    assert standard
    ours = re.search(r'^FLAGS="(.*)"', (ARM / "cross.sh").read_text(), re.M)
    assert ours
    assert set(ours[1].split()) == {f"-std=c++{standard[1]}", *re.findall(r'"(.*?)"', listed[1])}
    linked = re.search(r"^LINKED = \[([^]]*)\]", setup, re.M)
    theirs = re.search(r'^LINKED="(.*?)"', (ARM / "cross.sh").read_text(), re.M)
    assert linked and theirs
    assert theirs[1].split() == re.findall(r'"(.*?)"', linked[1])


@pytest.mark.parametrize("script", sorted(ARM.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


# ---- comparison of detections: it must be able to fail

ONE = {"boxes": [[10.0, 20.0, 30.0, 40.0]], "scores": [0.5], "classes": [2]}
NONE: dict[str, list] = {"boxes": [], "scores": [], "classes": []}


@pytest.mark.parametrize(
    ("other", "problems"),
    [
        (ONE, 0),
        ({**ONE, "scores": [0.50009]}, 0),
        ({**ONE, "scores": [0.50011]}, 2),
        ({**ONE, "boxes": [[10.0, 20.0, 30.049, 40.0]]}, 0),
        ({**ONE, "boxes": [[10.0, 20.0, 30.051, 40.0]]}, 2),
        ({**ONE, "classes": [1]}, 2),
        (NONE, 1),
    ],
)
def test_comparison(other: dict, problems: int) -> None:
    assert len(unmatched(ONE, other, 0.05)) == problems
    assert len(unmatched(other, ONE, 0.05)) == problems


def test_a_box_at_the_threshold_may_be_on_one_side_only() -> None:
    assert unmatched({**ONE, "scores": [0.05005]}, NONE, 0.05) == []
    assert len(unmatched({**ONE, "scores": [0.0502]}, NONE, 0.05)) == 1


# ---- the instruction counter knows its classes

WORDS = {  # as GNU as encodes them
    0x4E829420: "dot",  # sdot v0.4s, v1.16b, v2.16b
    0x2E829420: "dot",  # udot v0.2s, v1.8b, v2.8b
    0x4FA2E820: "dot",  # sdot v0.4s, v1.16b, v2.4b[3]
    0x6FB2E029: "dot",  # udot v9.4s, v1.16b, v18.4b[1]
    0x4E829C20: "dot",  # usdot v0.4s, v1.16b, v2.16b
    0x4F82F820: "dot",  # usdot v0.4s, v1.16b, v2.4b[2]
    0x4F02F820: "dot",  # sudot v0.4s, v1.16b, v2.4b[2]
    0x4E82A420: "mmla",  # smmla v0.4s, v1.16b, v2.16b
    0x6E82A420: "mmla",  # ummla
    0x4E82AC20: "mmla",  # usmmla
    0x4E22CC20: "simd",  # fmla v0.4s, v1.4s, v2.4s
    0x4FA21020: "simd",  # fmla v0.4s, v1.4s, v2.s[1]
    0x0E228020: "simd",  # smlal v0.8h, v1.8b, v2.8b
    0xF9400020: "load_store",  # ldr x0, [x1]
    0xAD000440: "load_store",  # stp q0, q1, [x2]
    0x8B020020: "",  # add x0, x1, x2
    0x14000000: "",  # b .
    0x04900020: "sve",  # mul z0.s, p0/m, z0.s, z1.s
}


def test_counter_classes(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed"
    words = ",".join(map(hex, WORDS))
    (tmp_path / "probe.c").write_text(
        f'#include "{ARM / "count.c"}"\n'
        f"int main(void) {{ uint32_t w[] = {{{words}}};\n"
        "  for (size_t i = 0; i < sizeof w / sizeof *w; i++) {\n"
        '    for (int c = 1; c < CLASSES; c++) if (classes_of(w[i]) >> c & 1) printf("%s ", class_name[c]);\n'
        '    puts(""); } return 0; }\n'
        "void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id a, tb_callback b) {(void)a; (void)b;}\n"
        "void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *a, vcpu_callback b, enum cb_flags c,"
        " void *d) {(void)a; (void)b; (void)c; (void)d;}\n"
        "void qemu_plugin_register_vcpu_syscall_cb(plugin_id a, syscall_callback b) {(void)a; (void)b;}\n"
        "void qemu_plugin_register_atexit_cb(plugin_id a, exit_callback b, void *c) {(void)a; (void)b; (void)c;}\n"
        "size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *a) {(void)a; return 0;}\n"
        "struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *a, size_t b)"
        " {(void)a; (void)b; return 0;}\n"
        "const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *a) {(void)a; return 0;}\n"
    )
    program = tmp_path / "probe"
    subprocess.run([compiler, "-Wall", "-Werror", "-o", program, tmp_path / "probe.c"], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    for (word, kind), line in zip(WORDS.items(), lines, strict=True):
        found = set(line.split())
        expected = {"simd", kind} if kind in ("dot", "mmla") else {kind} - {""}
        assert found == expected, hex(word)


# ---- when something cannot be had


def run_test_sh(
    tmp_path: Path, stubs: dict[str, str], release: str = "ID=debian\nVERSION_ID=12\n"
) -> tuple[int, str]:
    """tools/arm/test.sh with some programs replaced; (exit code, all output)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"uname": "echo x86_64", **stubs}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "os-release").write_text(release)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OS_RELEASE": str(tmp_path / "os-release"),
        "EDGEKIT_ARM_DIR": str(tmp_path / "arm"),
        "PYTHON": sys.executable,
    }
    ran = subprocess.run(
        ["bash", str(ARM / "test.sh")],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout


def test_skips_with_a_reason_when_the_index_is_out_of_reach(tmp_path: Path) -> None:
    code, output = run_test_sh(tmp_path, {"apt-get": "exit 100"})
    assert code == 0
    assert "the Debian package index cannot be reached" in output
    assert output.splitlines()[-1].startswith("skipped: ")


def test_a_failed_download_is_a_failure(tmp_path: Path) -> None:
    only_update = 'case "$*" in *" update") exit 0;; esac; echo "E: Unable to locate package"; exit 100'
    code, output = run_test_sh(tmp_path, {"apt-get": only_update})
    assert code == 1
    assert "Unable to locate package" in output
    assert "skipped" not in output


@pytest.mark.parametrize(
    ("stubs", "release", "words"),
    [
        ({"uname": "echo aarch64"}, "ID=debian\nVERSION_ID=12\n", "needs an x86_64 machine"),
        ({}, "ID=ubuntu\nVERSION_ID=24.04\n", "needs Debian 12, this is ubuntu 24.04"),
    ],
)
def test_another_machine_is_told_what_is_needed(
    stubs: dict[str, str], release: str, words: str, tmp_path: Path
) -> None:
    code, output = run_test_sh(tmp_path, stubs, release)
    assert code == 1
    assert words in output

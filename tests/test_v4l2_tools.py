"""What tools/camera says where its guest cannot be had. Booting it is `make test-camera`."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

VM, TEST = ROOT / "tools" / "camera" / "vm.sh", ROOT / "tools" / "camera" / "test.sh"


def run(
    script: Path, *arguments: str, stubs: dict[str, str], folder: Path, **more: str
) -> subprocess.CompletedProcess:
    """`script` on a machine where the programs in `stubs` do something else."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(stat.S_IRWXU)
    env = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CAMERA_VM_CACHE": str(folder / "cache"),
        **more,
    }
    if "CAMERA_REQUIRED" not in more:
        env.pop("CAMERA_REQUIRED", None)
    return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)


ANOTHER = {"uname": "echo Linux aarch64"}
NO_NETWORK = {
    "apt-get": 'echo "E: Failed to fetch http://deb" >&2; exit 100',
    "apt-cache": "echo '  Depends: linux-image-6.1.0-1-amd64'",
}


def test_another_machine_is_a_skip_that_says_so(tmp_path):
    done = run(TEST, stubs=ANOTHER, folder=tmp_path)
    assert done.returncode == 0
    assert "skipped: camera tests need Debian on x86-64" in done.stdout
    assert "needs Linux on x86-64, this is Linux aarch64" in done.stderr


def test_another_machine_is_a_failure_where_required(tmp_path):
    done = run(TEST, stubs=ANOTHER, folder=tmp_path, CAMERA_REQUIRED="1")
    assert done.returncode == 69
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("script", [VM, TEST])
def test_no_network_is_an_error(tmp_path, script):
    if os.uname().machine != "x86_64" or not Path("/usr/bin/dpkg-deb").exists():
        pytest.skip("needs Debian on x86-64")
    done = run(script, "true", stubs=NO_NETWORK, folder=tmp_path)
    assert done.returncode == 70, done.stderr
    assert "skipped" not in done.stdout
    assert ("cannot" in done.stderr and "Failed to fetch" in done.stderr) or "Run as root" in done.stderr
    assert not list((tmp_path / "cache").glob("build.*"))


def test_usage(tmp_path):
    done = run(VM, stubs={}, folder=tmp_path)
    assert done.returncode == 64
    assert "Usage: vm.sh COMMAND" in done.stderr

"""`edgekit doctor`: finds what is missing and what is broken, and never dies of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit import host
from edgekit.cli import doctor
from edgekit.cli.doctor import PACKAGES, Package
from tests.helpers import ROOT

LIGHT = tuple(p for p in PACKAGES if p.module not in ("torch", "onnxscript", "supervision"))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages that take seconds to import."""
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda: examine(LIGHT))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    code = doctor.main(parser.parse_args(argv))
    return code, capsys.readouterr().out


@pytest.mark.usefixtures("light")
def test_this_machine_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    code, page = run(capsys)
    assert code == 0
    assert "No problems found." in page
    assert "run onnxruntime bundles  yes" in page
    assert all(package.distribution in page for package in LIGHT)


@pytest.mark.usefixtures("light")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--json")
    report = json.loads(text)
    assert (code, report["ok"], report["problems"]) == (0, True, [])
    states = {p["module"]: p for p in report["packages"]}
    assert states["numpy"]["status"] == "ok"
    assert states["numpy"]["version"].count(".") == 2
    assert report["machine"]["name"] == "host"
    assert report["can_run"]["onnxruntime"] == {"ok": True, "problem": ""}
    assert report["cache"]["free_bytes"] > 0


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of the processes that doctor starts."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return tmp_path


def package(module: str) -> Package:
    return Package(module, f"{module}-dist", "build", "some", "tests")


def test_each_kind_of_package(modules: Path) -> None:
    (modules / "good_one.py").write_text("__version__ = '1.2.3'\nprint('ok good_one 9.9')\nprint('noise')\n")
    (modules / "bad_one.py").write_text("raise RuntimeError('libfoo.so.3:\\ncannot open')\n")
    (modules / "quitting.py").write_text("import sys\nsys.exit(3)\n")
    (modules / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (modules / "needy.py").write_text("import a_module_that_is_not_there\n")
    names = ["good_one", "bad_one", "quitting", "crashing", "needy", "absent_one", "absent.sub", "last_one"]
    (modules / "last_one.py").write_text("__version__ = '2'\n")
    found = {p.module: p for p in doctor.probe([package(name) for name in names])}
    assert (found["good_one"].status, found["good_one"].version) == ("ok", "1.2.3")
    assert (found["bad_one"].status, found["bad_one"].error) == (
        "broken",
        "RuntimeError: libfoo.so.3: cannot open",
    )
    assert (found["quitting"].status, found["quitting"].error) == ("broken", "SystemExit: 3")
    assert found["crashing"].status == "broken"
    assert "code -11" in found["crashing"].error
    assert found["needy"].status == "broken"  # its own import is missing: installed, but it does not work
    assert "a_module_that_is_not_there" in found["needy"].error
    assert found["absent_one"].status == found["absent.sub"].status == "missing"
    assert (found["last_one"].status, found["last_one"].version) == ("ok", "2")


def test_an_import_that_hangs(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "hanging.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(doctor, "TIMEOUT_S", 1)
    (found,) = doctor.probe([package("hanging")])
    assert (found.status, found.error) == ("broken", "did not import within 1 s")


def test_broken_libraries_are_a_problem(
    modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = ("onnxruntime", "ai_edge_litert", "openvino")
    monkeypatch.setenv("EDGEKIT_NATIVE_LIBRARY", str(modules / "none.so"))
    for name in broken:
        (modules / f"{name}.py").write_text("raise ImportError('GLIBC_2.99 not found')\n")
    examine = doctor.examine
    few = tuple(p for p in PACKAGES if p.module in ("numpy", *broken))
    monkeypatch.setattr(doctor, "examine", lambda: examine(few))
    code, page = run(capsys)
    assert code == 1
    assert "GLIBC_2.99 not found" in page
    assert "problem: no backend can run bundles here" in page


def test_missing_packages_come_with_their_pip_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    absent = (
        PACKAGES[0],
        Package("onnxruntime", "onnxruntime", "build", "onnxruntime", "x"),
        package("absent_one"),
    )
    report = doctor.examine(absent)
    assert report["can_build"] == {"ok": False, "missing": ["absent_one-dist"]}
    assert report["packages"][2]["install"] == "pip install 'edgekit[some]'"
    assert not report["ok"]
    assert "pip install 'edgekit[onnxruntime]'" in report["can_run"]["onnxruntime"]["problem"]


def test_every_extra_exists_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for entry in PACKAGES:
        assert not entry.extra or f"\n{entry.extra} = [" in text, entry


def test_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EDGEKIT_CACHE", str(blocked / "cache"))
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda: examine(PACKAGES[:2]))
    code, page = run(capsys)
    assert code == 1
    assert f"problem: cache {blocked / 'cache'}: cannot be written" in page
    assert "EDGEKIT_CACHE" in page


def test_no_room_warns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_cache", lambda: {"path": "/c", "free_bytes": 10 * 1024**2, "problem": ""})
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda: examine(PACKAGES[:2]))
    code, page = run(capsys)
    assert (code, "less than 512 MiB free" in page) == (0, True)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (("missing", ""), "not built, the numpy references run instead"),
        (
            ("broken", "ImportError: undefined symbol: x"),
            "built but does not load: ImportError: undefined symbol",
        ),
        (("ok", ""), ""),
    ],
)
def test_kernels(state: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_import", lambda modules: dict.fromkeys(modules, state))
    kernels: dict[str, Any] = doctor._kernels()
    assert kernels["native"] is (state[0] == "ok")
    assert words in kernels["problem"]


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_PYTHON", (sys.version_info.major, sys.version_info.minor + 1))
    assert "too old" in doctor.examine(PACKAGES[:2])["problems"][0]

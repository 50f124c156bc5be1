"""A small run of tools/fuzz.py, and proof that it sees what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import ROOT

# what a handler may do to the child that runs it, and what has to be counted then
STAND_IN = """
import json, os, sys, time, warnings
sys.path.insert(0, "tools")
import fuzz
from edgekit.errors import BundleError, OutputError

def handle(kind, seed):
    if kind == "refuse": raise BundleError("no")
    if kind == "lines": raise BundleError("one\\ntwo")
    if kind == "wrong code": raise OutputError("no")
    if kind == "error": return {}["x"]
    if kind == "warn": warnings.warn("overflow", RuntimeWarning)
    if kind == "native": os.kill(os.getpid(), 11)
    if kind == "exit": os._exit(0)
    if kind == "hang": time.sleep(600)
    if kind == "memory": return str(len(bytes(3 << 30)))
    if kind == "deep": return handle(kind, seed)
    return kind

kinds = ["refuse", "identical", "lines", "changed", "native", "error", "hang", "wrong code", "exit", "memory", "deep", "late", "warn"]
print(json.dumps([[job[0], outcome] for job, outcome, _ in fuzz.run([(k, 0) for k in kinds], handle, 2.0, 1 << 30)]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_each_outcome_is_counted() -> None:
    done = run("-c", STAND_IN)
    assert done.returncode == 0, done.stderr
    assert dict(json.loads(done.stdout)) == {
        "refuse": "refused",
        "identical": "identical",
        "lines": "crash",
        "changed": "changed",
        "native": "crash",
        "error": "crash",
        "hang": "hang",
        "wrong code": "crash",
        "exit": "crash",
        "memory": "crash",
        "deep": "crash",
        "late": "late",
        "warn": "crash",
    }


def fuzzed(*words: str) -> dict[str, Any]:
    done = run("tools/fuzz.py", "--json", *words)
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if result["failures"] else 0)
    return result


def test_some_bundles() -> None:
    result = fuzzed("--bundles", "165", "--models", "0")
    assert result["failures"] == []
    assert result["mutants"] == 165 == sum(sum(found.values()) for found in result["kinds"].values())
    assert result["refused"] > 140
    assert len(result["kinds"]) == 33


def test_some_models() -> None:
    result = fuzzed("--bundles", "0", "--models", "48", "--limit", "60")
    assert result["failures"] == []
    assert result["refused"] >= 24
    assert result["identical"] >= 4, "the unharmed parts of the model are read"
    assert len(result["kinds"]) == 24


def test_a_reader_that_looks_away_is_caught(tmp_path: Path) -> None:
    """With the digest checks taken out, accepted mutants with other content are reported."""
    script = (
        "import sys; sys.path.insert(0, 'tools'); import fuzz\n"
        "from edgekit import bundle\nfrom hashlib import sha256\n"
        "bundle.Bundle._verify = lambda self, name: self._verified.add(name)\n"
        "sys.exit(fuzz.main(['--bundles', '60', '--models', '0', '--json']))"
    )
    done = run("-c", script)
    assert done.returncode == 1
    assert json.loads(done.stdout)["changed"] >= 1

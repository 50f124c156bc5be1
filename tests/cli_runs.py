"""Running the command line in tests: in this process (fast) or as its own process (signals, pipes)."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.cli.main import main
from tests.helpers import ROOT


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def cli(*words: object) -> Ran:
    """`edgekit WORDS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return Ran(code, out.getvalue(), err.getvalue())


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}


def process(*words: object, python: str = "", cwd: Path | None = None, **options: Any) -> Ran:
    """`edgekit WORDS...` as a process; `python` runs in it first."""
    code = f"{python}\nfrom edgekit.cli.main import run\nrun()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *(w if isinstance(w, bytes) else str(w) for w in words)],
        capture_output=True,
        timeout=120,
        cwd=cwd,
        env=environment(options.pop("env", None)),
        check=False,
        **options,
    )
    return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode(errors="replace"))


def refusal(ran: Ran, code: int, *needles: str) -> str:
    """Checks that `ran` ended with one line that holds `needles`, and nothing else was said; the line.

    Progress of the steps before the refusal may stand above the line.
    """
    *_, last = ran.err.splitlines() or [""]
    assert ran.code == code, ran
    assert ran.out == "", ran
    assert last.startswith("edgekit: "), ran
    assert "internal error" not in ran.err, ran
    assert "Traceback" not in ran.err, ran
    assert ran.err.count("edgekit: ") == 1, ran
    for needle in needles:
        assert needle.lower() in last.lower(), (needle, last)
    return last

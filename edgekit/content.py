"""Finds the content folders (targets/, calibration/, apps/) by path, in a checkout or in a wheel.

Search order: each entry of `$EDGEKIT_PATH` (os.pathsep separated roots that hold the three
folders), the checkout around this package, then the copy installed with the wheel.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = ("targets", "calibration", "apps")


def folders(kind: str) -> tuple[Path, ...]:
    """Existing folders called `kind`, first match wins."""
    assert kind in FOLDERS
    package = Path(__file__).resolve().parent
    roots = [Path(entry) for entry in os.environ.get("EDGEKIT_PATH", "").split(os.pathsep) if entry]
    roots += [package.parent, package / "_content"]
    found = [root / kind for root in roots if (root / kind).is_dir()]
    # a folder of the same name beside site-packages is not ours: ours sits by setup.py
    return tuple(p for p in found if p.parent != package.parent or (package.parent / "setup.py").is_file())


def find(kind: str, name: str) -> Path | None:
    """The first `<kind>/<name>` on the search path, or None."""
    return next((f / name for f in folders(kind) if (f / name).exists()), None)

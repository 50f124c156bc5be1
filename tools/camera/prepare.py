"""Writes what the camera tests need into a folder that the guest sees: the shipped detector's bundle and a tiny one.

python tools/camera/prepare.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import edgekit
from tools.soak import tiny_bundle


def main(folder: str) -> None:
    bundle = edgekit.app_bundle("detect")
    shutil.copy(bundle, Path(folder) / "detector.edge")
    shutil.copy(tiny_bundle(Path(folder)), Path(folder) / "tiny.edge")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

"""What benchmarks share: where a line comes from, and where things lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The checkout's commit, `-dirty` when files were changed; `unknown` outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def reference_data() -> Path:
    """Folder of trained models and labelled pictures beside the checkout (or in $EDGEKIT_SHARED), there or not."""
    return Path(os.environ.get("EDGEKIT_SHARED", ROOT.parent / "shared")) / "data"


def peers() -> Path:
    """Where the peers' environments and files lie (peers/setup.sh): $EDGEKIT_PEERS, else in edgekit's own cache."""
    from edgekit.toolchain import cache

    return Path(os.environ.get("EDGEKIT_PEERS") or cache.cache_dir() / "peers")


def say(text: str) -> None:
    """Progress, beside the results."""
    print(f"  {text}", file=sys.stderr, flush=True)


def warn_if_busy() -> None:
    """Before anything is timed: others at work here change what is measured."""
    if os.getloadavg()[0] > 0.5:
        print(
            f"warning: load is {os.getloadavg()[0]:.1f}; ratios hold better than milliseconds",
            file=sys.stderr,
        )

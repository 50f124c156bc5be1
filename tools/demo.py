"""make demo: the shipped detector, built for three boards, proven, run on a picture and reported on.

Writes to runs/demo/: three bundles, street.png (annotated), street.jsonl, report.html.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from edgekit.cli.main import main as edgekit

OUT = Path("runs/demo")
TARGETS = ("jetson-orin", "rpi5", "host")
SOURCE = "synthetic://street?seed=31415&frames=1&size=1280x720"


def step(*words: str) -> None:
    """Run one edgekit command as a user would, and stop the demo when it fails."""
    print(f"\n$ edgekit {' '.join(words)}", flush=True)
    code = edgekit(words)
    if code:
        sys.exit(code)


def main() -> None:
    started = time.monotonic()
    step("build", "--target", ",".join(TARGETS), "--out", str(OUT))
    bundles = {t: str(next(OUT.glob(f"*.{t}.edge"))) for t in TARGETS}
    step(
        "run",
        bundles["host"],
        "--source",
        SOURCE,
        "--sink",
        str(OUT / "street.png"),
        "--sink",
        str(OUT / "street.jsonl"),
    )
    step("bench", bundles["host"], "--vs", bundles["rpi5"], "--runs", "100")
    step("verify", bundles["jetson-orin"])
    step("report", *bundles.values(), "--out", str(OUT / "report.html"))
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Look at {OUT / 'street.png'} and {OUT / 'report.html'}"
    )


if __name__ == "__main__":
    main()

"""count.py BUNDLE --board pi5: instructions per inference of each variant on an emulated board, as JSON.

Runs on the workstation, after tools/arm/setup.sh; the same as `edgekit tune BUNDLE --board pi5 --json`.
A proxy: counts repeat to a fraction of a percent and know nothing of caches, memory or issue width.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--board", default="pi5", help="target (rpi5) or profile (pi5); default: pi5")
    parser.add_argument("--variant", action="append", default=[], help="only this one; may be repeated")
    args = parser.parse_args()
    from edgekit.errors import EdgekitError
    from edgekit.toolchain.arm_count import count

    try:
        print(json.dumps(count(args.bundle, args.board, tuple(args.variant)), indent=1))
    except EdgekitError as error:
        print(f"count.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

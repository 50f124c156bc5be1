"""Make an Ed25519 key pair for signing bundles: `python tools/keygen.py FOLDER [NAME]`.

Writes NAME.key.pem (keep it secret: `edgekit build --sign`) and NAME.pub.pem (give it to the
devices: `edgekit verify --key`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgekit.errors import EdgekitError
from edgekit.signing import generate_keys


def main() -> int:
    parser = argparse.ArgumentParser(description="Make an Ed25519 key pair for signing bundles.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", nargs="?", default="edgekit")
    args = parser.parse_args()
    try:
        for path in generate_keys(args.folder, args.name):
            print(path)
    except EdgekitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""expect_native.py FOLDER: what operators of the native engine give on this machine, for the boards to reproduce.

Writes FOLDER/native.npz: outputs by the case's name (tests/arm/native_cases.py). tests/arm/test_native_arm.py compares.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main(folder: Path) -> None:
    from tests.arm.native_cases import cases
    from tests.native_nets import isas, run

    os.environ["EDGEKIT_NATIVE_SPLIT"] = "0"
    best = isas()[0]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, payload, inputs, out in cases():
        found[name] = run(payload, inputs, out, "scalar")
        if run(payload, inputs, out, best).tobytes() != found[name].tobytes():
            raise AssertionError(f"{name}: {best} is not what scalar is")
    np.savez(folder / "native.npz", **found)
    print(f"arm: {len(found)} operators of the native engine, by scalar and {best}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

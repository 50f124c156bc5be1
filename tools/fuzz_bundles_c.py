"""Damage bundles and manifests in many ways and open each with the C library; what opens is run on a picture.

    EDGEKIT_NATIVE_LIBRARY=<build with -fsanitize=address,undefined> LD_PRELOAD="<libasan.so> <libubsan.so>" \\
        ASAN_OPTIONS=detect_leaks=0 python tools/fuzz_bundles_c.py --mutants 100000

A mutant must be refused with a status and a line, or open and run; the sanitizers end the program where memory is misused.
The same seed gives the same mutants. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgekit.manifest import payload_digest
from edgekit.pixels import PixelLayout
from edgekit.schema import canonical_json
from edgekit.tasks.preprocess import ImagePreprocess
from tests import native_bundles, native_c
from tests.bundle_samples import files_of, rebuild
from tests.native_c import Detector, Failed, opened
from tests.test_native_bundle import mutate
from tests.test_native_capi import picture


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the container changed, or some taken out, doubled or cut off."""
    bad = bytearray(data)
    table = data.rindex(b"PK\5\6")
    table = int.from_bytes(data[table + 16 : table + 20], "little")
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = (
            rng.randrange(table, len(bad))
            if rng.random() < 0.5 and table < len(bad)
            else rng.randrange(len(bad))
        )
        kind = rng.randrange(5)
        if kind == 0:
            bad[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 1:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del bad[at : at + rng.choice((1, 2, 4, 64))]
        elif kind == 3:
            bad[at:at] = bad[at : at + rng.choice((1, 2, 4, 64))]
        else:
            bad[at : at + 4] = rng.choice((0, 1, 0xFFFF, 0xFFFFFFFF, len(bad), 1 << 31)).to_bytes(4, "little")
        if not bad:
            break
    return bytes(bad)


def text_changed(files: dict[str, bytes], rng: random.Random) -> bytes:
    """A few bytes of the manifest's text changed, its checksum made to fit."""
    text = bytearray(files["manifest.json"])
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(text))
        text[at : at + rng.choice((0, 1, 1, 2))] = rng.choice(
            (
                b'"',
                b"\\",
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b"0",
                b"-",
                b"e",
                b".",
                b"\xff",
                b"\xc3",
                b"\\u0000",
                b"9" * 30,
                b"[" * 70,
            )
        )
    return rebuild({**files, "manifest.json": bytes(text)})


def tree_changed(files: dict[str, bytes], rng: random.Random) -> bytes:
    """Values of the manifest changed, its digests made to fit."""
    tree = json.loads(files["manifest.json"])
    for _ in range(rng.choice((1, 1, 2, 4))):
        mutate(tree, rng)
    tree["payload_digest"] = payload_digest(tree)
    return rebuild({**files, "manifest.json": canonical_json(copy.deepcopy(tree), "m")})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pixels = picture(PixelLayout("nv12", 50, 40), 1)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for i, family in enumerate(("yolox", "yolov5", "yolov8", "fastestdet", "rows")):
            payload, spec = native_bundles.detector(ImagePreprocess(32, 32), family, seed=i)  # type: ignore[arg-type]
            samples.append(files_of(native_bundles.write(Path(folder) / "x.edge", payload, spec)))
    counts: Counter[str] = Counter()
    for _ in range(args.mutants):
        files = rng.choice(samples)
        kind = rng.choice(("bytes", "text", "tree", "tree"))
        if kind == "bytes":
            data = bytes_changed(rebuild(files), rng)
        else:
            data = text_changed(files, rng) if kind == "text" else tree_changed(files, rng)
        try:
            with opened(data) as bundle:
                detector = Detector(bundle)
                detector(pixels)
                detector.close()
            counts[f"{kind}: ran"] += 1
        except Failed as failed:
            if failed.status == native_c.INTERNAL:  # a mistake of the library's own
                raise
            counts[f"{kind}: refused"] += 1
    print(json.dumps({"mutants": args.mutants, "seed": args.seed, "outcomes": dict(sorted(counts.items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The C library's reader of bundles refuses what Python's refuses, with one line, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import types
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import archive
from edgekit.bundle import Bundle
from edgekit.errors import BundleError
from edgekit.manifest import payload_digest
from edgekit.schema import SchemaError, canonical_json, from_json, parse_json
from edgekit.tasks.classify.pipeline import ClassifyPipeline
from edgekit.tasks.classify.spec import ClassifySpec
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.tasks.preprocess import ImagePreprocess
from tests import native_bundles, native_c
from tests.bundle_samples import files_of, forge, rebuild
from tests.native_c import Classifier, Detector, Failed, opened


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    payload, spec = native_bundles.detector(ImagePreprocess(32, 32), "yolov5")
    return files_of(native_bundles.write(tmp_path_factory.mktemp("good") / "x.edge", payload, spec))


def c_refuses(data: bytes) -> Failed | None:
    """As `python_refuses`."""
    try:
        with opened(data) as bundle:
            if bundle.facts["task"] in ("detect", "classify"):
                (Detector if bundle.facts["task"] == "detect" else Classifier)(bundle).close()
        return None
    except Failed as failed:
        return failed


def refused(data: bytes) -> Failed:
    with pytest.raises(Failed) as caught, opened(data):
        pass
    assert caught.value.status in (native_c.BAD_FILE, native_c.UNSUPPORTED), caught.value
    assert (
        caught.value.line.startswith("bundle: ")
        and caught.value.line.isprintable()
        and len(caught.value.line) < 600
    )
    return caught.value


def python_refuses(path: Path) -> str | None:
    """Why Python does not take the bundle, its payload and its pipeline; None where it does."""
    try:
        with Bundle.open(path, verify=False) as bundle:
            for _, variant in bundle.manifest.variants():
                bundle.read(variant.path)
            m = bundle.manifest
            kinds = {"detect": (DetectSpec, DetectPipeline), "classify": (ClassifySpec, ClassifyPipeline)}
            if m.task in kinds:
                spec, pipeline = kinds[m.task]
                ports = [
                    {n: np.zeros(m.tensor(n).shape, m.tensor(n).dtype.value) for n in side}
                    for side in (m.inputs, m.outputs)
                ]
                session = types.SimpleNamespace(inputs=ports[0], outputs=ports[1], run=None)
                pipeline(from_json(spec, m.pipeline, "pipeline"), session)  # type: ignore[arg-type]
        return None
    except (BundleError, SchemaError) as error:
        return str(error)


def test_files_that_are_no_bundles(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    giant = tmp_path / "giant"
    with open(giant, "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 33)
    for path, status, line in (
        (tmp_path / "none.edge", native_c.IO, "No such file"),
        (tmp_path / "fifo", native_c.BAD_FILE, "not a regular file"),
        (Path("/dev/zero"), native_c.BAD_FILE, "not a regular file"),
        (tmp_path, native_c.UNSUPPORTED, "is a folder"),
        (giant, native_c.BAD_FILE, "4 GiB"),
    ):
        with pytest.raises(Failed) as caught, opened(path):
            pass
        assert caught.value.status == status and line in caught.value.line and str(path) in caught.value.line
    for data, line in (
        (b"", "0 bytes, too short"),
        (b"#!/bin/sh" + bytes(100), "not a bundle"),
        (b"PK\3\4" + bytes(70_000), "its end is missing"),
    ):
        assert line in refused(data).line


def test_damage(good: dict[str, bytes]) -> None:
    data = rebuild(good)
    with opened(data):
        pass
    for size in (0, 1, 21, 22, 29, 5000, len(data) - 23, len(data) - 22, len(data) - 1):
        refused(data[:size])
    payload = data.index(good["segments/network/v0.ek"])
    golden = data.index(good["golden/input_0.bin"])
    places = [*range(30), *range(len(data) - 120, len(data)), *range(payload, payload + 200)]
    places += [p for p in random.Random(1).sample(range(len(data)), 300) if not golden - 12288 <= p < payload]
    seen = 0
    for place in places:
        bad = bytearray(data)
        bad[place] ^= 1 << place % 8
        name = next((n for n in ("evidence.json",) if 0 <= place - data.index(good[n]) < len(good[n])), None)
        if name is None:  # that file is not used here
            refused(bytes(bad))
            seen += 1
    assert seen > 400
    table = data.index(b"PK\1\2")
    for bad in (b"#!/bin/sh\n" + data, data + b"\0", data[:table] + bytes(64) + data[table:]):
        refused(bad)


def test_golden_values_are_checked_when_they_are_used(good: dict[str, bytes]) -> None:
    data = bytearray(rebuild(good))
    data[bytes(data).index(good["golden/input_0.bin"]) + 77] ^= 1
    with opened(bytes(data)) as bundle, pytest.raises(Failed, match=r"golden/input_0\.bin' is damaged"):
        bundle.test()


def test_each_checksum_by_itself(good: dict[str, bytes]) -> None:
    payload = "segments/network/v0.ek"
    changed = {**good, payload: good[payload][:-1] + bytes([good[payload][-1] ^ 1])}
    assert f"file '{payload}' is damaged: its SHA-256 differs" in refused(rebuild(changed)).line
    data = rebuild(good)
    crc = struct.pack("<I", zlib.crc32(good[payload]))
    assert data.count(crc) == 2
    assert f"file '{payload}' is damaged: its CRC-32 differs" in refused(data.replace(crc, b"\1\2\3\4")).line


def zipped(files: list[tuple[str, bytes]]) -> bytes:
    """The canonical zip of any names in any order, doubles included."""
    position, body, central = 0, b"", b""
    for name, data in files:
        crc = zlib.crc32(data)
        central += archive._central(name, len(data), crc, position)
        body += archive._local(name, len(data), crc, position) + data
        position = len(body)
    return body + central + archive._end(len(files), len(central), position)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "evidence//x", "evidence/.h", "evidence\\x", "C:x", "evidence/a b", "evidence/\nx", "a/b/c/d/e",
     "evidence/" + "x" * 81, "evidence/" + "x" * 300, "manifest.json", "Manifest.JSON", "evidence.json/x", "evidence/zzz", "", "a/"],
)  # fmt: skip
def test_names(good: dict[str, bytes], name: str) -> None:
    line = refused(zipped([(n, good.get(n, b"")) for n in archive.order([*good, name])])).line
    assert "file name" in line or (name == "evidence/zzz" and "does not list" in line)


def test_order_and_headers(good: dict[str, bytes]) -> None:
    assert "canonical order" in refused(zipped(list(good.items())[::-1])).line
    many = [(f"evidence/{i}", b"") for i in range(10_001)]
    assert "10001 files" in refused(zipped(many)).line
    data = rebuild(good)
    end, table = len(data) - 22, data.index(b"PK\1\2")
    for at, form, values in (
        (end + 8, "<HH", (0xFFFF, 0xFFFF)), (end + 12, "<I", (0xFFFFFFFF,)), (end + 16, "<I", (table - 1,)),
        (end + 8, "<HH", (len(good) + 1, len(good) + 1)), (end + 8, "<HH", (len(good) - 1, len(good) - 1)),
        (table + 8, "<H", (1,)), (table + 20, "<II", (0xFFFFFFFF, 0xFFFFFFFF)), (table + 20, "<II", (1 << 30, 1 << 30)),
        (table + 20, "<II", (table, table)), (table + 42, "<I", (64,)), (table + 46, "<B", (0,)), (table + 28, "<H", (9999,)),
    ):  # fmt: skip
        bad = bytearray(data)
        struct.pack_into(form, bad, at, *values)
        refused(bytes(bad))


def test_manifest_text(good: dict[str, bytes]) -> None:
    text = good["manifest.json"]
    for bad, line in (
        (b"", "expected a value"),
        (b"[]", "expected a table"),
        (text + b"\n", "something follows"),
        (json.dumps(json.loads(text), indent=1).encode(), "not canonical JSON"),
        (text.replace(b'"model":"hand-made"', b'"model":"hand-made","model":"hand-made"'), "there twice"),
        (b'{"a":' + b"[" * 100_000, "nested too deep"),
        (b"[" + b"0," * 1_000_000 + b"0]", "too many values"),
        (b" " * (17 << 20), "too large"),
    ):
        assert line in refused(rebuild({**good, "manifest.json": bad})).line
    assert (
        "manifest.sha256"
        in refused(rebuild({**good, "manifest.json": text.replace(b"made", b"laid")}, checksum=False)).line
    )
    assert "the plan was altered" in refused(forge(good, lambda t: t | {"model": "other"}, digest=False)).line
    newer = refused(forge(good, lambda t: t | {"schema_version": 2, "novelty": {}}))
    assert newer.status == native_c.UNSUPPORTED and "Upgrade" in newer.line


def numbers() -> Iterator[float]:
    rng = random.Random(4)
    yield from (
        0.0,
        -0.0,
        1e16,
        1e15,
        9999999999999998.0,
        123456789012345680.0,
        1e-4,
        1e-5,
        0.00012,
        5e-324,
        1.7976931348623157e308,
    )
    yield from (2.0**k for k in range(-1074, 1024, 7))
    for _ in range(300):
        value = struct.unpack("<d", rng.randbytes(8))[0]
        if np.isfinite(value):
            yield value
    yield from (float(np.float32(rng.gauss(0, 100))) for _ in range(100))


TEXTS = """
true false null True nul -0 00 -1 01 1. .5 1e5 1E+16 1e+16 1.0e+16 1e16 - +1 0x1 1.50 1e999 1e-999 NaN Infinity
{} [] [1,] {"a":1,} {"b":1,"a":2} {"a":1,"a":1} {"\\u0041":1} {"é":1,"z":2} {"z":1,"é":2} {a:1}
"""


def test_texts_that_are_canonical_json_or_not(good: dict[str, bytes]) -> None:
    """`provenance` may hold anything: one reader must not take what the other does not."""
    strings = [
        '"é\u2028\U0001f600\x7f"',
        '"\\u0000\\u001f\\b\\t\\n\\f\\r\\"\\\\"',
        '"\\/"',
        '"\\u0041"',
        '"\\u001F"',
        '"\\u0008"',
        '"\\ud800"',
        '"\\x"',
        '"a',
        '"\t"',
    ]
    words = TEXTS.split()
    words += ["9" * 19, "9" * 20, "", "{ }", "[1, 2]", '{"a" :1}', *("[" * n + "]" * n for n in (61, 62, 63))]
    texts: list[bytes] = [s.encode() for s in strings + words]
    texts += [b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x80"', b'"\xc3"']
    for value in numbers():
        texts += [repr(value).encode(), f"{value:.17g}".encode(), f"{value:.6e}".encode()]
    taken = 0
    for text in texts:
        manifest = good["manifest.json"].replace(
            b'"provenance":{"edgekit":"0"}', b'"provenance":{"x":' + text + b"}"
        )
        try:
            python = canonical_json(parse_json(manifest, "m"), "m") == manifest
        except SchemaError:
            python = False
        failed = c_refuses(rebuild({**good, "manifest.json": manifest}))
        assert (failed is None) == python, text
        assert failed is None or "not canonical JSON" in failed.line, (text, failed)
        taken += failed is None
    assert 500 < taken < len(texts) - 500


WORDS = "detect classify native uint8 float32 rows yolox yolov8 crop NHWC level_8 images segment kernel"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, -0.5, 1e30, 10**18),
    *("", "a", "x" * 81, "a b", "a\x01", [], {}, [1], [0.5, 0.5, 0.5], ["a", "a"], {"a": 1}),
    *WORDS.split(),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, child in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield from places(child, (*path, key))


def mutate(tree: Any, rng: random.Random) -> None:
    """One edit of what is somewhere in the tree."""
    *way, key = rng.choice(list(places(tree)))
    parent = tree
    for step in way:
        parent = parent[step]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[
            rng.choice(
                (
                    "novelty",
                    "levels",
                    "axis",
                    "options",
                    "when",
                    "repeat",
                    "states",
                    "shorter_side",
                    "interpolation",
                )
            )
        ] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(rng.choice(parent)))
    elif kind == 3 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = rng.choice(
            (parent[key] + 1, -parent[key], parent[key] * 2, parent[key] / 2, float(parent[key]))
        )
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


@pytest.mark.parametrize("seed", range(4))
def test_both_readers_agree_about_any_manifest(good: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    outcomes = {"both": 0, "neither": 0, "unsupported": 0}
    original = json.loads(good["manifest.json"])
    for _ in range(250):
        tree = copy.deepcopy(original)
        for _ in range(rng.choice((1, 1, 1, 2))):
            mutate(tree, rng)
        tree["payload_digest"] = payload_digest(tree)
        data = rebuild({**good, "manifest.json": canonical_json(tree, "m")})
        path = tmp_path / "x.edge"
        path.write_bytes(data)
        python = python_refuses(path)
        c = c_refuses(data)
        if c is None:
            assert python is None, f"only Python refuses it: {python}"
            outcomes["both"] += 1
        elif python is None:  # what C does not do, and what Python finds when it loads the payload
            assert c.status == native_c.UNSUPPORTED or "the payload has" in c.line, f"only C refuses it: {c}"
            outcomes["unsupported"] += 1
        else:
            outcomes["neither"] += 1
    assert min(outcomes["both"], outcomes["neither"]) > 8, outcomes


def test_damaged_payload_and_its_engine_say_which_it_was(good: dict[str, bytes]) -> None:
    payload = bytearray(good["segments/network/v0.ek"])
    payload[8] = 99  # the version

    def put(tree: Any) -> None:
        variant = tree["plan"][0]["variants"][0]
        digest = sha256(payload).hexdigest()
        variant["digest"], tree["files"][variant["path"]]["sha256"] = "sha256:" + digest, digest

    failed = refused(forge({**good, "segments/network/v0.ek": bytes(payload)}, put))
    assert "variant 'v0'" in failed.line


def test_packed_weights_and_other_backends_are_not_for_here(good: dict[str, bytes]) -> None:
    def packed(tree: Any) -> None:
        tree["plan"][0]["variants"][0]["options"] = {"packed": {"bytes": 1, "digest": ""}}

    def other(tree: Any) -> None:
        tree["plan"][0]["variants"][0]["backend"] = "litert"

    for edit, line in ((packed, "weights are packed"), (other, "no variant of the backend 'native'")):
        failed = refused(forge(good, edit))
        assert failed.status == native_c.UNSUPPORTED and line in failed.line

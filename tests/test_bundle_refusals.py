"""Every way to damage or forge a bundle is refused with one line that says what is wrong."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit import archive
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, UsageError
from tests.bundle_samples import files_of, forge, rebuild, write_sample


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(write_sample(tmp_path_factory.mktemp("good") / "x.edge"))


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Opens bytes as a bundle and returns the one line with which they are refused."""

    def open_refused(data: bytes, **options: Any) -> str:
        path = tmp_path / "bad.edge"
        path.write_bytes(data)
        with pytest.raises(BundleError) as caught:
            Bundle.open(path, **options)
        text = str(caught.value)
        assert text.startswith(f"bundle {path}: ")
        assert text.isprintable()
        assert len(text) < 600
        assert caught.value.exit_code == 2
        return text.removeprefix(f"bundle {path}: ")

    return open_refused


Refusal = Callable[..., str]
STATE = {
    "name": "mem", "dtype": "float32", "shape": [1, 2, 3], "input": "mem_in", "output": "mem_out",
}  # fmt: skip


# --- damage ------------------------------------------------------------------------------------


def test_missing_and_strange_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "none.edge", "no such file. Check the path, or build it with: edgekit build"),
        (tmp_path / "none.edge\n", "no such file"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "empty", "file 'manifest.json' is missing. Is it a bundle?"),
        (Path("a\0b"), "cannot be read: "),
        (tmp_path / "fifo" / "x", "cannot be read: Not a directory"),
    ]:
        with pytest.raises(BundleError) as caught:
            Bundle.open(path)
        assert message in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, too short for a bundle"),
        (b"PK\3\4", "4 bytes, too short for a bundle"),
        (b"\x08\x07onnx model, not a bundle", "not a bundle, expected a zip file that starts with 'PK'"),
        (b"PK\3\4" + bytes(70_000), "damaged: its end is missing or something follows it"),
    ],
)
def test_not_a_bundle(refusal: Refusal, data: bytes, message: str) -> None:
    assert message in refusal(data)


def test_every_truncation_is_refused(refusal: Refusal, good: dict[str, bytes]) -> None:
    data = rebuild(good)
    for size in [0, 1, 21, 22, 29, 30, 5000, len(data) - 23, len(data) - 22, len(data) - 1]:
        refusal(data[:size])


def test_flipped_bits_are_refused(refusal: Refusal, good: dict[str, bytes]) -> None:
    """In every structure of the file, and at random; tools/fuzz.py sweeps wider."""
    data = rebuild(good)
    places = [*range(30), *range(len(data) - 120, len(data))]
    places += random.Random(1).sample(range(len(data)), 300)
    for place in places:
        bad = bytearray(data)
        bad[place] ^= 1 << place % 8
        refusal(bytes(bad))


def test_bytes_before_between_and_after_are_refused(refusal: Refusal, good: dict[str, bytes]) -> None:
    data = rebuild(good)
    assert "not a bundle" in refusal(b"#!/bin/sh\n" + data)
    assert "its end is missing or something follows it" in refusal(data + b"\0")
    table = data.index(b"PK\1\2")
    assert "damaged" in refusal(data[:table] + b"\0" * 64 + data[table:])


def test_damaged_payload_is_found_without_the_full_check_too(tmp_path: Path, good: dict[str, bytes]) -> None:
    data = bytearray(rebuild(good))
    payload = good["segments/backbone/fp32.onnx"]
    data[bytes(data).index(payload) + 1234] ^= 4
    path = tmp_path / "x.edge"
    path.write_bytes(data)
    message = "file 'segments/backbone/fp32.onnx' is damaged: its SHA-256 differs"
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)
    with Bundle.open(path, verify=False) as bundle:
        assert bundle.read("segments/head/fp16.onnx") == good["segments/head/fp16.onnx"]
        for use in (
            bundle.verify_files,
            lambda: bundle.read("segments/backbone/fp32.onnx"),
            lambda: bundle.extract(tmp_path / "out"),
        ):
            with pytest.raises(BundleError, match=message):
                use()
        assert not (tmp_path / "out").exists()


def test_wrong_crc_in_both_places_is_refused(refusal: Refusal, good: dict[str, bytes]) -> None:
    """Only the SHA-256 protects content, but no byte is free."""
    data = rebuild(good)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        crc = struct.pack("<I", file.getinfo("segments/head/fp16.onnx").CRC)
    assert data.count(crc) == 2
    assert "file 'segments/head/fp16.onnx' is damaged: its CRC-32 differs" in refusal(
        data.replace(crc, b"\1\2\3\4")
    )


# --- zip tricks --------------------------------------------------------------------------------


def zipped(files: list[tuple[zipfile.ZipInfo | str, bytes]], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as file:
        for name, data in files:
            file.writestr(name, data)
    return stream.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_tricks(refusal: Refusal, good: dict[str, bytes]) -> None:
    files: list[Any] = list(good.items())
    cases: list[tuple[bytes, str]] = [
        (zipped([("a.txt", b"hello")]), "table entry of 'a.txt' is not in canonical form"),
        (zipped(files), "table entry of 'manifest.json' is not in canonical form"),
        (zipped(files, compression=zipfile.ZIP_DEFLATED), "file 'manifest.json' is compressed (method 8)"),
        (zipped([("bomb", bytes(50 << 20))], compression=zipfile.ZIP_DEFLATED), "file 'bomb' is compressed"),
        (zipped([(link("manifest.json"), b"/etc/passwd")]), "file 'manifest.json' is a link"),
        (zipped([("segments/", b"")]), "'segments/' is a folder entry"),
        (zipped([("é.txt", b"")]), "expected ASCII"),
        (zipped([]), "not a bundle"),
    ]
    for data, message in cases:
        assert message in refusal(data)


def patched(monkeypatch: pytest.MonkeyPatch, files: list[tuple[str, bytes]]) -> bytes:
    """The canonical zip of any names in any order, doubles included."""
    monkeypatch.setattr(archive, "check_paths", lambda _: None)
    position, body, central = 0, b"", b""
    for name, data in files:
        crc = __import__("zlib").crc32(data)
        head = archive._local(name, len(data), crc, position)
        central += archive._central(name, len(data), crc, position)
        body += head + data
        position = len(body)
    monkeypatch.undo()
    return body + central + archive._end(len(files), len(central), position)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x", "file name '../x': leads out of the bundle ('..')"),
        ("evidence/../../x", "leads out of the bundle"),
        ("/etc/passwd", "file name '/etc/passwd': absolute path"),
        ("evidence//x", "expected parts of letters"),
        ("evidence/./x", "expected parts of letters"),
        ("evidence/.hidden", "begin with no dot"),
        ("evidence\\x", "expected parts of letters"),
        ("C:x", "expected parts of letters"),
        ("evidence/a b", "expected parts of letters"),
        ("evidence/\nx", "expected parts of letters"),
        ("a/b/c/d/e", "longer than 240 characters or 4 parts"),
        ("evidence/" + "x" * 300, "longer than 240 characters or 4 parts"),
        ("manifest.json", "file name 'manifest.json': there twice"),
        ("Manifest.JSON", "there twice (upper and lower case count as equal)"),
        ("evidence.json/x", "file name 'evidence.json/x': lies below a file"),
        ("evidence/zzz", "file 'evidence/zzz' is not in the manifest"),
    ],
)
def test_names(
    refusal: Refusal, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    files = [(n, good.get(n, b"")) for n in archive.order([*good, name])]
    assert message in refusal(patched(monkeypatch, files))


def test_order_count_and_sizes(
    refusal: Refusal, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "files are not in canonical order" in refusal(patched(monkeypatch, list(good.items())[::-1]))
    many = [(f"evidence/{i}", b"") for i in range(10_001)]
    assert "10001 files, expected at most 10000" in refusal(patched(monkeypatch, many))
    data = rebuild(good)
    end = len(data) - 22
    table = data.index(b"PK\1\2")
    cases = [
        (end + 8, "<HH", (0xFFFF, 0xFFFF), "uses zip64"),
        (end + 12, "<I", (0xFFFFFFFF,), "uses zip64"),
        (end + 16, "<I", (table - 1,), "the file table does not fill the end"),
        (end + 8, "<HH", (len(good) + 1, len(good) + 1), "file table is cut short"),
        (end + 8, "<HH", (len(good) - 1, len(good) - 1), "bytes belong to no file"),
        (table + 8, "<H", (1,), "file 'manifest.json' is encrypted"),
        (table + 20, "<II", (0xFFFFFFFF, 0xFFFFFFFF), "file 'manifest.json' uses zip64"),
        (
            table + 20,
            "<II",
            (1 << 30, 1 << 30),
            "file 'manifest.json' claims 1073741824 bytes, the bundle has",
        ),
        (table + 20, "<II", (table, table), "runs into the file table"),
        (table + 42, "<I", (64,), "header of 'manifest.json' is not in canonical form"),
        (table + 46, "<B", (0,), "expected parts of letters"),
    ]
    for at, form, values, message in cases:
        bad = bytearray(data)
        struct.pack_into(form, bad, at, *values)
        assert message in refusal(bytes(bad)), message


def test_a_sparse_giant_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "giant.edge"
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 33)
    with pytest.raises(BundleError, match="8589934592 bytes, expected at most 4294967295"):
        Bundle.open(path)


# --- the folder form ---------------------------------------------------------------------------


def test_folder_tricks(tmp_path: Path) -> None:
    def fresh() -> Path:
        return write_sample(tmp_path / "x", directory=True)

    def extra_file(p: Path) -> None:
        (p / "evidence" / "more.jpg").write_bytes(b"")

    def missing_file(p: Path) -> None:
        (p / "golden" / "input_0.bin").unlink()

    def link_file(p: Path) -> None:
        (p / "segments" / "head" / "fp16.onnx").unlink()
        (p / "segments" / "head" / "fp16.onnx").symlink_to("/etc/passwd")

    def link_folder(p: Path) -> None:
        (p / "evidence2").symlink_to(p / "evidence")

    def empty_folder(p: Path) -> None:
        (p / "spare").mkdir()

    def fifo(p: Path) -> None:
        os.mkfifo(p / "evidence" / "pipe")

    def odd_name(p: Path) -> None:
        (p / "evidence" / "a b").write_bytes(b"")

    def deep(p: Path) -> None:
        (p / "/".join("abcdefghijkl")).mkdir(parents=True)

    def longer(p: Path) -> None:
        with open(p / "evidence.json", "ab") as file:
            file.write(b" ")

    def flipped(p: Path) -> None:
        data = bytearray((p / "segments" / "head" / "fp16.onnx").read_bytes())
        data[3] ^= 1
        (p / "segments" / "head" / "fp16.onnx").write_bytes(data)

    def flipped_manifest(p: Path) -> None:
        data = (p / "manifest.json").read_bytes()
        (p / "manifest.json").write_bytes(data.replace(b'"model_sha256":"ab', b'"model_sha256":"ac'))

    cases: list[tuple[Callable[[Path], None], str]] = [
        (extra_file, "file 'evidence/more.jpg' is not in the manifest"),
        (missing_file, "file 'golden/input_0.bin' is missing"),
        (link_file, "file 'segments/head/fp16.onnx' is a link"),
        (link_folder, "file 'evidence2' is a link"),
        (empty_folder, "folder 'spare/' is empty"),
        (fifo, "'evidence/pipe' is not a regular file"),
        (odd_name, "file name 'evidence/a b': expected parts of letters"),
        (deep, "lies too deep"),
        (longer, "file 'evidence.json' has"),
        (flipped, "file 'segments/head/fp16.onnx' is damaged: its SHA-256 differs"),
        (
            flipped_manifest,
            "manifest.json or signature.json is damaged or altered: differs from manifest.sha256",
        ),
    ]
    import shutil

    for trick, message in cases:
        path = fresh()
        trick(path)
        with pytest.raises(BundleError) as caught:
            Bundle.open(path)
        assert message in str(caught.value)
        shutil.rmtree(path)


# --- what the manifest says --------------------------------------------------------------------


def test_manifest_text(refusal: Refusal, good: dict[str, bytes]) -> None:
    text = good["manifest.json"]
    cases = [
        (b"", "manifest.json: not valid JSON"),
        (b"[]", "schema_version must be an integer from 1 to 1, got None"),
        (text + b"\n", "manifest.json: not in canonical form"),
        (json.dumps(json.loads(text), indent=1).encode(), "manifest.json: not in canonical form"),
        (text.replace(b'"model":"tiny"', b'"model":"tiny","model":"tiny"'), "key 'model' is there twice"),
        (text.replace(b'"initial":0.0', b'"initial":NaN'), "NaN is not a JSON number"),
        (b'{"a":' + b"[" * 100_000, "nested too deep"),
        (b" " * (17 << 20), "too large, expected at most 16777216 bytes"),
    ]
    for bad, message in cases:
        assert message in refusal(rebuild({**good, "manifest.json": bad}))
    assert "differs from manifest.sha256" in refusal(
        rebuild({**good, "manifest.json": text.replace(b"tiny", b"tidy")}, checksum=False)
    )
    for name in ("manifest.json", "manifest.sha256", "evidence.json"):
        less = {n: d for n, d in good.items() if n != name}
        assert f"file '{name}' is missing" in refusal(rebuild(less, checksum=False))


def test_evidence_must_be_a_table(tmp_path: Path, good: dict[str, bytes]) -> None:
    from hashlib import sha256

    for bad, message in [(b"[]", "evidence.json: expected a table"), (b"[", "evidence.json: not valid JSON")]:
        tree = json.loads(good["manifest.json"])
        tree["files"]["evidence.json"] = {"bytes": len(bad), "sha256": sha256(bad).hexdigest()}
        (tmp_path / "x.edge").write_bytes(forge({**good, "evidence.json": bad}, lambda _, t=tree: t))
        with pytest.raises(BundleError, match=message.replace(".", r"\.")):
            Bundle.open(tmp_path / "x.edge")


def test_newer_schema_in_every_shape(tmp_path: Path, refusal: Refusal, good: dict[str, bytes]) -> None:
    """Also when the newer container is one that this edgekit cannot read."""
    tree = json.loads(good["manifest.json"])
    tree |= {"schema_version": 2, "novelty": {}}
    tree["provenance"]["edgekit"] = "0.9.0"
    text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    message = "expected schema at most 1, got schema 2. Upgrade edgekit"
    files = {**good, "manifest.json": text}
    assert refusal(rebuild(files)) == "needs edgekit >= 0.9.0, " + message
    assert refusal(rebuild(files, checksum=False)) == "needs edgekit >= 0.9.0, " + message
    assert refusal(zipped(list(files.items()))) == "needs a newer edgekit, " + message
    assert (
        refusal(zipped(list(files.items()), compression=zipfile.ZIP_DEFLATED))
        == "needs a newer edgekit, " + message
    )
    folder = write_sample(tmp_path / "x", directory=True)
    (folder / "manifest.json").write_text(json.dumps(tree, indent=2))
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)
    (folder / "new.bin").symlink_to("/")
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def edit(path: str, value: Any) -> Callable[[Any], None]:
    """Sets the value at a dotted path; `...` deletes it."""

    def apply(tree: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            tree = tree[int(key) if key.isdigit() else key]
        key = int(last) if last.isdigit() else last
        if value is ...:
            del tree[key]
        else:
            tree[key] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 0, "schema_version must be an integer from 1 to 1, got 0"),
        ("schema_version", True, "schema_version must be an integer from 1 to 1, got True"),
        ("novelty", 1, "manifest.json: unknown key 'novelty'"),
        ("model", "", "model '': expected 1 to 80 letters"),
        ("target", "a/b", "target 'a/b': expected 1 to 80 letters"),
        ("inputs", [], "plan: expected at least one input, one output and one step"),
        ("inputs", ["images", "images"], "plan input 'images': there twice"),
        ("inputs", ["image"], "plan input 'image': no such tensor. Did you mean 'images'?"),
        ("outputs", ["images"], "plan: no step produces 'images'"),
        ("tensors.0.shape", [1, 3, 0, 6], "tensor 'images' has shape (1, 3, 0, 6)"),
        ("tensors.1.shape", [2**40, 2**40], "is too large, expected at most 8 axes and 4294967296 bytes"),
        ("tensors.1.shape", [1] * 9, "is too large, expected at most 8 axes"),
        ("tensors.0.name", "raw", "tensor 'raw': there twice"),
        ("tensors.0.name", "a\nb", "expected a printable name"),
        ("tensors.0.name", "", "expected a printable name"),
        ("tensors.5.quant.axis", 2, "quantization axis 2 is not an axis of shape (1, 2)"),
        ("tensors.5.quant.axis", 0, "expected 1 scales, got 2"),
        ("tensors.5.quant.scale", [0.5, -1.0], "every scale must be positive and finite"),
        ("states.0.shape", [6], "tensor 'mem_in' is float32 (1, 2, 3), expected float32 (6,)"),
        ("states.0.input", "mem", "state input 'mem': no such tensor"),
        ("states.0.output", "mem_in", "plan: no step produces 'mem_in'"),
        ("states", [STATE, {**STATE, "name": "again"}], "state input 'mem_in': there twice"),
        ("states.0.input", "images", "state 'mem': 'images' is also an input of the plan"),
        ("states.0.nominal_dt_s", 0.0, "state 'mem': nominal_dt_s must be positive, at most 1e+09, got 0.0"),
        ("states.0.reset_after_s", 1e305, "state 'mem': reset_after_s must be positive, at most 1e+09"),
        ("states.0.name", "../mem", "state '../mem': expected 1 to 80 letters"),
        ("plan", [], "plan: expected at least one input, one output and one step"),
        ("plan.0", ..., "step 'pool': input 'raw' is not produced before it"),
        ("plan.1.inputs", ["scores"], "step 'pool': input 'scores' is not produced before it"),
        ("plan.1.outputs", ["images"], "step 'pool': output 'images' is written twice"),
        ("plan.1.outputs", ["raw"], "step 'pool': output 'raw' is written twice"),
        ("plan.1.outputs", [], "step 'pool': has no output"),
        ("plan.1.outputs", ["features", "features"], "output of step 'pool' 'features': there twice"),
        ("plan.1.name", "head", "step 'head': there twice"),
        ("plan.1.name", "a/b", "step 'a/b': expected 1 to 80 letters"),
        ("plan.1.kind", "magic", "manifest.json.plan[1]"),
        ("plan.0.variants", [], "segment 'backbone': has no variant"),
        ("plan.0.variants.1.name", "fp32", "variant of segment 'backbone' 'fp32': there twice"),
        ("plan.0.variants.0.path", "segments/backbone/int8.onnx", "expected 'segments/backbone/fp32.onnx'"),
        ("plan.0.variants.0.path", "../../etc/passwd", "expected 'segments/backbone/fp32.onnx'"),
        ("plan.0.variants.0.format", "a/b", "variant backbone/fp32: format 'a/b': expected 1 to 80 letters"),
        ("plan.0.variants.0.bytes", 1, "variant backbone/fp32: 1 bytes, but the file table says 3000"),
        ("plan.0.variants.0.digest", "sha256:" + "0" * 64, "its digest differs from the file table's"),
        ("golden.inputs", [], "golden input 'images': missing, the bundle could not test itself"),
        ("golden.outputs", [], "golden output 'scores': missing, the bundle could not test itself"),
        ("golden.outputs.0.tensor", "raw", "golden output 'raw': not an output of the plan"),
        ("golden.outputs.0.tensor", "none", "golden output 'none': no such tensor"),
        ("golden.outputs.0.path", "evidence.json", "is not in the file table below golden/"),
        ("golden.outputs.0.path", "golden/input_0.bin", "file has 288 bytes, expected 2 for int8 (1, 2)"),
        ("golden.outputs.0.allow", 1.0, "expected atol, rtol >= 0 and 0 <= allow < 1"),
        ("golden.outputs.0.atol", -1.0, "expected atol, rtol >= 0 and 0 <= allow < 1"),
        ("files", {}, "file table: evidence.json is missing"),
        ("payload_digest", "md5:0", "payload_digest: expected 'sha256:' and 64 hex digits"),
    ],
)  # fmt: skip
def test_inconsistent_manifests(
    refusal: Refusal, good: dict[str, bytes], path: str, value: Any, message: str
) -> None:
    digest = path != "payload_digest"
    assert message in refusal(forge(good, edit(path, value), digest=digest))


def test_file_table(refusal: Refusal, good: dict[str, bytes]) -> None:
    def entry(name: str, value: Any) -> Callable[[Any], None]:
        def apply(tree: Any) -> None:
            tree["files"][name] = value

        return apply

    zero = {"bytes": 0, "sha256": "0" * 64}
    for name, value, message in [
        ("../x", zero, "file name '../x': leads out of the bundle"),
        ("manifest.json", zero, "file table: must not list manifest.json"),
        ("evidence/x", zero, "file 'evidence/x' is missing"),
        ("segments/x", zero, "file 'segments/x': nothing in the manifest refers to it"),
        ("evidence/x", {"bytes": -1, "sha256": "0" * 64}, "file 'evidence/x': entry is malformed"),
        ("evidence/x", {"bytes": 0, "sha256": "0" * 63 + "G"}, "file 'evidence/x': entry is malformed"),
        ("evidence/sample_0.jpg", {"bytes": 1, "sha256": "0" * 64}, "has 24 bytes, the manifest says 1"),
        ("evidence/sample_0.jpg", {"bytes": 24, "sha256": "0" * 64}, "is damaged: its SHA-256 differs"),
    ]:
        assert message in refusal(forge(good, entry(name, value)))


def test_edited_manifest_with_the_old_payload_digest(refusal: Refusal, good: dict[str, bytes]) -> None:
    bad = forge(good, edit("pipeline.score_threshold", 0.0), digest=False)
    assert "payload_digest: the plan was altered, expected sha256:" in refusal(bad)


def test_swapped_payloads(refusal: Refusal, good: dict[str, bytes]) -> None:
    a, b = "segments/backbone/fp32.onnx", "segments/backbone/int8.onnx"
    assert "has 1000 bytes, the manifest says 3000" in refusal(rebuild({**good, a: good[b], b: good[a]}))
    assert f"file '{a}' is damaged: its SHA-256 differs" in refusal(rebuild({**good, a: good[a][::-1]}))


def test_unknown_file(tmp_path: Path) -> None:
    with (
        Bundle.open(write_sample(tmp_path / "x.edge")) as bundle,
        pytest.raises(UsageError, match="has no file"),
    ):
        bundle.read("../../etc/passwd")

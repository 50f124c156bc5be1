"""Bundles written and read back: content, bytes, alignment, failures on the way, signatures."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import archive, signing
from edgekit.bundle import Bundle, golden_bytes, write_bundle
from edgekit.errors import BundleError, MissingExtraError, OutputError, UsageError
from edgekit.manifest import MAX_FILES, MAX_PATH, Manifest
from edgekit.schema import MAX_JSON_VALUES
from edgekit.signing import generate_keys
from tests.bundle_samples import EVIDENCE, files_of, forge, rebuild, sample, write_sample
from tests.helpers import ROOT


def one_line(error: BaseException) -> str:
    text = str(error)
    assert len(text) < 600
    assert text.isprintable()
    return text


@pytest.mark.parametrize("directory", [False, True])
def test_what_goes_in_comes_out(tmp_path: Path, directory: bool) -> None:
    manifest, files = sample()
    path = tmp_path / "x.edge"
    digest = write_bundle(path, manifest, files, EVIDENCE, directory=directory)
    with Bundle.open(path) as bundle:
        assert bundle.evidence == EVIDENCE
        assert bundle.payload_digest == bundle.manifest.payload_digest == digest
        got = dataclasses.replace(bundle.manifest, files={}, payload_digest="")
        assert got == manifest
        for name, data in files.items():
            assert bundle.read(name) == data
            assert bundle.read(name).readonly
        assert bundle.names[:3] == ("manifest.json", "manifest.sha256", "evidence.json")
        assert set(bundle.manifest.files) == {*files, "evidence.json"}
        assert not bundle.signed
        assert bundle.signed_by is None
        bundle.verify_files()


def test_both_forms_hold_the_same_files(tmp_path: Path) -> None:
    one, many = write_sample(tmp_path / "x.edge"), write_sample(tmp_path / "x", directory=True)
    assert files_of(one) == files_of(many)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    manifest, files = sample()
    backwards = dict(reversed(list(files.items())))
    write_bundle(tmp_path / "a.edge", manifest, files, EVIDENCE)
    write_bundle(tmp_path / "b.edge", manifest, backwards, dict(reversed(list(EVIDENCE.items()))))
    assert (tmp_path / "a.edge").read_bytes() == (tmp_path / "b.edge").read_bytes()


def test_other_tools_read_it_and_payloads_are_aligned(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "x.edge")
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        for info in file.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            at = raw.find(file.read(info), info.header_offset + 30)
            assert at % (16384 if info.filename.startswith("segments/") else 64) == 0
    with Bundle.open(path) as bundle:
        payload = np.frombuffer(bundle.read("segments/backbone/fp32.onnx"), np.uint8)
        assert payload.ctypes.data % 64 == 0 or len(raw) < 1 << 16


def test_reading_maps_the_file_and_views_outlive_the_bundle(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "x.edge", payload_bytes=300_000)
    bundle = Bundle.open(path)
    view = bundle.read("segments/backbone/fp32.onnx")
    weights = np.frombuffer(view, np.uint8)
    assert weights.ctypes.data % 4096 == 0
    again = np.frombuffer(bundle.read("segments/backbone/fp32.onnx"), np.uint8)
    assert again.ctypes.data == weights.ctypes.data
    expected = hashlib.sha256(weights).hexdigest()
    bundle.close()
    bundle.close()
    assert hashlib.sha256(weights).hexdigest() == expected
    with pytest.raises(UsageError, match=r"has no file 'evidence\.json'"):
        bundle.read("evidence.json")


def test_payload_digest_covers_what_is_computed_and_only_that(tmp_path: Path) -> None:
    manifest, files = sample()

    def digest(changed: Any = manifest, data: Any = files, evidence: Any = EVIDENCE) -> str:
        return write_bundle(tmp_path / "x.edge", changed, data, evidence)

    base = digest()
    assert digest(evidence={"other": 1}) == base
    assert digest(dataclasses.replace(manifest, provenance={})) == base
    assert digest(data={**files, "golden/input_0.bin": bytes(288)}) == base
    assert digest(dataclasses.replace(manifest, pipeline={"labels": []})) != base
    assert digest(dataclasses.replace(manifest, target="host")) != base
    assert (
        digest(dataclasses.replace(manifest, states=(dataclasses.replace(manifest.states[0], initial=1.0),)))
        != base
    )
    assert digest(sample(3001)[0], sample(3001)[1]) != base
    # an integer in a float field is the same number
    assert (
        digest(dataclasses.replace(manifest, states=(dataclasses.replace(manifest.states[0], initial=0),)))
        == base
    )


def test_golden_bytes_are_little_endian_and_contiguous() -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert golden_bytes(values) == np.ascontiguousarray(values).astype("<f4").tobytes()


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.from_regex(r"evidence/[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True),
        st.binary(max_size=300),
        max_size=5,
    )
)
def test_any_files_round_trip(tmp_path_factory: pytest.TempPathFactory, extra: dict[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "x.edge"
    manifest, files = sample(100)
    try:
        write_bundle(path, manifest, {**files, **extra}, {})
    except BundleError as error:
        if "there twice (upper and lower case count as equal)" in str(error):
            return
        raise
    got = files_of(path)
    assert {name: got[name] for name in extra} == extra


# --- writing what does not fit, or cannot be written -------------------------------------------


def test_writer_refuses_what_would_not_open(tmp_path: Path) -> None:
    manifest, files = sample()
    cases = [
        ({**files, "../x": b""}, "file name '../x': leads out of the bundle"),
        (
            {**files, "segments/spare.bin": b""},
            "file 'segments/spare.bin': nothing in the manifest refers to it",
        ),
        ({**files, "manifest.json": b""}, "file table: must not list"),
        (
            {n: d for n, d in files.items() if "golden" not in n},
            "file 'golden/input_0.bin' is not in the file table",
        ),
        (
            {**files, "segments/head/fp16.onnx": b"123"},
            "variant head/fp16: 100 bytes, but the file table says 3",
        ),
        (
            {**files, "segments/head/fp16.onnx": bytes(100)},
            "variant head/fp16: its digest differs from the file table's",
        ),
        ({**files, "golden/output_0.bin": b"123"}, "file has 3 bytes, expected 2 for int8 (1, 2)"),
    ]
    for wrong, message in cases:
        with pytest.raises(BundleError) as caught:
            write_bundle(tmp_path / "x.edge", manifest, wrong, {})
        assert message in one_line(caught.value)
    for evidence in ({"ap": float("nan")}, {"ap": np.float32(1)}):
        with pytest.raises(BundleError, match=r"evidence\.json: cannot be written as JSON"):
            write_bundle(tmp_path / "x.edge", manifest, files, evidence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("what", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, what: BaseException, directory: bool
) -> None:
    path = write_sample(tmp_path / "x.edge", directory=directory)
    before = files_of(path)

    def fail(*_: Any) -> None:
        raise what

    with monkeypatch.context() as patch:
        patch.setattr(archive.os, when, fail)
        with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
            write_sample(path, payload_bytes=50, directory=directory)
    if isinstance(what, OSError):
        assert caught.type is OutputError
        assert f"bundle {path}: cannot be written: No space left on device. Free space" in one_line(
            caught.value
        )
    assert [p.name for p in tmp_path.iterdir()] == ["x.edge"]
    assert files_of(path) == before
    write_sample(path, payload_bytes=50, directory=directory)
    assert files_of(path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["x.edge"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A real ENOSPC: the file size limit of a child process, whose signal Python ignores (EFBIG)."""
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom tests.bundle_samples import write_sample\n"
        "from edgekit.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    write_sample(Path(sys.argv[1]))\nexcept OutputError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.edge")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "cannot be written: File too large. Free space" in run.stdout
    assert run.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written: "):
        write_sample(tmp_path / "file" / "x.edge")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "work.txt").write_text("mine")
    with pytest.raises(OutputError, match="a folder of that name is there"):
        write_sample(tmp_path / "folder")
    with pytest.raises(OutputError, match=r"what is there is not an intact bundle\. Remove it first"):
        write_sample(tmp_path / "folder", directory=True)
    with pytest.raises(OutputError, match=r"what is there is not an intact bundle\. Remove it first"):
        write_sample(tmp_path / "file", directory=True)
    assert (tmp_path / "folder" / "work.txt").read_text() == "mine"
    if os.geteuid() != 0:
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            write_sample(tmp_path / "folder" / "x.edge")


def test_more_than_4_gib_is_refused_as_a_zip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 40_000)
    with pytest.raises(
        BundleError, match=r"larger than 4 GiB, which a zip file cannot hold\. Write it as a folder"
    ):
        write_sample(tmp_path / "x.edge")
    assert not list(tmp_path.iterdir())


# --- extract -----------------------------------------------------------------------------------


def test_extract(tmp_path: Path) -> None:
    _, files = sample()
    with Bundle.open(write_sample(tmp_path / "x.edge")) as bundle:
        paths = bundle.extract(tmp_path / "out")
        assert [p.relative_to(tmp_path / "out").as_posix() for p in paths] == [
            "segments/backbone/fp32.onnx",
            "segments/backbone/int8.onnx",
            "segments/head/fp16.onnx",
        ]
        for path in paths:
            assert path.read_bytes() == files[path.relative_to(tmp_path / "out").as_posix()]
        assert bundle.extract(tmp_path / "out", ["evidence.json"]) == [tmp_path / "out" / "evidence.json"]
        with pytest.raises(UsageError, match=r"has no file 'evidence\.jsn'\. Did you mean 'evidence\.json'"):
            bundle.extract(tmp_path / "none", ["evidence.jsn"])
        assert not (tmp_path / "none").exists()


# --- signatures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return (*generate_keys(folder), *generate_keys(folder, "other"))


@pytest.mark.parametrize("directory", [False, True])
def test_signed_bundle(tmp_path: Path, keys: tuple[Path, ...], directory: bool) -> None:
    path = write_sample(tmp_path / "x.edge", sign_key=keys[0], directory=directory)
    with Bundle.open(path) as bundle:
        assert bundle.signed
        assert str(bundle.signed_by).startswith("ed25519:")
        bundle.check_signature(keys[1])
        with pytest.raises(
            BundleError, match=r"signed by another key, expected ed25519:.*, got ed25519:"
        ) as caught:
            bundle.check_signature(keys[3])
        one_line(caught.value)


def test_signing_does_not_change_the_payload_digest_and_repeats(
    tmp_path: Path, keys: tuple[Path, ...]
) -> None:
    a, b = (write_sample(tmp_path / n, sign_key=keys[0]) for n in ("a.edge", "b.edge"))
    assert a.read_bytes() == b.read_bytes()
    plain = write_sample(tmp_path / "c.edge")
    with Bundle.open(a) as signed, Bundle.open(plain) as unsigned:
        assert signed.payload_digest == unsigned.payload_digest


def test_unsigned_bundle(tmp_path: Path, keys: tuple[Path, ...]) -> None:
    with Bundle.open(write_sample(tmp_path / "x.edge")) as bundle:
        with pytest.raises(BundleError, match=r"not signed\. Build it with --sign KEY") as caught:
            bundle.check_signature(keys[1])
        one_line(caught.value)


def test_forged_manifest_under_an_old_signature(tmp_path: Path, keys: tuple[Path, ...]) -> None:
    """Somebody who knows the format changes the target and fixes every checksum but cannot sign."""
    files = files_of(write_sample(tmp_path / "x.edge", sign_key=keys[0]))

    def edit(tree: Any) -> None:
        tree["target"] = "host"

    (tmp_path / "y.edge").write_bytes(forge(files, edit))
    with (
        Bundle.open(tmp_path / "y.edge") as bundle,
        pytest.raises(BundleError, match="signature does not match, the manifest was altered after signing"),
    ):
        bundle.check_signature(keys[1])


def test_forged_signature_file(tmp_path: Path, keys: tuple[Path, ...]) -> None:
    files = files_of(write_sample(tmp_path / "x.edge", sign_key=keys[0]))
    good = files["signature.json"]
    for bad, message in [
        (good.replace(b"ed25519", b"rsa4096"), "signature.json.algorithm: expected one of 'ed25519'"),
        (good.replace(b'{"algo', b'{ "algo'), "signature.json: not in canonical form"),
        (good.replace(good[-8:-2], b"XXXXXX"), "signature.json: signature must be 128 hex digits"),
        (good + b" " * 5000, "signature.json: too large"),
    ]:
        (tmp_path / "y.edge").write_bytes(rebuild({**files, "signature.json": bad}))
        with pytest.raises(BundleError) as caught:
            Bundle.open(tmp_path / "y.edge")
        assert message in one_line(caught.value)


def test_unusable_keys(tmp_path: Path, keys: tuple[Path, ...]) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem, form = serialization.Encoding.PEM, serialization
    curve = ec.generate_private_key(ec.SECP256R1())
    files = {
        "empty": b"",
        "junk": b"\x00\x01junk" * 50,
        "curve.key": curve.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()),
        "curve.pub": curve.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo),
        "locked": curve.private_bytes(pem, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"secret")),
        "huge": b"x" * 70_000,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = write_sample(tmp_path / "x.edge", sign_key=keys[0])
    private = {
        "none": "no such file",
        "empty": "not a usable private key, expected an Ed25519 PEM file",
        "junk": "not a usable private key",
        "curve.key": "expected an Ed25519 key, got ECPrivateKey",
        "locked": "not a usable private key",
        "huge": "too large for a key",
        str(keys[1]): "got a public key",
    }
    for name, message in private.items():
        with pytest.raises(UsageError) as caught:
            write_sample(tmp_path / "y.edge", sign_key=tmp_path / name)
        assert message in one_line(caught.value)
        assert not (tmp_path / "y.edge").exists()
    public = {
        "none": "no such file",
        "junk": "not a usable public key",
        "curve.pub": "expected an Ed25519 key, got",
        str(keys[0]): "got a private key",
    }
    with Bundle.open(path) as bundle:
        for name, message in public.items():
            with pytest.raises(UsageError) as caught:
                bundle.check_signature(tmp_path / name)
            assert message in one_line(caught.value)


def test_signing_without_its_package(
    tmp_path: Path, keys: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[sign\]'"):
        write_sample(tmp_path / "x.edge", sign_key=keys[0])
    assert not list(tmp_path.iterdir())


def test_generated_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    key, pub = generate_keys(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), pub.read_bytes()
    with pytest.raises(OutputError, match=r"edgekit\.key\.pem: cannot be written: File exists"):
        generate_keys(tmp_path)
    key.unlink()
    with pytest.raises(OutputError, match=r"edgekit\.pub\.pem: cannot be written: File exists"):
        generate_keys(tmp_path)
    assert not key.exists()
    assert pub.read_bytes() == before[1]


def test_known_signature(tmp_path: Path) -> None:
    """RFC 8032, 7.1, test 1: key pair and signature of the empty message."""
    seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    der = bytes.fromhex("302e020100300506032b657004220420" + seed)
    pem = b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(der) + b"\n-----END PRIVATE KEY-----\n"
    (tmp_path / "key.pem").write_bytes(pem)
    made = signing.sign(b"", tmp_path / "key.pem")
    assert made.public_key == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert made.signature == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555f"
        "b8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert made.fingerprint == "ed25519:21fe31dfa154a261"


def test_opening_imports_no_heavy_package(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "x.edge")
    script = (
        "import sys\nfrom edgekit.bundle import Bundle\nBundle.open(sys.argv[1])\n"
        "print(sorted({'numpy', 'torch', 'onnx', 'onnx_ir', 'cryptography', 'cv2', 'zipfile'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "[]"


def test_the_reader_in_the_docs_works(tmp_path: Path) -> None:
    """docs/bundle.md is the specification: its example code and its limits are those of the reader."""
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/bundle.md", "exec"), namespace)
    path = write_sample(tmp_path / "x.edge")
    manifest, evidence, files = namespace["read"](path)
    with Bundle.open(path) as bundle:
        assert manifest["payload_digest"] == bundle.payload_digest
        assert evidence == bundle.evidence
        assert files == files_of(path)
        assert [v["path"] for _, v in namespace["variants"](manifest)] == [
            v.path for _, v in bundle.manifest.variants()
        ]
    for limit in (MAX_FILES, MAX_PATH, MAX_JSON_VALUES, archive.MAX_BYTES, archive.ALIGN_PAYLOAD):
        assert f"{limit:,}" in text or str(limit) in text
    for field in dataclasses.fields(Manifest):
        assert f"`{field.name}`" in text
    first = path.read_bytes()[:64].hex()
    dump = "".join(
        "".join(line.split()[1:9]) for line in text.split("first bytes of a bundle\n```\n")[1].split("\n")[:4]
    )
    assert first[:28] == dump[:28]
    assert first[52:86] == dump[52:86]

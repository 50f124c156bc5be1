"""Write and open bundles (`*.edge`): all that crosses from the workstation to the device.

A bundle is untrusted input: nothing in it is run or unpickled, sizes are bounded, no path leaves
it, and every byte is checked before it is handed out. docs/bundle.md specifies the format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import archive, signing
from edgekit.errors import BundleError, EdgekitError, OutputError, UsageError, did_you_mean
from edgekit.manifest import (
    CHECKSUM,
    EVIDENCE,
    MANIFEST,
    OUTSIDE,
    SCHEMA_VERSION,
    SIGNATURE,
    FileEntry,
    Manifest,
    Variant,
    check,
    digest,
    payload_digest,
    payload_path,
)
from edgekit.schema import SchemaError, canonical_json, from_json, parse_json, printable, to_json

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

    from edgekit.backends.base import Payload


# --- writing -----------------------------------------------------------------------------------


def make_variant(segment: str, name: str, payload: Payload) -> Variant:
    """The manifest's entry for `payload`, whose bytes belong into `files` at its `path`."""
    return Variant(
        name=name,
        backend=payload.backend,
        precision=payload.precision,
        format=payload.format,
        path=payload_path(segment, name, payload.format),
        bytes=len(payload.data),
        digest=digest(payload.data),
        options=dict(payload.options),
    )


def golden_path(side: str, index: int) -> str:
    """Where the golden values of the index-th plan input or output go: `golden/input_0.bin`."""
    assert side in ("input", "output")
    return f"golden/{side}_{index}.bin"


def golden_bytes(values: np.ndarray) -> bytes:
    """Raw little-endian values, C order."""
    return values.astype(values.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def write_bundle(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    evidence: Mapping[str, Any],
    *,
    sign_key: Path | None = None,
    directory: bool = False,
) -> str:
    """Write a bundle, whole or not at all; equal arguments give equal bytes.

    manifest: its `files` and `payload_digest` are computed here, whatever they hold.
    files: name -> bytes of the payloads (`segments/`), golden values (`golden/`) and sample
        pictures (`evidence/`).
    evidence: JSON values, what was measured (`evidence.json`).
    sign_key: Ed25519 private key, a PEM file.
    directory: write a folder of the files instead of one zip file (the form for over 4 GiB).

    Returns the payload digest. Raises: BundleError when the parts do not fit each other (it would not open),
    OutputError when it cannot be written, UsageError for a bad key, MissingExtraError.
    """
    path = Path(path)
    what = f"bundle {printable(str(path), 200)}"
    try:
        body: dict[str, bytes] = {**files, EVIDENCE: canonical_json(to_json(evidence), EVIDENCE)}
        table = {name: FileEntry(len(body[name]), _sha256(body[name])) for name in sorted(body)}
        # through JSON once, so that 0 and 0.0 in a float field give the same digest
        manifest = dataclasses.replace(manifest, files=table, payload_digest="sha256:" + "0" * 64)
        tree = to_json(from_json(Manifest, to_json(manifest), MANIFEST))
        tree["payload_digest"] = payload_digest(tree)
        text = canonical_json(tree, MANIFEST)
        _read_manifest(text)
    except SchemaError as error:
        raise BundleError(f"{what}: {error}") from None
    head = {MANIFEST: text}
    if sign_key is not None:
        head[SIGNATURE] = signing.sign(text, sign_key).to_bytes()
    head[CHECKSUM] = _checksum(head)
    if directory:
        _check_replaceable(path, what)
        archive.write_folder(path, {**head, **body}, "bundle")
    else:
        archive.write_atomic(path, archive.zip_chunks({**head, **body}), "bundle")
    return str(tree["payload_digest"])


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(head: Mapping[str, bytes | memoryview]) -> bytes:
    """`manifest.sha256`, the format of sha256sum: anchors what the manifest's own table cannot list."""
    names = [name for name in (MANIFEST, SIGNATURE) if name in head]
    return "".join(f"{_sha256(head[name])}  {name}\n" for name in names).encode("ascii")


def _check_replaceable(path: Path, what: str) -> None:
    """Only an intact bundle is replaced: the folder may hold somebody's work."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        try:
            Bundle.open(path, verify=False).close()
            return
        except BundleError:
            pass
    raise OutputError(f"{what}: cannot be written: what is there is not an intact bundle. Remove it first")


def _read_manifest(data: bytes | memoryview) -> Manifest:
    """Parse and check manifest.json. Raises: SchemaError."""
    tree = parse_json(data, MANIFEST)
    _check_version(tree)
    if canonical_json(tree, MANIFEST) != data:
        raise SchemaError(f"{MANIFEST}: not in canonical form (sorted keys, no spaces, UTF-8)")
    manifest = from_json(Manifest, tree, MANIFEST)
    check(manifest)
    wanted = payload_digest(tree)
    if wanted != manifest.payload_digest:
        raise SchemaError(
            f"payload_digest: the plan was altered, expected {wanted}, got {manifest.payload_digest}"
        )
    return manifest


def _check_version(tree: Any) -> None:
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        built = tree.get("provenance")
        by = built.get("edgekit") if isinstance(built, dict) else None
        raise SchemaError(newer_message(version, by if isinstance(by, str) else None))
    if type(version) is not int or version < 1:
        raise SchemaError(
            f"{MANIFEST}: schema_version must be an integer from 1 to {SCHEMA_VERSION}, got {version!r:.40}"
        )


def newer_message(version: int, by: str | None) -> str:
    """What to tell somebody whose edgekit is too old for a bundle built by version `by`."""
    wanted = f"edgekit >= {printable(by, 20)}" if by else "a newer edgekit"
    return f"needs {wanted}, expected schema at most {SCHEMA_VERSION}, got schema {version}. Upgrade edgekit"


# --- reading -----------------------------------------------------------------------------------


class Bundle:
    """An open bundle. `read` hands out views into the mapped file; they stay valid after `close`
    as long as something holds them. Close it, or use it in a `with` statement.

    path, manifest, evidence: what was opened and what it says.
    signature: what the bundle claims; only `check_signature` makes it mean something.
    """

    def __init__(
        self, files: archive.Archive, manifest: Manifest, signature: signing.Signature | None
    ) -> None:
        self.path = files.path
        self.manifest = manifest
        self.signature = signature
        self._files = files
        self._verified: set[str] = set(OUTSIDE)
        self._evidence: dict[str, Any] | None = None

    @staticmethod
    def open(path: Path | str, *, verify: bool = True) -> Bundle:
        """Open a bundle file or folder and check it, down to the last byte if `verify`.

        Without `verify` each file is checked when it is first read instead: quicker where only
        the manifest is wanted. Raises: BundleError, one line.
        """
        path = Path(path)
        where = f"bundle {printable(str(path), 200)}"
        try:
            files = archive.open_archive(path)
        except BundleError:
            version = archive.newer_schema(path)
            if version is not None and version > SCHEMA_VERSION:
                raise BundleError(f"{where}: {newer_message(version, None)}") from None
            raise
        try:
            manifest, signature = _read_head(files)
            bundle = Bundle(files, manifest, signature)
            if verify:
                bundle.verify_files()
            return bundle
        except EdgekitError as error:
            files.close()
            if isinstance(error, SchemaError):
                raise BundleError(f"{where}: {error}") from None
            raise

    @property
    def payload_digest(self) -> str:
        """ "sha256:<hex>" over all that decides what the bundle computes."""
        return self.manifest.payload_digest

    @property
    def evidence(self) -> dict[str, Any]:
        """`evidence.json`: what was measured when the bundle was built."""
        if self._evidence is None:
            try:
                tree = parse_json(self.read(EVIDENCE), EVIDENCE)
                if not isinstance(tree, dict):
                    raise SchemaError(f"{EVIDENCE}: expected a table")
            except SchemaError as error:
                raise BundleError(f"{self._where}: {error}") from None
            self._evidence = tree
        return self._evidence

    @property
    def signed(self) -> bool:
        """Whether there is a signature; `check_signature` says whether it is right."""
        return self.signature is not None

    @property
    def signed_by(self) -> str | None:
        """Fingerprint of the key that the bundle claims to be signed with, or None."""
        return self.signature.fingerprint if self.signature else None

    @property
    def names(self) -> tuple[str, ...]:
        """All files, in the order of the bundle."""
        return tuple(self._files.views)

    @property
    def nbytes(self) -> int:
        """Bytes of all files together, without the container."""
        return sum(len(view) for view in self._files.views.values())

    @property
    def _where(self) -> str:
        return f"bundle {printable(str(self.path), 200)}"

    def read(self, name: str) -> memoryview:
        """The bytes of a file, read-only and without a copy, verified against its digest.

        Raises: BundleError for a damaged file, UsageError for an unknown name.
        """
        if name not in self._files.views:
            raise UsageError(f"{self._where}: has no file {name!r}. {did_you_mean(name, self._files.views)}")
        if name not in self._verified:
            self._verify(name)
        return self._files.views[name][:]

    def _verify(self, name: str) -> None:
        view, entry = self._files.views[name], self.manifest.files[name]
        if _sha256(view) != entry.sha256:
            raise BundleError(
                f"{self._where}: file {name!r} is damaged: its SHA-256 differs. Copy or build it again"
            )
        try:
            _check_crc(self._files, name)
        except SchemaError as error:
            raise BundleError(f"{self._where}: {error}") from None
        self._verified.add(name)

    def verify_files(self) -> None:
        """Check every file's digest. Raises: BundleError for the first that differs."""
        for name in self._files.views:
            if name not in self._verified:
                self._verify(name)
        _ = self.evidence  # is JSON

    def check_signature(self, public_key: Path) -> None:
        """Check the signature against the public key in the PEM file `public_key`, and every file.

        Raises: BundleError when it is missing, by another key or does not match; UsageError for an
        unusable key file; MissingExtraError.
        """
        signing.verify(self._files.views[MANIFEST], self.signature, Path(public_key), self._where)
        self.verify_files()

    def extract(self, directory: Path, names: Iterable[str] | None = None) -> list[Path]:
        """Write files below `directory` under their names (default: the payloads); each whole or not at all.

        Returns the paths. Raises: OutputError, BundleError, UsageError for an unknown name.
        """
        directory = Path(directory)
        if names is None:
            names = [variant.path for _, variant in self.manifest.variants()]
        data = {name: self.read(name) for name in names}
        for name, view in data.items():
            archive.write_atomic(directory / name, [view], "file")
        return [directory / name for name in data]

    def close(self) -> None:
        """Release the file. Views and arrays still held keep their part of it in memory."""
        self._files.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_crc(files: archive.Archive, name: str) -> None:
    """The zip file's own checksum has to be right too, so that no byte is free. Raises: SchemaError."""
    if files.crcs and zlib.crc32(files.views[name]) != files.crcs[name]:
        raise SchemaError(f"file {name!r} is damaged: its CRC-32 differs. Copy or build it again")


def _read_head(files: archive.Archive) -> tuple[Manifest, signing.Signature | None]:
    """Manifest and signature, checked against their checksums and the list of files. Raises: SchemaError."""
    views = files.views
    for name in (MANIFEST, CHECKSUM):
        if name not in views:
            raise SchemaError(f"file {name!r} is missing. Is it a bundle?")
    head = [name for name in OUTSIDE if name in views]
    for name in head:
        if len(views[name]) > 16 << 20:
            raise SchemaError(
                f"file {name!r}: too large, expected at most {16 << 20} bytes, got {len(views[name])}"
            )
        _check_crc(files, name)
    if bytes(views[CHECKSUM]) != _checksum(views):
        _check_version(parse_json(views[MANIFEST], MANIFEST))  # a newer schema may sum up otherwise
        raise SchemaError(
            f"{MANIFEST} or {SIGNATURE} is damaged or altered: differs from {CHECKSUM}. Build it again"
        )
    manifest = _read_manifest(views[MANIFEST])
    signature = None
    if SIGNATURE in views:
        signature = signing.Signature.from_bytes(views[SIGNATURE])
        if signature.to_bytes() != views[SIGNATURE]:
            raise SchemaError(f"{SIGNATURE}: not in canonical form")
    there = views.keys() - set(OUTSIDE)
    for name in sorted(there - manifest.files.keys()):
        raise SchemaError(f"file {name!r} is not in the manifest")
    for name in sorted(manifest.files.keys() - there):
        raise SchemaError(f"file {name!r} is missing")
    for name, entry in manifest.files.items():
        if len(views[name]) != entry.bytes:
            raise SchemaError(f"file {name!r} has {len(views[name])} bytes, the manifest says {entry.bytes}")
    return manifest, signature

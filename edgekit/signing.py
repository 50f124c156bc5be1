"""Ed25519 signatures of bundles (RFC 8032) through the package `cryptography`, extra `sign`.

Keys are PEM files: PKCS#8 without a password for the private one, SubjectPublicKeyInfo for the
public one, as `openssl genpkey -algorithm ed25519` writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit.errors import BundleError, MissingExtraError, OutputError, UsageError
from edgekit.manifest import SIGNATURE
from edgekit.schema import canonical_json, from_json, parse_json, to_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class Signature:
    """`signature.json`: over the exact bytes of manifest.json. What it claims counts only once checked."""

    algorithm: Literal["ed25519"]
    public_key: str
    """32 bytes, hex."""
    signature: str
    """64 bytes, hex."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.public_key):
            raise ValueError("public_key must be 64 hex digits")
        if not re.fullmatch("[0-9a-f]{128}", self.signature):
            raise ValueError("signature must be 128 hex digits")

    @property
    def fingerprint(self) -> str:
        return fingerprint(bytes.fromhex(self.public_key))

    def to_bytes(self) -> bytes:
        return canonical_json(to_json(self), SIGNATURE)

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> Signature:
        """Raises: SchemaError."""
        return from_json(Signature, parse_json(data, SIGNATURE, max_bytes=4096), SIGNATURE)


def fingerprint(public_key: bytes) -> str:
    """ "ed25519:" and the first 16 hex digits of the SHA-256 of the raw public key."""
    return "ed25519:" + hashlib.sha256(public_key).hexdigest()[:16]


def generate_keys(folder: Path, name: str = "edgekit") -> tuple[Path, Path]:
    """Write a new pair `<name>.key.pem` (private, mode 0600) and `<name>.pub.pem`; never over a file.

    Raises: MissingExtraError, OutputError.
    """
    formats = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem = formats.Encoding.PEM
    secret = private.private_bytes(pem, formats.PrivateFormat.PKCS8, formats.NoEncryption())
    public = private.public_key().public_bytes(pem, formats.PublicFormat.SubjectPublicKeyInfo)
    paths = (folder / f"{name}.key.pem", folder / f"{name}.pub.pem")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data, mode in ((paths[0], secret, 0o600), (paths[1], public, 0o644)):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
    except BaseException as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"key {error.filename or folder}: cannot be written: {error.strerror}"
            ) from None
        raise
    return paths


def check_private_key(key: Path) -> None:
    """Can `key` sign? Raises: UsageError, MissingExtraError."""
    _private(key)


def sign(manifest: bytes, key: Path) -> Signature:
    """Sign with the private key in the PEM file `key`. Raises: UsageError, MissingExtraError."""
    private = _private(key)
    formats = _serialization()
    public = private.public_key().public_bytes(formats.Encoding.Raw, formats.PublicFormat.Raw)
    return Signature("ed25519", public.hex(), private.sign(manifest).hex())


def verify(manifest: bytes | memoryview, signature: Signature | None, key: Path, where: str) -> None:
    """Check against the public key in the PEM file `key`.

    Raises: BundleError when there is no signature, it is by another key, or the manifest differs
    from what was signed; UsageError for an unusable key file; MissingExtraError.
    """
    public = _public(key)
    if signature is None:
        raise BundleError(f"{where}: not signed. Build it with --sign KEY, or verify without --key")
    formats = _serialization()
    raw = public.public_bytes(formats.Encoding.Raw, formats.PublicFormat.Raw)
    if raw.hex() != signature.public_key:
        raise BundleError(
            f"{where}: signed by another key, expected {fingerprint(raw)}, got {signature.fingerprint}"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(bytes.fromhex(signature.signature), bytes(manifest))
    except InvalidSignature:
        raise BundleError(
            f"{where}: signature does not match, the manifest was altered after signing. Do not use it"
        ) from None


def _serialization() -> Any:
    """The module of key formats. Raises: MissingExtraError."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise MissingExtraError("cryptography", "sign", "sign bundles and check signatures") from None
    return serialization


def _pem(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UsageError(f"key {path}: no such file. Make a pair with: python tools/keygen.py FOLDER")
        with open(path, "rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UsageError(f"key {path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_KEY_BYTES:
        raise UsageError(f"key {path}: too large for a key, expected at most {MAX_KEY_BYTES} bytes")
    return data


def _private(path: Path) -> Ed25519PrivateKey:
    serialization = _serialization()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _pem(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "a public key" if b"PUBLIC KEY" in data else _one_line(error)
        raise UsageError(
            f"key {path}: not a usable private key, expected an Ed25519 PEM file, got {what}"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"key {path}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    serialization = _serialization()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _pem(path)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "a private key" if b"PRIVATE KEY" in data else _one_line(error)
        raise UsageError(
            f"key {path}: not a usable public key, expected an Ed25519 PEM file, got {what}"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"key {path}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def _one_line(error: Exception) -> str:
    # the library's texts run on for pages; their first sentence says it
    text = " ".join(str(error).split()).partition(". ")[0]
    return text[:120] or type(error).__name__

"""Picture files, decoded with care: one reader for sources, calibration and evaluation.

Decoders take a truncated JPEG for a whole one (the rest stays grey) and allocate whatever a header
asks for. So the first bytes are read here before a decoder sees the file: kind, size, and whether
the end is there. Sources: ITU T.81 (JPEG), W3C PNG, RFC 9649 (WebP), TIFF 6.0.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.optional import load_cv2, native_messages, quiet

MAX_SIDE = 16_384
"""Longest side of a picture or video, pixels; `ImagePreprocess` has the same bound."""
MAX_PIXELS = 200_000_000
"""Most pixels of one picture: 600 MB when decoded."""
_MAX_BYTES = 1 << 29
KINDS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "PNM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".gif",
)
_MAX_SEGMENTS = 10_000
_DECODER_LINES = ("libpng ", "Corrupt JPEG", "Premature end of JPEG", "Inconsistent prog", "Warning: unknown JFIF",
                  "Invalid SOS param", "Unknown Adobe")  # fmt: skip
"""How lines begin that libpng and libjpeg (jerror.h) write to stderr."""
_STRAY_BYTES = 256
"""Cameras pad their JPEGs with a few bytes; more than this is a picture whose middle is lost."""


def read_picture(path: str | Path) -> np.ndarray:
    """Decode a picture file to uint8 BGR [height, width, 3].

    EXIF orientation is applied; grey is repeated over the channels; 16-bit is scaled to 8 (value
    / 256); an alpha channel is dropped, not blended; CMYK is converted; of a file with several
    pages the first is read. The kind is told by content, not by suffix.

    Raises: UsageError for a file that is missing, empty, truncated, no picture or too large
    (16384 pixels a side, 200 megapixels, 512 MiB; checked before decoding). Damage inside a JPEG
    that still decodes cannot be seen: the format has no checksum.
    """
    path, name = Path(path), printable(path)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"picture {name}: not a regular file. Give a picture file")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"picture {name}: larger than {_MAX_BYTES >> 20} MiB. Give a smaller file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"picture {name}: {reason}. Check the path") from None
    try:
        return decode_picture(data)
    except ValueError as error:
        raise UsageError(f"picture {name}: {error}. Replace the file") from None


def decode_picture(data: bytes) -> np.ndarray:
    """As `read_picture`, from the bytes of a file. Raises: ValueError, its text is the reason."""
    if not data:
        raise HeaderError("the file is empty")
    header = read_header(data)
    problem = check_size(header.width, header.height)
    if problem:
        raise HeaderError(problem)
    if not header.whole:
        raise HeaderError(f"truncated: the end of the {header.kind} data is missing")
    cv2 = load_cv2("read pictures")
    with quiet(cv2), native_messages(_DECODER_LINES) as messages:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # a header that the decoder refuses, or no memory
            image = None
    if image is None:
        raise HeaderError(f"damaged or unsupported {header.kind} data")
    if header.kind == "JPEG":
        for message in messages:
            _check_jpeg(message)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise HeaderError(f"decodes to {image.dtype} {list(image.shape)}, expected 8-bit colour")
    return np.asarray(image)


def _check_jpeg(message: str) -> None:
    """libjpeg goes on after damage and fills the picture with something. Raises: HeaderError."""
    stray = re.search(r"([0-9]+) extraneous bytes", message)
    if stray and int(stray[1]) < _STRAY_BYTES:
        return
    if message.startswith(("Corrupt JPEG data", "Premature end", "Inconsistent progression")):
        raise HeaderError(f"damaged JPEG data ({message.partition(': ')[2] or message})")


def check_size(width: int, height: int) -> str | None:
    """Why pixels of this size are refused, or None. Asked before anything is decoded."""
    if width < 1 or height < 1:
        return f"its header says {width}x{height} pixels"
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        return (
            f"{width}x{height} pixels is too large, expected at most {MAX_SIDE} a side "
            f"and {MAX_PIXELS // 10**6} megapixels"
        )
    return None


@dataclass(frozen=True)
class Header:
    """`width`, `height`: pixels as stored, before any EXIF rotation. `whole`: the file has its end."""

    kind: str
    width: int
    height: int
    whole: bool = True


class HeaderError(ValueError):
    """Bytes that are no picture we know, or a header cut short."""


def kind_of(data: bytes) -> str | None:
    """Which of `KINDS` the first 16 bytes of a file announce, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(b"BM"):
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    return "PNM" if re.match(rb"P[1-6]\s", data) else None


def read_header(data: bytes) -> Header:
    """Header of an encoded picture. Raises: HeaderError, its text is the reason."""
    kind = kind_of(data)
    if kind is None:
        raise HeaderError(f"not a picture, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    parsers = {"JPEG": _jpeg, "PNG": _png, "WebP": _webp, "BMP": _bmp, "TIFF": _tiff, "PNM": _pnm}
    try:
        return parsers[kind](data)
    except (struct.error, IndexError):
        raise HeaderError(f"{kind} header is cut short") from None


def _jpeg(data: bytes) -> Header:
    size = None
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise HeaderError("damaged JPEG header")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = struct.unpack_from(">HH", data, at + 3)
        elif marker == 0xDA and size:
            # only now: the thumbnail inside an EXIF segment has an end marker of its own
            return Header("JPEG", size[1], size[0], data.find(b"\xff\xd9", at + length) >= 0)
        elif marker in (0xD9, 0xDA):
            break
        at += length
    raise HeaderError("damaged JPEG header")


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    return Header("PNG", width, height, data.rfind(b"IEND") >= 0)


def _webp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 4)
    whole = len(data) >= length + 8
    chunk = data[12:16]
    if chunk == b"VP8 ":
        width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8X":
        (low,) = struct.unpack_from("<I", data, 24)
        (high,) = struct.unpack_from("<I", data, 26)
        width, height = (low & 0xFFFFFF) + 1, (high >> 8) + 1
    else:
        raise HeaderError("damaged WebP header")
    return Header("WebP", width, height, whole)


def _bmp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return Header("BMP", width, abs(height))  # rows are stored top down when the height is negative


def _tiff(data: bytes) -> Header:
    end = "<" if data.startswith(b"II") else ">"
    (at,) = struct.unpack_from(end + "I", data, 4)
    (count,) = struct.unpack_from(end + "H", data, at)
    size: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(end + "HH", data, entry)
        if tag in (256, 257):
            (value,) = struct.unpack_from(end + ("H" if kind == 3 else "I"), data, entry + 8)
            size[tag] = max(value, size.get(tag, 0))  # given twice: decoders differ in which they take
    if len(size) != 2:
        raise HeaderError("damaged TIFF header")
    return Header("TIFF", size[256], size[257])


def _pnm(data: bytes) -> Header:
    match = re.match(
        rb"P[1-6](?:\s+(?:#[^\n]*\n\s*)*)(\d{1,9})(?:\s+(?:#[^\n]*\n\s*)*)(\d{1,9})\s", data[:4096]
    )
    if not match:
        raise HeaderError("damaged PNM header")
    return Header("PNM", int(match[1]), int(match[2]))

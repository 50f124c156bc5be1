"""Small text and TOML files: bounded reads, one-line errors. Whole files are written by `archive.write_atomic`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from edgekit.errors import UsageError
from edgekit.schema import SchemaError, from_json

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 ships Python 3.10
    import tomli as tomllib

T = TypeVar("T")

MAX_TEXT_BYTES = 1 << 20
"""Largest project, set or class file that is read."""


def read_text(path: Path, what: str) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{what}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{what}: cannot be read: {reason}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{what}: too large, expected at most {MAX_TEXT_BYTES} bytes of text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what}: not UTF-8 text at byte {error.start}") from None
    if "\0" in text:
        raise UsageError(f"{what}: a binary file, expected text")
    return text


def read_toml(cls: type[T], path: Path, what: str) -> T:
    text = read_text(path, what)
    try:
        return from_json(cls, tomllib.loads(text), "@")
    except SchemaError as error:
        message = str(error).removeprefix("@").removeprefix(".").removeprefix(": ")
        raise UsageError(f"{what}: {message}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{what}: not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{what}: nested too deep") from None

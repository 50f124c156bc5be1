"""The part behind `?` of a labelled procedural set: `synthetic://gestures?clips=600&size=64x64`."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping

from edgekit.errors import UsageError, did_you_mean


def read_query(query: str, defaults: Mapping[str, str], what: str) -> dict[str, str]:
    """Texts by key: `defaults` and, over them, what the query says. Raises: UsageError for another key."""
    values = dict(defaults)
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if key not in values:
            raise UsageError(f"{what}: unknown key {key[:40]!r}. {did_you_mean(key[:40], tuple(defaults))}")
        values[key] = value
    return values


def whole(what: str, values: Mapping[str, str], key: str, least: int, most: int) -> int:
    """The whole number `values[key]`. Raises: UsageError for anything else."""
    text = values[key]
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and least <= int(text) <= most):
        raise UsageError(f"{what}: {key} {text[:40]!r}: expected a whole number, {least} to {most}")
    return int(text)


def picture_size(what: str, values: Mapping[str, str], example: str) -> tuple[int, int]:
    """(width, height) of `values["size"]`, WxH or one number for both. Raises: UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", values["size"])
    if found is None:
        raise UsageError(f"{what}: size {values['size'][:40]!r}: expected {example}")
    return int(found[1]), int(found[2] or found[1])

"""MCAP files, what their writer and reader share.

The `mcap` package writes and reads the records; the frame of a chunk is handled in `mcap_writer` and
`mcap_reader`, because its writer takes four copies of every picture and its reader trusts the lengths in a file.
Source: mcap.dev/spec (records, chunks, summary section).
"""

from __future__ import annotations

from typing import Any

from edgekit.errors import MissingExtraError

MAGIC = b"\x89MCAP0\r\n"
FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, CHUNK_INDEX, STATISTICS, METADATA_INDEX, DATA_END = (
    2,
    3,
    4,
    5,
    6,
    8,
    11,
    13,
    15,
)
"""Opcodes of records."""


def load_mcap(purpose: str) -> Any:
    """The module `mcap.records`. Raises: MissingExtraError ("needed to <purpose>") when it is not installed."""
    try:
        import mcap.records
    except ImportError:
        raise MissingExtraError("mcap", "mcap", purpose) from None
    return mcap.records

"""What verbs that run streams say of rigs: sources by sensor, calibration, and how parts become moments."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError, did_you_mean, printable

if TYPE_CHECKING:
    from edgekit.runtime.sync import SyncOptions

_KEYS = {
    "window": "window_ms",
    "timeout": "timeout_ms",
    "adapt": "adapt_ms",
    "period": "period_ms",
    "depth": "depth",
}


def add_rig_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rig",
        type=Path,
        metavar="FILE",
        help="calibration of a rig (rig.toml, `edgekit rig`), used anew when the file changes; each sensor is then a "
        "source of its own: --source lidar=URI --source CAM_FRONT=URI",
    )
    parser.add_argument(
        "--sync",
        metavar="KEY=N,...",
        help="how a rig's parts become moments, in milliseconds: window=50 (a picture so far from its time belongs to a "
        "sweep), timeout=60 (a moment waits so long), adapt=50 (phases are corrected by so much), period=0 (moments at "
        "least so far apart); depth=8 (parts of a sensor that wait)",
    )
    parser.add_argument(
        "--lidar-budget",
        type=float,
        metavar="MS",
        help="what the LiDAR's encoder may take; a sweep that would take longer is cropped, then made coarser",
    )


def read_sync(text: str | None) -> SyncOptions | None:
    """The options in `--sync`. Raises: UsageError."""
    if text is None:
        return None
    from edgekit.runtime.sync import SyncOptions

    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in _KEYS:
            raise UsageError(
                f"option --sync: unknown key {printable(key)[:40]!r}. {did_you_mean(key, _KEYS)}"
            )
        if not re.fullmatch(r"[0-9]{1,6}" if key == "depth" else r"[0-9]{1,6}(\.[0-9]{1,3})?", value):
            raise UsageError(
                f"option --sync {key}={printable(value)[:40]}: expected a number, as in {key}=50"
            )
        found[_KEYS[key]] = int(value) if key == "depth" else float(value)
    return SyncOptions(**found)


def named_sources(sources: list[str]) -> list[str] | dict[str, str]:
    """`NAME=URI` by name, where all are written so; else as they are. Raises: UsageError for a mixture."""
    pairs = [re.fullmatch(r"(?s)([\w. -]{1,64})=(.+)", text) for text in sources]
    named = [match for text, match in zip(sources, pairs, strict=True) if match and not Path(text).exists()]
    if not named:
        return sources
    if len(named) < len(sources):
        plain = next(t for t, m in zip(sources, pairs, strict=True) if m not in named)
        raise UsageError(
            f"option --source {printable(plain)[:60]}: has no name while others do, expected NAME=URI"
        )
    found = {match[1]: match[2] for match in named}
    if len(found) < len(named):
        raise UsageError("option --source: a name is given twice. Leave one out")
    return found

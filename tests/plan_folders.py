"""Plan folders for the tests: a small BEVFusion with random weights."""

from __future__ import annotations

from pathlib import Path

from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.export import export_segments
from tests.bevfusion_nets import TINY, network


def export(folder: Path, config: Config = TINY) -> Path:
    """Write the plan of a network that knows nothing."""
    export_segments(network(config), folder)
    return folder

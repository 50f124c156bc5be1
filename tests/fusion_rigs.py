"""What tests of the task fusion share: a small network as a plan folder, its pipeline, and moments of a rig."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from edgekit.models.bevfusion.export import export_segments
from edgekit.models.bevfusion.head import pipeline
from edgekit.models.bevfusion.segments import Segments
from edgekit.tasks.fusion.pipeline import FusionPipeline
from tests import bevfusion_nets as nets


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgekit-plan-")


@functools.cache
def folder(config=nets.TINY) -> Path:
    """A plan folder of the network with random weights; shared, so not to be written into."""
    path = Path(_kept().name) / config.name
    export_segments(nets.network(config), path)
    return path


def tiny(config=nets.TINY) -> FusionPipeline:
    """A pipeline of its own."""
    return FusionPipeline(pipeline(config), Segments(folder(config)))

"""`edgekit.toml`: which models to build, what their heads mean, what to calibrate and to judge them on.

    project = open_project(None)                       # ./edgekit.toml, else the shipped detector
    project = open_project(Path("model.onnx"))         # a bare network: everything found or given
    project = load_project(Path("apps/detect"))        # a folder that holds an edgekit.toml

Keys are described in docs/projects.md. Paths in the file are relative to the file. Reading is
strict: an unknown key, a wrong type or a missing file is a one-line UsageError.
"""

from edgekit.project.entry import (
    FILE_NAME,
    HEADS,
    PLAN_NAME,
    PLANNED,
    PRECISIONS,
    QUANTIZATIONS,
    RESIZES,
    SEARCHES,
    Accept,
    HeadHint,
    ModelEntry,
    PreprocessHint,
    Project,
    TargetOverride,
    TaskName,
    Thresholds,
    VideoHint,
    safe_name,
)
from edgekit.project.opening import (
    bare_module,
    bare_plan,
    bare_project,
    default_app,
    open_project,
    with_options,
)
from edgekit.project.reading import load_project, read_classes

__all__ = [
    "FILE_NAME", "HEADS", "PLANNED", "PLAN_NAME", "PRECISIONS", "QUANTIZATIONS", "RESIZES", "SEARCHES", "Accept", "HeadHint",
    "ModelEntry", "PreprocessHint", "Project", "TargetOverride", "TaskName", "Thresholds", "VideoHint", "bare_module",
    "bare_plan", "bare_project", "default_app", "load_project", "open_project", "read_classes", "safe_name", "with_options",
]  # fmt: skip

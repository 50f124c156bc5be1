"""`edgekit init`: write a commented project file to start from."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from edgekit.archive import write_atomic
from edgekit.errors import UsageError
from edgekit.project import FILE_NAME, PLAN_NAME, bare_plan, safe_name

TEMPLATE = """\
# An edgekit project: which models to build, and how to tell that a build is right.
# Every key that is commented out shows its default or an example. Reference: docs/projects.md
# Paths are relative to this file.

[project]
name = {project}

[[model]]
{name}# names the bundle: <name>.<target>.edge
{source}# the trained network, ONNX
task = "detect"                  # or "classify", "video"; "fusion" takes a plan folder
{classes}

# What a detector's outputs mean (other tasks need no such table). "auto" finds the head by its structure; when it cannot, name the
# family: yolox, yolov5 (also v7), yolov8 (also v11), nanodet, fastestdet.
[model.head]
family = "auto"
# For any other network with one row per box, say what its columns hold:
# family = "rows"
# columns = ["x1", "y1", "x2", "y2", "score", "class"]   # or cx cy w h; obj; cls* = one score per class
# normalized = false             # true: coordinates are fractions of the input size

# How a picture becomes the network's input. Only what differs from the head family's own rule; a classifier
# or video network has no such rule and needs resize, color, mean and std.
[model.preprocess]
# resize = "letterbox"           # keep the aspect, paste top left; or "letterbox-center", "stretch", "crop"
#                                # (the middle, of a picture whose shorter side becomes shorter_side = 256)
# pad_value = 114                # 0..255
# color = "bgr"                  # or "rgb"
# mean = [0.0, 0.0, 0.0]         # per channel, in 8-bit levels: x = (pixel - mean) / std
# std = [1.0, 1.0, 1.0]          # [255.0, 255.0, 255.0] is the usual "/255"

# For task = "video": a clip model, or a one-frame model with its states.
# [model.video]
# dt_s = 0.1                     # seconds between two frames of the clips that it was trained on
# background = "still"           # the label that means that nothing happens
# smoothing = {{ window = 4 }}     # steps whose outputs are averaged
# allow_bidirectional = false    # true: convert a network that looks ahead, and measure what that costs

# Which boxes or classes are reported.
[model.thresholds]
# score = 0.25
# iou = 0.65                     # boxes of one class that overlap more are dropped
# max_detections = 300
# (a classifier has score and top_k: how many of the best classes are listed)

# Pictures like those the device will see, 100 to 500 of them. Needed for int8; no labels needed.
# [model.calibration]
# images = "calibration"         # a folder; or a named set: set = "street"
# count = 200                    # at most so many, evenly spaced in name order

# Labelled pictures to judge the build on. Without them accuracy is reported as not measured.
# [model.evaluation]
# data = "instances.json"        # COCO json; for a classifier a folder per class, .csv, .jsonl or .npz; for video
#                                # a folder <class>/<clip> or .npz, or set = "gestures-eval"
# images = "images"

# What `edgekit compress` trains the network on: labelled pictures, others than those it is judged by.
# [model.train]
# data = "train.json"            # as for an evaluation
# images = "train"
# batch = 32

# A build outside these limits fails.
[model.accept]
max_drop = 0.01                  # largest drop of AP (classifier: top1) against the float model, absolute
# min_metric = 0.30              # smallest AP or top1 of the build itself
# max_score_shift = 0.05         # largest change of a score
# max_confidence_loss = 0.05     # largest mean fall of the scores of what both networks find

# What one target does differently.
# [model.target.host]
# precision = "float32"          # auto, float32, float16, int8, dynamic
# backends = ["onnxruntime"]
# thresholds = {{ score = 0.3 }}
"""

PLAN_TEMPLATE = """\
# An edgekit project: which models to build, and how to tell that a build is right.
# Every key that is commented out shows its default or an example. Reference: docs/projects.md
# Paths are relative to this file.

[project]
name = {project}

[[model]]
{name}# names the bundle: <name>.<target>.edge
{source}# a folder with plan.json, its networks and weights
task = {task}

# Which boxes are reported.
[model.thresholds]
# score = 0.1
# max_detections = 500

# Moments like those the rig will see, about 50. Needed for int8; no labels needed.
# [model.calibration]
# data = "calibration"           # a folder with an info file of nuScenes' form, or KITTI's folders
# count = 48                     # at most so many, evenly spaced
# source = "synthetic://street-rig?size=256x144"   # or a synthetic street, with seed and count

# Labelled moments to judge the build on. Without them accuracy is reported as not measured.
# [model.evaluation]
# data = "evaluation"

# A build outside these limits fails.
[model.accept]
max_drop = 0.01                  # largest drop of mAP against the float plan, absolute
# min_metric = 0.30              # smallest mAP of the build itself
# max_score_shift = 0.05         # largest change of a score
# max_confidence_loss = 0.05     # largest mean fall of the scores of what both find

# What one target does differently.
# [model.target.host]
# precision = "float32"          # auto, float32, float16, int8
# backends = ["onnxruntime"]
# thresholds = {{ score = 0.2 }}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a commented edgekit.toml to start from."
    parser.add_argument("dir", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: here")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="M.onnx",
        help="the trained network or plan folder, default: the one in DIR",
    )
    parser.add_argument("--force", action="store_true", help=f"overwrite an {FILE_NAME} that is there")


def main(args: argparse.Namespace) -> int:
    path = write_project(args.dir, args.model, args.force)
    found = _source(args.dir, args.model)
    here = "" if args.dir in (Path(), Path(".")) else f" {args.dir}"
    print(f"wrote {path}")
    print("\nNext:", file=sys.stderr)
    if found is None:
        print(f"  put your network at {args.dir / 'model.onnx'}, or change `source`", file=sys.stderr)
    print(f"  edgekit build{here} --target host --dry-run    shows the plan", file=sys.stderr)
    print(f"  edgekit build{here} --target jetson-orin,rpi5  builds and proves the bundles", file=sys.stderr)
    return 0


def write_project(folder: Path, model: Path | None = None, force: bool = False) -> Path:
    """Write `folder`/edgekit.toml; `model` (an .onnx file, or a plan folder) None = the only one in the folder, if there
    is one.

    Raises: UsageError when the file is there (without `force`) or `model` is not; OutputError.
    """
    path = folder / FILE_NAME
    if folder.exists() and not os.path.isdir(folder):
        raise UsageError(f"folder {folder}: a file, expected a folder")
    if model is not None and model.name == PLAN_NAME:
        model = model.parent
    if model is not None and not (os.path.isfile(model) or os.path.isfile(model / PLAN_NAME)):
        raise UsageError(f"model {model}: no such file. Give the path of an .onnx file, or of a plan folder")
    if os.path.lexists(path) and not force:
        raise UsageError(f"project {path}: exists already. Overwrite it with --force")
    source = _source(folder, model) or Path("model.onnx")
    plan = model or folder / source
    if os.path.isfile(plan / PLAN_NAME):
        (entry,) = bare_plan(plan).models
        text = PLAN_TEMPLATE.format(
            project=_quote(safe_name(folder.resolve().name, entry.name)),
            name=f"name = {_quote(entry.name)} ".ljust(33),
            source=f"source = {_quote(source.as_posix())} ".ljust(33),
            task=_quote(entry.task),
        )
        write_atomic(path, [text.encode("utf-8")], "project")
        return path
    name = safe_name(source.stem)
    project = safe_name(folder.resolve().name, name)
    labels = os.path.isfile(folder / "classes.txt")
    text = TEMPLATE.format(
        project=_quote(project),
        name=f"name = {_quote(name)} ".ljust(33),
        source=f"source = {_quote(source.as_posix())} ".ljust(33),
        classes=("" if labels else "# ") + 'classes = "classes.txt"         # one name a line, or a list; '
        "without it 80 classes are taken as COCO's",
    )
    write_atomic(path, [text.encode("utf-8")], "project")
    return path


def _source(folder: Path, model: Path | None) -> Path | None:
    """The network as the file will name it."""
    if model is not None:
        try:
            return Path(os.path.relpath(model.resolve(), folder.resolve()))
        except ValueError:  # another drive
            return model.resolve()
    plans = sorted(path.parent for path in (*folder.glob(PLAN_NAME), *folder.glob(f"*/{PLAN_NAME}")))
    if plans:
        return plans[0].relative_to(folder) if len(plans) == 1 else None
    networks = sorted(folder.glob("*.onnx"))
    return Path(networks[0].name) if len(networks) == 1 else None


def _quote(text: str) -> str:
    """A TOML basic string: JSON's escapes are a subset of TOML's, save that TOML wants DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")

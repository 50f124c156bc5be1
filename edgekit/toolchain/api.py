"""`edgekit.build` and `edgekit.compress`: the commands' work as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import content
from edgekit.bundle import Bundle
from edgekit.errors import MissingExtraError, UsageError, did_you_mean
from edgekit.target import Target
from edgekit.tasks import TASKS

if TYPE_CHECKING:
    from torch import nn

    from edgekit.compression.job import Job
    from edgekit.compression.problem import Problem
    from edgekit.compression.recipe import Recipe
    from edgekit.compression.run import Compressed

Progress = Callable[[str, int, int], None]


def build(
    model: str | Path,
    target: str | Target | Sequence[str | Target] = "host",
    *,
    task: str | None = None,
    precision: str = "auto",
    out: str | Path = "dist",
    head: str | None = None,
    columns: Sequence[str] = (),
    classes: str | Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    batch: int | None = None,
    calibration: str | Path | None = None,
    instances: str | Path | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    sign_key: str | Path | None = None,
    allow_drop: bool = False,
    quantization: str = "search",
    qat_steps: int = 300,
    weights_codec: str = "",
    progress: Progress | None = None,
) -> list[Bundle]:
    """Build a model for one or several targets.

    model: an ONNX file, an `edgekit.toml`, a folder that holds one, or a plan folder (docs/projects.md).
    task: detect (the default of a bare network), classify or video; a plan says its own.
    precision: float32, float16, int8 (needs calibration) or auto (each target's default).
    quantization: how int8 is found: search, search+qat (train where the budget is missed), qat (train in any case), or
        one plain range scheme (minmax, percentile, entropy, mse). qat_steps: batches of that training.
    weights_codec: store float32 weights in few bits, decoded when the bundle is loaded: kmeans-16, ternary, binary,
        pow2-5, int4, ..., 2:4+int8 or sparse+kmeans-16 for zeros (edgekit/codecs.py); the accuracy budget judges it.
    head: detector family when it is not found by structure; columns: of the output, for head "rows".
    classes: file of their names, one a line. shapes: sizes of inputs that the file leaves open.
    preprocess: the input rule, or what differs from the one found: resize, shorter_side, color, mean, std,
        pad_value, layout, dtype (docs/projects.md). Classifiers and video networks need resize, color, mean and std.
    video: keys of [model.video] (docs/projects.md): dt_s, frames, allow_bidirectional, smoothing, ...
    batch: streams that one run takes, each in a lane of its own (docs/states.md); by default the project's, or 1.
    calibration: folder of pictures or name of a set: int8 is calibrated on them; without labelled pictures
        they stand in for them wherever no labels are needed.
    instances, images: COCO annotations and their pictures, to prove the accuracy on; limit: only
        the first so many. data: the same for any task: for a classifier a folder per class, a table
        (.csv, .jsonl, with its pictures in images or beside it) or arrays (.npz); for video a folder of
        <class>/<clip>, clips as .npz, or a synthetic:// source; for fusion an info file's or KITTI's folder, or a
        synthetic:// source.
    sign_key: PEM file of an Ed25519 private key.
    allow_drop: write a bundle that misses its limits all the same, marked as such.
    progress: called as progress(what, done, of).
    Returns: the bundles, open, in the order of models and targets.
    Raises: ModelError, CalibrationError, LoweringError, UsageError (bad input); EvidenceError (accuracy budget missed);
    OutputError (cannot write).
    """
    require_extras()
    if data is not None and instances is not None:
        raise UsageError("arguments data and instances: expected one of them, they say the same")
    if task is not None and task not in TASKS:
        raise UsageError(f"task {task!r}: unknown. {did_you_mean(task, TASKS)}")
    labels = data if data is not None else instances
    from edgekit.project import QUANTIZATIONS, open_project, with_options
    from edgekit.toolchain import build as main_path

    if quantization not in QUANTIZATIONS:
        raise UsageError(
            f"quantization {quantization!r}: unknown. {did_you_mean(quantization, QUANTIZATIONS)}"
        )
    project = with_options(
        open_project(Path(model)),
        head=head,
        columns=tuple(columns),
        calibration=str(calibration) if calibration else None,
        classes=Path(classes) if classes else None,
        data=Path(labels) if labels else None,
        images=Path(images) if images else None,
        task=task,
        preprocess=preprocess,
        video=video,
        batch=batch,
    )
    names = [target] if isinstance(target, (str, Target)) else list(target)
    targets = [t if isinstance(t, Target) else Target.load(t) for t in names]
    if qat_steps < 1:
        raise UsageError(f"qat_steps {qat_steps}: expected at least 1")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1")
    key = Path(sign_key) if sign_key else None
    options = main_path.Options(
        Path(out),
        precision,
        key,
        allow_drop,
        dict(shapes or {}),
        limit,
        quantization,
        qat_steps,
        weights_codec,
    )
    quiet: Progress = progress or (lambda what, done, of: None)
    built = [b for entry in project.models for b in main_path.build(entry, targets, options, quiet)]
    return [Bundle.open(b.path) for b in built]


def compress(
    model: str | Path | nn.Module | Problem,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    target: str | Target | None = None,
    *,
    only: str | None = None,
    precision: str | None = None,
    steps_scale: float = 1.0,
    seed: int | None = None,
    task: str | None = None,
    classes: str | Path | None = None,
    preprocess: Mapping[str, Any] | None = None,
    input: Sequence[int] = (),
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Make a network smaller or faster by training it after a recipe (docs/compression.md).

    model: a project (an `edgekit.toml` or its folder), an ONNX file, "package.module:function", a torch module, or an
        edgekit.compression.problem.Problem. only: name of the model, of a project that has several.
    recipe: a .toml file, the name of one that ships, or a mapping with its keys.
    out: the folder of the run: the network as ONNX with an `edgekit.toml` that `edgekit.build` takes as it is,
        summary.json, accuracy.png, and all that an interrupted run needs to go on.
    target: the board to be fast on; precision: in which it will run there (its default).
    steps_scale: times the batches of every training. seed: in place of the recipe's.
    task, classes, preprocess, data, images: as of `build`, over those of the project.
    train, train_images: labelled pictures to train on, as data and images, which it is judged by.
    input: sizes of a torch module's input, [1, ...].
    progress: called as progress(what, done, of).
    Returns: the module, its file, and what each step did to it.
    Raises: UsageError, ModelError, CalibrationError, OutputError, EdgekitError (a training that fails).
    """
    job = compression_job(
        model, recipe, target, only=only, precision=precision, steps_scale=steps_scale, seed=seed, task=task,
        classes=classes, preprocess=preprocess, input=input, train=train, train_images=train_images, data=data,
        images=images,
    )  # fmt: skip
    return job.run(Path(out), progress or (lambda *_: None))


def compression_job(
    model: str | Path | nn.Module | Problem,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    target: str | Target | None = None,
    **options: Any,
) -> Job:
    """What `compress` would run, with everything read and checked that can be before it."""
    require_extras()
    require_torch()
    from edgekit.compression.job import plan_job

    return plan_job(model, recipe, target, **options)


def app_bundle(name: str, target: str = "host", *, progress: Progress | None = None) -> Path:
    """The bundle of an app that ships with edgekit, built for `target` at the first call and kept in the cache.

    Raises: UsageError for an unknown app or target; what `build` raises.
    """
    folder = content.find("apps", name)
    if folder is None or not (folder / "edgekit.toml").is_file():
        known = {p.parent.name for f in content.folders("apps") for p in f.glob("*/edgekit.toml")}
        raise UsageError(f"app {name!r}: unknown. {did_you_mean(name, known)}")
    require_extras()
    from edgekit.toolchain import cache

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".md"))
    code = cache.sources("toolchain", "quant", "passes", "backends", "kernels", "tasks")
    parts = [part for path in files for part in (str(path.relative_to(folder)), path.read_bytes())]
    key = cache.digest(target, cache.tools(), code, *parts)
    home = cache.cache_dir() / "apps" / name / f"{target}-{key[:16]}"
    found = sorted(home.glob("*.edge"))
    if not found:
        build(folder, target, out=home, progress=progress)[0].close()
        found = sorted(home.glob("*.edge"))
    return found[0]


def require_extras() -> None:
    """Raises: MissingExtraError when the toolchain's packages are not installed."""
    from importlib.util import find_spec

    for module, package in (
        ("onnx", "onnx"),
        ("onnx_ir", "onnx-ir"),
        ("onnxruntime", "onnxruntime"),
        ("cv2", "opencv-python-headless"),
    ):
        if find_spec(module) is None:
            raise MissingExtraError(package, "build", "build models")


def require_torch() -> None:
    """Raises: MissingExtraError when torch is not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch", "compress networks by training")

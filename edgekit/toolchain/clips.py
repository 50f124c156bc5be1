"""Clips a build of a stateful network is calibrated and proven on: frames in time order, and the states that the
float network carries through them."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import onnx_ir as ir

from edgekit.dataset import DIGEST_PICTURES, DataSet, check_digest, check_files, from_uri
from edgekit.errors import CalibrationError, UsageError
from edgekit.passes.graph import shape
from edgekit.picture import SUFFIXES, VIDEO_SUFFIXES
from edgekit.project import ModelEntry
from edgekit.runtime.sources.pictures import natural_key
from edgekit.runtime.state import initial_value
from edgekit.schema import printable, to_json
from edgekit.spec import StateSpec
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.tasks.video.dataset import Clip, VideoSet, read_set
from edgekit.tasks.video.spec import VideoSpec
from edgekit.toolchain import cache

if TYPE_CHECKING:
    from edgekit.passes.streamify import Streamified

Progress = Callable[[str, int, int], None]

CALIBRATION_FRAMES = 256
"""Taken of a set when the project says no count: as many clips of the network's length as make these."""
COMPARED = 128
"""Clips of an evaluation set that calibration is compared with, a frame of each: frames of one clip look alike. With the
shipped gesture network, 60 clips and these lie 0.03 to 0.04 apart, 120 of them 0.015 (quant.likeness); 64 of these
0.045 to 0.05, as far as unlike ones."""
GOLDEN = (5**0.5 - 1) / 2
LONGEST = 4
"""Of a clip, at most this many times the network's length is looked at to calibrate and to compare outputs."""


@dataclass(frozen=True)
class Clips(Sequence[Sequence[np.ndarray]]):
    """Clips of a set, read when they are asked for: frames uint8 [H, W, 3] BGR, in the network's step."""

    data: VideoSet
    chosen: tuple[int, ...]
    frames: int
    """At most so many of each."""
    dt_s: float | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Sequence[np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return replace(self, chosen=self.chosen[index])
        clip = self.data.clip(self.chosen[operator.index(index)])
        return clip.played(self.dt_s)[: self.frames]

    def of(self, count: int) -> Clips:
        """At most `count` of them, evenly spaced."""
        return replace(self, chosen=tuple(self.chosen[i] for i in DataSet(count=count).indices(len(self))))


def clips_of(data: VideoSet, spec: VideoSpec) -> Clips:
    """All clips of a set, as a build of a network with `spec` looks at them."""
    return Clips(data, tuple(range(len(data.images))), LONGEST * spec.frames, spec.dt_s)


def labelled_clips(data: DataSet, labels: tuple[str, ...], limit: int | None = None) -> VideoSet:
    """The set to judge on; `labels`: the model's, () takes the set's own.

    Raises: UsageError, CalibrationError for a synthetic set that has changed.
    """
    counts = [n for n in (data.count, limit) if n is not None]
    return _read(data, min(counts) if counts else None, labels)


def unlabelled_clips(data: DataSet, count: int | None = None) -> VideoSet:
    """Clips whose labels do not matter: a set with labels, or a folder that holds videos, folders of pictures or,
    as one clip, pictures. At most `count`, evenly spaced. Raises: UsageError, CalibrationError."""
    if data.source or data.data is not None:
        return _read(data, count if data.count is None else min(data.count, count or data.count), ())
    assert data.images is not None, "a set is one of these"
    paths = clip_paths(data.images)
    if not paths:
        raise UsageError(
            f"folder {printable(str(data.images))}: holds no clip, expected videos, folders of pictures or pictures. "
            "Name another folder"
        )
    counts = [n for n in (data.count, count) if n is not None]
    chosen = [paths[i] for i in DataSet(count=min(counts) if counts else None).indices(len(paths))]
    return VideoSet(data.images.name, (), tuple(Clip(0, path) for path in chosen), "")


def footage(where: str, count: int) -> DataSet:
    """What an option names: a folder of clips, labelled ones, or a synthetic:// source (`count` clips of it, unless
    it says clips itself)."""
    if "://" in where:
        found = from_uri(where)
        return found if found.count is not None else replace(found, count=count)
    return DataSet(images=Path(where)) if Path(where).is_dir() else DataSet(data=Path(where))


def clip_paths(folder: Path) -> list[Path]:
    """The clips below a folder, in name order, folders per class included; the folder itself if it holds pictures."""
    try:
        entries = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural_key)
    except OSError as error:
        raise UsageError(f"folder {printable(str(folder))}: {error.strerror}. Check the folder") from None
    if any(p.suffix.lower() in SUFFIXES and p.is_file() for p in entries):
        return [folder]
    found = []
    for path in entries:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.append(path)
        elif path.is_dir():
            found += clip_paths(path)
    return found


def _read(data: DataSet, count: int | None, labels: tuple[str, ...]) -> VideoSet:
    if not data.source:
        where = data.data if data.data is not None else data.images
        assert where is not None, "checked by the project reader"
        return read_set(where, None, limit=count, labels=labels)
    between = "&" if "?" in data.source else "?"
    clips = min(n for n in (data.count, count) if n is not None)
    found = read_set(Path(f"{data.source}{between}clips={clips}&seed={data.seed}"), None, labels=labels)
    if data.sha256:
        first = read_set(Path(f"{data.source}{between}clips={DIGEST_PICTURES}&seed={data.seed}"), None)
        check_digest(data, [first.read(i) for i in range(DIGEST_PICTURES)])
    return found


# --- feeds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateFeeds:
    """Frames of clips as a stateful network is fed with them on the device; may be gone through again.

    Iterating gives one dict a frame, in time order: the picture [1, C, H, W] or [1, H, W, C] by the input rule,
    and each state as `model`, the float network, left it after the frame before; at a clip's first frame
    its initial value.

    lengths: frames of each clip. chosen: numbers of the frames to give, counted through all clips (None: all);
    those before them in their clip run all the same.
    digest: of the pictures, the rule, the code that applies it and the network. provenance: for the evidence.
    """

    clips: Clips
    lengths: tuple[int, ...]
    rule: ImagePreprocess
    input_name: str
    model: ir.Model
    states: tuple[StateSpec, ...]
    what: str
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)
    chosen: frozenset[int] | None = None

    def __len__(self) -> int:
        return sum(self.lengths) if self.chosen is None else len(self.chosen)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        from edgekit.toolchain.data import fed

        number = 0
        for index, length in enumerate(self.lengths):
            wanted = [i for i in range(length) if self.chosen is None or number + i in self.chosen]
            number += length
            if not wanted:
                continue
            held: Mapping[str, np.ndarray] = {s.input: initial_value(s) for s in self.states}
            for i, frame in enumerate(self.clips[index][: wanted[-1] + 1]):
                feed = {self.input_name: fed(frame, self.rule), **held}
                if i in wanted:
                    yield feed
                if i < wanted[-1]:
                    held = self._next(feed)

    def spread(self, count: int, skip: Collection[int] = ()) -> list[int]:
        """At most `count` positions in this sequence: clips evenly, and in each another moment, by the golden
        ratio. Evenly spaced frames would often all be the first of their clip, whose states hold nothing."""
        known = list(range(sum(self.lengths))) if self.chosen is None else sorted(self.chosen)
        bounds = np.cumsum([0, *self.lengths]).tolist()
        clip_of = np.searchsorted(bounds, known, "right").tolist()
        groups: dict[int, list[int]] = {}
        for position, clip in enumerate(clip_of):
            if position not in skip:
                groups.setdefault(clip, []).append(position)
        left = list(groups.values())
        count = min(count, sum(map(len, left)))
        found: list[int] = []
        for i in range(count):
            group = left[i * len(left) // count]
            free = [position for position in group if position not in found]
            if free:
                found.append(free[int(len(free) * (i * GOLDEN % 1.0))])
        return sorted(found)

    def pick(self, which: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
        """The feeds at these positions."""
        return {i: feed for i, feed in enumerate(self) if i in which}

    def first(self, count: int) -> StateFeeds:
        """Of at most `count` frames (`spread`), with the same states as in the whole."""
        known = range(sum(self.lengths)) if self.chosen is None else sorted(self.chosen)
        chosen = tuple(known[i] for i in self.spread(count))
        provenance = {**self.provenance, "pictures": len(chosen)}
        digest = cache.digest(self.digest, chosen)
        return replace(self, chosen=frozenset(chosen), digest=digest, provenance=provenance)

    def _next(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the states become."""
        if not self.states:
            return {}
        values = self._session.run([s.output for s in self.states], dict(feed))
        return {s.input: value for s, value in zip(self.states, values, strict=True)}

    @cached_property
    def _session(self) -> Any:
        from edgekit.quant.simulate import open_session

        return open_session(self.model)


def calibration_clips(
    entry: ModelEntry,
    spec: Any,
    model: ir.Model,
    states: Sequence[StateSpec],
    *,
    input_name: str,
    progress: Progress,
) -> StateFeeds:
    """What to calibrate `entry` on: its own clips through its own input rule.

    Raises: CalibrationError when the project gives none, or clips that it also evaluates on; UsageError for a
    set without clips.
    """
    from edgekit.toolchain.data import calibration_set

    data = calibration_set(entry)
    progress("read calibration clips", 0, 1)
    count = data.count or max(1, CALIBRATION_FRAMES // spec.frames)
    found = unlabelled_clips(data, count)
    if entry.evaluation is not None:
        _check_apart(found, _read_all(entry.evaluation), f"model {entry.name}")
    where = data.name or data.source or found.name
    return _feeds(clips_of(found, spec), spec.preprocess, input_name, model, states, where)


def evaluation_clips(
    entry: ModelEntry,
    spec: Any,
    model: ir.Model,
    states: Sequence[StateSpec],
    *,
    input_name: str,
    progress: Progress,
) -> StateFeeds | None:
    """A frame each of COMPARED clips that `entry` is judged on, to compare calibration with; None without any."""
    data = entry.evaluation
    if data is None:
        return None
    progress("read evaluation clips", 0, 1)
    clips = clips_of(_read_all(data), spec).of(COMPARED)
    name = data.name or "evaluation"
    return _feeds(clips, spec.preprocess, input_name, model, states, name).first(len(clips))


def _read_all(data: DataSet) -> VideoSet:
    return _read(data, data.count, ())


def _feeds(
    clips: Clips,
    rule: ImagePreprocess,
    input_name: str,
    model: ir.Model,
    states: Sequence[StateSpec],
    what: str,
) -> StateFeeds:
    """Each clip is read once, for its length and digest."""
    pixels, lengths = hashlib.sha256(), []
    for clip in clips:
        lengths.append(len(clip))
        for frame in clip:
            pixels.update(f"{frame.shape}".encode())
            pixels.update(np.ascontiguousarray(frame).tobytes())
    found = pixels.hexdigest()
    code = cache.sources("kernels/letterbox"), cache.tools()["opencv-python-headless"]
    content = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
    digest = cache.digest(found, lengths, to_json(rule), to_json(list(states)), content, *code)
    provenance = {"calibration": what, "digest": found, "pictures": sum(lengths), "clips": len(lengths)}
    return StateFeeds(clips, tuple(lengths), rule, input_name, model, tuple(states), what, digest, provenance)


def _check_apart(calibration: VideoSet, evaluation: VideoSet, where: str) -> None:
    """Refuse to calibrate on what is judged: equal files, or equal clips of arrays. Raises: CalibrationError.

    Clips of a synthetic world are told apart by their seeds (dataset.check_disjoint).
    """
    check_files(_files(calibration), _files(evaluation), where)
    if calibration.arrays is None or evaluation.arrays is None:
        return
    judged = {_row(evaluation, clip) for clip in evaluation.images}
    shared = [clip for clip in calibration.images if _row(calibration, clip) in judged]
    if shared:
        raise CalibrationError(
            f"{where}: {len(shared)} of {len(calibration.images)} calibration clips are evaluation clips too, "
            f"expected none, the first is number {shared[0].index}. Give calibration its own"
        )


def _files(data: VideoSet) -> list[Path]:
    found: list[Path] = []
    for clip in data.images:
        if clip.path is not None and clip.path.is_dir():
            found += [p for p in clip.path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        elif clip.path is not None:
            found.append(clip.path)
    return found


def _row(data: VideoSet, clip: Clip) -> bytes:
    assert data.arrays is not None, "asked for arrays only"
    return hashlib.sha256(np.ascontiguousarray(data.arrays[clip.index]).tobytes()).digest()


# --- what the clip model itself would say ------------------------------------------------------------


def clip_accuracy(
    model: ir.Model, made: Streamified, spec: VideoSpec, data: VideoSet, progress: Progress
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The metric of the clip model that `made` came from, float, on whole clips: what `evaluate` gives.

    A clip is cut into runs of the model's length, the last of which ends with it; a shorter one shows its last
    frame to the end. The mean of all outputs counts. Raises: ModelError.
    """
    from edgekit.quant.simulate import open_session
    from edgekit.tasks.classify.metric import accuracy, judge
    from edgekit.toolchain.data import fed

    session = open_session(model)
    value = model.graph.inputs[0]
    sizes = shape(value)
    assert sizes is not None, "checked by streamify"
    answers = []
    everything = replace(clips_of(data, spec), frames=1 << 30)
    for number, clip in enumerate(everything):
        progress("accuracy, clip model", number, len(everything))
        arrays = [fed(frame, spec.preprocess) for frame in clip]
        arrays += [arrays[-1]] * (made.frames - len(arrays))
        begins = {min(b, len(arrays) - made.frames) for b in range(0, len(arrays), made.frames)}
        total = np.zeros(len(spec.labels), np.float64)
        for begin in sorted(begins):
            run = np.stack([a[0] for a in arrays[begin : begin + made.frames]], made.axis - (len(sizes) - 4))
            (result,) = session.run(None, {str(value.name): run.reshape(sizes)})
            total += np.asarray(result, np.float64).reshape(-1, len(spec.labels)).mean(axis=0)
        answers.append(judge(total, data.images[number].cls))
    return accuracy(data, answers), answers

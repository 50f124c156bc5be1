"""Calibration: run pictures through the float network once and keep a histogram of every value.

The graph is cut into stages, runs of nodes whose results fit in a few megabytes. A picture passes
stage by stage; every result is counted and dropped as soon as no later stage reads it. So each node
runs once per picture, and memory is bounded by the largest stage, whatever the number of pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.errors import CalibrationError, ModelError, printable
from edgekit.passes import exact
from edgekit.passes.graph import infer, shape
from edgekit.quant import stats as stats_
from edgekit.quant.stats import Accumulator, Stats
from edgekit.toolchain import cache

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""
Feed = Mapping[str, np.ndarray]
Feeds = Iterable[Feed] | Callable[[], Iterable[Feed]]

KIND = "calibration"
STAGE_BYTES = 16 << 20
"""Results of one stage. Smaller: more calls; larger: more memory. The statistics are the same."""
CHECKPOINT = 32
"""Pictures between two saves of a calibration that may be interrupted."""


def calibrate(
    model: ir.Model,
    feeds: Feeds,
    *,
    progress: Progress | None = None,
    cache_key: str | None = None,
    stage_bytes: int = STAGE_BYTES,
    only: Collection[str] | None = None,
) -> Stats:
    """Statistics of every float32 value that a node of `model` computes, and of its float32 inputs.

    feeds: one dict of input arrays per picture, or a function that returns such an iterable (it is
        not called when the result is in the cache). Read once, one picture at a time.
    cache_key: digest of what `feeds` yields. With it the result is kept, by that key, the network
        and the code here, and an interrupted run goes on where it stopped.
    stage_bytes: results held at a time; changes memory and speed, never a statistic.
    only: look at these values alone, None for all.

    Raises: CalibrationError without pictures, for one that does not fit the network's inputs or for
    a value that is not finite; ModelError when ONNX Runtime refuses the network.
    """
    model = model.clone()
    infer(model)
    names = [name for name in measured(model) if only is None or name in only]
    if not names:
        raise ModelError("model: nothing to calibrate, expected at least one float32 value. Check the export")
    store = None
    if cache_key is not None:
        content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        key = cache.digest(hashlib.sha256(content).hexdigest(), names, cache_key, _code(), _tools())
        store = _Store(key, tuple(names))
        finished = store.load("")
        if finished is not None:
            return {name: a.stats() for name, a in zip(names, finished, strict=True)}
    stages = _stages(model, set(names), stage_bytes)
    types = {str(v.name): v for v in model.graph.inputs}
    del model
    gathered = (store.load(".part") if store else None) or [Accumulator() for _ in names]
    done = len(gathered[0].image_low)
    by_name = dict(zip(names, gathered, strict=True))
    source = feeds() if callable(feeds) else feeds
    total = operator.length_hint(source)
    saved, pool = done, _Pool()
    try:
        for number, feed in enumerate(itertools.islice(iter(source), done, None), done):
            if progress:
                progress("calibrate", number, max(total, number))
            _run(stages, _checked(feed, types, number), by_name, number, pool)
            done = number + 1
            if store and done - saved >= CHECKPOINT:
                store.save(".part", gathered)
                saved = done
    except BaseException:
        # a picture that stopped half way is in some histograms only: such a state is not kept
        if store and done > saved and all(len(a.image_low) == done for a in gathered):
            store.save(".part", gathered)
        raise
    if not done:
        raise CalibrationError(
            "calibration: there are no pictures, expected at least one. Give a folder of pictures"
        )
    if progress:
        progress("calibrate", done, done)
    if store:
        store.save("", gathered)
        store.drop(".part")
    return {name: a.stats() for name, a in by_name.items()}


def measured(model: ir.Model) -> list[str]:
    """The values that calibration looks at: float32 inputs and results of nodes, constants aside."""
    found = [v for v in model.graph.inputs if v.dtype == ir.DataType.FLOAT]
    for node in model.graph:
        if node.op_type != "Constant":
            found += [v for v in node.outputs if v.name and v.dtype == ir.DataType.FLOAT]
    return [str(v.name) for v in found]


# --- stages --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    session: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    drop: tuple[str, ...]
    """What no later stage reads."""
    places: dict[str, tuple[tuple[int, ...], np.dtype]] | None
    """Shape and type of every result; None when one is not known before the run."""


def _stages(model: ir.Model, names: set[str], budget: int) -> list[_Stage]:
    """Cut the graph, in order, into sessions whose results take about `budget` bytes."""
    groups: list[list[ir.Node]] = [[]]
    size = 0
    for node in model.graph:
        bytes_ = sum(_nbytes(v) for v in node.outputs)
        if groups[-1] and size + bytes_ > budget:
            groups.append([])
            size = 0
        groups[-1].append(node)
        size += bytes_
    last: dict[str, int] = {}
    reads = []
    for number, nodes in enumerate(groups):
        made = {o.name for node in nodes for o in node.outputs}
        outside: dict[str, ir.Value] = {}
        for node in nodes:
            outside.update((str(v.name), v) for v in _used(node) if v.name not in made)
        last.update((name, number) for name in outside)
        reads.append(outside)
    proto = ir.serde.serialize_model(model)
    stages = []
    for number, nodes in enumerate(groups):
        weights = {n for n, v in reads[number].items() if v.is_initializer() and not v.is_graph_input()}
        inputs = [v for n, v in reads[number].items() if n not in weights]
        results = [o for node in nodes for o in node.outputs if o.name]
        writes = [v for v in results if v.name in names or last.get(str(v.name), -1) > number]
        drop = [str(v.name) for v in (*inputs, *writes) if last.get(str(v.name), -1) <= number]
        if not writes:
            continue
        session = _session(proto, nodes, weights, inputs, writes)
        known = {str(v.name): _place(v) for v in writes}
        places = {name: place for name, place in known.items() if place is not None}
        stages.append(
            _Stage(
                session,
                tuple(str(v.name) for v in inputs),
                tuple(known),
                tuple(drop),
                places if len(places) == len(known) else None,
            )
        )
    return stages


def _used(node: ir.Node) -> list[ir.Value]:
    """What a node reads, that of its inner graphs included."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        graphs = []
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        for graph in graphs:
            inner = {v.name for v in graph.inputs} | set(graph.initializers)
            inner |= {o.name for n in graph for o in n.outputs}
            found += [v for n in graph for v in _used(n) if v.name not in inner]
            found += [v for v in graph.outputs if v.name not in inner]
    return found


def _place(value: ir.Value) -> tuple[tuple[int, ...], np.dtype] | None:
    sizes = shape(value)
    if sizes is None or 0 in sizes or value.dtype not in (ir.DataType.FLOAT, ir.DataType.INT64):
        return None
    return sizes, np.dtype(value.dtype.numpy())


def _nbytes(value: ir.Value) -> int:
    sizes = shape(value)
    item = value.dtype.itemsize if value.dtype is not None else 4
    return math.prod(sizes) * int(item) if sizes is not None else 1 << 20


def _session(
    model: Any,
    nodes: Sequence[ir.Node],
    weights: set[str],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> Any:
    """An ONNX Runtime session of some nodes of `model` (onnx.ModelProto).

    No graph optimisation: every result is wanted as it is, and each kernel then gives the same bits
    whatever else is in its stage.
    """
    import onnx

    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = "stage"
    part.graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in weights)
    part.graph.input.extend(ir.serde.serialize_value(v) for v in inputs)
    part.graph.output.extend(ir.serde.serialize_value(v) for v in outputs)
    with exact.refused():
        return exact.open_session(part.SerializeToString(), "calibrate", arena=False)


class _Pool:
    """Memory for results, used again and again: asking malloc for megabytes in changing sizes lets the
    process grow to several times what it holds."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, nbytes: int) -> np.ndarray:
        """The smallest free block of at least `nbytes`, else a new one: uint8."""
        fitting = [i for i, block in enumerate(self._free) if block.nbytes >= nbytes]
        if not fitting:
            return np.empty(nbytes, np.uint8)
        return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))

    def give(self, block: np.ndarray) -> None:
        self._free.append(block)


def _run(
    stages: Sequence[_Stage], feed: Feed, gathered: Mapping[str, Accumulator], number: int, pool: _Pool
) -> None:
    """One picture through all stages, every result counted."""

    def count(name: str, array: np.ndarray) -> None:
        if name in gathered and not gathered[name].add(array):
            raise CalibrationError(
                f"calibration picture {number}: value {printable(name)} is not finite (NaN or infinity). "
                "Check the picture and the input rule of the model"
            )

    alive = {name: np.ascontiguousarray(array) for name, array in feed.items()}
    blocks: dict[str, np.ndarray] = {}
    for name, array in alive.items():
        count(name, array)
    for stage in stages:
        if stage.places is None:
            results = stage.session.run(list(stage.writes), {name: alive[name] for name in stage.reads})
            alive.update(zip(stage.writes, results, strict=True))
            del results
        else:
            binding = stage.session.io_binding()
            for name in stage.reads:
                binding.bind_cpu_input(name, alive[name])
            for name, (sizes, dtype) in stage.places.items():
                blocks[name] = pool.take(math.prod(sizes) * dtype.itemsize)
                array = blocks[name][: math.prod(sizes) * dtype.itemsize].view(dtype).reshape(sizes)
                alive[name] = array
                binding.bind_output(name, "cpu", 0, dtype.type, sizes, array.ctypes.data)
            stage.session.run_with_iobinding(binding)
        for name in stage.writes:
            count(name, alive[name])
        for name in stage.drop:
            alive.pop(name, None)
            if name in blocks:
                pool.give(blocks.pop(name))


def _checked(feed: Feed, inputs: Mapping[str, ir.Value], number: int) -> Feed:
    """Raises: CalibrationError unless `feed` fits the network's inputs."""
    if set(feed) != set(inputs):
        raise CalibrationError(
            f"calibration picture {number}: expected arrays for {', '.join(inputs)}, got {', '.join(feed)}"
        )
    for name, value in inputs.items():
        sizes, dtype = shape(value), value.dtype
        array = feed[name]
        if (sizes is not None and array.shape != sizes) or (
            dtype is not None and array.dtype != dtype.numpy()
        ):
            raise CalibrationError(
                f"calibration picture {number}: input {printable(name)}: expected {dtype} {list(sizes or ())}, "
                f"got {array.dtype} {list(array.shape)}"
            )
    return feed


# --- the cache -----------------------------------------------------------------------------------


def _code() -> str:
    """Digest of the code that the statistics depend on."""
    return cache.digest(*(Path(f).read_bytes() for f in (__file__, str(stats_.__file__))))


def _tools() -> dict[str, str]:
    import onnxruntime

    return {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__}


@dataclass(frozen=True)
class _Store:
    """Accumulators on disk: a JSON entry of the cache with the digest of the .npz file beside it."""

    key: str
    names: tuple[str, ...]

    def _path(self, suffix: str, digest: str) -> Path:
        return cache.cache_dir() / KIND / f"{self.key}{suffix}.{digest[:16]}.npz"

    def load(self, suffix: str) -> list[Accumulator] | None:
        entry = cache.load(KIND, self.key + suffix)
        if entry is None or entry.get("names") != list(self.names) or not isinstance(entry.get("npz"), str):
            return None
        try:
            data = self._path(suffix, entry["npz"]).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != entry["npz"]:
            return None
        return stats_.unpack(data, len(self.names))

    def save(self, suffix: str, gathered: Sequence[Accumulator]) -> None:
        data = stats_.pack(gathered)
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(suffix, digest)
        before = cache.load(KIND, self.key + suffix)
        temporary = path.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        cache.store(KIND, self.key + suffix, {"names": list(self.names), "npz": digest})
        if before is not None and before.get("npz") != digest:
            with contextlib.suppress(OSError):
                self._path(suffix, str(before.get("npz"))).unlink()

    def drop(self, suffix: str) -> None:
        entry = cache.load(KIND, self.key + suffix)
        if entry is not None:
            with contextlib.suppress(OSError):
                self._path(suffix, str(entry.get("npz"))).unlink()
                (cache.cache_dir() / KIND / f"{self.key}{suffix}.json").unlink()

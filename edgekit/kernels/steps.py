"""Kernels as steps of a bundle's plan (docs/bundle.md, section 4): options and files in, an executable out.

    executable = load(step, tensors, bundle.read, options)     # backends.base.Executable and Fitting
    binding = executable.bind()

Inputs and outputs, in this order:

    depth_raster    points f32 [P, 5], point_count int32 [1], projections f32 [cam, 3, 4]
                    -> depth images f32 [cam, 1, H, W]
    lidar_encoder   points, point_count
                    -> seen from above, f32 [1, C * nz, rows, columns]
    bev_pool        depth f32 [cam, D, h, w], features f32 [cam, h, w, C], cameras f32 [cam] (0 = missing),
                    intrinsics f32 [cam, 3, 3] of the network's picture, camera_to_lidar f32 [cam, 4, 4]
                    -> seen from above, f32 [1, C, rows, columns]

Tensors may have any name. Points have x, y, z in metres, intensity
and dt; the first `point_count` of them count. A bundle is untrusted: every shape, option and weight is checked here.
All kernels run on the CPU, with the same bits for any number of threads.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from edgekit import __version__
from edgekit.backends.base import TO_LAST, Binding, LoadOptions, usable, zeros
from edgekit.backends.tensorrt.cache import default_dir
from edgekit.errors import BundleError, StreamError, UsageError
from edgekit.kernels import bev_pool as pooling
from edgekit.kernels.bev_pool import BevGrid, BevPool, Frustum, Geometry
from edgekit.kernels.depth_raster import MAX_SIDE, depth_raster
from edgekit.kernels.sparse_conv import encoder
from edgekit.kernels.sparse_conv.encoder import EncoderSpec
from edgekit.kernels.voxelize import VALUES, VoxelGrid, encoder_values, voxelize
from edgekit.manifest import KernelStep
from edgekit.schema import SchemaError, from_json
from edgekit.spec import DType, TensorSpec

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
Read = Callable[[str], memoryview]
Layout = Literal["NCHW", "NHWC"]

MAX_TABLES = 8
"""Rigs whose association tables an engine keeps in memory, those used last."""
TABLES = "bev"
"""Folder of association tables in the cache."""

MAX_STAGES, MAX_BLOCKS, MAX_CHANNELS, MAX_PADDING = 16, 64, 4096, 8
"""Limits of an encoder."""

POINT_FIELDS = 5


def load(
    step: KernelStep, tensors: Mapping[str, TensorSpec], read: Read, options: LoadOptions
) -> KernelExecutable:
    """Check a step and make it ready to run.

    tensors: of the plan, by name. read: the bytes of a file of the bundle (`Bundle.read`).
    Raises: BundleError for a kernel that this edgekit does not have, and for whatever does not fit it.
    """
    kind = KERNELS.get(step.kernel)
    if kind is None:
        raise BundleError(
            f"step {step.name}: needs kernel {step.kernel!r}, which this edgekit does not have. Upgrade edgekit"
        )
    try:
        return kind(step, tensors, read, options)
    except (SchemaError, UsageError) as error:
        raise BundleError(f"step {step.name}: {error}") from None


def pack(weights: Mapping[str, np.ndarray]) -> tuple[list[list[Any]], bytes]:
    """Weights as a step has them: `options["weights"]` and the file `weights`, little-endian float32 one after the other."""
    arrays = {name: np.asarray(array, "<f4") for name, array in weights.items()}
    return [[name, list(a.shape)] for name, a in arrays.items()], b"".join(
        a.tobytes() for a in arrays.values()
    )


def unpack(names: Sequence[tuple[str, tuple[int, ...]]], data: memoryview) -> dict[str, np.ndarray]:
    """The weights in `data`, which they view. Raises: UsageError unless they fit it to the byte and are finite."""
    found: dict[str, np.ndarray] = {}
    at = 0
    for name, shape in names:
        if name in found or not all(d >= 1 for d in shape) or len(shape) > 8:
            raise UsageError(f"weights {name[:80]!r}: there twice, or of the shape {list(shape)[:8]}")
        size = 4 * math.prod(shape)
        if at + size > len(data):
            raise UsageError(f"weights {name[:80]!r}: lie beyond the end of their file of {len(data)} bytes")
        found[name] = np.frombuffer(data, "<f4", size // 4, at).reshape(shape)
        if not np.isfinite(found[name]).all():
            raise UsageError(f"weights {name[:80]!r}: expected finite numbers, got some that are not")
        at += size
    if at != len(data):
        raise UsageError(f"weights: the file has {len(data)} bytes, expected {at}")
    return found


class KernelExecutable:
    """A kernel of a step, shared by sessions: `backends.base.Executable` and `Fitting`.

    Subclasses check their tensors in `_prepare`, and `_work` on the arrays of one session.
    """

    KERNEL: ClassVar[str]
    ROLES: ClassVar[tuple[str, ...]]
    FILES: ClassVar[tuple[str, ...]] = ()
    precision = "float32"
    turnable: frozenset[str] = frozenset()
    """Outputs that it can also write where they lie channels last (`backends.base.Fitting`)."""

    def __init__(
        self, step: KernelStep, tensors: Mapping[str, TensorSpec], read: Read, options: LoadOptions
    ) -> None:
        self.name, self.threads = step.name, options.threads
        self._step = step
        if len(step.inputs) != len(self.ROLES) or len(step.outputs) != 1:
            raise BundleError(
                f"step {step.name}: kernel {self.KERNEL} takes {', '.join(self.ROLES)} and gives one tensor, "
                f"got {len(step.inputs)} inputs and {len(step.outputs)} outputs. Build the bundle again"
            )
        if set(step.files) != set(self.FILES):
            raise BundleError(
                f"step {step.name}: kernel {self.KERNEL} has the files {list(self.FILES)}, got {sorted(step.files)}. "
                "Build the bundle again"
            )
        self.inputs = tuple(tensors[name] for name in step.inputs)
        self.outputs = tuple(tensors[name] for name in step.outputs)
        self._open = True
        self._prepare(step, read, options)

    def _prepare(self, step: KernelStep, read: Read, options: LoadOptions) -> None:
        raise NotImplementedError

    def _work(self, inputs: Sequence[np.ndarray], out: np.ndarray, kept: dict[str, Any]) -> None:
        """Writes all of `out`. kept: what the binding keeps from run to run."""
        raise NotImplementedError

    def _expect(self, spec: TensorSpec, role: str, dtype: DType, *shape: int | None) -> tuple[int, ...]:
        """The shape of a tensor. Raises: BundleError unless it is `shape`, where None stands for any size."""
        fits = len(spec.shape) == len(shape) and all(
            want in (None, have) for have, want in zip(spec.shape, shape, strict=True)
        )
        if spec.dtype != dtype or not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise BundleError(
                f"step {self.name}: {role} {spec.name!r}: expected {dtype.value} [{wanted}], "
                f"got {spec.dtype.value} {list(spec.shape)}. Build the bundle again"
            )
        return spec.shape

    def bind(self) -> KernelBinding:
        """Buffers for one session. Raises: StreamError when closed."""
        return self.bind_to({})

    def bind_to(self, given: Arrays, beside: Binding | None = None) -> KernelBinding:
        """As `bind`, in arrays that are given: see backends.base.Fitting."""
        if not self._open:
            raise StreamError(f"step {self.name}: the engine is closed. Load the bundle again")
        return KernelBinding(self, given)

    def close(self) -> None:
        """Let go; bindings still open go on working. Closing twice is fine."""
        self._open = False

    def describe(self) -> dict[str, Any]:
        """Kernel, where it runs and its threads (JSON values)."""
        return {
            "kernel": self.KERNEL,
            "library": "edgekit",
            "version": __version__,
            "device": "CPU",
            "threads": self.threads or "all cores",
            "precision": self.precision,
        }


class KernelBinding:
    """One session's arrays of a kernel."""

    inputs: Arrays
    outputs: Arrays

    def __init__(self, executable: KernelExecutable, given: Arrays) -> None:
        turnable = executable.turnable
        self.inputs, self.outputs = (
            MappingProxyType(
                {spec.name: _array(spec, given.get(spec.name), spec.name in turnable) for spec in specs}
            )
            for specs in (executable.inputs, executable.outputs)
        )
        self._sources, (self._out,) = list(self.inputs.values()), list(self.outputs.values())
        self._kept: dict[str, Any] = {}
        self._work: Callable[..., None] | None = executable._work
        self._name = executable.name

    def run(self) -> None:
        """Raises: StreamError for inputs that cannot be worked on, and when the binding is closed."""
        if self._work is None:
            raise StreamError(f"step {self._name}: the session is closed")
        try:
            self._work(self._sources, self._out, self._kept)
        except UsageError as error:
            raise StreamError(f"step {self._name}: {error}") from None

    def close(self) -> None:
        """Let go of the kernel; the arrays stay readable. Closing twice is fine."""
        self._work, self._kept = None, {}


def _array(spec: TensorSpec, given: np.ndarray | None, turnable: bool = False) -> np.ndarray:
    if given is not None and (usable(given, spec) or (turnable and usable(given, spec, TO_LAST))):
        return given
    return zeros(spec.shape, spec.dtype.value)


def _options(kind: type[T], step: KernelStep) -> T:
    return from_json(kind, step.options, "options")


def _counted(points: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The points that are there. Raises: UsageError for a count beyond the array."""
    n = int(count[0])
    if not 0 <= n <= len(points):
        raise UsageError(f"point_count: expected 0 to {len(points)}, got {n}")
    return points[:n]


class DepthRaster(KernelExecutable):
    """The nearest point per pixel of each camera: kernels.depth_raster. No options."""

    KERNEL = "depth_raster"
    ROLES = ("points", "point_count", "projections")

    def _prepare(self, step: KernelStep, read: Read, options: LoadOptions) -> None:
        if step.options:
            raise BundleError(
                f"step {step.name}: kernel {self.KERNEL} has no options, got {list(step.options)[:3]}"
            )
        points, count, matrices = self.inputs
        self._expect(points, "points", DType.float32, None, POINT_FIELDS)
        self._expect(count, "point_count", DType.int32, 1)
        cameras = self._expect(matrices, "projections", DType.float32, None, 3, 4)[0]
        shape = self._expect(self.outputs[0], "depth images", DType.float32, cameras, 1, None, None)
        self._size = shape[2], shape[3]
        if max(self._size) > MAX_SIDE:
            raise BundleError(
                f"step {step.name}: depth images of {self._size}, expected sides of at most {MAX_SIDE}"
            )

    def _work(self, inputs: Sequence[np.ndarray], out: np.ndarray, kept: dict[str, Any]) -> None:
        points, count, matrices = inputs
        depth_raster(_counted(points, count), matrices, self._size, out[:, 0], threads=self.threads)


@dataclass(frozen=True)
class EncoderOptions:
    """Options of `lidar_encoder`.

    values: of a voxel: `raw` = the means of its points' first `encoder.inputs` fields; `local` = voxelize.VALUES.
    max_points, max_voxels: limits of voxelization, 0 = none. weights: (name, shape) in the order of the file `weights`;
    names as kernels.sparse_conv.encoder has them, kernel axes z, y, x. precision: int8 with the `scales` that
    sparse_conv.encoder.calibrate gives.
    """

    grid: VoxelGrid
    encoder: EncoderSpec
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    values: Literal["raw", "local"] = "raw"
    max_points: int = 0
    max_voxels: int = 0
    precision: Literal["float32", "int8"] = "float32"
    scales: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raises: UsageError for a network that cannot be, or that would take for ever."""
        spec = self.encoder
        small = (
            1 <= len(spec.stages) <= MAX_STAGES
            and all(0 <= stage.blocks <= MAX_BLOCKS for stage in spec.stages)
            and all(0 <= pad <= MAX_PADDING for stage in spec.stages for pad in stage.padding)
            and all(
                1 <= n <= MAX_CHANNELS
                for n in (spec.inputs, spec.outputs, *(s.channels for s in spec.stages))
            )
            and all(1 <= cells <= 1 << 20 for cells in spec.shape)
        )
        limits = all(0 <= limit < 1 << 31 for limit in (self.max_points, self.max_voxels))
        if not small or not 0 < spec.eps < 1 or not limits:
            raise UsageError(
                f"encoder: expected 1..{MAX_STAGES} stages of up to {MAX_BLOCKS} blocks, 1..{MAX_CHANNELS} channels, "
                f"padding of at most {MAX_PADDING}, 0 < eps < 1 and limits from 0 to 2^31"
            )
        for stage, following in zip(spec.stages, spec.stages[1:], strict=False):
            if (stage.down or stage.channels) != following.channels:
                raise UsageError(
                    f"encoder: a stage has {following.channels} channels, expected the "
                    f"{stage.down or stage.channels} that the one before makes"
                )
        if spec.stages[-1].down and not 1 <= spec.stages[-1].down <= MAX_CHANNELS:
            raise UsageError(f"encoder: expected up to {MAX_CHANNELS} channels, got {spec.stages[-1].down}")
        if min(spec.out_shape) < 1:
            raise UsageError(f"encoder: nothing is left of {list(spec.shape)} cells")
        if any(cells > room for cells, room in zip(self.grid.shape, spec.shape, strict=True)):
            raise UsageError(
                f"encoder: takes {list(spec.shape)} cells, expected at least the {list(self.grid.shape)} of the grid"
            )
        if bool(self.scales) != (self.precision == "int8") or not all(s > 0 for s in self.scales.values()):
            raise UsageError(
                f"encoder: {len(self.scales)} scales, expected positive ones for int8 and none else"
            )
        if self.values == "local" and spec.inputs != len(VALUES):
            raise UsageError(
                f"encoder: takes {spec.inputs} values, expected the {len(VALUES)} of local voxels"
            )
        if self.values == "raw" and spec.inputs > POINT_FIELDS:
            raise UsageError(
                f"encoder: takes {spec.inputs} values, expected at most {POINT_FIELDS} of raw voxels"
            )


class LidarEncoder(KernelExecutable):
    """Points to a map seen from above: voxels, their values, sparse convolutions. Options: `EncoderOptions`."""

    KERNEL = "lidar_encoder"
    ROLES = ("points", "point_count")
    FILES = ("weights",)

    def _prepare(self, step: KernelStep, read: Read, options: LoadOptions) -> None:
        self.settings = _options(EncoderOptions, step)
        self.settings.check()
        self.precision = self.settings.precision
        points, count = self.inputs
        self._expect(points, "points", DType.float32, None, POINT_FIELDS)
        self._expect(count, "point_count", DType.int32, 1)
        spec = self.settings.encoder
        nz, ny, nx = spec.out_shape
        self._expect(self.outputs[0], "output", DType.float32, 1, spec.outputs * nz, ny, nx)
        weights = unpack(self.settings.weights, read(step.files["weights"]))
        for name, values in weights.items():
            if name.endswith("running_var") and (values < 0).any():
                raise BundleError(f"step {step.name}: weights {name}: a variance is negative")
        self._encoder = encoder.prepare(weights, spec, scales=self.settings.scales or None)
        unknown = sorted(weights.keys() - _named(spec))
        if unknown:
            raise BundleError(
                f"step {step.name}: weights {unknown[0][:80]!r}: the encoder has none of that name"
            )

    def _work(self, inputs: Sequence[np.ndarray], out: np.ndarray, kept: dict[str, Any]) -> None:
        settings = self.settings
        voxels = voxelize(
            _counted(*inputs), settings.grid, max_points=settings.max_points, max_voxels=settings.max_voxels,
            threads=self.threads,
        )  # fmt: skip
        with np.errstate(over="ignore", invalid="ignore"):  # values of points may be anything
            values = encoder_values(voxels, settings.grid, settings.values, settings.encoder.inputs)
            encoder.encode(self._encoder, voxels.coordinates, values, out=out, threads=self.threads)


def _named(spec: EncoderSpec) -> set[str]:
    """Names that weights of an encoder may have."""
    layers = spec.layers()
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{layer.name}.{part}" for layer in layers for part in ("weight", "bias")} | {
        f"{layer.norm}.{part}" for layer in layers for part in parts
    }


@dataclass(frozen=True)
class PoolOptions:
    """Options of `bev_pool`."""

    frustum: Frustum = field(default_factory=Frustum)
    grid: BevGrid = field(default_factory=BevGrid)


class PoolCameras(KernelExecutable):
    """Camera features lifted into the cells of a view from above. Options: `PoolOptions`.

    Calibration is data: each rig needs an association table, which is made when it is first met, or ahead by `prefetch`.
    Tables are kept in memory, shared by the sessions of an engine, and in the cache folder.
    """

    KERNEL = "bev_pool"
    ROLES = ("depth", "features", "cameras", "intrinsics", "camera_to_lidar")

    def _prepare(self, step: KernelStep, read: Read, options: LoadOptions) -> None:
        self.settings = _options(PoolOptions, step)
        depth, features, there, intrinsics, to_lidar = self.inputs
        frustum = self.settings.frustum
        cameras = self._expect(there, "cameras", DType.float32, None)[0]
        shape = self._expect(features, "features", DType.float32, cameras, *frustum.features, None)
        self.channels, self.cameras = shape[3], cameras
        self._expect(depth, "depth", DType.float32, cameras, frustum.bins, *frustum.features)
        self._expect(intrinsics, "intrinsics", DType.float32, cameras, 3, 3)
        self._expect(to_lidar, "camera_to_lidar", DType.float32, cameras, 4, 4)
        self._expect(self.outputs[0], "output", DType.float32, 1, self.channels, *self.settings.grid.shape)
        if cameras > pooling.geometry.MAX_CAMERAS or depth.elements > pooling.geometry.MAX_POINTS:
            raise BundleError(
                f"step {step.name}: {cameras} cameras and {depth.elements} points, expected at most "
                f"{pooling.geometry.MAX_CAMERAS} and {pooling.geometry.MAX_POINTS}"
            )
        if not 1 <= self.channels <= pooling.MAX_CHANNELS:
            raise BundleError(
                f"step {step.name}: {self.channels} channels, expected at most {pooling.MAX_CHANNELS}"
            )
        self.turnable = frozenset(step.outputs)
        self._layouts: set[Layout] = set()
        self.folder = (options.cache_dir or default_dir()) / TABLES
        self._tables: OrderedDict[tuple[bytes, Layout], Future[BevPool]] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, intrinsics: np.ndarray, camera_to_lidar: np.ndarray, layout: Layout = "NCHW") -> BevPool:
        """The pooling of a rig, from memory, from the cache folder, or made now; float32 arrays as the step takes them.

        layout: of what it writes. For any thread; one that comes while another makes the same table waits for it.
        Raises: UsageError for matrices that cannot be inverted.
        """
        if not (np.isfinite(intrinsics).all() and np.isfinite(camera_to_lidar).all()):
            raise UsageError("calibration: expected finite numbers, got some that are not")
        key = _calibration(intrinsics, camera_to_lidar), layout
        with self._lock:
            found = self._tables.get(key)
            if found is not None:
                self._tables.move_to_end(key)
            else:
                mine: Future[BevPool] = Future()
                self._tables[key] = mine
                while len(self._tables) > MAX_TABLES:
                    self._tables.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            geometry = self._geometry(intrinsics, camera_to_lidar)
            made = BevPool(pooling.cached(geometry, self.folder, self.threads), self.channels, layout)
        except BaseException as error:
            with self._lock:
                self._tables.pop(key, None)
            mine.set_exception(error if isinstance(error, UsageError) else UsageError(f"table: {error}"))
            raise
        mine.set_result(made)
        return made

    def table_path(self, intrinsics: np.ndarray, camera_to_lidar: np.ndarray) -> Path:
        """Where the table of a rig is kept, if it is. Raises: UsageError as `table`."""
        return self.folder / f"{self._geometry(intrinsics, camera_to_lidar).key}.table"

    def _geometry(self, intrinsics: np.ndarray, camera_to_lidar: np.ndarray) -> Geometry:
        return Geometry(intrinsics, camera_to_lidar, None, self.settings.frustum, self.settings.grid)

    def bind_to(self, given: Arrays, beside: Binding | None = None) -> KernelBinding:
        """As of any kernel."""
        binding = super().bind_to(given, beside)
        with self._lock:
            self._layouts.add(_layout(binding.outputs[self.outputs[0].name]))
        return binding

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of what sessions have it write."""
        with self._lock:
            return tuple(sorted(self._layouts)) or ("NCHW",)

    def _work(self, inputs: Sequence[np.ndarray], out: np.ndarray, kept: dict[str, Any]) -> None:
        depth, features, cameras, intrinsics, to_lidar = inputs
        now = _calibration(intrinsics, to_lidar)
        if kept.get("calibration") != now:
            kept["pool"], kept["calibration"] = self.table(intrinsics, to_lidar, _layout(out)), now
        pool: BevPool = kept["pool"]
        if pool.layout == "NHWC":
            out = out.transpose(TO_LAST)
        pool.run(depth, features, out, cameras=(cameras != 0).tolist(), threads=self.threads)


def _layout(out: np.ndarray) -> Layout:
    return "NCHW" if out.flags.c_contiguous else "NHWC"


def _calibration(intrinsics: np.ndarray, camera_to_lidar: np.ndarray) -> bytes:
    """What tells one rig from another: all bits of both."""
    return intrinsics.tobytes() + camera_to_lidar.tobytes()


def prefetch(
    executable: KernelExecutable, intrinsics: np.ndarray, camera_to_lidar: np.ndarray
) -> Future[BevPool]:
    """Make the table of a rig in another thread, so that the first run with it need not.

    executable: of a `bev_pool` step, `session.executables[step]`. The arrays are copied.
    The future holds what `table` returns or raises. Raises: UsageError for another kernel, or arrays that do not fit it.
    """
    if not isinstance(executable, PoolCameras):
        raise UsageError(f"prefetch: expected a step of kernel {PoolCameras.KERNEL}, got {executable!r:.80}")
    of_pixels, to_lidar = (np.array(array, np.float32, order="C") for array in (intrinsics, camera_to_lidar))
    for array, spec in zip((of_pixels, to_lidar), executable.inputs[3:], strict=True):
        if array.shape != spec.shape:
            raise UsageError(f"prefetch: {spec.name}: expected {list(spec.shape)}, got {list(array.shape)}")
    future: Future[BevPool] = Future()

    def work() -> None:
        try:
            for layout in executable.layouts:
                made = executable.table(of_pixels, to_lidar, layout)
            future.set_result(made)
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, name="edgekit-table", daemon=True).start()
    return future


KERNELS: Mapping[str, type[KernelExecutable]] = MappingProxyType(
    {kind.KERNEL: kind for kind in (DepthRaster, LidarEncoder, PoolCameras)}
)
LIGHT = (DepthRaster.KERNEL,)
"""Kernels that take so little time that no cores need be kept for them."""

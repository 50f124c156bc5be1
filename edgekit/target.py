"""Facts about a board. What the code asks about a board is a field here, never a test of its name.

Each board is one file, `targets/<name>/target.toml`; `host` is detected. Every figure states its
unit in its name and its source in `sources`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from edgekit import content
from edgekit.errors import UsageError, did_you_mean
from edgekit.schema import SchemaError, from_json


@dataclass(frozen=True)
class Cpu:
    """One CPU cluster, the big one first. `isa`: features a kernel may be chosen by (edgekit.host.ISA).

    `l2_bytes` is one L2 cache, shared by `l2_cores` cores; `l3_bytes` is all of the L3.
    """

    name: str
    cores: int
    clock_hz: float | None
    """At most; None where detection cannot tell."""
    isa: tuple[str, ...]
    l1d_bytes: int | None = None
    l2_bytes: int | None = None
    l2_cores: int = 1
    l3_bytes: int | None = None
    simd_bits: int | None = None
    """Vector bits that one core multiplies and accumulates per cycle, all its pipes together."""


@dataclass(frozen=True)
class Gpu:
    """`compute_capability` as "8.7". TOPS are dense (no 2:4 sparsity), GPU alone (no DLA), at `clock_hz`."""

    name: str
    compute_capability: str
    sms: int
    clock_hz: float
    int8_tops: float | None = None
    fp16_tflops: float | None = None
    fp32_tflops: float | None = None
    """CUDA cores; TensorRT may run float32 on TF32 tensor cores instead."""
    sparse_2_4: bool = False
    unified_memory: bool = False
    """CPU and GPU share one DRAM: a buffer need not be copied between them."""
    l1_bytes_per_sm: int | None = None
    l2_bytes: int | None = None
    check_capability: str | None = None
    """The nearest architecture that NVIDIA's builder takes without this GPU (8.6 for Orin, 12.0 for Thor)."""


@dataclass(frozen=True)
class Dla:
    cores: int
    clock_hz: float | None = None
    int8_tops: float | None = None
    """Dense, all cores together."""


@dataclass(frozen=True)
class PowerMode:
    """One nvpmodel mode: caps, not guarantees. None = no cap or not known.

    `config`: the flashed configuration that offers the mode, where a board has several.
    """

    name: str
    config: str = ""
    watts: float | None = None
    cpu_cores: int | None = None
    cpu_clock_hz: float | None = None
    gpu_sms: int | None = None
    gpu_clock_hz: float | None = None
    emc_clock_hz: float | None = None
    dla_clock_hz: float | None = None
    default: bool = False


@dataclass(frozen=True)
class Software:
    """What a system image of the board carries. `l4t`: NVIDIA's Linux release, as "36.4.3"."""

    os: str
    python: str | None = None
    jetpack: str | None = None
    l4t: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    cudnn: str | None = None


@dataclass(frozen=True)
class Target:
    """A board. `backends` in order of preference; `channel_granularity`: channels that one tile of
    the fastest kernels takes, per precision, to which pruning rounds."""

    name: str
    title: str
    arch: str
    """As `uname -m` says it: aarch64, x86_64."""
    cpus: tuple[Cpu, ...]
    dram_bytes: int
    dram_bytes_per_s: float | None
    """Bus peak; None where it is not known (detection does not measure it)."""
    backends: tuple[str, ...]
    precisions: dict[str, tuple[str, ...]]
    """Per backend, what it can run on this board, the default first. `float16` of onnxruntime on a
    CPU stores weights in half the bytes and computes in float32."""
    channel_granularity: dict[str, int]
    software: tuple[Software, ...] = ()
    """Newest first."""
    emc_clock_hz: float | None = None
    """Memory clock at which `dram_bytes_per_s` holds; a power mode's `emc_clock_hz` lowers both."""
    gpu: Gpu | None = None
    dla: Dla | None = None
    power_modes: tuple[PowerMode, ...] = ()
    device_tree_models: tuple[str, ...] = ()
    """A machine whose /proc/device-tree/model contains one of these is this board."""
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    """Field path, such as `gpu.int8_tops` or `cpus.0`, -> where the figures at and below it come
    from; the longest path wins. A source that says "memory, not checked" was not looked up."""

    def __post_init__(self) -> None:
        if not self.cpus:
            raise ValueError("cpus must hold at least one CPU cluster")
        if not self.backends:
            raise ValueError("backends must name at least one backend")
        missing = [b for b in self.backends if not self.precisions.get(b)]
        if missing:
            raise ValueError(f"precisions has no entry for backend {missing[0]!r}")

    def source(self, path: str) -> str | None:
        """Where the figure at `path` (dotted, list indices as numbers) comes from, None if not stated."""
        parts = path.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.sources[p] for p in prefixes if p in self.sources), None)

    @property
    def default_power_mode(self) -> PowerMode | None:
        return next((m for m in self.power_modes if m.default), None)

    @property
    def backend(self) -> str:
        return self.backends[0]

    @staticmethod
    def load(name: str) -> Target:
        """The board called `name`. Raises: UsageError for an unknown name or a faulty file."""
        if name == "host":
            from edgekit.host import detect

            return detect()
        path = content.find("targets", f"{name}/target.toml") if name in Target.names() else None
        if path is None:
            raise UsageError(f"target {name!r}: unknown. {did_you_mean(name, Target.names())}")
        if sys.version_info >= (3, 11):
            import tomllib
        else:  # JetPack 6 ships Python 3.10
            import tomli as tomllib
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            return from_json(Target, {"name": name, **data}, str(path))
        except (SchemaError, tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"target {name}: {path} cannot be used: {error}") from None

    @staticmethod
    def names() -> tuple[str, ...]:
        """All known boards, `host` included, sorted."""
        found = {p.parent.name for folder in content.folders("targets") for p in folder.glob("*/target.toml")}
        return tuple(sorted(found | {"host"}))

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

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 ships Python 3.10
    import tomli as tomllib


@dataclass(frozen=True)
class Cpu:
    """One CPU cluster, the big one first. `isa`: features a kernel may be chosen by (e.g. neon, fp16, dotprod, i8mm, avx2, avx512_vnni)."""

    name: str
    cores: int
    clock_hz: float
    isa: tuple[str, ...]
    l1d_bytes: int | None = None
    l2_bytes: int | None = None
    l3_bytes: int | None = None


@dataclass(frozen=True)
class Gpu:
    """`compute_capability` as "8.7". TOPS are dense (no 2:4 sparsity), GPU alone (no DLA)."""

    name: str
    compute_capability: str
    sms: int
    clock_hz: float
    int8_tops: float | None = None
    fp16_tflops: float | None = None
    fp32_tflops: float | None = None
    sparse_2_4: bool = False
    check_capability: str | None = None
    """The nearest architecture that NVIDIA's builder accepts without this GPU (8.6 for Orin, 12.0 for Thor)."""


@dataclass(frozen=True)
class Dla:
    cores: int
    clock_hz: float | None = None
    int8_tops: float | None = None
    """Dense, all cores together."""


@dataclass(frozen=True)
class PowerMode:
    """One nvpmodel mode: caps, not guarantees. None = no cap or not known."""

    name: str
    watts: float | None = None
    cpu_cores: int | None = None
    cpu_clock_hz: float | None = None
    gpu_sms: int | None = None
    gpu_clock_hz: float | None = None
    emc_clock_hz: float | None = None
    default: bool = False


@dataclass(frozen=True)
class Software:
    """What the board's system image carries."""

    os: str
    python: str | None = None
    jetpack: str | None = None
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
    cpus: tuple[Cpu, ...]
    dram_bytes: int
    dram_bytes_per_s: float
    backends: tuple[str, ...]
    precisions: dict[str, tuple[str, ...]]
    """Per backend, what it can run on this board, the default first."""
    channel_granularity: dict[str, int]
    software: tuple[Software, ...] = ()
    gpu: Gpu | None = None
    dla: Dla | None = None
    power_modes: tuple[PowerMode, ...] = ()
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    """Field path -> where the figure comes from; a source of "memory" was not checked."""

    @property
    def backend(self) -> str:
        return self.backends[0]

    @staticmethod
    def load(name: str) -> Target:
        """The board called `name`. Raises: UsageError for an unknown name or a faulty file."""
        if name == "host":
            from edgekit.host import detect

            return detect()
        folders = content.folders("targets")
        path = next((f / name / "target.toml" for f in folders if (f / name / "target.toml").is_file()), None)
        if path is None or "/" in name or name.startswith("."):
            raise UsageError(f"target {name!r}: unknown. {did_you_mean(name, Target.names())}")
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            return from_json(Target, {"name": name, **data}, str(path))
        except (SchemaError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"target {name}: {path} cannot be used: {error}") from None

    @staticmethod
    def names() -> tuple[str, ...]:
        """All known boards, `host` included, sorted."""
        found = {p.parent.name for folder in content.folders("targets") for p in folder.glob("*/target.toml")}
        return tuple(sorted(found | {"host"}))

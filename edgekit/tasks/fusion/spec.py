"""What the outputs of a network that sees from above mean: heads that predict centres (CenterPoint, Yin et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from edgekit.errors import UsageError
from edgekit.kernels.voxelize import VoxelGrid
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.preprocess import ImagePreprocess

Suppression = Literal["none", "circle", "rotated"]
Axis = Literal["x", "y"]
SizeOrder = Literal["lwh", "wlh"]
MAX_BOXES = 100_000
MAX_CAMERAS = 64
MAX_REACH = 1e6


@dataclass(frozen=True)
class CenterGroup:
    """Classes that share regression maps (a "task" of CenterPoint), and how their boxes are picked.

    Tensors are [1, channels, rows, columns] float32, raw; each field names the first of its channels:
    heat: logits, one per class.  offset: 2, x and y from the cell's low corner, in cells.  height: 1, z of the
    centre, metres.  size: 3, in the head's order and scale.  rotation: 2, sine and cosine of yaw.  velocity: 2,
    vx and vy in m/s; None = unknown.

    windows: 3 = a peak is the greatest of its 3 x 3 cells, 1 = every cell may be one; one per class, () = 3 for all.
    suppress: what makes a box drop a worse one: `circle` = its centre lies within `limits` metres, `rotated` = they
    overlap from above by IoU > `limits`; one limit for all classes, or one per class. across: whether classes
    of the group suppress each other, as CenterPoint's do; then there is one limit.
    """

    labels: tuple[str, ...]
    heat: Channels
    offset: Channels
    height: Channels
    size: Channels
    rotation: Channels
    velocity: Channels | None = None
    windows: tuple[int, ...] = ()
    suppress: Suppression = "rotated"
    limits: tuple[float, ...] = (0.2,)
    across: bool = False

    def __post_init__(self) -> None:
        count = len(self.labels)
        if not count:
            raise ValueError("a group needs at least one label")
        if len(self.windows) not in (0, count) or not set(self.windows) <= {1, 3}:
            raise ValueError(f"windows must be 1 or 3, one per class or none, got {list(self.windows)}")
        if self.suppress not in get_args(Suppression):
            raise ValueError(
                f"suppress must be one of {', '.join(get_args(Suppression))}, got {self.suppress!r}"
            )
        if len(self.limits) != 1 and (self.across or len(self.limits) != count):
            raise ValueError(f"limits must be one, or one per class unless `across`, got {len(self.limits)}")
        _check_limits(self.suppress, self.limits)


@dataclass(frozen=True)
class VoxelCells:
    """The cells that an encoder cuts space into: corners and sides in metres, x, y, z."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    size: tuple[float, float, float]

    def __post_init__(self) -> None:
        try:
            self.grid()
        except UsageError as error:
            raise ValueError(str(error)) from None

    def grid(self) -> VoxelGrid:
        """As the kernel takes them."""
        return VoxelGrid(self.low, self.high, self.size)

    def double(self) -> VoxelGrid:
        """Cells twice as large along each axis, the last ones reaching beyond `high`."""
        x, y, z = (
            (low + 2 * side * math.ceil(cells / 2), 2 * side)
            for low, side, cells in zip(self.low, self.size, reversed(self.grid().shape), strict=True)
        )
        return VoxelGrid(self.low, (x[0], y[0], z[0]), (x[1], y[1], z[1]))


@dataclass(frozen=True)
class CenterHead:
    """Groups over one grid. x = low_x + (cell along x + offset x) * cell_x, metres; y likewise.

    rows: the axis along which the rows of the maps count up; columns are the other one.
    sizes: the order of the size channels. log_sizes: they are natural logarithms of metres, else metres.
    bounds: x, y, z low and x, y, z high: boxes with a centre outside are dropped; () keeps all.
    """

    groups: tuple[CenterGroup, ...]
    low_x: float
    low_y: float
    cell_x: float
    cell_y: float
    rows: Axis = "y"
    sizes: SizeOrder = "lwh"
    log_sizes: bool = True
    bounds: tuple[float, ...] = ()
    family: Literal["centers"] = "centers"

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a head needs at least one group")
        _check_grid(self)
        if self.rows not in get_args(Axis) or self.sizes not in get_args(SizeOrder):
            raise ValueError(f"unknown rows {self.rows!r} or sizes {self.sizes!r}")


@dataclass(frozen=True)
class QueryHead:
    """Boxes that queries give, one each (TransFusion, Bai et al. 2022, arXiv:2203.11496).

    Tensors are [1, channels, queries] float32; each field names the first of its channels:
    classes: logits, one per label.  found: 2, the score 0..1 of the heat map where the query began, and the class
    (its number) that it was found as.  center: 2, x and y from the grid's low corner, in cells.  height: 1, z of the
    centre, metres.  size: 3, in the head's order and scale.  rotation: 2, sine and cosine of yaw.  velocity: 2, vx and
    vy in m/s; None = unknown.

    A box has the class that its query was found as; its score is the query's own score of that class times the heat map's.
    sizes, log_sizes, bounds: as of `CenterHead`. suppress, limits: as of `CenterGroup`; queries hardly say a thing twice,
    so that none are suppressed by default.
    """

    classes: Channels
    found: Channels
    center: Channels
    height: Channels
    size: Channels
    rotation: Channels
    low_x: float
    low_y: float
    cell_x: float
    cell_y: float
    velocity: Channels | None = None
    sizes: SizeOrder = "lwh"
    log_sizes: bool = True
    bounds: tuple[float, ...] = ()
    suppress: Suppression = "none"
    limits: tuple[float, ...] = (0.0,)
    family: Literal["queries"] = "queries"

    def __post_init__(self) -> None:
        _check_grid(self)
        if self.sizes not in get_args(SizeOrder) or self.suppress not in get_args(Suppression):
            raise ValueError(f"unknown sizes {self.sizes!r} or suppress {self.suppress!r}")
        _check_limits(self.suppress, self.limits)


def _check_grid(head: CenterHead | QueryHead) -> None:
    numbers = (head.low_x, head.low_y, head.cell_x, head.cell_y, *head.bounds)
    if not all(map(math.isfinite, numbers)) or head.cell_x <= 0 or head.cell_y <= 0:
        raise ValueError(f"the grid's corner and cells must be finite, cells above 0, got {numbers[:4]}")
    if head.bounds and (
        len(head.bounds) != 6 or any(a >= b for a, b in zip(head.bounds[:3], head.bounds[3:], strict=True))
    ):
        raise ValueError(f"bounds must be three lows, then three highs, got {list(head.bounds)}")


def _check_limits(suppress: Suppression, limits: tuple[float, ...]) -> None:
    most = 1.0 if suppress == "rotated" else math.inf
    for limit in limits:
        if not (math.isfinite(limit) and 0 <= limit <= most):
            raise ValueError(f"limits must be between 0 and {most} for {suppress!r}, got {limit}")


PICTURE = ImagePreprocess(
    704, 256, "crop-bottom", 0, "rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375),
    interpolation="area", scaled_width=768,
)  # fmt: skip
"""What the published BEVFusion makes of a 1600x900 picture, means and deviations being ImageNet's."""


@dataclass(frozen=True)
class FusionSpec:
    """The `pipeline` of a rig's bundle: sensors -> inputs of the plan, outputs of the head -> boxes in the LiDAR's frame.

    cameras: names of the rig's, in the order in which the plan takes them; () = a plan without.
    preprocess: from each camera's picture to the plan's.
    reach: metres along x and y, from the LiDAR, beyond which points are not taken; 0 = all are.
    camera_step: the step that sees one camera at a time, run as soon as its picture is there. camera_tensors: what
    is kept of it. Without such a step ("") it is the picture, as the plan takes it.
    lidar_step: the step whose time depends on how many voxels there are. voxels: their low and high corners and
    sides, for its deadline (deadline.py); None = no deadline can be held. lidar_budget_ms: what that step may take, unless the
    pipeline is told otherwise; None = as long as it takes.

    labels: of the groups, one after the other; of queries: as their classes are numbered.
    A peak counts when its score >= `score_threshold`; each group gives
    the best `candidates` of them to its suppression and keeps `per_group` boxes; at most `max_detections` remain, best
    first. Defaults are those of BEVFusion's CenterHead, which keeps what all groups give (6 x 83).
    ranges: by label, metres from the LiDAR within which an evaluation asks for boxes; a label that is not there has no
    limit.
    """

    task: ClassVar[str] = "fusion"

    head: CenterHead | QueryHead
    labels: tuple[str, ...]
    score_threshold: float = 0.1
    candidates: int = 500
    per_group: int = 83
    max_detections: int = 500
    cameras: tuple[str, ...] = ()
    preprocess: ImagePreprocess = PICTURE
    reach: float = 0.0
    camera_step: str = "camera"
    camera_tensors: tuple[str, ...] = ("pyramid",)
    lidar_step: str = "encoder"
    voxels: VoxelCells | None = None
    lidar_budget_ms: float | None = None
    ranges: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.head, CenterHead):
            given = tuple(label for group in self.head.groups for label in group.labels)
            if given != self.labels:
                raise ValueError(
                    f"labels must be those of the groups in their order, got {self.labels} and {given}"
                )
        elif len(self.head.limits) not in (1, len(self.labels)):
            raise ValueError(f"limits must be one, or one per label, got {len(self.head.limits)}")
        if not self.labels:
            raise ValueError("at least one label is needed")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {self.score_threshold}")
        for name in ("candidates", "per_group", "max_detections"):
            if not 1 <= getattr(self, name) <= MAX_BOXES:
                raise ValueError(f"{name} must be between 1 and {MAX_BOXES}, got {getattr(self, name)}")
        if len(set(self.cameras)) != len(self.cameras) or "lidar" in self.cameras:
            raise ValueError("cameras must differ, and none is called 'lidar'")
        if len(self.cameras) > MAX_CAMERAS:
            raise ValueError(f"at most {MAX_CAMERAS} cameras, got {len(self.cameras)}")
        if not 0 <= self.reach <= MAX_REACH:
            raise ValueError(f"reach must be 0 or more metres, at most {MAX_REACH:g}, got {self.reach}")
        if self.lidar_budget_ms is not None and not (self.lidar_budget_ms > 0 and self.voxels is not None):
            raise ValueError(f"lidar_budget_ms must be above 0 and needs voxels, got {self.lidar_budget_ms}")
        for label, metres in self.ranges.items():
            if label not in self.labels or not metres > 0:
                raise ValueError(f"ranges: {label[:60]!r}: expected one of the labels, above 0 metres")

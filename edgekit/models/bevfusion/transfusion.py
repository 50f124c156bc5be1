"""TransFusion's head (Bai et al. 2022, arXiv:2203.11496), in the form that BEVFusion and mmdetection3d give it: queries begin
at the peaks of a heat map, look at each other and at the whole view from above in one decoder layer, and each says a box.

Outputs, raw: `classes` [B, K, Q], logits; `boxes` [B, 8 or 10, Q], the channels of `head.BOX` with x and y of the centre in
cells from the grid's low corner; `queries` [B, 2, Q], the heat map's score where each began and the class it was found as.
`heat` [B, K, rows, columns], logits, is for a loss alone. `head.pipeline` says the same to `tasks.fusion`.

A cell is a peak of its class where it is the greatest of its 3 x 3 cells, of `still` classes always; cells at the edge may
be peaks, which pooling without padding denies them in the published code. z is the centre's. There is no loss here yet
(it needs queries assigned to objects), so this head can be built, exported and run, not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.models.bevfusion.config import Config, QueryConfig
from edgekit.models.bevfusion.layers import conv

PARTS = (("center", 2), ("height", 1), ("size", 3), ("rotation", 2), ("velocity", 2))
"""Regressions and how many values each has, in the order of `boxes`."""
NO_PEAK = -1e4
"""Logit of cells that are none."""
BRANCH = 64
"""Channels of the hidden layer of each."""


class Attention(nn.Module):
    """Scaled dot products between queries [B, Q, C] and keys and values [B, N, C] (Vaswani et al. 2017), in `heads` parts.

    Written out, so that it is exported as it is; parameters are those of `torch.nn.MultiheadAttention`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            self._split(functional.linear(x, w, b))
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        share = (q @ k.transpose(2, 3) * (int(q.shape[3]) ** -0.5)).softmax(-1)
        joined: Tensor = self.out_proj((share @ v).transpose(1, 2).flatten(2))
        return joined

    def _split(self, x: Tensor) -> Tensor:
        """[B, heads, n, C / heads]."""
        batch, count, channels = (int(n) for n in x.shape)
        return x.reshape(batch, count, self.heads, channels // self.heads).transpose(1, 2)


class Position(nn.Module):
    """Where something is, learnt: positions [B, n, 2] in cells -> [B, n, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, channels, 1),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, at: Tensor) -> Tensor:
        found: Tensor = self.net(at.transpose(1, 2))
        return found.transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added and normalised; positions are added to queries, keys and
    values, as in the published code."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        c = config.hidden
        self.own, self.cross = Attention(c, config.heads), Attention(c, config.heads)
        self.own_position, self.cross_position = Position(c), Position(c)
        self.feed = nn.Sequential(
            nn.Linear(c, config.feedforward), nn.ReLU(inplace=True), nn.Linear(config.feedforward, c)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(3))

    def forward(self, query: Tensor, seen: Tensor, query_at: Tensor, seen_at: Tensor) -> Tensor:
        """query [B, Q, C], seen [B, N, C], and their positions [B, Q, 2], [1, N, 2] in cells."""
        position = self.own_position(query_at)
        placed = query + position
        query = self.norms[0](query + self.own(placed, placed, placed))
        keys = seen + self.cross_position(seen_at)
        query = self.norms[1](query + self.cross(query + position, keys, keys))
        done: Tensor = self.norms[2](query + self.feed(query))
        return done


class TransFusionHead(nn.Module):
    """[B, channels, rows, columns] -> outputs by name."""

    cells_at: Tensor

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        settings = config.head.queries
        assert settings is not None, "a configuration with queries"
        self.settings, labels = settings, config.head.labels
        self.classes = len(labels)
        hidden = settings.hidden
        self.shared = nn.Conv2d(channels, hidden, 3, padding=1)
        self.heat = nn.Sequential(conv(hidden, hidden), nn.Conv2d(hidden, self.classes, 3, padding=1))
        self.kind = nn.Conv1d(self.classes, hidden, 1)
        self.layers = nn.ModuleList(DecoderLayer(settings) for _ in range(settings.layers))
        self.says = nn.ModuleDict({name: _branch(hidden, count) for name, count in PARTS})
        if not config.head.velocity:
            del self.says["velocity"]
        self.says["classes"] = _branch(hidden, self.classes)
        rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in config.shape), indexing="ij")
        at = torch.stack([columns, rows], -1).reshape(1, -1, 2)
        self.register_buffer("cells_at", at, persistent=False)
        still = torch.tensor([float(label in settings.still) for label in labels]).reshape(1, -1, 1, 1)
        self.register_buffer("still", still, persistent=False)
        self.start()

    def start(self) -> None:
        """Last layers that say next to nothing, as `head.BoxHead.start`."""
        from edgekit.models.bevfusion.head import PRIOR

        for branch, bias in (
            (self.heat, PRIOR), (self.says["classes"], PRIOR), *((self.says[n], 0.0) for n, _ in PARTS if n in self.says)
        ):  # fmt: skip
            assert isinstance(branch, nn.Sequential)
            last = branch[-1]
            assert isinstance(last, nn.Conv2d | nn.Conv1d) and last.bias is not None
            nn.init.normal_(last.weight, std=0.01)
            nn.init.constant_(last.bias, bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.shared(x)
        heat = self.heat(features)
        prior, kind, cell = self._begin(heat)
        seen = features.flatten(2).transpose(1, 2)
        query_at = self.cells_at.expand(int(x.shape[0]), -1, -1).gather(1, cell[..., None].expand(-1, -1, 2))
        chosen = seen.gather(1, cell[..., None].expand(-1, -1, int(seen.shape[2])))
        numbers = torch.arange(self.classes, device=x.device).reshape(1, -1, 1)
        query = chosen + self.kind((kind[:, None] == numbers).to(x.dtype)).transpose(1, 2)
        for layer in self.layers:
            query = layer(query, seen, query_at, self.cells_at)
        rows = query.transpose(1, 2)
        said = {name: branch(rows) for name, branch in self.says.items()}
        said["center"] = said["center"] + query_at.transpose(1, 2)
        boxes = torch.cat([said[name] for name, _ in PARTS if name in said], 1)
        queries = torch.stack([prior, kind.to(x.dtype)], 1)
        return {"classes": said["classes"], "boxes": boxes, "queries": queries, "heat": heat}

    def _begin(self, heat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, class and cell of the best peaks of all classes, [B, Q] each."""
        # logits, so that no two become equal by saturation
        peak = torch.maximum(
            (heat == functional.max_pool2d(heat, 3, 1, 1)).to(heat.dtype), self.get_buffer("still")
        )
        best, index = torch.where(peak > 0, heat, NO_PEAK).flatten(1).topk(self.settings.count, dim=1)
        cells = int(heat.shape[2]) * int(heat.shape[3])
        kind = torch.div(index, cells, rounding_mode="floor")
        return best.sigmoid(), kind, index - kind * cells


def _branch(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, BRANCH, 1, bias=False),
        nn.BatchNorm1d(BRANCH),
        nn.ReLU(inplace=True),
        nn.Conv1d(BRANCH, outputs, 1),
    )

"""Clips a build of a stateful network is calibrated and proven on: frames in time order, with the states that
the float network carries through them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.dataset import DataSet
from edgekit.runtime.state import initial_value
from edgekit.spec import StateSpec
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain import cache

Progress = Callable[[str, int, int], None]
Clip = np.ndarray
"""uint8 [T, H, W, 3] BGR."""


@dataclass(frozen=True)
class StateFeeds:
    """Frames of clips as a stateful network is fed with them on the device; may be gone through again.

    Iterating gives one dict a frame, in time order: the picture [1, C, H, W] or [1, H, W, C] by the input rule,
    and each state as `model`, the float network, left it after the frame before; at a clip's first frame
    its initial value.

    clips: reads clip i. lengths: its frames. chosen: numbers of the frames to give, counted through all clips
    (None: all); those before them run all the same.
    digest: of the pictures, the rule, the code that applies it and the network. provenance: for the evidence.
    """

    clips: Callable[[int], Clip]
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
            if wanted:
                held: Mapping[str, np.ndarray] = {s.input: initial_value(s) for s in self.states}
                for i, frame in enumerate(self.clips(index)[: wanted[-1] + 1]):
                    feed = {self.input_name: fed(frame, self.rule), **held}
                    if i in wanted:
                        yield feed
                    if i < wanted[-1]:
                        held = self._next(feed)
            number += length

    def first(self, count: int) -> StateFeeds:
        """Of `count` frames, evenly spaced, with the same states as in the whole."""
        known = range(sum(self.lengths)) if self.chosen is None else sorted(self.chosen)
        chosen = tuple(known[i] for i in DataSet(count=count).indices(len(known)))
        provenance = {**self.provenance, "pictures": len(chosen)}
        digest = cache.digest(self.digest, chosen)
        return replace(self, chosen=frozenset(chosen), digest=digest, provenance=provenance)

    def _next(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the states become."""
        values = self._session.run([s.output for s in self.states], dict(feed))
        return {s.input: value for s, value in zip(self.states, values, strict=True)}

    @cached_property
    def _session(self) -> Any:
        from edgekit.quant.simulate import open_session

        return open_session(self.model)


def state_feeds(
    clips: Callable[[int], Clip],
    count: int,
    rule: ImagePreprocess,
    input_name: str,
    model: ir.Model,
    states: Sequence[StateSpec],
    what: str,
) -> StateFeeds:
    """Feeds of `count` clips; each is read once for its length and digest."""
    from edgekit.schema import to_json

    pixels, lengths = hashlib.sha256(), []
    for index in range(count):
        clip = clips(index)
        lengths.append(len(clip))
        pixels.update(f"{clip.shape}".encode())
        pixels.update(np.ascontiguousarray(clip).tobytes())
    found = pixels.hexdigest()
    code = cache.sources("kernels/letterbox"), cache.tools()["opencv-python-headless"]
    content = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()
    digest = cache.digest(found, to_json(rule), to_json(list(states)), content, *code)
    provenance = {"calibration": what, "digest": found, "pictures": sum(lengths), "clips": count}
    return StateFeeds(
        clips, tuple(lengths), rule, input_name, model, tuple(states), what, digest, provenance
    )

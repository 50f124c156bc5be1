"""Learned steps on a plan's own places: equal to the simulation, gradients by hand, and better after training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.compression.fake_quant import FakeQuantized
from edgekit.quant.annotate import quant
from edgekit.quant.simulate import fake_quantized, run
from tests.quant_graphs import BETWEEN, annotated, between, pictures
from tests.test_quant_placement import ORT, TRT


def outputs(model: FakeQuantized, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        found = model(*(torch.from_numpy(feed[n]) for n in model.network.input_names))
    return [f.numpy() for f in (found if isinstance(found, tuple) else (found,))]


def same(model: FakeQuantized, seed: int = 7) -> None:
    """The torch forward is the simulation of what is put back on the graph, to one code at a tie."""
    learned = model.learned()
    int32 = model.rules.int32_bias
    for feed in pictures(2, seed=seed):
        (expected,) = run(fake_quantized(learned, int32_bias=int32), [feed])
        for name, got in zip(model.network.output_names, outputs(model, feed), strict=True):
            params = quant({v.name: v for v in learned.graph.outputs}[name])
            step = params.scale[0] if params else 1e-5 * np.abs(expected[name]).max()
            codes = np.abs(got - expected[name]) / step
            assert codes.max() <= 1.01
            assert (codes > 0.01).mean() <= 0.01 or params is None


@pytest.mark.parametrize("rules", [ORT, TRT], ids=["outputs", "inputs only"])
@pytest.mark.parametrize("name", sorted(set(BETWEEN) - {"Softmax"}))
def test_the_forward_is_the_simulation(name: str, rules: Any) -> None:
    model = FakeQuantized(annotated(between(name), rules), rules)
    same(model)
    with torch.no_grad():  # and after steps and weights have moved
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    same(model)

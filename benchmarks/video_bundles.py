"""TSM networks in the forms that the video benchmarks compare, and bundles of them.

One set of weights, four forms: `online` (one frame and states), `plain` (the same backbone without shift, one
frame), `clip` (T frames at once); the torch form is torch_online_tsm.py. Weights are seeded unless given, and
BatchNorm is settled on gesture clips: what the network says means nothing, what it costs and how well it
is quantized means as much as with trained weights of that shape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgekit import frontends, passes
from edgekit.backends.base import Payload, half
from edgekit.bundle import golden_bytes, golden_path, make_variant, write_bundle
from edgekit.manifest import Golden, GoldenTensor, Manifest, Segment
from edgekit.models.tsm import MEAN, STD, TSM, export_clip, export_online
from edgekit.passes.lanes import lanes
from edgekit.passes.states import states
from edgekit.passes.streamify import streamify
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import place
from edgekit.quant.rules import rules_for
from edgekit.quant.simulate import open_session
from edgekit.synth.gestures import FRAMES_PER_SECOND, GestureWorld
from edgekit.target import Target
from edgekit.toolchain import recurrent
from edgekit.toolchain.running import run_here

CLIP = 8
"""Frames of the clip model."""
CALIBRATION_SEED, CALIBRATION_CLIPS = 1_200_000, 8
FORMS = ("online", "plain", "clip")


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 BGR [..., H, W, 3] to float32 RGB [..., 3, H, W], (level / 255 - MEAN) / STD."""
    scaled = (images[..., ::-1].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3), np.float32)


def settled(backbone: str, size: int, width: float = 1.0, classes: int = 27, seed: int = 0) -> TSM:
    """An online TSM with seeded weights whose BatchNorm statistics are those of gesture clips; in eval mode."""
    torch.manual_seed(seed)
    model = TSM(backbone, classes, "online", width)
    world = GestureWorld(CALIBRATION_SEED + 1, max(size, 32), max(size, 32))
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in norms:
        part.momentum = 1.0
    clips = np.stack([world.clip(i * 5, 4)[0][:, :size, :size] for i in range(12)])
    with torch.no_grad():
        model.train()(torch.from_numpy(normalised(clips)))
    return model.eval()


def without_shift(model: TSM, backbone: str, width: float) -> TSM:
    """The same weights, frames judged one by one."""
    classes = [part for part in model.modules() if isinstance(part, nn.Linear)][-1].out_features
    plain = TSM(backbone, classes, "none", width)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def clip_of(model: TSM, size: int, frames: int = CLIP) -> ir.Model:
    """The clip model as the exporter writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.onnx")
        export_clip(model, path, frames, (size, size))
        return frontends.load(path)


def graphs(model: TSM, plain: TSM, size: int, frames: int = CLIP) -> dict[str, ir.Model]:
    """Every form after the recipe of a build."""
    clip = clip_of(model, size, frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plain.onnx")
        export_online(plain, path, (size, size))
        single = frontends.load(path)
    online = streamify(clip, nominal_dt_s=1 / FRAMES_PER_SECOND).model
    found = {"online": online, "plain": single, "clip": clip}
    return {name: passes.prepare(graph, task="none").model for name, graph in found.items()}


def feeds(
    graph: ir.Model, size: int, seed: int = CALIBRATION_SEED
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """Calibration pictures as the graph takes them: clips, single frames, or frames with the states that the float
    network carries from one to the next, from nothing at the start of each clip."""
    name, kept = str(graph.graph.inputs[0].name), states(graph)
    whole = int(graph.graph.inputs[0].shape[0]) > 1  # type: ignore[index]
    world = GestureWorld(seed, max(size, 32), max(size, 32))
    session = open_session(graph) if kept else None

    def run() -> Iterator[Mapping[str, np.ndarray]]:
        for index in range(CALIBRATION_CLIPS):
            frames = normalised(world.clip(index * 5, CLIP)[0][:, :size, :size])
            if whole:
                yield {name: frames}
                continue
            held = {s.input: np.full(s.shape, s.initial, np.float32) for s in kept}
            for frame in frames:
                feed = {name: frame[None], **held}
                yield feed
                if session is not None:
                    values = session.run([s.output for s in kept], feed)
                    held = {s.input: value for s, value in zip(kept, values, strict=True)}

    return run


def payload(
    graph: ir.Model, backend: str, precision: str, size: int, target: Target | None = None, count: int = 1
) -> Payload:
    """Lowered for this machine (or `target`), with `count` lanes; int8: ranges by least squares, no search."""
    target = target or Target.load("host")
    if precision == "int8":
        stats = calibrate(graph, feeds(graph, size))
        graph = place(graph, stats, rules_for(backend, target))
    (lowered,) = half(backend, "lower").lower(lanes(graph, count), target, precision)
    return lowered


def write(
    path: Path,
    graph: ir.Model,
    payloads: Mapping[str, Payload],
    *,
    target: str = "host",
    tolerance: float = 1e-3,
) -> Path:
    """A bundle of one network with payloads by name. Its golden values are what the first payload gives here on one
    frame, within `tolerance` of their largest magnitude, which the others must meet.

    Raises: LoweringError where the payloads hold the states in ways that do not go together.
    """
    first, *_ = payloads.values()
    kept = recurrent.timed(states(graph), None, None)
    agreed = recurrent.agreed(kept, list(payloads.values()))
    inputs, outputs = recurrent.ports(first, agreed)
    session = run_here(first, kept, threads=1).binding
    rng = np.random.default_rng(0)
    for name in inputs:
        session.inputs[name][...] = rng.normal(size=session.inputs[name].shape)
    session.run()
    golden = Golden(
        tuple(GoldenTensor(n, golden_path("input", i)) for i, n in enumerate(inputs)),
        tuple(
            GoldenTensor(
                n, golden_path("output", i), atol=tolerance * float(np.abs(session.outputs[n]).max())
            )
            for i, n in enumerate(outputs)
        ),
    )
    files = {g.path: golden_bytes(session.inputs[g.tensor]) for g in golden.inputs}
    files |= {g.path: golden_bytes(session.outputs[g.tensor]) for g in golden.outputs}
    session.close()
    variants = tuple(make_variant("net", name, p) for name, p in payloads.items())
    files |= {v.path: p.data for v, p in zip(variants, payloads.values(), strict=True)}
    names = tuple(tuple(t.name for t in side) for side in (first.inputs, first.outputs))
    manifest = Manifest(
        schema_version=1,
        model=path.stem,
        task="none",
        target=target,
        inputs=inputs,
        outputs=outputs,
        tensors=recurrent.tensors(first, agreed),
        plan=(Segment("net", *names, variants),),
        pipeline={},
        payload_digest="",
        golden=golden,
        files={},
        provenance={},
        states=agreed,
    )
    write_bundle(path, manifest, files, {})
    return path

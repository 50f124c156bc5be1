"""Clip model to one-frame model: every form of the shift, what is refused, and the numbers frame by frame."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from edgekit import frontends, passes  # noqa: E402
from edgekit.backends.litert.lower import lower  # noqa: E402
from edgekit.errors import ModelError, UsageError  # noqa: E402
from edgekit.passes import probe  # noqa: E402
from edgekit.passes.graph import op_counts  # noqa: E402
from edgekit.passes.streamify import (  # noqa: E402
    KEY,
    TOLERANCE,
    Streamified,
    random_clip,
    states,
    stream,
    streamify,
    verify,
)
from edgekit.target import Target  # noqa: E402
from tests import clip_models as nets  # noqa: E402

SIZES = (4, 3, 16, 16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """The clip model of two shifted blocks that tests do not change."""
    return nets.export(nets.seeded(nets.Net), SIZES, tmp_path_factory.mktemp("plain") / "m.onnx")


def rows(model: ir.Model, clip: np.ndarray) -> np.ndarray:
    return probe.evaluate(model, {"clip": clip})["logits"]


def streamed(made: Streamified, clip: np.ndarray) -> np.ndarray:
    """The test's own loop: states start at their initial value and are passed on by name."""
    kept = {s.input: np.full(s.shape, s.initial, np.float32) for s in made.states}
    found = []
    for frame in clip:
        image = str(made.model.graph.inputs[0].name)
        out = probe.evaluate(made.model, {image: frame[None], **kept})
        kept = {s.input: out[s.output] for s in made.states}
        found.append(out["logits"])
    return np.concatenate(found)


def noise(*sizes: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


@pytest.mark.parametrize("exporter", [(13, False), (17, False), (18, True)], ids=["13", "17", "dynamo18"])
@pytest.mark.parametrize("form", nets.FORMS)
def test_every_form_of_the_shift_becomes_the_same_graph(
    form: str, exporter: tuple[int, bool], tmp_path: Path
) -> None:
    net = nets.seeded(lambda: nets.Net(shift=nets.FORMS[form]))
    model = nets.export(net, SIZES, tmp_path / "m.onnx", opset=exporter[0], dynamo=exporter[1])
    made = streamify(model, nominal_dt_s=0.25)
    counts = op_counts(made.model.graph)
    assert counts == {
        "Add": 2, "Clip": 4, "Concat": 2, "Conv": 7, "Gemm": 1, "ReduceMean": 1, "Relu": 1, "Split": 2,
    }  # fmt: skip
    assert [s.shape for s in made.states] == [(1, 2, 8, 8)] * 2
    assert [(s.input, s.output, s.initial, s.nominal_dt_s) for s in made.states] == [
        ("state_0", "state_0_next", 0.0, 0.25),
        ("state_1", "state_1_next", 0.0, 0.25),
    ]
    assert [v.name for v in made.model.graph.inputs] == ["image", "state_0", "state_1"]
    assert [v.name for v in made.model.graph.outputs] == ["logits", "state_0_next", "state_1_next"]
    assert made.exact
    assert [(s.past, s.future, s.channels, s.delay) for s in made.shifts] == [(2, 0, 16, 1)] * 2
    clip = noise(*SIZES)
    want = rows(model, clip)
    assert np.ptp(want, axis=0).max() > 1e-3, "frames must differ for the comparison to mean anything"
    got = streamed(made, clip)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        np.testing.assert_allclose(got, net(torch.from_numpy(clip)).numpy(), rtol=0, atol=1e-4)


def test_later_frames_do_not_matter(plain: ir.Model) -> None:
    made = streamify(plain)
    clip = noise(*SIZES)
    for t in range(4):
        other = clip.copy()
        other[t + 1 :] = 1e3
        np.testing.assert_allclose(streamed(made, clip)[t], rows(plain, other)[t], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", nets.FORMS)
def test_bidirectional_is_refused_and_explained(form: str, tmp_path: Path) -> None:
    net = nets.seeded(lambda: nets.Net(shift=nets.FORMS[form], both=True))
    model = nets.export(net, SIZES, tmp_path / "m.onnx")
    with pytest.raises(ModelError) as caught:
        streamify(model)
    text = str(caught.value)
    assert "2 shifts are bi-directional" in text
    assert "2 of 16 channels from the future, 2 from the past" in text
    assert "allow_bidirectional" in text
    assert "\n" not in text


def test_bidirectional_by_request_is_the_network_with_the_present_in_place_of_the_future(
    tmp_path: Path,
) -> None:
    def present(x: Tensor, frames: int, share: int, both: bool) -> Tensor:
        f = x.shape[1] // share
        zero = torch.zeros_like(x[:1, :f])
        return torch.cat([x[:, :f], torch.cat([zero, x[:-1, f : 2 * f]]), x[:, 2 * f :]], 1)

    net = nets.seeded(lambda: nets.Net(shift=nets.splits, both=True))
    made = streamify(nets.export(net, SIZES, tmp_path / "m.onnx"), allow_bidirectional=True)
    assert not made.exact
    assert made.difference > TOLERANCE
    assert "measure the drop" in made.notes[0]
    assert [(s.past, s.future) for s in made.shifts] == [(2, 2)] * 2
    assert [s.shape for s in made.states] == [(1, 2, 8, 8)] * 2
    for block in net.blocks:  # type: ignore[union-attr]
        block.shift = present  # type: ignore[assignment, union-attr]
    clip = noise(*SIZES)
    with torch.no_grad():
        want = net(torch.from_numpy(clip)).numpy()
    np.testing.assert_allclose(streamed(made, clip), want, rtol=0, atol=1e-5)


class Features(nn.Module):
    """A picture's 8 channels, changed over time by `change`, then 4 numbers a frame."""

    def __init__(self, change: Callable[[Features, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.time = nn.Conv1d(8, 4, 3, dilation=2)
        self.chomped = nn.Conv1d(8, 4, 3, dilation=2, padding=4)
        self.centred = nn.Conv1d(8, 4, 3, padding=1)
        self.pair = nn.Conv1d(8, 4, 2, groups=4)
        self.solid = nn.Conv3d(3, 4, (3, 3, 3))

    def forward(self, clip: Tensor) -> Tensor:
        return self.change(self, clip)

    def vectors(self, clip: Tensor) -> Tensor:
        pooled: Tensor = self.conv(clip).mean((2, 3))
        return pooled

    def columns(self, clip: Tensor) -> Tensor:
        return self.vectors(clip).t().unsqueeze(0)


def late(x: Tensor, frames: int = 1, value: float = 0.0) -> Tensor:
    return torch.cat([torch.full_like(x[:frames], value), x[:-frames]])


def two_frames_late(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)
    return s.linear(torch.cat([late(y[:, :3], 2), y[:, 3:]], 1).mean((2, 3)))


def three_delays(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)
    return s.linear(
        torch.cat([late(y[:, :2], 3), y[:, 2:4], late(y[:, 4:6]), late(y[:, 6:], 2)], 1).mean((2, 3))
    )


def frame_difference(s: Features, x: Tensor) -> Tensor:
    return s.linear(s.conv(x - late(x)).mean((2, 3)))


def written_twice(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)  # the same tensor late twice, written in two ways: one state
    zero = torch.zeros_like(y)
    zero[1:] = y[:-1]
    return s.linear((late(y).relu() + zero.sigmoid() + y).mean((2, 3)))


def shift_then_shuffle(s: Features, x: Tensor) -> Tensor:
    y = nets.ours(s.conv(x), 8)
    n, c, h, w = y.shape
    return s.linear(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w).relu().mean((2, 3)))


def late_part(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)
    return s.linear(torch.cat([late(y[:, :4]).sigmoid(), y[:, 4:].relu()], 1).mean((2, 3)))


def shuffle_then_late_twice(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)  # between the two, a state is tried that nothing reads in the end
    n, c, h, w = y.shape
    return s.linear(late(late(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w))).mean((2, 3)))


def other_initial(s: Features, x: Tensor) -> Tensor:
    return s.linear(late(s.conv(x), 1, 0.5).mean((2, 3)))


def padded_convolution(s: Features, x: Tensor) -> Tensor:
    return s.time(nn.functional.pad(s.columns(x), (4, 0)))[0].t()


def padded_with_a_value(s: Features, x: Tensor) -> Tensor:
    return s.time(nn.functional.pad(s.columns(x), (4, 0), value=1.5))[0].t()


def chomped_convolution(s: Features, x: Tensor) -> Tensor:
    return s.chomped(s.columns(x)).relu()[:, :, : x.shape[0]][0].t()


def grouped_pair(s: Features, x: Tensor) -> Tensor:
    return s.pair(nn.functional.pad(s.columns(x), (1, 0)))[0].t()


def convolution_in_space_and_time(s: Features, x: Tensor) -> Tensor:
    y = s.solid(nn.functional.pad(x.transpose(0, 1).unsqueeze(0), (0, 0, 0, 0, 2, 0)))
    return y.mean((3, 4))[0].t()


def mean_before_the_classifier(s: Features, x: Tensor) -> Tensor:
    return s.linear(s.vectors(x).view(1, 8, 8).mean(1))


def pool_over_space_and_time(s: Features, x: Tensor) -> Tensor:
    y = s.conv(x)
    y = y.view(1, 8, 8, y.shape[2], y.shape[3]).transpose(1, 2)
    return s.linear(nn.functional.adaptive_avg_pool3d(y, 1).flatten(1))


def pool_over_time(s: Features, x: Tensor) -> Tensor:
    return s.linear(nn.functional.avg_pool1d(s.columns(x), 8).flatten(1))


CONVERTED = {
    two_frames_late: [(1, 6, 4, 4)],
    three_delays: [(1, 6, 4, 4), (1, 2, 4, 4), (1, 4, 4, 4)],
    frame_difference: [(1, 3, 6, 6)],
    written_twice: [(1, 8, 4, 4)],
    shift_then_shuffle: [(1, 1, 4, 4)],
    late_part: [(1, 4, 4, 4)],
    shuffle_then_late_twice: [(1, 16, 4, 4)],
    other_initial: [(1, 8, 4, 4)],
    padded_convolution: [(1, 8, 4)],
    padded_with_a_value: [(1, 8, 4)],
    chomped_convolution: [(1, 8, 4)],
    grouped_pair: [(1, 8, 1)],
    convolution_in_space_and_time: [(1, 3, 2, 6, 6)],
    mean_before_the_classifier: [],
    pool_over_space_and_time: [],
    pool_over_time: [],
}
CLIP = (8, 3, 6, 6)
"""As many frames as the convolution has channels: axes must not be told apart by their size."""


@pytest.mark.parametrize("change", CONVERTED, ids=lambda f: f.__name__)
def test_converted(change: Callable[[Features, Tensor], Tensor], tmp_path: Path) -> None:
    net = nets.seeded(lambda: Features(change))
    model = nets.export(net, CLIP, tmp_path / "m.onnx")
    made = streamify(model)
    assert [s.shape for s in made.states] == CONVERTED[change]
    clip = noise(*CLIP)
    got, want = streamed(made, clip), rows(model, clip)
    assert len(want) == (8 if made.states else 1)
    if not made.states:
        assert made.outputs == {"logits": None}
        assert "mean over frames" in made.notes[-1]
        got = got.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    ends = {id(v) for v in (*made.model.graph.inputs, *made.model.graph.outputs)}
    assert len(ends) == 2 + 2 * len(made.states), "no state may be another's tensor, or the frame itself"
    initial = {"other_initial": 0.5, "padded_with_a_value": 1.5}.get(change.__name__, 0.0)
    assert {s.initial for s in made.states} <= {initial}


REFUSED = {
    "turned round": (lambda s, x: s.linear(late(s.conv(x), 1).roll(1, 0).mean((2, 3))), "another way than a"),
    "first frame again": (
        lambda s, x: s.linear(torch.cat([x[:1], x[:-1]]).mean((2, 3)).repeat(1, 3)[:, :8]),
        "another way than a",
    ),
    "last frame blank": (
        lambda s, x: s.linear(
            s.conv(torch.cat([torch.zeros_like(x[:1]), x[:-2], torch.zeros_like(x[:1])])).mean((2, 3))
        ),
        "another way than a",
    ),
    "backwards": (lambda s, x: s.linear(s.conv(x.flip(0)).mean((2, 3))), "another way than a"),
    "attention": (
        lambda s, x: torch.softmax(s.vectors(x) @ s.vectors(x).t(), 1) @ s.vectors(x),
        "MatMul .* mixes frames",
    ),
    "sum so far": (lambda s, x: s.vectors(x).cumsum(0), "CumSum .* runs along the frames"),
    "position": (lambda s, x: s.vectors(x) + torch.arange(8.0)[:, None], "a weight of its own for every"),
    "maximum": (lambda s, x: s.linear(s.vectors(x).amax(0, True)), "ReduceMax .* only a mean"),
    "after the mean": (lambda s, x: s.linear(s.vectors(x).mean(0, True).relu()), "Relu .* not commute"),
    "less the mean": (lambda s, x: s.vectors(x) - s.vectors(x).mean(0, True), "Sub .* not commute"),
    "centred": (lambda s, x: s.centred(s.columns(x))[0].t(), "looks 1 frames ahead"),
    "softmax": (lambda s, x: s.vectors(x).softmax(0), "Softmax .* runs along the frames"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_operator_named(case: str, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    model = nets.export(nets.seeded(lambda: Features(change)), CLIP, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=reason) as caught:
        streamify(model)
    assert str(caught.value).startswith("model: cannot be made a one-frame model: ")
    assert "\n" not in str(caught.value)


def test_all_refusals_in_one_line(tmp_path: Path) -> None:
    def several(s: Features, x: Tensor) -> Tensor:
        y = s.vectors(x)
        return torch.cat([y.cumsum(0), y.softmax(0)], 1)

    model = nets.export(nets.seeded(lambda: Features(several)), CLIP, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"CumSum .*; Softmax "):
        streamify(model)


def test_a_mean_of_shifted_frames(tmp_path: Path) -> None:
    net = nets.seeded(lambda: nets.Net(shift=nets.buffer, consensus=True))
    model = nets.export(net, SIZES, tmp_path / "m.onnx")
    made = streamify(model)
    clip = noise(*SIZES)
    got = streamed(made, clip)
    assert got.shape == (4, 5)
    np.testing.assert_allclose(got.mean(0, keepdims=True), rows(model, clip), rtol=0, atol=TOLERANCE)
    assert "Reshape" not in op_counts(made.model.graph)


def test_a_clip_of_channels_over_time(tmp_path: Path) -> None:
    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(nn.functional.pad(x, (2, 0)))
            return y

    model = nets.export(nets.seeded(Temporal), (1, 6, 9), tmp_path / "m.onnx")
    made = streamify(model, frames=9)
    assert made.axis == 2
    assert made.outputs == {"logits": 2}
    assert op_counts(made.model.graph) == {"Concat": 1, "Conv": 1, "Slice": 1}
    assert verify(model, made, {"clip": noise(1, 6, 9)}) <= TOLERANCE
    with pytest.raises(ModelError, match="give its frames"):
        streamify(model)


def test_no_states_where_nothing_is_shifted(tmp_path: Path) -> None:
    made = streamify(
        nets.export(nets.seeded(lambda: nets.Net(shift=None)), SIZES, tmp_path / "m.onnx"), frames=4
    )
    assert made.states == () == made.shifts
    assert states(made.model) == ()
    assert json.loads(made.model.metadata_props[KEY]) == []


def test_states_stay_through_the_recipe(plain: ir.Model) -> None:
    before = {str(v.name) for node in plain.graph for v in node.outputs}
    made = streamify(plain)
    ready, records = passes.run_passes(made.model, passes.AFTER_SPLIT)
    assert all(r.max_abs_diff is not None for r in records)
    assert states(ready) == made.states
    clip = random_clip(plain, seed=3)["clip"]
    got = np.concatenate([r["logits"] for r in stream(ready, states(ready), clip)])
    np.testing.assert_allclose(got, rows(plain, clip), rtol=0, atol=1e-5)
    assert {str(v.name) for node in plain.graph for v in node.outputs} == before, "the clip model stays"


def test_states_stay_in_a_file(plain: ir.Model, tmp_path: Path) -> None:
    made = streamify(plain, nominal_dt_s=0.5)
    ir.save(made.model, tmp_path / "one.onnx")
    assert states(frontends.load(tmp_path / "one.onnx")) == made.states


def test_tensorflow_lite_runs_it_without_transposes(plain: ir.Model) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    ready, _ = passes.run_passes(streamify(plain).model, passes.AFTER_SPLIT)
    (payload,) = lower(ready, Target.load("rpi5"), "float32")
    lite = interpreter.Interpreter(model_content=bytes(payload.data), num_threads=1)
    lite.allocate_tensors()
    assert not {o["op_name"] for o in lite._get_ops_details()} & {"TRANSPOSE", "SPLIT_V", "GATHER_ND"}
    ports = [
        [(*port, d["index"]) for port, d in zip(payload.options[side], details, strict=True)]
        for side, details in (("inputs", lite.get_input_details()), ("outputs", lite.get_output_details()))
    ]
    kept = {s.input: np.full(s.shape, s.initial, np.float32) for s in states(ready)}
    clip = noise(*SIZES)
    for frame, want in zip(clip, rows(plain, clip), strict=True):
        for name, order, sizes, index in ports[0]:
            given = {"image": frame[None], **kept}[name]
            lite.set_tensor(index, np.ascontiguousarray(given.transpose(order)).reshape(sizes))
        lite.invoke()
        out = {n: lite.get_tensor(i).reshape(z).transpose(np.argsort(o)) for n, o, z, i in ports[1]}
        kept = {s.input: out[s.output] for s in states(ready)}
        np.testing.assert_allclose(out["logits"][0], want, rtol=0, atol=TOLERANCE)


def test_the_check_can_fail(plain: ir.Model) -> None:
    made = streamify(plain)
    assert verify(plain, made) <= TOLERANCE
    entries = json.loads(made.model.metadata_props[KEY])
    entries[0]["output"], entries[1]["output"] = entries[1]["output"], entries[0]["output"]
    made.model.metadata_props[KEY] = json.dumps(entries)
    crossed = Streamified(**{**vars(made), "states": states(made.model)})
    with pytest.raises(passes.PassError, match="differs from the clip model"):
        verify(plain, crossed)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda e: "{", "not valid JSON"),
        (lambda e: "[" * 100_000, "nested too deep"),
        (lambda e: json.dumps([{**e[0], "initial": 10**400}]), "an integer of 401 digits"),
        (lambda e: json.dumps([{**e[0], "nominal_dt_s": 1e305}]), "nominal_dt_s positive"),
        (lambda e: json.dumps([{**e[0], "name": "a\nb"}]), "expected a name of 1 to 80 letters"),
        (lambda e: json.dumps({}), "expected a list, got dict"),
        (lambda e: json.dumps([{"name": "a"}]), "expected entries with"),
        (lambda e: json.dumps([{**e[0], "more": 1}]), "expected entries with"),
        (lambda e: json.dumps([{**e[0], "input": 3}]), "names must be text"),
        (lambda e: json.dumps([{**e[0], "initial": float("nan")}]), "NaN is not a JSON number"),
        (lambda e: json.dumps([{**e[0], "initial": True}]), "initial must be finite"),
        (lambda e: json.dumps([{**e[0], "nominal_dt_s": 0}]), "nominal_dt_s positive"),
        (lambda e: json.dumps([{**e[0], "input": "nothing"}]), "no pair of an input 'nothing'"),
        (lambda e: json.dumps([{**e[0], "input": "image"}]), "input and output differ"),
        (lambda e: json.dumps([e[0], {**e[1], "input": "state_0"}]), "two states share one input"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(
    change: Callable[[list[dict[str, object]]], str], problem: str, plain: ir.Model
) -> None:
    made = streamify(plain)
    made.model.metadata_props[KEY] = change(json.loads(made.model.metadata_props[KEY]))
    with pytest.raises(ModelError, match=problem) as caught:
        states(made.model)
    assert "\n" not in str(caught.value)


def test_bad_arguments(plain: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nominal_dt_s"):
        streamify(plain, nominal_dt_s=0.0)
    with pytest.raises(ModelError, match="expected a clip of 8 frames"):
        streamify(plain, frames=8)
    with pytest.raises(ModelError, match="at least 2 frames"):
        streamify(nets.export(nets.seeded(lambda: nets.Net(frames=1)), (1, 3, 16, 16), tmp_path / "n.onnx"))


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(2, 6),
    channels=st.sampled_from([4, 8, 12]),
    share=st.sampled_from([2, 4]),
    forms=st.lists(st.sampled_from([None, *nets.FORMS]), min_size=1, max_size=4),
    consensus=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_residual_networks(
    tmp_path_factory: pytest.TempPathFactory,
    frames: int,
    channels: int,
    share: int,
    forms: list[str | None],
    consensus: bool,
    seed: int,
) -> None:
    def make() -> nn.Module:
        net = nets.Net(frames, channels, blocks=len(forms), share=share, consensus=consensus)
        for block, form in zip(net.blocks, forms, strict=True):
            assert isinstance(block, nets.Block)
            block.shift = None if form is None else nets.FORMS[form]
        return net

    path = tmp_path_factory.mktemp("net") / "m.onnx"
    model = nets.export(nets.seeded(make, seed), (frames, 3, 8, 8), path)
    made = streamify(model)
    shifted = sum(f is not None for f in forms)
    assert [s.shape for s in made.states] == [(1, channels // share, 4, 4)] * shifted
    assert (
        op_counts(made.model.graph).get("Split", 0) == op_counts(made.model.graph).get("Concat", 0) == shifted
    )
    clip = noise(frames, 3, 8, 8, seed=seed)
    got, want = streamed(made, clip), rows(model, clip)
    got = got.mean(0, keepdims=True) if consensus else got
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(want).max())))

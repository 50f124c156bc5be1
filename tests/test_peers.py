"""benchmarks/peers: interleaved timing, what is called integer, the judge, and peers that are not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import torch_networks
from benchmarks.peers import cases, integers, placements, run, runners
from benchmarks.peers.timing import interleave
from tests.helpers import ROOT


class Clock:
    """A clock that only its runners move; the whole machine slows down by a factor now and then."""

    def __init__(self) -> None:
        self.now, self.calls, self.factor = 0, [], 1.0

    def runner(self, name: str, nanoseconds: int) -> Callable[[], None]:
        def go() -> None:
            self.calls.append(name)
            self.now += int(nanoseconds * self.factor)
            if len(self.calls) % 50 == 0:  # for everyone alike
                self.factor = 10.0 if self.factor == 1.0 else 1.0

        return go


def test_ratios_hold_on_a_machine_that_is_disturbed() -> None:
    clock = Clock()
    turns = {"base": clock.runner("base", 4_000_000), "half": clock.runner("half", 2_000_000)}
    found = interleave(turns, "base", rounds=60, calls=3, clock=lambda: clock.now)
    assert found["base"].ratio == 1.0 and found["half"].ratio == pytest.approx(2.0, rel=0.01)
    assert found["half"].ratio_of_min == pytest.approx(2.0) and found["half"].min_ms == pytest.approx(2.0)
    assert found["half"].spread[0] <= found["half"].ratio <= found["half"].spread[1]
    # every round runs each once untimed and `calls` times timed, in an order of its own
    rounds = [clock.calls[10 + 8 * i : 18 + 8 * i] for i in range(60)]
    assert all(sorted(r) == ["base"] * 4 + ["half"] * 4 for r in rounds)
    assert {r[0] for r in rounds} == {"base", "half"}
    with pytest.raises(KeyError):
        interleave(turns, "nobody", rounds=1)


def float_network() -> bytes:
    """x [1, 3, 12, 12] -> Conv 8 -> Relu -> depthwise Conv 8 -> mean -> Gemm 5 -> y."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "b": rng.normal(0, 0.3, (8, 1, 3, 3)),
        "c": rng.normal(0, 0.3, (5, 8)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "b"], ["r"], group=8, strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["r"], ["s"]),
        helper.make_node("Flatten", ["s"], ["t"]),
        helper.make_node("Gemm", ["t", "c"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def test_layers_are_named_and_counted() -> None:
    data, layers = cases.name_layers(float_network())
    assert [layer.macs for layer in layers] == [12 * 12 * 8 * 27, 6 * 6 * 8 * 9, 5 * 8]
    assert [layer.name for layer in layers] == ["layer_000", "layer_001", "layer_002"]
    x = np.random.default_rng(1).normal(size=(1, 3, 12, 12)).astype(np.float32)
    answers = [runners.outputs_of(runners.onnxruntime(d), [x])[0]["y"] for d in (data, float_network())]
    np.testing.assert_array_equal(*answers)
    assert cases.layers_in("a/layer_002/WithoutBiases,weight_000_quantized weight_777", layers) == {0, 2}


@pytest.fixture(scope="module")
def peers_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of peers' files that the tests of this module share."""
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_PEERS", str(folder))
        yield folder


def make(peer: str) -> Path:
    return run.made(run.PEERS[peer], case_of(float_network()), pictures())


def pictures(scale: float = 1.0, channels: int = 3) -> cases.Calibration:
    noise = np.random.default_rng(2).normal(size=(8, channels, 12, 12)) * scale
    return cases.Calibration(noise.astype(np.float32), "noise")


def case_of(data: bytes) -> cases.Case:
    graph, layers = cases.name_layers(data)
    images = tuple(np.random.default_rng(3).integers(0, 255, (4, 12, 12, 3), np.uint8))

    def feed(image: np.ndarray) -> np.ndarray:
        return (image.transpose(2, 0, 1)[None] / 128 - 1).astype(np.float32)

    return cases.Case("tiny", Path("tiny.onnx"), graph, layers, "x", ("y",), feed, None, None, images)


def test_integer_shares_tell_what_runs_not_what_is_written(tmp_path: Path, peers_home: Path) -> None:
    case = case_of(float_network())
    total = sum(layer.macs for layer in case.layers)
    folder = make("ort-minmax")
    data = (folder / "model.onnx").read_bytes()
    assert integers.q_dq(data) == 1.0 and integers.onnxruntime(data, case.layers) == 1.0
    assert integers.q_dq(case.graph) == 0.0 and integers.onnxruntime(case.graph, case.layers) == 0.0
    model = onnx.load_from_string(data)
    last = next(
        n for n in reversed(model.graph.node) if n.op_type == "DequantizeLinear" and n.output[0] == "y"
    )
    gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
    gemm.output[0] = "y"  # result stays float: the product can not be integer for ONNX Runtime
    queued = [n for n in model.graph.node if n.output[0] == last.input[0]]
    for node in (last, *queued):
        model.graph.node.remove(node)
    text = model.SerializeToString()
    assert integers.q_dq(text) == 1.0
    assert integers.onnxruntime(text, case.layers) in (1.0, pytest.approx(1 - case.layers[2].macs / total))
    pytest.importorskip("openvino")
    runner = runners.OpenVino(folder / "model.onnx", ("y",))
    assert integers.openvino(runner.compiled, case.layers) > 0.5
    (tmp_path / "float.onnx").write_bytes(case.graph)
    assert integers.openvino(runners.OpenVino(tmp_path / "float.onnx", ("y",)).compiled, case.layers) == 0


def test_files_are_made_once_and_again_when_anything_changes(peers_home: Path) -> None:
    first = make("ort-minmax")
    before = (first / "made.json").stat().st_mtime_ns
    assert make("ort-minmax") == first
    assert (first / "made.json").stat().st_mtime_ns == before
    assert {p.name for p in first.iterdir()} >= {"made.json", "model.onnx"}
    assert not list(first.glob("*.npy")) and not list((peers_home / "made").glob("*.tmp"))
    facts = json.loads((first / "made.json").read_text())
    assert facts["seconds"] > 0 and facts["pictures"] == 8 and "onnxruntime" in facts["versions"]
    other = run.made(run.PEERS["ort-minmax"], case_of(float_network()), pictures(scale=2))
    assert other != first


def test_a_peer_that_is_not_installed_or_fails_is_a_row(peers_home: Path) -> None:
    before = set((peers_home / "made").glob("*"))
    with pytest.raises(run.Unavailable, match=r"not installed .*setup\.sh litert"):
        run.made(run.PEERS["litert-int8"], case_of(float_network()), pictures())
    with pytest.raises(run.Unavailable, match="failed: "):
        run.made(run.PEERS["ort-minmax"], case_of(float_network()), pictures(channels=2))
    row = run.Row("litert-int8", "LiteRT int8", "not installed")
    assert "not installed" in run.table([row], False, False)[-1]
    assert set((peers_home / "made").glob("*")) == before


def test_a_comparison_prints_every_row_and_logs_it(
    tmp_path: Path, peers_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(cases, "load", lambda name: case_of(float_network()))
    monkeypatch.setattr(cases, "calibration", lambda case, folder, count: pictures())
    words = ["run.py", "--network", "resnet18", "--peers", "ort-minmax,openvino-minmax,litert-int8"]
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "2", "--out", str(tmp_path / "log.jsonl")])
    run.main()
    out = capsys.readouterr().out
    assert "onnxruntime U8S8 MinMax" in out and "OpenVINO on that MinMax file" in out
    assert "LiteRT int8" in out and "not installed" in out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["ort-float", "ort-minmax", "openvino-minmax", "litert-int8"]
    assert lines[0]["metric"] == {"sqnr_db": 200.0, "top1_agreement": 1.0}
    assert 20 < lines[1]["metric"]["sqnr_db"] < 60 and lines[1]["times"]["ratio"] > 0
    assert lines[1]["commit"] and lines[1]["machine"]["cpu"] and lines[3]["why"] and lines[3]["times"] is None


def test_sqnr() -> None:
    signal = [{"y": np.array([3.0, 4.0], np.float32)}]
    assert cases.sqnr(signal, signal) == 200.0
    assert cases.sqnr(signal, [{"y": np.array([3.0, 4.5], np.float32)}]) == pytest.approx(20.0)
    assert cases.sqnr(signal, [{"y": np.array([np.nan, 4.0], np.float32)}]) == 0.0


def test_calibration_refuses_pictures_that_are_judged(tmp_path: Path) -> None:
    import dataclasses

    import cv2

    from edgekit.tasks.detect.dataset import CocoSet, Picture

    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((12, 12, 3), 40 * i, np.uint8))
    case = case_of(float_network())
    data = cases.calibration(case, tmp_path, 2)
    assert data.inputs.shape == (2, 3, 12, 12) and data.what.startswith("2 pictures")
    np.testing.assert_allclose(data.inputs[1], 80 / 128 - 1)
    judged = CocoSet("set", ("a",), (Picture(1, tmp_path / "2.png", 12, 12),), (), "")
    with pytest.raises(ValueError, match=r"2\.png is also judged on"):
        cases.calibration(dataclasses.replace(case, data=judged), tmp_path, 4)
    with pytest.raises(ValueError, match="holds no pictures"):
        cases.calibration(case, ROOT / "docs", 4)


def test_calibration_folders_hold_the_very_pictures(tmp_path: Path) -> None:
    import cv2

    given, made = tmp_path / "given", tmp_path / "made"
    given.mkdir()
    for i in range(6):
        cv2.imwrite(str(given / f"{i}.png"), np.full((12, 12, 3), 40 * i, np.uint8))
    case = case_of(float_network())
    folder = cases.calibration_folder(given, 3, made)
    assert [p.name for p in sorted(folder.iterdir())] == ["0.png", "2.png", "4.png"]
    again, whole = (cases.calibration(case, f, 3).inputs for f in (given, folder))
    np.testing.assert_array_equal(again, whole)
    assert cases.calibration_folder(given, 3, made) == folder
    cv2.imwrite(str(given / "2.png"), np.zeros((12, 12, 3), np.uint8))
    assert cases.calibration_folder(given, 3, made) != folder
    streets = cases.calibration_folder(None, 2, made)
    drawn, read = (cases.calibration(case, f, 2).inputs for f in (None, streets))
    np.testing.assert_array_equal(drawn, read)  # PNG keeps every pixel
    assert len(list(made.iterdir())) == 3


@pytest.mark.slow
def test_edgekit_is_built_and_measured_as_the_peers_are(
    tmp_path: Path, peers_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    source = tmp_path / "net.onnx"
    source.write_bytes(float_network())
    rule = torch_networks.Definition(torch_networks.mobilenet_v2, 12, (128.0,) * 3, (128.0,) * 3)
    monkeypatch.setitem(torch_networks.NETWORKS, "net", rule)
    case = dataclasses.replace(case_of(float_network()), name="net", source=source)
    path, seconds, cpu = run.built_bundle(case, None, count=8)
    assert seconds > 0 and cpu.endswith("s of CPU to build")
    assert run.built_bundle(case, None, count=8) == (path, seconds, cpu)
    entries = run.bundle_entries(path, case, seconds, cpu)
    assert {e.row.name for e in entries} >= {"edgekit onnxruntime-int8"}
    assert sum(e.row.chosen for e in entries) == 1 and all(e.row.integer_macs == 1.0 for e in entries)
    x = torch_networks.network_input(rule, cases.street(500_000, 1)[0])
    reference = run.peer_entry("ort-float", case, pictures()).answer([x])
    for entry in entries:
        assert 20 < cases.sqnr(reference, entry.answer([x])) < 80
    other = onnx.load_from_string(float_network())
    other.graph.node[-1].output[0] = other.graph.output[0].name = "z"
    with pytest.raises(run.Unavailable, match="bundle outputs"):
        run.bundle_entries(path, case_of(other.SerializeToString()), None)


def test_torch_networks_are_the_same_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_networks, "SETTLE", torch_networks.SETTLE[:1])
    one, other = (torch_networks.export("mobilenetv2", tmp_path / name) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes() and one.name == other.name
    data = onnx.shape_inference.infer_shapes(onnx.load(one)).SerializeToString()
    _, layers = cases.name_layers(data)
    # Sandler et al. 2018: 300 M multiply-adds
    assert len(layers) == 53 and sum(layer.macs for layer in layers) == pytest.approx(300.8e6, rel=0.001)
    stamp = one.stat().st_mtime_ns
    assert torch_networks.export("mobilenetv2", tmp_path / "a").stat().st_mtime_ns == stamp


def test_torch_networks_answer_to_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled, no layer is dead and none overflows: two streets give different answers of ordinary size."""
    monkeypatch.setattr(torch_networks, "SETTLE", torch_networks.SETTLE[:1])
    runner = runners.onnxruntime(torch_networks.export("mobilenetv2", tmp_path).read_bytes())
    definition = torch_networks.NETWORKS["mobilenetv2"]
    inputs = [torch_networks.network_input(definition, image) for image in cases.street(500_000, 2)]
    a, b = (answer["output"] for answer in runners.outputs_of(runner, inputs))
    assert 0.1 < a.std() < 10 and 0.01 < np.abs(a - b).mean() < 10


def test_setup_builds_every_environment_that_a_peer_names() -> None:
    text = (ROOT / "benchmarks" / "peers" / "setup.sh").read_text()
    for peer in run.PEERS.values():
        assert not peer.venv or f"setup_{peer.venv}()" in text
        assert peer.maker is None or (ROOT / "benchmarks" / "peers" / peer.maker[0]).is_file()


def test_codes_are_taken_out_between_the_operators_named_and_nowhere_else(peers_home: Path) -> None:
    data = (make("ort-minmax") / "model.onnx").read_bytes()
    pool, taken = placements.take(data, lambda made, user: user.op_type == "GlobalAveragePool")
    assert taken == 1
    onnx.checker.check_model(onnx.load_from_string(pool), full_check=True)
    before, after = (
        [n.op_type for n in onnx.load_from_string(d).graph.node].count("QuantizeLinear") for d in (data, pool)
    )
    assert after == before - 1
    assert placements.take(data, lambda made, user: False) == (data, 0)
    x = pictures().inputs[:1]
    want, coarse, fine = (
        runners.outputs_of(runners.onnxruntime(d), [x])[0]["y"] for d in (float_network(), data, pool)
    )
    assert np.abs(coarse - want).max() < 0.05 and np.abs(fine - want).max() < 0.05

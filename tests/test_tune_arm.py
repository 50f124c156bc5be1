"""Instruction counts on emulated boards: what is read from the counter here, the counts themselves in make test-arm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import UsageError
from edgekit.manifest import GoldenTensor
from edgekit.target import Target
from edgekit.toolchain import arm_count
from tests.cli_runs import cli, refusal
from tests.helpers import ROOT
from tests.plan_bundles import WIDTH, Step, altered, network, write

emulated = pytest.mark.skipif(
    "EDGEKIT_ARM_COUNT" not in os.environ, reason="needs the emulator: make test-arm runs it"
)


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float network with int8 operands of its product: DequantizeLinear around both."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    w = numpy_helper.to_array(graph.initializer[0])
    scale = float(np.abs(w).max()) / 127
    (x,) = graph.input
    graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.clip(np.round(w / scale), -127, 127).astype(np.int8), "w")
    )
    scalars = {"sw": scale, "sx": 4 / 127, "sy": 6 / 127}
    graph.initializer.extend(numpy_helper.from_array(np.float32(v), n) for n, v in scalars.items())
    graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    steps = [
        helper.make_node("QuantizeLinear", [x.name, "sx", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["raw"]),
        helper.make_node("QuantizeLinear", ["raw", "sy", "zero"], ["pq"]),
        helper.make_node("DequantizeLinear", ["pq", "sy", "zero"], ["product"]),
    ]
    rest = [node for node in graph.node if node.op_type != "MatMul"]
    del graph.node[:]
    graph.node.extend([*steps, *rest])
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    return copy


def bundle(path: Path) -> Path:
    good = network("x", "y")
    variants = {"float32": good, "int8": quantized(good), "wrong": altered(good, lambda w: w[::-1])}
    return write(path, [Step("net", variants)], golden=GoldenTensor("", "", atol=0.1))


def mark(tag: int, **counts: int) -> str:
    return json.dumps({"what": "mark", "tag": tag, **{k: counts.get(k, 0) for k in arm_count.CLASSES}})


def test_the_last_marked_run_counts() -> None:
    lines = [mark(0, all=7), mark(1, all=600, dot=13), mark(2, all=701, dot=23)]
    lines.append(json.dumps({"what": "exit", "tag": 0, **dict.fromkeys(arm_count.CLASSES, 999)}))
    found = arm_count.last_run("\n".join(lines))
    assert found == {**dict.fromkeys(arm_count.CLASSES, 0), "all": 101, "dot": 10}


def test_without_an_emulator_the_next_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_ARM_DIR", str(tmp_path / "arm"))
    path = bundle(tmp_path / "b.edge")
    refusal(cli("tune", path, "--board", "rpi5"), 2, "Run tools/arm/setup.sh")


def test_boards_are_found_by_their_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    sys.path.insert(0, str(ROOT / "tools" / "arm"))
    try:
        import devices
    finally:
        sys.path.pop(0)
    devices.write(tmp_path / "devices")
    (tmp_path / "armpython").touch()
    known = arm_count.boards(tmp_path)
    assert {"rpi4": "pi4", "rpi5": "pi5", "pi4": "pi4", "orin": "orin"}.items() <= known.items()
    assert known["jetson-orin"] == "orin" and "host" not in known
    monkeypatch.setenv("EDGEKIT_ARM_DIR", str(tmp_path))
    path = bundle(tmp_path / "b.edge")
    with pytest.raises(UsageError, match=r"board 'rpi6': cannot be emulated. Did you mean 'rpi5'"):
        arm_count.count(path, "rpi6")
    with pytest.raises(UsageError, match=r"variant 'int9'.* Did you mean 'int8'\?"):
        arm_count.count(path, "rpi5", ("int9",))


def test_a_process_that_dies_is_a_problem_of_its_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator(tmp_path, "echo 'Illegal instruction' >&2\nexit 132")
    monkeypatch.setenv("EDGEKIT_ARM_DIR", str(tmp_path))
    found = arm_count.count(bundle(tmp_path / "b.edge"), "pi5")
    assert {name: row["instructions"] for name, row in found["variants"].items()} == dict.fromkeys(
        ("float32", "int8", "wrong")
    )
    assert "ended with 132: Illegal instruction" in found["variants"]["int8"]["problem"]


def emulator(folder: Path, script: str) -> None:
    """A folder that looks like the emulator of a Pi 5, whose `armpython` is `script`."""
    (folder / "devices" / "pi5" / "proc").mkdir(parents=True)
    (folder / "devices" / "pi5" / "qemu-cpu").touch()
    cpuinfo = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
    (folder / "devices" / "pi5" / "proc" / "cpuinfo").write_text(cpuinfo)
    (folder / "armpython").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "armpython").chmod(0o755)


COUNTING = "\n".join(
    [f"echo '{mark(i, all=i * 1234567, dot=i * 999)}' >> $ARM_COUNT" for i in range(3)]
    + ["echo '{\"libraries\": {}}'"]
)


def test_a_build_records_counts_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, precisions = Target.load("rpi5"), {"float32": "float32", "int8": "int8"}
    written: list[Path] = []

    def write_into(folder: Path) -> Path:
        written.append(bundle(folder / "b.edge"))
        return written[-1]

    monkeypatch.setenv("EDGEKIT_ARM_DIR", str(tmp_path))
    absent = arm_count.record(target, 10**6, precisions, write_into)
    assert all("edgekit tune BUNDLE --board rpi5" in row["not_measured"] for row in absent.values())
    emulator(tmp_path, COUNTING)
    found = arm_count.record(target, 10**6, precisions, write_into)
    counts = {**dict.fromkeys(arm_count.CLASSES, 0), "all": 1230000, "dot": 999}
    row = {"board": "pi5", "counts": counts, "note": arm_count.WHAT}
    assert found == {"float32": row, "int8": row}
    assert len(written) == 1 and not written[0].exists()
    # floats of a network this large would take minutes, its integers would not
    found = arm_count.record(target, 3 * 10**9, precisions, write_into)
    assert "3000 M MACs in float32" in found["float32"]["not_measured"] and "counts" in found["int8"]
    emulator(tmp_path / "broken", "echo gone >&2; exit 1")
    monkeypatch.setenv("EDGEKIT_ARM_DIR", str(tmp_path / "broken"))
    found = arm_count.record(target, 10**6, {"int8": "int8"}, write_into)
    assert "gone" in found["int8"]["not_measured"]
    assert arm_count.record(Target.load("jetson-orin"), 10**6, precisions, write_into) == {}


@pytest.mark.parametrize(("number", "want"), [(0, 0), (7, 7), (999, 999), (1234, 1230), (90896939, 90900000)])
def test_counts_are_recorded_to_three_digits(number: int, want: int) -> None:
    assert arm_count.rounded(number) == want


@emulated
@pytest.mark.arm
def test_dot_products_on_a_pi_5_and_none_on_a_pi_4(tmp_path: Path) -> None:
    path = bundle(tmp_path / "b.edge")
    new, old = arm_count.count(path, "rpi5"), arm_count.count(path, "rpi4", ("int8",))
    assert (new["board"], old["board"]) == ("pi5", "pi4")
    for found in (new, old):
        for name in found["variants"].keys() - {"wrong"}:
            row = found["variants"][name]
            assert row["problem"] == "", row
            assert row["instructions"]["all"] > row["instructions"]["simd"] > 0
        assert found["libraries"]["onnxruntime"]
    assert "golden" in new["variants"]["wrong"]["problem"]
    assert new["variants"]["float32"]["instructions"]["dot"] == 0
    # each does 16 products of 8 bits
    assert new["variants"]["int8"]["instructions"]["dot"] >= WIDTH * WIDTH // 16
    assert old["variants"]["int8"]["instructions"]["dot"] == 0
    again = arm_count.count(path, "pi5", ("int8",))["variants"]["int8"]["instructions"]
    first = new["variants"]["int8"]["instructions"]
    assert again["dot"] == first["dot"]
    assert again["simd"] == pytest.approx(first["simd"], rel=0.01)


def test_the_verb_prints_the_counts_and_what_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"instructions": dict.fromkeys(arm_count.CLASSES, 1250000), "problem": ""}
    none = {"instructions": None, "repeat": None, "problem": "library is missing"}
    result = {"bundle": "b.edge", "board": "pi5", "variants": {"int8": row, "odd": none}}
    monkeypatch.setattr(arm_count, "count", lambda path, board: result)
    ran = cli("tune", tmp_path / "b.edge", "--board", "rpi5")
    assert ran.code == 0 and "A proxy" in ran.out and "1.250" in ran.out and "library is missing" in ran.out
    assert json.loads(cli("tune", tmp_path / "b.edge", "--board", "rpi5", "--json").out) == result

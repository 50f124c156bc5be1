"""`edgekit inspect`: the JSON contract, the page for people, extraction."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from edgekit.bundle import Bundle
from edgekit.cli import inspect
from edgekit.errors import BundleError
from edgekit.signing import generate_keys
from tests.bundle_samples import EVIDENCE, sample, write_sample


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.main(parser.parse_args(words))


def test_json_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sample(tmp_path / "x.edge")
    assert run(str(path), "--json") == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["schema_version"], got["model"], got["task"], got["target"]) == (
        1,
        "tiny",
        "classify",
        "rpi5",
    )
    assert got["payload_digest"].startswith("sha256:")
    assert got["inputs"] == [
        {"name": "images", "dtype": "float32", "shape": [1, 3, 4, 6], "layout": "NCHW", "elements": 72}
    ]
    assert got["outputs"][0]["quant"]["scale"] == [0.5, 0.25]
    assert {k: got["states"][0][k] for k in ("name", "shape", "dtype", "elements")} == {
        "name": "mem",
        "shape": [1, 2, 3],
        "dtype": "float32",
        "elements": 6,
    }
    assert [
        (p["name"], p["backend"], p["precision"], p["format"], p["path"], p["bytes"]) for p in got["payloads"]
    ] == [
        ("backbone/fp32", "onnxruntime", "float32", "onnx", "segments/backbone/fp32.onnx", 3000),
        ("backbone/int8", "onnxruntime", "int8", "onnx", "segments/backbone/int8.onnx", 1000),
        ("head/fp16", "tensorrt", "float16", "onnx", "segments/head/fp16.onnx", 100),
    ]
    assert all(p["digest"].startswith("sha256:") for p in got["payloads"])
    assert got["evidence"] == EVIDENCE
    assert got["labels"] == ["cat", "dög"]
    assert got["signature"] is None
    assert [s["kind"] for s in got["plan"]] == ["segment", "kernel", "segment"]


def test_extract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sample(tmp_path / "x.edge", directory=True)
    assert run(str(path), "--extract", str(tmp_path / "out"), "--json") == 0
    captured = capsys.readouterr()
    for payload in json.loads(captured.out)["payloads"]:
        assert (tmp_path / "out" / payload["path"]).read_bytes() == sample()[1][payload["path"]]
    assert captured.err.count("wrote ") == 3


def test_page_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, _ = generate_keys(tmp_path)
    path = write_sample(tmp_path / "x.edge", sign_key=key)
    assert run(str(path)) == 0
    page = capsys.readouterr().out
    for text in (
        "x.edge: tiny (classify) for rpi5, ",
        "images  float32  1x3x4x6  NCHW",
        "scores  int8  1x2    quantized: 2 scales",
        "mem  float32  1x2x3  6 elements",
        "2. pool      kernel mean_pool       raw -> features",
        "segments/backbone/fp32.onnx  onnxruntime  float32",
        "2  cat, dög",
        "metric.AP50    0.8125",
        "claims key ed25519:",
    ):
        assert text in page
    assert max(map(len, page.splitlines())) < 160


def test_page_of_lists_and_unknowns() -> None:
    long = [
        "a sentence that is so long that two of them do not fit on one line",
        "another such sentence, as limits are",
    ]
    rows = inspect._flat({"short": ["a", 1, 0.5], "long": long, "none": None, "deep": {"list": [{"a": 1}]}})
    assert rows == [
        ("short", "a, 1, 0.5"),
        ("long", long[0]),
        ("", long[1]),
        ("none", "not known"),
        ("deep.list", "1 entries (--json shows them)"),
    ]
    assert len(inspect._flat({str(i): [i] for i in range(99)})) == 41


def test_page_shows_no_control_characters(tmp_path: Path) -> None:
    """Names and evidence may come from a stranger; a terminal must not obey them."""
    from edgekit.bundle import write_bundle

    manifest, files = sample()
    path = tmp_path / "x.edge"
    evil = "\x1b[2J\r\n\u202e"
    write_bundle(path, manifest, files, {evil: evil, "list": [evil]})
    out = io.StringIO()
    with Bundle.open(path) as bundle:
        inspect.print_human(bundle, out)
        json.loads(json.dumps(inspect.describe(bundle)))
    assert all(line.isprintable() for line in out.getvalue().splitlines())
    assert "\\x1b[2J" in out.getvalue()


def test_damage_is_an_error(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "x.edge")
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError):
        run(str(path), "--json")

"""The command line as outside programs rely on it (docs/cli.md): exit codes, JSON on stdout, files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from edgekit.cli.main import VERBS
from edgekit.signing import generate_keys
from tests import detectors
from tests.cli_runs import cli, environment, refusal

STREET = "synthetic://street?seed=5&frames=3"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with five classes, their names, pictures and labels."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)  # of some random networks float16 loses half the boxes
    detectors.export(detectors.randomize(detectors.YoloX(True)), folder / "net.onnx")
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(folder / "pictures" / f"p{i}.png"), rng.integers(0, 255, (120, 160, 3), np.uint8))
    tree = {
        "images": [{"id": i, "file_name": f"p{i}.png", "width": 160, "height": 120} for i in range(3)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
            for i in range(3)
        ],
        "categories": [{"id": 1, "name": "ant"}],
    }
    (folder / "instances.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def built(work: Path) -> dict[str, Any]:
    """What `build --json` said about the small network for two boards, signed."""
    key, _ = generate_keys(work)
    words = ["build", work / "net.onnx", "--target", "host,rpi5", "--classes", work / "names.txt"]
    ran = cli(*words, "--head", "yolox", "--out", work / "dist", "--sign", key, "--json")
    assert ran.code == 0, ran.err
    return {"err": ran.err, **json.loads(ran.out)}


# --- build ---------------------------------------------------------------------------------------


def test_build_json_is_one_object_and_progress_goes_to_stderr(work: Path, built: dict[str, Any]) -> None:
    assert [row["target"] for row in built["bundles"]] == ["host", "rpi5"]
    for row in built["bundles"]:
        assert set(row) >= {"path", "target", "model", "payload_digest", "bytes"}
        path = Path(row["path"])
        assert path == work / "dist" / f"net.{row['target']}.edge"
        assert path.stat().st_size == row["bytes"]
        assert row["model"] == "net"
        assert row["payload_digest"].startswith("sha256:")
    assert "prove" in built["err"]
    assert {p.name for p in (work / "dist").iterdir()} == {"net.host.edge", "net.rpi5.edge"}


def test_build_twice_gives_the_same_payload_digests(
    work: Path, built: dict[str, Any], tmp_path: Path
) -> None:
    words = ["build", work / "net.onnx", "--target", "host", "--classes", work / "names.txt"]
    again = json.loads(cli(*words, "--out", tmp_path, "--json").out)["bundles"]
    assert again[0]["payload_digest"] == built["bundles"][0]["payload_digest"]


def test_build_for_people_names_each_bundle(work: Path, tmp_path: Path) -> None:
    ran = cli("build", work / "net.onnx", "--target", "host", "--out", tmp_path / "new" / "folder")
    assert ran.code == 0
    assert str(tmp_path / "new" / "folder" / "net.host.edge") in ran.out
    assert "accuracy not measured" in ran.out


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("host", "auto", "float32"),
        ("host", "float32", "float32"),
        ("jetson-orin", "auto", "float16"),
        ("jetson-orin", "float16", "float16"),
        ("jetson-orin", "float32", "float32"),
    ],
)
def test_precision(work: Path, tmp_path: Path, target: str, precision: str, expected: str) -> None:
    words = ["build", work / "net.onnx", "--target", target, "--precision", precision, "--out", tmp_path]
    ran = cli(*words)
    assert ran.code == 0, ran
    shown = json.loads(cli("inspect", tmp_path / f"net.{target}.edge", "--json").out)
    assert [p["precision"] for p in shown["payloads"]] == [expected]


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--json",), ("--quantization", "minmax")])
def test_int8_without_calibration_is_refused_in_one_line_before_any_work(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    from edgekit.toolchain import build

    monkeypatch.setattr(build, "read", lambda *_: pytest.fail("worked first"))
    words = ["build", work / "net.onnx", "--target", "rpi5", "--precision", "int8", "--out", tmp_path / "o"]
    refusal(
        cli(*words, *more), 2, "model net: int8 needs pictures to calibrate on, got none", "--calibration"
    )
    assert list(tmp_path.iterdir()) == []


def test_build_measures_accuracy_on_given_labels(work: Path, tmp_path: Path) -> None:
    labels = ["--data", work / "instances.json", "--images", work / "pictures", "--limit", 2]
    words = ["build", work / "net.onnx", "--target", "host", "--classes", work / "names.txt", *labels]
    assert cli(*words, "--out", tmp_path).code == 0
    shown = json.loads(cli("inspect", tmp_path / "net.host.edge", "--json").out)
    assert shown["evidence"]["metric"]["images"] == 2
    ran = cli("verify", tmp_path / "net.host.edge", *labels, "--json")
    said = json.loads(ran.out)
    assert said["images"] == 2
    assert {"AP", "AP50"} <= set(said["metric"])
    assert said["reference"]["AP"] == pytest.approx(said["metric"]["AP"], abs=1e-9)


def test_calibration_folder_and_set_are_taken(work: Path, tmp_path: Path) -> None:
    for given in (work / "pictures", "street"):
        words = ["build", work / "net.onnx", "--target", "host", "--calibration", given, "--dry-run"]
        assert cli(*words, "--out", tmp_path).code == 0


def test_dry_run_prints_the_plan_and_writes_nothing(work: Path, tmp_path: Path) -> None:
    words = ["build", work / "net.onnx", "--target", "host,jetson-orin", "--out", tmp_path / "o", "--dry-run"]
    ran = cli(*words, "--json")
    plan = json.loads(ran.out)["plan"]
    assert [(p["target"], p["backend"], p["backends"], p["precision"]) for p in plan] == [
        ("host", "onnxruntime", ["onnxruntime"], "float32"),
        ("jetson-orin", "tensorrt", ["tensorrt"], "float16"),
    ]
    words[words.index("host,jetson-orin")] = "rpi5,jetson-orin"
    given = ["--precision", "int8", "--calibration", work / "pictures", "--json"]
    plan = json.loads(cli(*words, *given).out)["plan"]
    assert [(p["backends"], p["precision"]) for p in plan] == [
        (["onnxruntime", "litert", "native"], "int8"),
        (["tensorrt"], "int8"),
    ]
    words[words.index("rpi5,jetson-orin")] = "host,jetson-orin"
    people = cli(*words)
    assert people.code == ran.code == 0
    assert "net.jetson-orin.edge: tensorrt, float16" in people.out
    assert not (tmp_path / "o").exists()


def test_default_app_and_app_folder_and_project_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import ROOT

    monkeypatch.chdir(tmp_path)  # no edgekit.toml here
    app = ROOT / "apps" / "detect"
    plans = [
        json.loads(cli("build", *words, "--target", "jetson-orin", "--dry-run", "--json").out)["plan"]
        for words in ([], [app], [app / "edgekit.toml"])
    ]
    assert plans[0][0]["model"] == "yolo_lite"
    names = [[(p["model"], p["target"], Path(p["source"]).resolve()) for p in plan] for plan in plans]
    assert names[0] == names[1] == names[2]


def test_init_then_build(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes((work / "net.onnx").read_bytes())
    assert cli("init").code == 0
    refusal(cli("init"), 2, "exists already", "--force")
    ran = cli("build", "--target", "host", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["bundles"][0]["path"] == str(Path("dist") / "net.host.edge")


# --- inspect, verify -----------------------------------------------------------------------------


def test_inspect_json_has_the_promised_keys(app_bundles: dict[str, Path]) -> None:
    for target, path in app_bundles.items():
        shown = json.loads(cli("inspect", path, "--json").out)
        assert set(shown) >= {
            "schema_version", "model", "task", "target", "payload_digest", "inputs", "outputs", "states",
            "payloads", "evidence",
        }  # fmt: skip
        assert (shown["task"], shown["target"]) == ("detect", target)
        for payload in shown["payloads"]:
            assert set(payload) >= {"name", "backend", "precision", "format", "path", "bytes", "digest"}
        for tensor in (*shown["inputs"], *shown["outputs"]):
            assert {"name", "shape", "dtype"} <= set(tensor)
            assert tensor["elements"] == math.prod(tensor["shape"])
        assert shown["states"] == []
        assert isinstance(shown["evidence"], dict)


def test_inspect_extract_writes_the_payloads(app_bundles: dict[str, Path], tmp_path: Path) -> None:
    ran = cli("inspect", app_bundles["jetson-orin"], "--extract", tmp_path, "--json")
    for payload in json.loads(ran.out)["payloads"]:
        assert (tmp_path / payload["path"]).stat().st_size == payload["bytes"]


def test_inspect_for_people(app_bundles: dict[str, Path]) -> None:
    text = cli("inspect", app_bundles["rpi5"]).out
    for needle in ("yolo_lite", "rpi5", "payload digest", "Labels", "pedestrian"):
        assert needle in text


def test_verify_says_what_was_checked(app_bundles: dict[str, Path]) -> None:
    said = json.loads(cli("verify", app_bundles["host"], "--json").out)
    assert said["self_test"] == "passed"
    assert (said["metric"], said["images"], said["reference"]) == (None, 0, None)
    assert "all digests match" in cli("verify", app_bundles["host"]).out


def test_verify_of_another_boards_bundle_says_what_was_not_tested(
    app_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.host.backend_problem", lambda b: "no CUDA GPU was found")
    ran = cli("verify", app_bundles["jetson-orin"], "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["self_test"].startswith("not run: ")


def test_signature(work: Path, built: dict[str, Any], tmp_path: Path) -> None:
    bundle = built["bundles"][0]["path"]
    assert json.loads(cli("verify", bundle, "--key", work / "edgekit.pub.pem", "--json").out)[
        "signature"
    ] == ("valid")
    _, other = generate_keys(tmp_path)
    refusal(cli("verify", bundle, "--key", other), 2, "signed by another key")
    refusal(cli("verify", bundle, "--key", work / "edgekit.key.pem"), 2, "a private key")
    refusal(cli("verify", bundle, "--key", work / "names.txt"), 2, "not a usable public key")


def test_unsigned_bundle_does_not_pass_a_key(app_bundles: dict[str, Path], tmp_path: Path) -> None:
    _, public = generate_keys(tmp_path)
    refusal(cli("verify", app_bundles["host"], "--key", public), 2, "not signed")


# --- run, bench ----------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_writes_every_kind_of_sink(app_bundles: dict[str, Path], tmp_path: Path) -> None:
    sinks = [tmp_path / "a.jsonl", tmp_path / "a.png", tmp_path / "a.mp4", f"{tmp_path}/shown/"]
    words = [word for sink in sinks for word in ("--sink", sink)]
    ran = cli("run", app_bundles["host"], "--source", STREET, *words, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    rows = lines(tmp_path / "a.jsonl")
    assert said["frames"] == len(rows) == 3
    assert said["boxes"] == sum(len(row["boxes"]) for row in rows) > 0
    for i, row in enumerate(rows):
        assert set(row) >= {"source", "seq", "pts_ns", "age_ms", "boxes", "scores", "classes", "labels"}
        assert (row["source"], row["seq"], row["pts_ns"]) == (STREET, i, round(i * 1e9 / 30))
        assert row["age_ms"] > 0
        count = len(row["boxes"])
        assert [len(row[k]) for k in ("scores", "classes", "labels")] == [count] * 3
        for x1, y1, x2, y2 in row["boxes"]:
            assert 0 <= x1 <= x2 <= 640
            assert 0 <= y1 <= y2 <= 360
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.jsonl", "a_000001.png", "a_000002.png", "a_000003.png", "a.mp4", "shown",
    }  # fmt: skip
    assert len(list((tmp_path / "shown").iterdir())) == 3
    # and a video is a source like any other
    ran = cli("run", app_bundles["host"], "--source", tmp_path / "a.mp4", "--sink", tmp_path / "b.jsonl")
    assert ran.code == 0, ran.err
    assert [row["seq"] for row in lines(tmp_path / "b.jsonl")] == [0, 1, 2]


def test_run_takes_pictures_and_folders(app_bundles: dict[str, Path], work: Path, tmp_path: Path) -> None:
    for source, count in ((work / "pictures" / "p1.png", 1), (work / "pictures", 3)):
        ran = cli("run", app_bundles["host"], "--source", source, "--sink", tmp_path / "x.jsonl", "--json")
        assert json.loads(ran.out)["frames"] == count
        names = [row["source"] for row in lines(tmp_path / "x.jsonl")]
        assert len(set(names)) == count
        assert all(Path(n).is_file() for n in names)


def test_run_limit_and_score(app_bundles: dict[str, Path]) -> None:
    def said(*words: object) -> dict[str, Any]:
        ran = cli("run", app_bundles["host"], "--source", STREET, *words, "--json")
        found: dict[str, Any] = json.loads(ran.out)
        return found

    assert said("--limit", 1)["frames"] == 1
    assert said("--score", 1)["boxes"] == 0 < said("--score", 0.1)["boxes"]


def test_bench_json(app_bundles: dict[str, Path]) -> None:
    words = ["--threads", 1, "--runs", 3, "--warmup", 1, "--json"]
    said = json.loads(cli("bench", app_bundles["host"], *words).out)
    for stage in ("preprocess", "engine", "decode", "total"):
        row = said["stages"][stage]
        assert row["runs"] == 3
        assert 0 < row["median_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert said["peak_rss_bytes"] > 1 << 20
    assert said["copies"]["bytes_per_frame"] == 0
    assert said["machine"]["threads"] == 1


def test_bench_two_bundles_and_for_people(app_bundles: dict[str, Path]) -> None:
    words = ["bench", app_bundles["host"], "--vs", app_bundles["rpi5"], "--runs", 2, "--warmup", 0]
    ran = cli(*words, "--json")
    assert json.loads(ran.out)["vs"][0]["target"] == "rpi5"
    assert "warning" in ran.err
    text = cli(*words).out
    assert "median" in text
    assert " x the time of " in text


# --- another board's bundle ----------------------------------------------------------------------


def test_an_arm_bundle_runs_here_with_a_warning(app_bundles: dict[str, Path]) -> None:
    ran = cli("run", app_bundles["rpi5"], "--source", STREET, "--limit", 1, "--json")
    assert ran.code == 0
    (line,) = ran.err.splitlines()
    assert line.startswith("edgekit: warning: bundle ")
    assert "not that board" in line
    json.loads(ran.out)


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_a_jetson_bundle_does_not_run_here(
    app_bundles: dict[str, Path], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.host.backend_problem", lambda b: "no CUDA GPU was found")
    words = ["--source", STREET, *(["--sink", tmp_path / "a.jsonl"] if verb == "run" else [])]
    refusal(cli(verb, app_bundles["jetson-orin"], *words), 2, "cannot run on this machine", "no CUDA GPU")
    assert not list(tmp_path.iterdir())


# --- the rest ------------------------------------------------------------------------------------


def test_report(app_bundles: dict[str, Path], tmp_path: Path) -> None:
    assert cli("report", app_bundles["host"], "--out", tmp_path / "r.html").code == 0
    assert "yolo_lite" in (tmp_path / "r.html").read_text(encoding="utf-8")
    both = [app_bundles["host"], app_bundles["rpi5"]]
    assert cli("report", *both, "--out", tmp_path / "both.html").code == 0


def test_targets() -> None:
    names = {t["name"] for t in json.loads(cli("targets", "--json").out)["targets"]}
    assert names >= {
        "jetson-orin", "jetson-orin-nx-16", "jetson-orin-nano-8", "jetson-xavier-nx", "jetson-thor", "rpi4", "rpi5",
        "android-arm64", "android-arm64-i8mm", "host",
    }  # fmt: skip
    assert "Orin" in cli("targets", "jetson-orin").out
    assert json.loads(cli("targets", "rpi5", "--json").out)["name"] == "rpi5"
    refusal(cli("targets", "rpi55"), 2, "did you mean 'rpi5'")


def test_doctor() -> None:
    ran = cli("doctor", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["can_build"]["ok"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = cli(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    for line in ran.out.splitlines():  # every option says what it is for
        assert not line.startswith("  --") or "  " in line.strip() or len(line.split()) <= 2


def test_help_and_version() -> None:
    for words in (["--help"], ["-h"], ["help"]):
        ran = cli(*words)
        assert ran.code == 0
        assert all(verb in ran.out for verb in VERBS)
    assert cli("--version").out.startswith("edgekit ")
    bare = cli()
    assert (bare.code, bare.out) == (2, "")


def test_it_is_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "edgekit", "targets"], capture_output=True, env=environment(), check=False
    )
    assert ran.returncode == 0
    assert b"rpi5" in ran.stdout


def test_assumptions_about_the_network_are_said(tmp_path: Path) -> None:
    """A raw YOLOv5 export holds no anchors: the build says that the standard ones were taken."""
    net = detectors.randomize(detectors.VARIANTS["yolov5", "raw"]())
    path = detectors.export(net, tmp_path / "raw.onnx")
    ran = cli("build", path, "--target", "host", "--out", tmp_path / "out")
    assert ran.code == 0
    assert any(line.startswith("edgekit: note: ") and "anchors" in line for line in ran.err.splitlines())

"""`edgekit rig`: what it shows and finds, pictures, and one line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import json

import cv2
import pytest

from edgekit.rig import Rig
from edgekit.rig_check import oddities
from edgekit.synth.street_rig import RigWorld, street_rig
from tests.cli_runs import cli, refusal
from tests.helpers import shared_data

STREET = "synthetic://street-rig?seed=7&frames=3"


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "rig.toml"
    street_rig(None).write(path)
    return path


def changed(rig, name, **facts):
    cameras = dict(rig.cameras)
    cameras[name] = dataclasses.replace(cameras[name], **facts)
    return dataclasses.replace(rig, cameras=cameras)


def test_show_says_where_cameras_look(toml):
    ran = cli("rig", "show", toml)
    assert ran.code == 0
    assert ran.err == ""
    lines = {line.split()[0]: line for line in ran.out.splitlines() if line}
    assert "ahead" in lines["CAM_FRONT"]
    assert "left" in lines["CAM_FRONT_LEFT"]
    assert "right" in lines["CAM_BACK_RIGHT"]
    assert "90.0 right" in lines["lidar"]  # it looks along its y, so x points to the right
    facts = json.loads(cli("rig", "show", toml, "--json").out)
    assert facts["digest"] == Rig.read(toml).digest()
    assert facts["sensors"]["CAM_FRONT"]["sees_degrees"] == pytest.approx([64.6, 39.1], abs=0.2)
    assert facts["sensors"]["CAM_FRONT_LEFT"]["looks_left_degrees"] == pytest.approx(55, abs=1)
    assert "frame" not in facts


def test_show_draws_the_sanity_picture(tmp_path):
    out = tmp_path / "new" / "rig.png"
    ran = cli("rig", "show", STREET, "--frame", 2, "--out", out, "--width", 128)
    assert ran.code == 0
    assert f"wrote {out}" in ran.err
    assert "labelled boxes" in ran.out
    picture = cv2.imread(str(out))
    assert picture.shape == (144, 3 * 128 + 144, 3)
    bare = tmp_path / "bare.png"
    assert cli("rig", "show", STREET, "--frame", 2, "--out", bare, "--width", 128, "--bare").code == 0
    assert (cv2.imread(str(bare)) != picture).any()


def test_check_of_a_right_rig_is_quiet():
    ran = cli("rig", "check", "synthetic://street-rig?seed=7&frames=60", "--frames", 12)
    assert ran.code == 0, ran
    assert "12 frames" in ran.out
    found = json.loads(cli("rig", "check", STREET, "--json").out)
    assert found["frames"] == 3
    assert found["warnings"] == []
    assert found["fit"]["on_points"] > found["turned_fit"]["on_points"]
    boxes = json.loads(cli("rig", "check", STREET, "--json", "--boxes").out)["boxes"]
    assert boxes[0]["camera"] == "CAM_FRONT_LEFT"
    assert len(boxes) > 20
    assert "ON LABEL" in cli("rig", "check", STREET, "--boxes").out


def test_a_recording_is_looked_at_too(tmp_path):
    pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")
    from edgekit.runtime.sinks.mcap import McapSink
    from tests.rig_items import rig_items

    with McapSink(tmp_path / "a.mcap") as sink:
        for item in rig_items():
            sink.write(item)
    facts = json.loads(cli("rig", "show", tmp_path / "a.mcap", "--frame", 2, "--json").out)
    assert facts["frame"]["missing"] == ["CAM_FRONT"]
    assert facts["frame"]["points"] is None
    found = cli("rig", "check", tmp_path / "a.mcap")
    assert found.code == 0
    assert "3 frames" in found.out


def test_check_of_the_real_frames():
    ran = cli("rig", "check", shared_data() / "nuscenes_sample/frame.json")
    assert ran.code == 0, ran
    assert "turned 2" in ran.out
    assert cli("rig", "check", shared_data() / "kitti_mini/training/calib/000001.txt").code == 0


def test_check_of_a_wrong_calibration_fails(tmp_path):
    """nuScenes with one camera's calibration in the place of another's."""
    source = shared_data() / "nuscenes_sample"
    content = json.loads((source / "frame.json").read_text())
    images = content["data_list"][0]["images"]
    front, back = images["CAM_FRONT"], images["CAM_BACK"]
    for key in ("cam2img", "lidar2cam", "cam2ego"):
        front[key], back[key] = back[key], front[key]
    for name in ("cam_instances",):
        content["data_list"][0][name] = {"CAM_FRONT": content["data_list"][0][name]["CAM_BACK"]}
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "frame.json").unlink()
    images["CAM_LEFT_TWIN"] = images["CAM_FRONT_LEFT"]
    (tmp_path / "frame.json").write_text(json.dumps(content))
    ran = cli("rig", "check", tmp_path / "frame.json")
    assert ran.code == 1
    assert "same mounting" in ran.out


def test_check_of_a_file_looks_at_the_mounting(toml, tmp_path):
    assert cli("rig", "check", toml).code == 0
    odd = tmp_path / "odd.toml"
    changed(street_rig(None), "CAM_BACK", cx=9000.0).write(odd)
    ran = cli("rig", "check", odd)
    assert ran.code == 1
    assert "outside of its 256x144 picture" in ran.out
    assert json.loads(cli("rig", "check", odd, "--json").out)["warnings"]
    shown = cli("rig", "show", odd)
    assert shown.code == 0
    assert "warning" in shown.err


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"cx": -5.0}, "outside"),
        ({"fx": 5.0, "fy": 5.0}, "degrees across"),
        ({"fx": 9000.0, "fy": 9000.0}, "degrees across"),
        ({"fx": 300.0}, "differ much"),
        ({"position": (1700.0, 0.0, 1510.0)}, "metres"),
        ({"rotation": (1.0, 0.0, 0.0, 0.0)}, "LiDAR points"),  # looks up
    ],
)
def test_what_hardly_any_rig_has(facts, words):
    frame = RigWorld(3).frame(0)
    assert oddities(frame.rig, frame) == []
    rig = changed(frame.rig, "CAM_FRONT", **facts)
    found = oddities(rig, dataclasses.replace(frame, rig=rig, shots={}))
    assert any(words in line and "CAM_FRONT" in line for line in found), found


def test_a_lidar_that_lies_on_its_side_is_told():
    rig = street_rig(None)
    lying = dataclasses.replace(
        rig, lidar=dataclasses.replace(rig.lidar, rotation=(0.7071068, 0.7071068, 0, 0))
    )
    assert "away from up" in oddities(lying)[0]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["rig"], "required"),
        (["rig", "shwo", "x.toml"], "did you mean"),
        (["rig", "show", "missing.toml"], "missing.toml"),
        (["rig", "show", "missing.json"], "check the path"),
        (["rig", "show", "picture.png"], "not a recorded rig"),
        (["rig", "show", "synthetic://street?frames=1"], "no rig"),
        (["rig", "show", STREET, "--frame", "9"], "no frame 9"),
        (["rig", "show", STREET, "--frames", "9"], "means nothing"),
        (["rig", "check", STREET, "--out", "x.png"], "means nothing"),
        (["rig", "show", STREET, "--out", "x.tif8"], "expected a picture"),
        (["rig", "check", STREET, "--frames", "0"], "whole number"),
    ],
)
def test_refusals(words, needle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(cli(*words), 2, needle)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_a_file_without_pictures_is_refused(toml, tmp_path):
    refusal(cli("rig", "show", toml, "--out", tmp_path / "x.png"), 2, "no pictures")


# --- tables ---


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from tests import fusion_plans

    return fusion_plans.write(tmp_path_factory.mktemp("rig") / "tiny.host.edge", tolerance=1e-3)


def test_tables_are_built_ahead_and_used(bundle, toml, tmp_path, monkeypatch):
    import edgekit
    from edgekit.kernels.bev_pool import table
    from edgekit.runtime.sources import open_source

    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    source = "synthetic://street-rig?seed=3&size=64x64&frames=1"
    with open_source(source) as frames:
        rig = next(iter(frames)).rig.rig
    rig.write(toml)
    first = json.loads(cli("rig", "tables", toml, "--bundle", bundle, "--json").out)
    (made,) = first["tables"]
    assert not made["was_there"]
    assert made["kept"]
    assert 0 < made["points"] < made["of_points"]
    again = cli("rig", "tables", source, "--bundle", bundle)
    assert again.code == 0
    assert "was there" in again.out
    assert made["path"] in again.out

    def build(*args, **options):
        raise AssertionError("the table is there")

    monkeypatch.setattr(table, "build", build)
    with edgekit.load(bundle, threads=1, self_test=False) as engine, edgekit.stream(engine, source) as stream:
        assert len(list(stream)) == 1


def test_tables_of_another_rig_say_what_does_not_fit(bundle, tmp_path):
    rig = street_rig(None, 64, 64)
    cameras = {("OTHER" if name == "CAM_BACK" else name): camera for name, camera in rig.cameras.items()}
    dataclasses.replace(rig, cameras=cameras).write(tmp_path / "rig.toml")
    ran = cli("rig", "tables", tmp_path / "rig.toml", "--bundle", bundle, "--cache", tmp_path / "cache")
    assert ran.code == 0, ran
    assert "lacks CAM_BACK" in ran.err
    assert "not used by the network: OTHER" in ran.err
    assert len(list((tmp_path / "cache").rglob("*.table"))) == 1
    dataclasses.replace(rig, cameras={"a": rig.cameras["CAM_FRONT"]}).write(tmp_path / "rig.toml")
    refusal(cli("rig", "tables", tmp_path / "rig.toml", "--bundle", bundle), 2, "none of the cameras")
    refusal(cli("rig", "tables", tmp_path / "rig.toml"), 2, "--bundle")
    refusal(cli("rig", "tables", tmp_path / "rig.toml", "--bundle", tmp_path / "none.edge"), 2, "none.edge")


def test_tables_that_cannot_be_kept_fail(bundle, toml, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(RuntimeWarning, match="not kept"):
        ran = cli("rig", "tables", toml, "--bundle", bundle, "--cache", tmp_path / "cache")
    assert ran.code == 1
    assert "could not be kept" in ran.out

"""Bad input at the command line: one line, the right exit code, nothing half-written, no trace."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekit.signing import generate_keys
from tests import detectors
from tests.bundle_samples import files_of, forge, rebuild
from tests.cli_runs import cli, environment, process, refusal
from tests.helpers import ROOT

STREET = "synthetic://street?seed=5&frames=1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)  # of some random networks float16 loses half the boxes
    detectors.export(detectors.randomize(detectors.YoloX(True)), folder / "net.onnx")
    detectors.export(detectors.randomize(detectors.YoloX(False)), folder / "open.onnx", dynamic=(0, 2, 3))
    # its decoding holds the grid of the size it was exported with
    detectors.export(detectors.randomize(detectors.YoloX(True)), folder / "grid.onnx", dynamic=(0, 2, 3))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def build(model: object, out: Path, *words: object, target: str = "host") -> list[object]:
    return ["build", model, "--target", target, "--out", out, *words]


def refused(model: object, out: Path, *needles: str, code: int = 2, words: Sequence[object] = ()) -> None:
    """The build is refused with `needles`, in one line, and `out` was not even made."""
    refusal(cli(*build(model, out, *words)), code, *needles)
    assert not out.exists()


# --- model files ---------------------------------------------------------------------------------


def _truncated(net: bytes, path: Path) -> None:
    path.write_bytes(net[: len(net) // 2])


def _huge(net: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


BROKEN: dict[str, tuple[Callable[[bytes, Path], object], str]] = {
    "missing": (lambda net, path: None, "no such file"),
    "empty": (lambda net, path: path.write_bytes(b""), "empty"),
    "truncated": (_truncated, "cut short"),
    "random": (lambda net, path: path.write_bytes(random.Random(1).randbytes(5000)), "not an ONNX"),
    "text": (lambda net, path: path.write_text("hello\n" * 99), "not an ONNX"),
    "web page": (lambda net, path: path.write_text("<!DOCTYPE html><html>"), "web page"),
    "checkpoint": (lambda net, path: path.write_bytes(b"PK\x03\x04" + b"x" * 99), "torch"),
    "huge": (_huge, "too big"),
    "a folder": (lambda net, path: path.mkdir(), "is a folder"),
    "a pipe": (lambda net, path: os.mkfifo(path), "not a regular file"),
    "a device": (lambda net, path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a loop of links": (lambda net, path: path.symlink_to(path), "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_files(models: Path, tmp_path: Path, out: Path, name: str) -> None:
    make, needle = BROKEN[name]
    path = tmp_path / "model.onnx"
    make((models / "net.onnx").read_bytes(), path)
    refused(path, out, needle, str(path))


@pytest.mark.parametrize(
    ("name", "needle"), [("m.edge", "a bundle already"), ("m.pt", "torch.onnx.export"), ("m", "ONNX")]
)
def test_files_of_another_kind(models: Path, tmp_path: Path, out: Path, name: str, needle: str) -> None:
    (tmp_path / name).write_bytes((models / "net.onnx").read_bytes())
    refused(tmp_path / name, out, needle)


def edited(models: Path, path: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(models / "net.onnx")
    edit(model)
    onnx.save(model, path)
    return path


def test_open_shapes_are_refused_with_the_option_that_helps(models: Path, out: Path) -> None:
    line = refusal(cli(*build(models / "open.onnx", out)), 2, "--shape images=1x3x")
    option = line.partition("--shape ")[2].rstrip(".")
    assert cli(*build(models / "open.onnx", out, "--shape", option)).code == 0
    assert [p.name for p in out.iterdir()] == ["open.host.edge"]


def test_a_size_that_the_graph_does_not_allow(models: Path, out: Path) -> None:
    refused(
        models / "grid.onnx", out, "the size it was exported with", words=["--shape", "images=1x3x416x416"]
    )
    size = "x".join(map(str, detectors.SIZE))
    assert cli(*build(models / "grid.onnx", out, "--shape", f"images=1x3x{size}")).code == 0


@pytest.mark.parametrize(
    ("given", "needle"),
    [
        ("images", "INPUT="),
        ("images=", "INPUT="),
        ("images=1x3xAx9", "INPUT="),
        ("images=1x3x0x9", "INPUT="),
        ("other=1x3x96x96", "no input 'other'"),
        ("images=1x3x96", "does not fit"),
        ("images=1x3x99999999x99999999", "elements"),
        ("images=1x3x" + "9" * 5000 + "x1", "INPUT="),
    ],
)
def test_unusable_shapes(models: Path, out: Path, given: str, needle: str) -> None:
    refused(models / "open.onnx", out, needle, words=["--shape", given])


def _custom(model: onnx.ModelProto) -> None:
    image = model.graph.input[0].name
    for i, (op, domain) in enumerate((("Magic", "acme"), ("Loop2", "acme"), ("If", ""))):
        model.graph.node.insert(i, helper.make_node(op, [image], [f"extra{i}"], f"extra{i}", domain=domain))
    model.opset_import.append(helper.make_opsetid("acme", 1))


def test_unsupported_operators_are_listed_at_once(models: Path, tmp_path: Path, out: Path) -> None:
    refused(edited(models, tmp_path / "m.onnx", _custom), out, "acme::Magic", "acme::Loop2", "If (1)")


def _for_cpu_only(model: onnx.ModelProto) -> None:
    """Operators between input and first node that ONNX Runtime runs and TensorRT has not."""
    graph = model.graph
    name = graph.input[0].name
    for node in graph.node:
        for i, used in enumerate(node.input):
            if used == name:
                node.input[i] = "mixed"
    nodes = [
        helper.make_node("Cast", [name], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("BitShift", ["bytes", "one"], ["shifted"], direction="LEFT"),
        helper.make_node("Cast", ["shifted"], ["shifted_f"], to=TensorProto.FLOAT),
        helper.make_node("Compress", [name, "all"], ["chosen"], axis=1),
        helper.make_node("Reshape", ["chosen", "whole"], ["chosen_whole"]),
        helper.make_node("Add", ["shifted_f", "chosen_whole"], ["mixed"]),
    ]
    for i, node in enumerate(nodes):
        graph.node.insert(i, node)
    graph.initializer.append(helper.make_tensor("one", TensorProto.UINT8, [1], [1]))
    graph.initializer.append(helper.make_tensor("all", TensorProto.BOOL, [3], [True] * 3))
    graph.initializer.append(helper.make_tensor("whole", TensorProto.INT64, [4], [1, 3, *detectors.SIZE]))


def test_operators_that_a_board_lacks_are_listed_at_once(models: Path, tmp_path: Path, out: Path) -> None:
    path = edited(models, tmp_path / "m.onnx", _for_cpu_only)
    for target in ("jetson-orin", "host,jetson-orin"):  # no board's bundle when one cannot be
        refusal(cli(*build(path, out, target=target)), 2, "BitShift", "Compress")
        assert not out.exists()
    assert cli(*build(path, out)).code == 0  # the host runs it


def test_nan_weights(models: Path, tmp_path: Path, out: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 4:
                values = numpy_helper.to_array(tensor).copy()
                values.flat[3] = np.nan
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                return

    refused(edited(models, tmp_path / "m.onnx", poison), out, "NaN", "1 of ")


@pytest.mark.parametrize(
    ("text", "needle"),
    [("a\nb\n", "5"), ("", "empty"), ("a\na\nb\nc\nd\n", "twice"), ("a\n\nb\nc\nd\n", "empty")],
)
def test_class_files(models: Path, tmp_path: Path, out: Path, text: str, needle: str) -> None:
    (tmp_path / "c.txt").write_text(text)
    refused(models / "net.onnx", out, needle, words=["--classes", tmp_path / "c.txt"])


def test_a_binary_or_missing_class_file(models: Path, tmp_path: Path, out: Path) -> None:
    refused(models / "net.onnx", out, "classes file", words=["--classes", models / "net.onnx"])
    refused(models / "net.onnx", out, "no such file", words=["--classes", tmp_path / "none.txt"])


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["buidl"], ["did you mean 'build'"]),
        (["\x1b[31mred"], ["unknown"]),
        (["build"], ["--target"]),
        (["build", "--target"], ["--target"]),
        (["build", "--target", ""], ["--target", "empty"]),
        (["build", "--target", "host,"], ["empty"]),
        (["build", "--target", " , "], ["empty"]),
        (["build", "--target", "host,rpi5,host"], ["host is given twice"]),
        (["build", "--target", "jetson-orni"], ["did you mean 'jetson-orin'"]),
        (["build", "--target", "host", "--precison", "int8"], ["did you mean '--precision'"]),
        (["build", "--targ", "host"], ["--targ"]),
        (["build", "--target", "host", "--precision", "float61"], ["did you mean 'float16'"]),
        (["build", "--target", "host", "--head", "yoloy"], ["did you mean 'yolo"]),
        (["build", "--target", "host", "--limit", "0"], ["--limit", "from 1"]),
        (["build", "--target", "host", "--limit", "1e3"], ["--limit", "whole number"]),
        (["build", "--target", "host", "--limit", "9" * 9999], ["--limit"]),
        (["build", "--target", "host", "--out", ""], ["--out", "empty"]),
        (["build", "--target", "host", "--calibration", "streets"], ["did you mean 'street'"]),
        (["build", "--target", "host", "--data", "x.json"], ["--images"]),
        (["build", "a.onnx", "b.onnx", "--target", "host"], ["b.onnx"]),
        (["run", "x.edge"], ["--source"]),
        (["run", "x.edge", "--source", STREET, "--threads", "-1"], ["--threads"]),
        (["run", "x.edge", "--source", STREET, "--threads", "99999"], ["--threads", "1024"]),
        (["run", "x.edge", "--source", STREET, "--score", "nan"], ["--score"]),
        (["run", "x.edge", "--source", STREET, "--score", "2"], ["--score"]),
        (["bench", "x.edge", "--runs", "0"], ["--runs"]),
        (["verify", "x.edge", "--limit", "-3"], ["--limit"]),
        (["verify", "x.edge", "--data", "x.json"], ["--images"]),
        (["targets", "rpi6"], ["did you mean 'rpi"]),
        (["inspect"], ["bundle"]),
    ],
)
def test_wrong_words(
    words: list[str], needles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(cli(*words), 2, *needles)
    assert line.isprintable()
    assert not list(tmp_path.iterdir())


def test_verbose_shows_the_trace_before_or_after_the_verb(tmp_path: Path) -> None:
    for words in (["-v", "targets", "rpi6"], ["targets", "rpi6", "-v"], ["targets", "--verbose", "rpi6"]):
        ran = cli(*words)
        assert ran.code == 2
        assert "Traceback" in ran.err
        assert ran.err.splitlines()[-1].startswith("edgekit: target 'rpi6'")


def test_an_unusable_key_is_refused_before_the_work(models: Path, tmp_path: Path, out: Path) -> None:
    _, public = generate_keys(tmp_path)
    for key, needle in ((tmp_path / "none.pem", "no such file"), (public, "a public key")):
        ran = cli(*build(models / "net.onnx", out, "--sign", key))
        refusal(ran, 2, needle)
        assert "prepare" not in ran.err
        assert not out.exists()


# --- where the result goes -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/edgekit-out", "/dev/full", "/dev/null/x"])
def test_impossible_out_is_refused_before_the_work(models: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    ran = cli(*build(models / "net.onnx", tmp_path / where))
    refusal(ran, 1, "cannot be written", where.removeprefix("file/"))
    assert "prepare" not in ran.err
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def _obey_permissions() -> None:
    """Before exec: even root then needs the write bit (drops CAP_DAC_OVERRIDE, prctl(2))."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_read_only_out(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "locked"
    out.mkdir(mode=0o500)
    ran = process(*build(models / "net.onnx", out), preexec_fn=_obey_permissions)
    refusal(ran, 1, "Permission denied", "locked")
    assert not list(out.iterdir())


def test_a_folder_in_the_bundles_place(models: Path, out: Path) -> None:
    (out / "net.host.edge").mkdir(parents=True)
    (out / "net.host.edge" / "mine").write_text("mine")
    refusal(cli(*build(models / "net.onnx", out)), 1, "a folder of that name")
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["mine"]


def test_a_full_disk_leaves_nothing_and_keeps_the_old_bundle(models: Path, out: Path) -> None:
    out.mkdir()
    (out / "net.host.edge").write_bytes(b"the bundle of yesterday")
    ran = process(
        *build(models / "net.onnx", out),
        python="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
    )
    refusal(ran, 1, "cannot be written", "too large")
    assert [p.name for p in out.iterdir()] == ["net.host.edge"]
    assert (out / "net.host.edge").read_bytes() == b"the bundle of yesterday"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk() -> None:
    for words in (["targets"], ["--help"], ["build", "--target", "host", "--dry-run", "--json"]):
        with open("/dev/full", "wb") as full:
            command = [sys.executable, "-m", "edgekit", *words]
            ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
        assert ran.returncode == 1
        assert ran.stderr.decode().splitlines() == [
            "edgekit: standard output: cannot be written: No space left on device"
        ]


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    for words in (["targets", "--json"], ["targets", "jetson-orin"], ["build", "--help"]):
        read, write = os.pipe()
        os.close(read)
        ran = subprocess.run(
            [sys.executable, "-m", "edgekit", *words],
            stdout=write,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
        os.close(write)
        assert ran.stderr == b""
        assert ran.returncode == 1


def test_closed_standard_streams(models: Path, out: Path) -> None:
    words = " ".join(map(str, build(models / "net.onnx", out, "--json")))
    command = f"{sys.executable} -m edgekit {words} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], env=environment(), check=False).returncode == 0
    assert cli("inspect", out / "net.host.edge").code == 0
    assert [p.name for p in out.iterdir()] == ["net.host.edge"]


@pytest.mark.parametrize(
    "name", ["a b", "a\nb", "[red] [bold", "ünï-日本", "-x", "%s {0}", "x" * 200], ids=ascii
)
def test_odd_paths(models: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "net.onnx").write_bytes((models / "net.onnx").read_bytes())
    ran = cli("build", folder / "net.onnx", "--target", "host", "--out", folder / "o", "--json")
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["bundles"]
    assert row["path"] == str(folder / "o" / "net.host.edge")
    sinks = ["--sink", folder / "a.jsonl", "--sink", folder / "a.png", "--sink", folder / "a.mp4"]
    ran = cli("run", row["path"], "--source", STREET, *sinks)
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == 5
    assert cli("inspect", row["path"]).code == 0
    line = refusal(cli("inspect", folder / "none.edge"), 2, "no such file")
    assert line.isprintable()


def test_paths_that_are_not_utf8(models: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    path = folder + b"/n\xff.onnx"
    with open(path, "wb") as file:
        file.write((models / "net.onnx").read_bytes())
    ran = process("build", path, "--target", "host", "--out", folder)
    assert ran.code == 0, ran
    assert len(ran.out.splitlines()) == 1
    for locale in ({"PYTHONUTF8": "1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        ran = process("build", path, "--target", "host", "--out", folder, "--json", env=locale)
        made = os.fsencode(json.loads(ran.out)["bundles"][0]["path"])
        assert os.path.isfile(made)
        refusal(process("inspect", folder + b"/none\xfe.edge", env=locale), 2, "no such file")
    ran = process("verify", made)
    assert (ran.code, ran.err) == (0, "")


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    python = f"import os; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    ran = process("build", "x.onnx", "--target", "host", python=python)
    refusal(ran, 2, "no such file")


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["read and prepare", "lower", "prove", "write"])
def test_an_interrupted_build_leaves_nothing(
    models: Path, tmp_path: Path, out: Path, number: signal.Signals, moment: str
) -> None:
    env = environment({"EDGEKIT_CACHE": str(tmp_path / "cache")})
    command = [sys.executable, "-m", "edgekit", *map(str, build(models / "net.onnx", out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as child:
        assert child.stderr is not None
        assert child.stdout is not None
        for raw in child.stderr:
            if moment.encode() in raw:
                break
        child.send_signal(number)
        err, printed = child.stderr.read().decode(), child.stdout.read()
    if child.returncode == 0:  # the signal came after the last step: then all of it is there
        assert moment == "write"
        assert [p.name for p in out.iterdir()] == ["net.host.edge"]
        return
    assert child.returncode == 130, err
    assert err.splitlines()[-1] == "edgekit: interrupted"
    assert "Traceback" not in err
    assert printed == b""
    left = [p.name for folder in (out, tmp_path / "cache") for p in folder.rglob("*") if p.is_file()]
    assert [name for name in left if name.endswith(".tmp") or name.startswith(".")] == []
    if "net.host.edge" in left:  # written whole before the signal was seen
        assert cli("inspect", out / "net.host.edge").code == 0


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.3, 0.6])
def test_an_interrupt_at_any_moment_is_no_trace(
    models: Path, out: Path, delay_s: float, tmp_path: Path
) -> None:
    """From the moment that the program has started: python's own start-up is not ours."""
    ready = tmp_path / "ready"
    code = f"from edgekit.cli.main import run; open({str(ready)!r}, 'w'); run()"
    command = [sys.executable, "-c", code, *map(str, build(models / "net.onnx", out))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as child:
        while not ready.exists():
            time.sleep(0.002)
        time.sleep(0.02 + delay_s)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
    assert child.returncode in (0, 130), err
    assert b"Traceback" not in err
    assert not list(out.rglob(".*")) if out.exists() else True


def test_an_interrupt_waits_for_an_import_and_survives_a_destructor(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    sum(range(9999))\n"
        "except KeyboardInterrupt:\n    os.abort()\n"
    )
    in_import = "import slow"
    in_destructor = (
        "class D:\n    def __del__(self):\n"
        "        import os, signal\n        os.kill(os.getpid(), signal.SIGINT); sum(range(9999))\n"
        "D()"
    )
    for work in (in_import, in_destructor):
        python = f"import edgekit.cli.main as m, time\nwork = {work!r}\n"
        python += "def dispatch(words):\n    exec(work, {}); [time.sleep(0.05) for _ in range(600)]\nm._dispatch = dispatch"
        ran = process("build", python=python, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
        assert refusal(ran, 130) == "edgekit: interrupted"
        assert ran.err.count("\n") == 1


def test_an_interrupted_run_keeps_whole_lines(app_bundles: dict[str, Path], tmp_path: Path) -> None:
    found, video = tmp_path / "a.jsonl", tmp_path / "a.mp4"
    words = ["run", app_bundles["host"], "--source", "synthetic://street?frames=100000"]
    words += ["--sink", found, "--sink", video]
    command = [sys.executable, "-m", "edgekit", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as child:
        while not found.exists() or found.read_bytes().count(b"\n") < 3:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        printed, err = child.communicate()
    assert child.returncode == 130, err
    assert err.decode().splitlines()[-1] == "edgekit: interrupted"
    assert printed == b""
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.mp4"]
    assert cv2.VideoCapture(str(video)).isOpened()


# --- bundles -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(models: Path) -> Path:
    ran = cli(*build(models / "net.onnx", models))
    assert ran.code == 0, ran.err
    return models / "net.host.edge"


def test_a_flipped_byte_anywhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    data = bundle.read_bytes()
    rng = random.Random(3)
    spots = {0, 3, len(data) - 1, len(data) - 30} | {rng.randrange(len(data)) for _ in range(36)}
    path = tmp_path / "flipped.edge"
    for verb in ("inspect", "verify", "run", "bench"):
        for spot in sorted(spots)[:: 1 if verb == "inspect" else 8]:
            path.write_bytes(data[:spot] + bytes([data[spot] ^ rng.randrange(1, 256)]) + data[spot + 1 :])
            words = ["--source", STREET] if verb == "run" else []
            refusal(cli(verb, path, *words), 2, "bundle")


def test_a_cut_empty_or_missing_bundle(bundle: Path, tmp_path: Path) -> None:
    data = bundle.read_bytes()
    path = tmp_path / "x.edge"
    refusal(cli("inspect", path), 2, "no such file")
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refusal(cli("run", path, "--source", STREET), 2, "bundle")
    path.write_bytes(data + b"x")
    refusal(cli("verify", path), 2, "bundle")
    refusal(cli("inspect", "/dev/zero"), 2, "not a regular file")
    refusal(cli("inspect", tmp_path), 2, "bundle")


def test_a_newer_schema(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.edge"
    path.write_bytes(forge(files_of(bundle), lambda tree: tree.update(schema_version=99)))
    refusal(cli("inspect", path), 2, "99", "upgrade edgekit")


def _zipped(files: dict[str, bytes], **options: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", options.get("method", zipfile.ZIP_STORED)) as file:
            for name, data in files.items():
                file.writestr(name, data)

    return write


def test_zip_tricks(bundle: Path, tmp_path: Path) -> None:
    files = files_of(bundle)
    link = zipfile.ZipInfo("segments/link")
    link.external_attr = 0o120777 << 16
    tricks: dict[str, Callable[[Path], None]] = {
        "bomb": _zipped({**files, "evidence/zeros": bytes(50 << 20)}, method=zipfile.ZIP_DEFLATED),
        "climb": _zipped({**files, "../climbed": b"x"}),
        "absolute": _zipped({**files, "/tmp/edgekit-absolute": b"x"}),
        "other tool": _zipped(files),
    }

    def twice(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("manifest.json", b"{}")

    def linked(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
            file.writestr(link, "/etc/passwd")

    tricks["twice"], tricks["link"] = twice, linked
    for name, write in tricks.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x.edge"
        write(path)
        refusal(cli("inspect", path, "--extract", tmp_path / name / "out"), 2, "bundle")
        assert [p.name for p in (tmp_path / name).iterdir()] == ["x.edge"]
    assert not (tmp_path / "climbed").exists()
    assert not Path("/tmp/edgekit-absolute").exists()


def test_a_payload_exchanged_by_one_who_knows_the_format(bundle: Path, tmp_path: Path) -> None:
    files = files_of(bundle)
    (name,) = [n for n in files if n.startswith("segments/")]
    path = tmp_path / "x.edge"
    path.write_bytes(rebuild({**files, name: files[name][:-1] + b"\0"}))
    refusal(cli("verify", path), 2, "bundle", name)


# --- sources, sinks, labels ----------------------------------------------------------------------


def test_unreadable_sources(bundle: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "bad.mp4").write_bytes(random.Random(1).randbytes(2000))
    (tmp_path / "none").mkdir()
    for source, needle in (
        (tmp_path / "bad.png", "bad.png"),
        (tmp_path / "empty.jpg", "empty.jpg"),
        (tmp_path / "bad.mp4", "bad.mp4"),
        (tmp_path / "none", "no picture"),
        (tmp_path / "missing.png", "no such file"),
        (models / "net.onnx", "net.onnx"),
        ("zmq://camera/1", "unknown scheme"),
        ("synthetic://stret", "did you mean 'street'"),
        ("synthetic://street?frames=0", "frames"),
        ("", "source"),
    ):
        sink = tmp_path / "none" / "a.jsonl"
        refusal(cli("run", bundle, "--source", source, "--sink", sink), 2, needle)
        assert not sink.exists()
        refusal(cli("bench", bundle, "--source", source), 2, needle)


def test_an_unreadable_picture_among_good_ones_is_told(bundle: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "b.png").write_bytes(b"no picture")
    ran = cli("run", bundle, "--source", tmp_path, "--json")
    assert ran.code == 0
    said = json.loads(ran.out)
    assert said["frames"] == 1
    assert [Path(path).name for path, _ in said["skipped"]] == ["b.png"]
    assert "b.png" in ran.err


def test_unusable_sinks(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for sink, code, needle in (
        ("a.xyz", 2, "cannot tell"),
        ("a", 2, "cannot tell"),
        ("file/a.jsonl", 1, "file"),
        ("/proc/edgekit.jsonl", 1, "/proc"),
        ("file/a.png", 1, "file"),
        ("file/a.mp4", 1, "file"),
    ):
        refusal(cli("run", bundle, "--source", STREET, "--sink", tmp_path / sink), code, needle)
    same = ["--sink", tmp_path / "a.jsonl"]
    refusal(cli("run", bundle, "--source", STREET, *same, *same), 2, "twice")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_under_a_sink(bundle: Path, tmp_path: Path) -> None:
    cv2.imwrite(
        str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 255, (400, 400, 3)).astype(np.uint8)
    )
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    for sink in ("out.png", "out.mp4"):
        words = ["run", bundle, "--source", tmp_path / "a.png", "--sink", tmp_path / sink]
        refusal(process(*words, python=limit), 1, sink)
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("", "not JSON"),
        ("[]", "COCO"),
        ("{}", "COCO"),
        ('{"images": [], "annotations": [], "categories": []}', "no pictures"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "COCO"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_labels_that_are_not_coco(
    bundle: Path, models: Path, tmp_path: Path, out: Path, text: str, needle: str
) -> None:
    (tmp_path / "labels.json").write_text(text)
    words = ["--data", tmp_path / "labels.json", "--images", tmp_path]
    refusal(cli("verify", bundle, *words), 2, "labels.json", needle)
    refused(models / "net.onnx", out, needle, words=words)


def test_labels_without_their_pictures(bundle: Path, models: Path, tmp_path: Path, out: Path) -> None:
    tree = {
        "images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}],
        "annotations": [],
        "categories": [{"id": i, "name": f"class_{i}"} for i in range(5)],
    }
    (tmp_path / "labels.json").write_text(json.dumps(tree))
    words = ["--data", tmp_path / "labels.json", "--images", tmp_path]
    refusal(cli("verify", bundle, *words), 2, "gone.png", "--images")
    refused(models / "net.onnx", out, "gone.png", words=words)
    words = ["--data", tmp_path / "labels.json", "--images", tmp_path / "nowhere"]
    refused(models / "net.onnx", out, "nowhere", words=words)
    (tmp_path / "gone.png").write_bytes(b"no picture")
    refusal(cli("verify", bundle, "--data", tmp_path / "labels.json", "--images", tmp_path), 2, "gone.png")


def test_projects_with_mistakes(models: Path, tmp_path: Path, out: Path) -> None:
    head = '[project]\nname = "p"\n[[model]]\nname = "m"\nsource = "net.onnx"\n'
    for text, needle in (
        ("", "project"),
        ("not toml", "TOML"),
        (head, "no such file"),
        (head + "sorce = 1\n", "sorce"),
        (head.replace('"m"', '"../m"'), "name"),
    ):
        (tmp_path / "edgekit.toml").write_text(text)
        refused(tmp_path, out, needle)
        refused(tmp_path / "edgekit.toml", out, needle)
    refused(models, out, "edgekit init")


def test_init_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refusal(cli("init", tmp_path / "file"), 2, "expected a folder")
    refusal(cli("init", tmp_path, "--model", tmp_path / "no.onnx"), 2, "no such file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_report_refusals(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refusal(cli("report", bundle, "--out", tmp_path / "file" / "r.html"), 1, "cannot be written")
    refusal(cli("report", bundle, "--out", bundle), 2, "is one of the bundles")
    refusal(cli("report", tmp_path / "file", "--out", tmp_path / "r.html"), 2, "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_out_of_memory_is_one_line(models: Path, out: Path) -> None:
    limit = "import numpy, onnx, onnxruntime, resource\n"
    limit += "resource.setrlimit(resource.RLIMIT_DATA, (140 << 20, 140 << 20))"
    ran = process(*build(models / "net.onnx", out), python=limit)
    assert ran.code in (0, 1, 2), ran
    assert "Traceback" not in ran.err
    assert not list(out.rglob(".*")) if out.exists() else True

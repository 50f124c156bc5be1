"""What manifests say of repeated steps, steps that may be skipped, and kernels' files: rules, digests, bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle, write_bundle
from edgekit.errors import BundleError
from edgekit.kernels import steps
from edgekit.kernels.bev_pool import BevGrid, Frustum
from edgekit.kernels.sparse_conv.encoder import EncoderSpec, Stage
from edgekit.kernels.voxelize import VoxelGrid
from edgekit.manifest import MAX_REPEAT, MAX_STEPS, KernelStep, Segment, kernel_path
from edgekit.schema import from_json, to_json
from tests.bundle_samples import files_of, forge, rebuild, write_sample
from tests.helpers import ROOT
from tests.kernel_bundles import CAMERAS, check_kernels, sample, write_kernels

NET, RASTER, POOL, ENCODER = range(4)
WEIGHTS = kernel_path("encoder", "weights")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(write_kernels(tmp_path_factory.mktemp("bundle") / "kernels.edge"))


def refusal(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_and_back(tmp_path: Path) -> None:
    path = write_kernels(tmp_path / "b.edge")
    with Bundle.open(path) as bundle:
        net, _, _, encoder = bundle.manifest.plan
        assert isinstance(net, Segment) and (net.repeat, net.when) == (CAMERAS, "cameras")
        assert isinstance(encoder, KernelStep) and encoder.files == {"weights": WEIGHTS}
        assert bytes(bundle.read(WEIGHTS)) == sample()[1][WEIGHTS]
        assert bundle.manifest.lanes == 1
        check_kernels(bundle, tmp_path / "cache")
        first = path.read_bytes(), bundle.payload_digest
    folder = write_kernels(tmp_path / "folder", directory=True)
    assert (folder / WEIGHTS).is_file()
    with Bundle.open(folder) as bundle:
        assert bundle.payload_digest == first[1]
        check_kernels(bundle, tmp_path / "cache")
    assert write_kernels(tmp_path / "again.edge").read_bytes() == first[0]


def test_manifests_without_them_read_and_write_as_before(tmp_path: Path) -> None:
    """The digest of a bundle that has none of this is what it was."""
    for step in (Segment("s", ("a",), ("b",), ()), KernelStep("k", "x", ("a",), ("b",))):
        tree = to_json(step)
        assert not tree.keys() & {"repeat", "when", "files"}
        assert from_json(type(step), tree, "step") == step
    tree = to_json(KernelStep("k", "x", ("a",), ("b",), when="a", files={"w": "kernels/k/w.bin"}))
    assert tree["when"] == "a" and tree["files"] == {"w": "kernels/k/w.bin"}
    manifest = json.loads(files_of(write_sample(tmp_path / "b.edge"))["manifest.json"])
    keys = ("task", "target", "model", "inputs", "outputs", "tensors", "states", "plan", "pipeline")
    text = json.dumps(
        {k: manifest[k] for k in keys}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert manifest["payload_digest"] == "sha256:" + sha256(text.encode()).hexdigest()


def test_bytes_of_kernel_files_are_part_of_the_payload_digest(good: dict[str, bytes], tmp_path: Path) -> None:
    """Weights exchanged, with every checksum but that one made to fit."""
    weights = bytearray(good[WEIGHTS])
    weights[5] ^= 1

    def edit(tree: Any) -> None:
        tree["files"][WEIGHTS]["sha256"] = sha256(weights).hexdigest()

    files = {**good, WEIGHTS: bytes(weights)}
    assert "payload_digest: the plan was altered" in refusal(
        forge(files, edit, digest=False), tmp_path / "a.edge"
    )
    assert "is damaged: its SHA-256 differs" in refusal(rebuild(files), tmp_path / "b.edge")
    (tmp_path / "c.edge").write_bytes(forge(files, edit))
    with (
        Bundle.open(tmp_path / "c.edge") as forged,
        pytest.raises(BundleError, match=r"golden|finite|variance"),
    ):
        check_kernels(forged, tmp_path / "cache")


def test_the_reader_in_the_docs_reads_it(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "docs/bundle.md", "exec"), namespace)
    path = write_kernels(tmp_path / "x.edge")
    manifest, _, files = namespace["read"](path)
    assert files == files_of(path)
    assert manifest["plan"][ENCODER]["files"] == {"weights": WEIGHTS}
    for kernel in steps.KERNELS:
        assert f"| `{kernel}` |" in text
    for limit in (MAX_REPEAT, MAX_STEPS):
        assert str(limit) in text
    for kind in (steps.EncoderOptions, steps.PoolOptions, EncoderSpec, Stage, VoxelGrid, Frustum, BevGrid):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in text, field.name


def put(step: int, **values: Any) -> Callable[[Any], None]:
    return lambda tree: tree["plan"][step].update(values)


def state(**values: Any) -> Callable[[Any], None]:
    """A state that the net keeps, of its own tensors' shape."""

    def edit(tree: Any) -> None:
        tree["tensors"] += [
            {"name": n, "dtype": "float32", "shape": [CAMERAS, 5], "layout": ""} for n in ("mem", "mem_next")
        ]
        net = tree["plan"][NET]
        net["inputs"].append("mem")
        net["outputs"].append("mem_next")
        tree["states"] = [
            {
                "name": "m",
                "dtype": "float32",
                "shape": [CAMERAS, 5],
                "input": "mem",
                "output": "mem_next",
                "initial": 0.0,
            }
        ]
        net.update(values)
        for key in [k for k, v in values.items() if v is None]:
            del net[key]

    return edit


def many(tree: Any) -> None:
    step = tree["plan"][RASTER]
    for i in range(MAX_STEPS):
        tree["tensors"].append({"name": f"t{i}", "dtype": "float32", "shape": [1], "layout": ""})
        tree["plan"].append({**step, "name": f"s{i}", "outputs": [f"t{i}"]})


def spare_file(tree: Any) -> None:
    tree["files"]["kernels/encoder/spare.bin"] = {"bytes": 0, "sha256": sha256(b"").hexdigest()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(NET, repeat=0), f"step 'net': expected repeat from 1 to {MAX_REPEAT}, got 0"),
        (put(NET, repeat=MAX_REPEAT + 1), f"expected repeat from 1 to {MAX_REPEAT}"),
        (put(NET, repeat=3), "tensor 'images' has shape (2, 3, 8, 16), expected 3 along the first axis"),
        (put(NET, repeat=2.0), "repeat: expected an integer"),
        (put(POOL, repeat=2), "unknown key 'repeat'"),
        (put(NET, when="seen"), "step 'net': when 'seen': no input of the plan"),
        (put(RASTER, when="camras"), "when 'camras': no input of the plan. Did you mean 'cameras'"),
        (put(RASTER, when=""), "when '': no input of the plan"),
        (put(RASTER, when=1), "when: expected a string"),
        (put(NET, when="lidar"), "when 'lidar': has shape (1,), expected (2,)"),
        (put(NET, when="images"), "when 'images': has shape (2, 3, 8, 16), expected (2,)"),
        (put(NET, files={}), "unknown key 'files'"),
        (put(ENCODER, files={"weights": "golden/input_0.bin"}), f"path 'golden/input_0.bin', expected '{WEIGHTS}'"),
        (put(ENCODER, files={"more": kernel_path("encoder", "more")}), "'kernels/encoder/more.bin' is missing from the file table"),
        (put(RASTER, files={"weights": WEIGHTS}), "expected 'kernels/raster/weights.bin'"),
        (put(ENCODER, files={"../x": "kernels/encoder/../x.bin"}), "role '../x': expected 1 to 80 letters"),
        (put(ENCODER, files={}), f"file '{WEIGHTS}': nothing in the manifest refers to it"),
        (put(ENCODER, kernel="a b"), "kernel 'a b': expected 1 to 80 letters"),
        (spare_file, "file 'kernels/encoder/spare.bin': nothing in the manifest refers to it"),
        (state(), "step 'net': is repeated or may be skipped, so it cannot keep state 'm'"),
        (state(repeat=None), "so it cannot keep state 'm'"),
        (state(when=None), "so it cannot keep state 'm'"),
        (many, f"plan: expected at most {MAX_STEPS} steps"),
    ],
)  # fmt: skip
def test_rules(edit: Callable[[Any], None], message: str, good: dict[str, bytes], tmp_path: Path) -> None:
    assert message in refusal(forge(good, edit), tmp_path / "x.edge")


def test_a_plain_step_may_keep_state_beside_them(good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.edge").write_bytes(forge(good, state(repeat=None, when=None)))
    Bundle.open(tmp_path / "x.edge").close()


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    manifest, files = sample()
    less = {name: data for name, data in files.items() if name != WEIGHTS}
    with pytest.raises(BundleError, match="missing from the file table"):
        write_bundle(tmp_path / "a.edge", manifest, less, {})
    with pytest.raises(BundleError, match="nothing in the manifest refers to it"):
        write_bundle(tmp_path / "b.edge", manifest, {**files, kernel_path("encoder", "more"): b"x"}, {})
    plan = (dataclasses.replace(manifest.plan[0], when="nothing"), *manifest.plan[1:])
    with pytest.raises(BundleError, match="no input of the plan"):
        write_bundle(tmp_path / "c.edge", dataclasses.replace(manifest, plan=plan), files, {})
    assert not list(tmp_path.iterdir())

"""A small bundle with everything a bundle can have, for the tests and the fuzzer."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.archive import zip_chunks
from edgekit.backends.base import Payload
from edgekit.bundle import Bundle, golden_bytes, golden_path, make_variant, write_bundle
from edgekit.manifest import Golden, GoldenTensor, KernelStep, Manifest, Segment, payload_digest
from edgekit.schema import canonical_json
from edgekit.spec import DType, QuantParams, StateSpec, TensorSpec

EVIDENCE = {"metric": {"AP50": 0.8125, "images": 12}, "layers": [{"name": "stem", "snr_db": 41.5}]}


def sample(payload_bytes: int = 3000) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest (files still empty) and its files: two segments, a kernel between them, a state."""
    rng = np.random.default_rng(7)
    shapes = {
        "images": (1, 3, 4, 6),
        "raw": (1, 4, 2, 3),
        "features": (1, 8),
        "mem_in": (1, 2, 3),
        "mem_out": (1, 2, 3),
    }
    tensors = tuple(TensorSpec(n, DType.float32, s, "NCHW" if len(s) == 4 else "") for n, s in shapes.items())
    quant = QuantParams(DType.int8, (0.5, 0.25), (0, -3), axis=1)
    tensors += (TensorSpec("scores", DType.int8, (1, 2), quant=quant),)
    payloads = {
        ("backbone", "fp32"): Payload("onnxruntime", "float32", "onnx", rng.bytes(payload_bytes), (), ()),
        ("backbone", "int8"): Payload(
            "onnxruntime", "int8", "onnx", rng.bytes(payload_bytes // 3), (), (), {"qdq": True}
        ),
        ("head", "fp16"): Payload(
            "tensorrt", "float16", "onnx", rng.bytes(100), (), (), {"workspace_bytes": 1 << 20}
        ),
    }
    variants = {key: make_variant(*key, payload) for key, payload in payloads.items()}
    plan = (
        Segment(
            "backbone",
            ("images", "mem_in"),
            ("raw", "mem_out"),
            tuple(v for (s, _), v in variants.items() if s == "backbone"),
        ),
        KernelStep("pool", "mean_pool", ("raw",), ("features",), {"axes": [2, 3]}),
        Segment("head", ("features",), ("scores",), (variants["head", "fp16"],)),
    )
    golden = {
        "images": rng.normal(size=shapes["images"]).astype(np.float32),
        "scores": np.array([[3, -7]], np.int8),
    }
    manifest = Manifest(
        schema_version=1,
        model="tiny",
        task="classify",
        target="rpi5",
        inputs=("images",),
        outputs=("scores",),
        tensors=tensors,
        plan=plan,
        pipeline={"labels": ["cat", "dög"], "score_threshold": 0.25},
        payload_digest="",
        golden=Golden(
            (GoldenTensor("images", golden_path("input", 0)),),
            (GoldenTensor("scores", golden_path("output", 0), atol=1.0, allow=0.01),),
        ),
        files={},
        provenance={"edgekit": "0.1.0", "model_sha256": "ab" * 32},
        states=(
            StateSpec("mem", DType.float32, shapes["mem_in"], "mem_in", "mem_out", 0.0, nominal_dt_s=0.1),
        ),
    )
    files = {variants[key].path: payload.data for key, payload in payloads.items()}
    files[golden_path("input", 0)] = golden_bytes(golden["images"])
    files[golden_path("output", 0)] = golden_bytes(golden["scores"])
    files["evidence/sample_0.jpg"] = b"\xff\xd8 not a real picture \xff\xd9"
    return manifest, files


def write_sample(path: Path, payload_bytes: int = 3000, **options: Any) -> Path:
    """`sample` as a bundle at `path`; options as for `write_bundle`."""
    manifest, files = sample(payload_bytes)
    write_bundle(path, manifest, files, EVIDENCE, **options)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """All files of a bundle, the manifest and its checksum included."""
    with Bundle.open(path) as bundle:
        return {name: bytes(bundle.read(name)) for name in bundle.names}


def rebuild(files: dict[str, bytes], *, checksum: bool = True) -> bytes:
    """The zip file of `files`, as somebody who knows the format would forge it."""
    files = dict(files)
    if checksum:
        lines = [
            f"{sha256(files[n]).hexdigest()}  {n}\n"
            for n in ("manifest.json", "signature.json")
            if n in files
        ]
        files["manifest.sha256"] = "".join(lines).encode()
    return b"".join(bytes(chunk) for chunk in zip_chunks(files))


def forge(files: dict[str, bytes], edit: Callable[[Any], Any], *, digest: bool = True) -> bytes:
    """The bundle with its manifest edited and, if `digest`, the payload digest made to fit."""
    tree = json.loads(files["manifest.json"])
    changed = edit(tree)
    tree = tree if changed is None else changed
    if digest and isinstance(tree, dict) and "payload_digest" in tree:
        tree["payload_digest"] = payload_digest(tree)
    return rebuild({**files, "manifest.json": canonical_json(tree, "manifest.json")})


def timeless(value: Any) -> Any:
    """Evidence without what the clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "timing", "speed")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same_but_for_times(a: dict[str, bytes], b: dict[str, bytes]) -> None:
    """The files of two builds of the same (`files_of`) agree, but for the times in their evidence."""
    assert list(a) == list(b)
    for name in a.keys() - {"manifest.json", "manifest.sha256", "evidence.json"}:
        assert a[name] == b[name], f"{name} differs"
    manifests = [json.loads(files["manifest.json"]) for files in (a, b)]
    assert manifests[0]["payload_digest"] == manifests[1]["payload_digest"]
    for manifest in manifests:
        del manifest["files"]["evidence.json"]  # it holds times
    assert manifests[0] == manifests[1]
    records = [timeless(json.loads(files["evidence.json"])) for files in (a, b)]
    assert records[0] == records[1]

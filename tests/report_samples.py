"""A bundle with every kind of evidence, its figures made up, for the tests of the report."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.backends.base import Payload
from edgekit.bundle import Bundle, golden_bytes, golden_path, make_variant, write_bundle
from edgekit.manifest import Golden, GoldenTensor, Manifest, Segment
from edgekit.spec import DType, TensorSpec
from edgekit.tasks.detect.coco import COCO_CLASSES

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def png(width: int = 320, height: int = 180) -> bytes:
    """A small picture without a library: a soft gradient with two boxes."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([90 + 100 * y / height, 110 + 60 * x / width, 150 - 40 * y / height], -1).astype(
        np.uint8
    )
    for left, top, right, bottom in ((40, 60, 120, 120), (190, 80, 220, 150)):
        image[top:bottom, left : left + 2] = image[top:bottom, right - 2 : right] = 255
        image[top : top + 2, left:right] = image[bottom - 2 : bottom, left:right] = 255
    rows = b"".join(b"\0" + row.tobytes() for row in image)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_HEAD + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def full_evidence() -> dict[str, Any]:
    """Every key of the evidence, as the build writes them."""
    rng = np.random.default_rng(5)
    reference = np.clip(rng.beta(1.6, 1.4, 230), 0.25, 0.97)
    got = np.clip(reference + rng.normal(0, 0.004, 230), 0, 1)
    pairs = [[round(float(a), 4), round(float(b), 4)] for a, b in zip(reference, got, strict=True)]
    classes = {name: round(0.62 * math.exp(-i / 45), 3) for i, name in enumerate(COCO_CLASSES)}
    stages = {}
    for name, median in (("preprocess", 0.212), ("engine", 7.41), ("decode", 0.188), ("total", 7.83)):
        stages[name] = {"median_ms": median, "p95_ms": median * 1.09, "p99_ms": median * 1.31, "runs": 200}
    return {
        "model": {
            "source": "detector.onnx", "sha256": "ab" * 32, "parameters": 911_234, "macs": 541_200_000, "opset": 11,
            "ops": {"Conv": 113, "Sigmoid": 92, "Mul": 88, "Concat": 21, "Slice": 16, "Add": 12, "MaxPool": 3,
                    "Resize": 2, "Transpose": 4, "Reshape": 3, "Exp": 1, "Cast": 1},
        },
        "graph": {
            "passes": [
                {"name": "raise_opset", "nodes_before": 356, "nodes_after": 356, "changed": True, "max_abs_diff": 0.0},
                {"name": "fold_constants", "nodes_before": 356, "nodes_after": 341, "changed": True, "max_abs_diff": 0.0},
                {"name": "fuse_conv_bn", "nodes_before": 341, "nodes_after": 300, "changed": True, "max_abs_diff": 3.1e-6},
                {"name": "fuse_silu", "nodes_before": 300, "nodes_after": 300, "changed": False},
                {"name": "split_head", "nodes_before": 300, "nodes_after": 262, "changed": True},
            ],
            "head": {"family": "yolox", "outputs": ["box_8", "box_16", "box_32"]},
            "input_rule": "letterbox, BGR, 0..255: the family's own rule",
            "labels": "class names as given",
        },
        "payloads": {
            "tensorrt-float16": {
                "backend": "tensorrt", "precision": "float16", "bytes": 1_860_000, "weight_bytes": 1_822_468, "images": 16,
                "pictures": "instances_val.json",
                "outputs": [
                    {"tensor": "box_8", "max_abs": 0.021, "rms": 0.0011, "sqnr_db": 61.2, "range": [-4.1, 6.8]},
                    {"tensor": "box_16", "max_abs": 0.034, "rms": 0.0019, "sqnr_db": 58.7, "range": [-3.9, 7.7]},
                    {"tensor": "box_32", "max_abs": 0.0, "rms": 0.0, "sqnr_db": None, "range": [-11.5, 3.2]},
                ],
            }
        },
        "agreement": {"images": 16, "boxes_reference": 232, "boxes_matched": 230, "boxes_payload": 231,
                      "score_shift_mean": 0.0002, "score_shift_max": 0.0123, "pairs": pairs},
        "metric": {
            "name": "AP", "data": "instances_val.json", "images": 94, "measured_by": "onnxruntime on this machine",
            "reference": {"AP": 0.2951, "AP50": 0.452, "AP75": 0.309, "AR100": 0.381},
            "payload": {"AP": 0.2944, "AP50": 0.4519, "AP75": 0.3071, "AR100": 0.3806},
            "drop": 0.0007, "interval95": [0.262, 0.329], "drop_interval95": [-0.0002, 0.0019], "per_class": classes,
        },
        "timing": {"machine": {"cpu": "Example CPU", "cores": 8, "threads": 4, "os": "Linux 6.1"}, "stages": stages,
                   "image": [1280, 720], "note": "The machine was idle."},
        "accept": {"max_drop": 0.01, "passed": True, "reason": "within limits"},
        "limits": ["The payload ran on the build machine, not on NVIDIA Jetson AGX Orin 64 GB"],
        "samples": [{"file": f"evidence/sample_{i}.png", "caption": f"{7 - i} boxes, payload float16"} for i in range(4)],
    }  # fmt: skip


def quantized_evidence() -> dict[str, Any]:
    """`full_evidence` of an INT8 build for a board with two libraries: float islands, a refusal, warnings."""
    rng = np.random.default_rng(6)
    layers: list[dict[str, Any]] = []
    for i in range(48):
        db = float(np.clip(26 - i / 4 + rng.normal(0, 4), -2, 45))
        layers.append({"id": f"/body/{i}/conv", "op": f"/body/{i}/conv (node {3 * i + 1} of 150, Conv 3x3 32>64)",
                       "precision": "int8", "reason": "", "macs": 1_000_000 * (1 + i % 7), "sqnr_db": round(db, 2),
                       "share": round(10 ** (-db / 10) / 3, 5), "scale": 0.04})  # fmt: skip
    layers[20] |= {
        "precision": "float",
        "reason": "the search left it in float",
        "sqnr_db": 100.0,
        "share": 0.0,
    }
    layers[21] |= {
        "precision": "float",
        "reason": "the search left it in float",
        "sqnr_db": None,
        "share": None,
    }
    floating = [
        {"id": f"/body/{i}/conv", "op": "Conv", "reason": "the search left it in float", "macs": 7_000_000}
        for i in (20, 21)
    ]
    tail = [
        {"id": f"/head/{i}/exp", "op": "Exp", "reason": "it stands alone: no integer form of Exp", "macs": 0}
        for i in range(11)
    ]
    trials = [
        {"label": "mse ranges", "error": 0.674, "kept": True, "seconds": 0.0131, "integer_share": 1.0},
        {"label": "percentile:99.99 ranges", "error": 0.802, "kept": False},
        {"label": "minmax ranges", "error": 1.198, "kept": False},
        {
            "label": "equalize /body/1/mul (node 5 of 150, SiLU)",
            "error": 0.2495,
            "kept": True,
            "seconds": 0.0132,
            "integer_share": 1.0,
        },
        {"label": "adaround", "error": 0.1980, "kept": True, "seconds": 0.0132, "integer_share": 1.0},
        {
            "label": "in integers, all that can be",
            "error": 0.198,
            "kept": True,
            "seconds": 0.0132,
            "integer_share": 1.0,
            "metric": 0.2713,
            "drop": 0.0238,
            "passed": False,
        },
        {
            "label": "2 nodes in float around the worst 1 values",
            "error": 0.09,
            "kept": True,
            "seconds": 0.0141,
            "integer_share": 0.93212,
            "metric": 0.2944,
            "drop": 0.0007,
            "passed": True,
        },
    ]
    calibration = {"calibration": "street_64", "digest": "9e6b" * 16, "pictures": 64}
    integer = {
        "litert": {"mac_share": 0.93212, "nodes": 150, "integer_nodes": 148, "float": floating},
        "onnxruntime": {
            "mac_share": 0.93212,
            "nodes": 150,
            "integer_nodes": 137,
            "float": [*floating, *tail],
        },
        "openvino": {"mac_share": 0.93212, "nodes": 150, "integer_nodes": 150, "float": []},
    }
    found = full_evidence()
    outputs = found["payloads"].pop("tensorrt-float16")["outputs"]
    for name, ms, engine in (
        (
            "litert",
            5.18,
            {
                "library": "ai-edge-litert",
                "version": "2.3.0",
                "operators": 369,
                "delegated": 361,
                "partitions": 3,
            },
        ),
        ("onnxruntime", 6.02, {"library": "onnxruntime", "version": "1.31.1"}),
    ):
        found["payloads"][f"{name}-int8"] = {
            "backend": name,
            "precision": "int8",
            "bytes": 1_193_000,
            "weight_bytes": 928_420,
            "images": 16,
            "outputs": outputs,
            "metric": {"AP": 0.2944, "drop": 0.0007},
            "integer": integer[name],
            "engine": engine,
            "speed": {
                "ms": ms,
                "quartiles": [ms - 0.2, ms + 0.3],
                "ratio": round(10.96 / ms, 3),
                "float_ms": 10.96,
                "threads": 1,
            },
        }
    found["agreement"] |= {"unit": "boxes", "score_shift_mean": -0.0318, "lost_score_max": 0.31}
    found["quantization"] = {
        "scheme": "search",
        "calibration": calibration,
        "searched_for": "LiteRT",
        "warnings": ["64 calibration pictures are few, expected 100 or more"],
        "steps": [
            "mse ranges",
            "equalize /body/1/mul (node 5 of 150, SiLU)",
            "adaround",
            trials[-1]["label"],
        ],
        "trials": trials,
        "metric_looks": 2,
        "output_error": 0.09,
        "layers": layers,
        "integer": integer,
        "worst_values": [
            {"value": f"/body/{i}/mul (node {i} of 150, SiLU)", "error": 0.1 / i} for i in range(1, 9)
        ],
        "not_lowered": {"tensorrt": "operator NonZero: not known there"},
        "left_out": {
            "tensorrt": "operator NonZero: not known there",
            "openvino": "1.81 times as slow as the fastest",
        },
    }
    return found  # fmt: skip


def write(
    path: Path,
    evidence: dict[str, Any],
    *,
    model: str = "detector",
    target: str = "jetson-orin",
    precision: str = "float16",
    provenance: dict[str, Any] | None = None,
    pictures: dict[str, bytes] | None = None,
) -> Bundle:
    """A detector bundle with this evidence, opened."""
    backend = "tensorrt" if target.startswith("jetson") else "onnxruntime"
    payload = Payload(backend, precision, "onnx", b"weights" * 1000, (), ())
    variant = make_variant("network", f"{backend}-{precision}", payload)
    image = TensorSpec("images", DType.float32, (1, 3, 4, 6), "NCHW")
    box = TensorSpec("box_8", DType.float32, (1, 85, 2, 3), "NCHW")
    manifest = Manifest(
        schema_version=1,
        model=model,
        task="detect",
        target=target,
        inputs=("images",),
        outputs=("box_8",),
        tensors=(image, box),
        plan=(Segment("network", ("images",), ("box_8",), (variant,)),),
        pipeline={
            "preprocess": {"resize": "letterbox", "color": "bgr", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
            "head": {"family": "yolox"}, "labels": list(COCO_CLASSES), "score_threshold": 0.25, "iou_threshold": 0.65,
        },
        payload_digest="",
        golden=Golden((GoldenTensor("images", golden_path("input", 0)),), (GoldenTensor("box_8", golden_path("output", 0)),)),
        files={},
        provenance=provenance or {"edgekit": "0.1.0", "model_sha256": "ab" * 32, "tools": {"onnx": "1.23.2"}},
    )  # fmt: skip
    files = {variant.path: payload.data}
    files[golden_path("input", 0)] = golden_bytes(np.zeros(image.shape, np.float32))
    files[golden_path("output", 0)] = golden_bytes(np.zeros(box.shape, np.float32))
    if pictures is None:
        pictures = {f"evidence/sample_{i}.png": png() for i in range(4)}
    write_bundle(path, manifest, {**files, **pictures}, evidence)
    return Bundle.open(path)

"""Check a bundle: digests, signature, self-test, and with labelled pictures its accuracy."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from edgekit.cli.common import add_engine_options, integer, print_json, ran
from edgekit.dataset import check_pair
from edgekit.errors import BundleError, MissingExtraError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle file (*.edge) or folder")
    parser.add_argument(
        "--key", type=Path, metavar="PUB", help="public key (PEM) that must have signed the bundle"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="LABELS",
        help="labels to measure on: COCO json; for a classifier a folder per class, .csv, .jsonl or .npz; of a rig "
        "a KITTI folder, a nuScenes-style .json, or synthetic://street-rig?count=200",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures that the labels name"
    )
    parser.add_argument(
        "--limit", type=integer("--limit", 1), metavar="N", help="use only the first N pictures"
    )
    add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    from edgekit.bundle import Bundle

    check_pair(args.data, args.images)
    with Bundle.open(args.bundle) as bundle:
        bundle.verify_files()
        if args.key is not None:
            bundle.check_signature(args.key)
        result: dict[str, Any] = {
            "bundle": str(args.bundle),
            "payload_digest": bundle.payload_digest,
            "files": len(bundle.manifest.files),
            "signature": "valid"
            if args.key
            else (f"by {bundle.signed_by}, not checked: give --key" if bundle.signed_by else "none"),
        }
        result.update(_run(bundle, args))
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _run(bundle: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Self-test and metric, or why they cannot be run on this machine."""
    from edgekit.host import backend_problem
    from edgekit.runtime.engine import load

    try:
        engine = load(bundle, threads=args.threads, variant=args.variant)
    except (MissingExtraError, BundleError) as error:
        # another board's payload: the digests still stand, but say plainly what was not tested
        backends = {variant.backend for _, variant in bundle.manifest.variants()}
        if args.data is not None or not all(backend_problem(b) for b in backends):
            raise
        return {"self_test": f"not run: {error}", "metric": None, "images": 0, "of": "", "reference": None}
    with engine:
        result: dict[str, Any] = {
            "self_test": "passed",
            "runs": engine.describe(),
            "metric": None,
            "images": 0,
            "of": "",
            "reference": None,
        }
        if args.data is None:
            return result
        from edgekit import tasks

        pipeline = engine.pipeline()  # first: it knows whether the task is known
        task = tasks.task(engine.task)
        data = task.read_set(args.data, args.images, limit=args.limit, labels=engine.labels)
        metric, _ = task.evaluate(pipeline, data, progress=partial(_progress, task.LABELLED))
        result.update(
            metric=metric, images=len(data.images), of=task.LABELLED, reference=_reference(bundle, data)
        )
        return result


def _reference(bundle: Any, data: Any) -> dict[str, Any] | None:
    """The float network's metric from the evidence, if it was measured on these very pictures."""
    metric = bundle.evidence.get("metric") or {}
    if metric.get("data_digest") == data.digest and isinstance(metric.get("reference"), dict):
        return dict(metric["reference"])
    return None


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} {what}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    print(f"{printable(result['bundle'])}: {result['files']} files, all digests match")
    print(f"  payload    {result['payload_digest']}")
    print(f"  signature  {result['signature']}")
    print(f"  self-test  {printable(result['self_test'])}")
    for step, runs in result.get("runs", {}).items():
        print(f"  runs       {printable(step)}: {ran(runs)}")
    if result["metric"]:
        shown = ", ".join(f"{k} {v:.4f}" for k, v in result["metric"].items() if isinstance(v, float))
        print(f"  metric     {shown} on {result['images']} {result['of']}")
        if result["reference"]:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in result["reference"].items() if isinstance(v, float))
            print(f"  float      {shown}")

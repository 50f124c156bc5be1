"""`edgekit doctor [--json]`: what this machine is, what it can build and run, and what to install for the rest.

Exit code 0 when at least one backend runs and the cache can be written, 1 when not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal

from edgekit import __version__, content, host
from edgekit.backends.base import BACKENDS
from edgekit.cli.targets import quantity, table
from edgekit.schema import to_json
from edgekit.target import Target
from edgekit.toolchain.cache import cache_dir

MIN_PYTHON = (3, 10)
MIN_FREE_BYTES = 512 * 1024**2
"""Below this the cache and a few bundles may not fit: doctor warns."""
TIMEOUT_S = 120
"""For all imports together."""


@dataclass(frozen=True)
class Package:
    """A library edgekit may use: `module` is imported, `distribution` is what pip calls it."""

    module: str
    distribution: str
    need: Literal["core", "build", "option"]
    extra: str
    purpose: str
    version: str | None = None
    status: Literal["ok", "missing", "broken"] = "missing"
    error: str = ""

    @property
    def install(self) -> str:
        """The line that brings it."""
        if self.module == "tensorrt":
            return "sudo apt install python3-libnvinfer (JetPack's own, for its own Python)"
        return f"pip install 'edgekit[{self.extra}]'" if self.extra else f"pip install {self.distribution}"


PACKAGES = (
    Package("numpy", "numpy", "core", "", "everything"),
    Package("onnxruntime", "onnxruntime", "build", "onnxruntime", "run on CPUs; evidence of a build"),
    Package("onnx", "onnx", "build", "build", "read models"),
    Package("onnx_ir", "onnx-ir", "build", "build", "transform models"),
    Package("onnxscript", "onnxscript", "build", "build", "rewrite rules"),
    Package("ml_dtypes", "ml-dtypes", "build", "build", "reduced precisions"),
    Package("cv2", "opencv-python-headless", "build", "camera", "read pictures and video"),
    Package("pycocotools", "pycocotools", "build", "build", "average precision"),
    Package("cryptography", "cryptography", "option", "sign", "sign and verify bundles"),
    Package("tensorrt", "tensorrt", "option", "tensorrt", "run on a Jetson's GPU"),
    Package("cuda.bindings.runtime", "cuda-bindings", "option", "tensorrt", "run on a Jetson's GPU"),
    Package("ai_edge_litert", "ai-edge-litert", "option", "litert", "run on CPUs, ARM first"),
    Package("openvino", "openvino", "option", "openvino", "run on x86 CPUs"),
    Package("torch", "torch", "option", "torch", "train and export models"),
    Package("mcap", "mcap", "option", "mcap", "record and replay"),
    Package("rerun", "rerun-sdk", "option", "rerun", "show results in Rerun"),
    Package("rich", "rich", "option", "build", "coloured output"),
    Package("trackers", "trackers", "option", "tracking", "track detections"),
    Package("supervision", "supervision", "option", "supervision", "convert detections"),
)

# Run apart: a broken library may print, hang or kill its process. One line out before and after each.
_PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    print("try", name, flush=True)
    try:
        module = importlib.import_module(name)
        print("ok", name, getattr(module, "__version__", ""), flush=True)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and (name + ".").startswith(f"{error.name}."):
            print("missing", name, flush=True)
            continue
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print("broken", name, text[:300], flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else "\n".join(_page(report)))
    return 0 if report["ok"] else 1


def examine(packages: Sequence[Package] = PACKAGES) -> dict[str, Any]:
    """All that doctor knows, as JSON values: machine, can_build, can_run, packages, kernels, cache, problems."""
    found = probe(packages)
    states = {p.module: p for p in found}
    machine = Target.load("host")
    here = host.board()
    cache = _cache()
    can_run = {backend: _run_problem(backend, states) for backend in BACKENDS}
    absent = [p.distribution for p in found if p.need in ("core", "build") and p.status != "ok"]
    problems = []
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        problems.append(f"Python {sys.version.split()[0]}: too old, expected {wanted} or newer")
    if states["numpy"].status != "ok":
        problems.append(f"numpy: {states['numpy'].error or 'not installed'}. Run: {states['numpy'].install}")
    if all(can_run.values()):
        problems.append(
            "no backend can run bundles here: " + "; ".join(f"{b}: {p}" for b, p in can_run.items())
        )
    if not content.folders("targets"):
        problems.append("target files: none found. Reinstall edgekit, or point EDGEKIT_PATH at a checkout")
    if cache["problem"]:
        problems.append(
            f"cache {cache['path']}: {cache['problem']}. Set EDGEKIT_CACHE to a folder you can write"
        )
    return {
        "ok": not problems,
        "edgekit": __version__,
        "machine": to_json(machine),
        "board": here.name if here else None,
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "can_build": {"ok": not absent, "missing": absent},
        "can_run": {b: {"ok": not p, "problem": p} for b, p in can_run.items()},
        "packages": [{**to_json(p), "install": p.install} for p in found],
        "kernels": _kernels(),
        "cameras": _cameras(),
        "cache": cache,
        "problems": problems,
    }


def probe(packages: Sequence[Package]) -> tuple[Package, ...]:
    """The packages with version, status and error filled in, each imported in another process."""
    states = _import(p.module for p in packages)
    out = []
    for package in packages:
        word, text = states[package.module]
        version = None if word == "missing" else _version(package.distribution)
        if word == "ok":
            out.append(replace(package, status="ok", version=version or text or None))
        elif word == "broken":
            out.append(replace(package, status="broken", version=version, error=text))
        else:
            out.append(package)
    return tuple(out)


def _import(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module -> ("ok", its version) | ("missing", "") | ("broken", why)."""
    states: dict[str, tuple[str, str]] = {}
    waiting = list(modules)
    while waiting:  # again without the culprit when the process did not survive an import
        output, died = _run_probe(waiting)
        last = waiting[0]
        for line in output.splitlines():
            word, name, text = (line + "  ").split(" ", 2)
            if word == "try" and name in waiting:
                last = name
            elif word in ("ok", "missing", "broken") and name in waiting:
                states[name] = (word, text.strip())
        if last not in states:
            states[last] = ("broken", died)
        waiting = [name for name in waiting if name not in states]
    return states


def _run_probe(modules: Sequence[str]) -> tuple[str, str]:
    """What the probe printed and, for an import that never came back, how its process ended."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, *modules]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return text, f"did not import within {TIMEOUT_S} s"
    return ran.stdout, f"the process ended with code {ran.returncode} while importing it"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _run_problem(backend: str, states: dict[str, Package]) -> str:
    """Why this backend cannot run bundles here, "" when it can."""
    problem = host.backend_problem(backend)
    needed = {"litert": ("ai_edge_litert",), "tensorrt": ("tensorrt", "cuda.bindings.runtime")}.get(
        backend, (backend,)
    )
    for name in needed if not problem else ():
        package = states.get(name)
        if package and package.status == "broken":
            return f"{name} is installed but does not import: {package.error}"
        if package and package.status == "missing" and importlib.util.find_spec("pycuda") is None:
            return f"{package.distribution} is not installed. Run: {package.install}"
    return problem


def _kernels() -> dict[str, Any]:
    """Are the C++ kernels built? The numpy references give the same results, slower."""
    word, text = _import(["edgekit._native"])["edgekit._native"]
    if word == "missing":
        how = "Install a C++17 compiler and reinstall edgekit (in a checkout: python setup.py build_ext --inplace)"
        return {"native": False, "problem": f"not built, the numpy references run instead. {how}"}
    return {"native": word == "ok", "problem": "" if word == "ok" else f"built but does not load: {text}"}


def _cameras() -> dict[str, Any]:
    """Video4Linux devices, and whether GStreamer is here for the others."""
    from edgekit.errors import EdgekitError
    from edgekit.runtime.sources import gst_native, v4l2_cameras

    try:
        gst_native.library()
        gstreamer = ""
    except EdgekitError as error:
        gstreamer = str(error)
    return {
        "v4l2": [to_json(camera) for camera in v4l2_cameras.list_cameras()],
        "gstreamer_problem": gstreamer,
    }


def _cache() -> dict[str, Any]:
    """Can the cache folder be written, and how much room is there?"""
    path = cache_dir()
    problem, free = "", None
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe_file:
            probe_file.write(b"edgekit")
        free = shutil.disk_usage(path).free
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
    return {"path": str(path), "free_bytes": free, "problem": problem}


def _page(report: dict[str, Any]) -> list[str]:
    machine = Target.load("host")
    cpus = " + ".join(
        f"{c.cores}x {c.name} ({', '.join(c.isa) or 'no known ISA features'})" for c in machine.cpus
    )
    facts = [
        ("edgekit", report["edgekit"]),
        ("machine", machine.title.removeprefix("this machine: ")),
        ("board", report["board"] or "none of the known targets (build for it with --target host)"),
        ("cpu", f"{machine.arch}, {cpus}"),
        ("memory", quantity("bytes", machine.dram_bytes)),
        ("system", machine.software[0].os),
        ("python", f"{report['python']['version']} ({report['python']['executable']})"),
    ]
    facts += [(k, v) for k in ("jetpack", "l4t", "cuda") if (v := getattr(machine.software[0], k))]
    kernels, cache, build = report["kernels"], report["cache"], report["can_build"]
    lines = [*table(facts), "", "This machine can"]
    missing = ", ".join(build["missing"])
    verbs = [
        (
            "build bundles",
            "yes" if build["ok"] else f"no: {missing} missing. Run: pip install 'edgekit[build]'",
        )
    ]
    verbs += [
        (f"run {backend} bundles", "yes" if state["ok"] else f"no: {state['problem']}")
        for backend, state in report["can_run"].items()
    ]
    streams = report["cameras"]["gstreamer_problem"]
    verbs.append(("use GStreamer sources", f"no: {streams}" if streams else "yes"))
    verbs.append(("use native kernels", "yes" if kernels["native"] else f"no: {kernels['problem']}"))
    room = "" if cache["free_bytes"] is None else f", {quantity('bytes', cache['free_bytes'])} free"
    verbs.append(
        ("keep a cache", f"no: {cache['problem']}" if cache["problem"] else f"yes: {cache['path']}{room}")
    )
    lines += table(verbs, indent="  ")
    cameras = report["cameras"]
    found = [(f"v4l2:{c['path']}", c["name"], " ".join(c["formats"]), c["problem"]) for c in cameras["v4l2"]]
    if found:
        lines += ["", *table([("CAMERA", "NAME", "FORMATS", ""), *found])]
    if cache["free_bytes"] is not None and cache["free_bytes"] < MIN_FREE_BYTES:
        lines.append(f"  warning: less than {quantity('bytes', MIN_FREE_BYTES)} free for bundles and caches")
    rows = [("PACKAGE", "VERSION", "STATE", "FOR", "")]
    for p in report["packages"]:
        hint = {"ok": "", "missing": p["install"], "broken": p["error"]}[p["status"]]
        rows.append((p["distribution"], p.get("version") or "-", p["status"], p["purpose"], hint))
    lines += ["", *table(rows), ""]
    lines += [f"problem: {p}" for p in report["problems"]] or ["No problems found."]
    return lines


__all__ = ["PACKAGES", "Package", "add_arguments", "examine", "main", "probe"]

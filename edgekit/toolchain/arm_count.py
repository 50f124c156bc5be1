"""Instructions per inference of a bundle's variants on an emulated ARM board: a proxy where no board is at hand.

tools/arm of a checkout sets up the emulator (qemu-user with a counting plugin, profiles of the boards and
aarch64 builds of the inference libraries); this module runs a bundle in it. Counts repeat to a fraction of a
percent, with one thread. They know nothing of caches, memory bandwidth or how many instructions a core
issues at once, so compare like with like, class by class.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import edgekit
from edgekit import host
from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, UsageError, did_you_mean, printable
from edgekit.target import Target

CLASSES = ("all", "simd", "load_store", "dot", "mmla", "sve")
"""What count.c tells apart. dot: SDOT, UDOT, USDOT, SUDOT; mmla: the int8 matrix instructions; both are
also simd. sve: any SVE instruction, its dot products included."""

RUNS = 2
"""The first fills caches and tables; the second is counted."""

TIMEOUT_S = 1800.0

BUILD_S = 60.0
"""What a build may spend on counting all its variants."""
START_S, INFERENCES = 6.0, 1 + RUNS
"""Emulated start-up with imports; inferences of one count, the self-test's included."""
SECONDS_PER_MAC = {"int8": 3e-9, "": 16e-9}
"""Of the emulator on a common machine, rounded up twofold; floats are computed in software."""
DIGITS = 3
"""Significant digits of a recorded count: the rest differs between two runs of the same file."""

WHAT = "emulated instructions per inference, one thread: a proxy, not a timing"


def arm_dir() -> Path:
    """Where tools/arm/setup.sh puts the emulator: `$EDGEKIT_ARM_DIR`, else `arm` in edgekit's cache folder."""
    if chosen := os.environ.get("EDGEKIT_ARM_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit" / "arm"


def boards(folder: Path | None = None) -> dict[str, str]:
    """Target or profile name -> profile, of the boards that can be emulated.

    A target is emulated by the profile whose core it has. Raises: UsageError without an emulator.
    """
    folder = folder or arm_dir()
    profiles = sorted(p.name for p in (folder / "devices").glob("*") if (p / "qemu-cpu").is_file())
    if not profiles or not (folder / "armpython").exists():
        raise UsageError(
            f"ARM emulator: not in {folder}. Run tools/arm/setup.sh in a checkout of edgekit, "
            "or set EDGEKIT_ARM_DIR to where it was set up"
        )
    cores = {host.detect(folder / "devices" / name).cpus[0].name: name for name in profiles}
    known = {name: name for name in profiles}
    for name in Target.names():
        target = Target.load(name) if name != "host" else None
        if target is not None and target.arch == "aarch64" and target.cpus[0].name in cores:
            known[name] = cores[target.cpus[0].name]
    return known


def record(
    target: Target, macs: int, payloads: Mapping[str, str], write: Callable[[Path], Path]
) -> dict[str, dict[str, Any]]:
    """What the evidence of a build says of instructions, per variant; {} for a target that is no ARM CPU.

    payloads: variant -> precision. write: writes the bundle into a folder and returns its path; called only
    if the emulator is set up here and the counting is expected to take less than BUILD_S in all.

    Returns: variant -> {board, counts: {class: per inference, DIGITS significant digits}, note}, or
    {not_measured: why and what to do}.
    """
    if target.arch != "aarch64" or target.gpu is not None:
        return {}
    later = f"Run: edgekit tune BUNDLE --board {target.name}"
    try:
        known = boards()
    except UsageError:
        return {name: {"not_measured": f"no ARM emulator on the build machine. {later}"} for name in payloads}
    if target.name not in known:
        return {name: {"not_measured": "no emulated board has its core"} for name in payloads}
    found: dict[str, dict[str, Any]] = {}
    left = BUILD_S
    with tempfile.TemporaryDirectory(prefix="edgekit-count-") as folder:
        path: Path | None = None
        for name, precision in payloads.items():
            expected = START_S + INFERENCES * macs * SECONDS_PER_MAC.get(precision, SECONDS_PER_MAC[""])
            if expected > left:
                why = f"{macs / 1e6:.0f} M MACs in {precision} take the emulator too long for a build"
                found[name] = {"not_measured": f"{why}. {later}"}
                continue
            path = path or write(Path(folder))
            start = time.monotonic()
            try:
                row = count(path, target.name, (name,), timeout_s=left)["variants"][name]
            except EdgekitError as error:  # a proxy is no reason to lose a build
                row = _none(str(error))
            left -= time.monotonic() - start
            if row["instructions"] is None:
                found[name] = {"not_measured": row["problem"]}
                continue
            counts = {kind: rounded(number) for kind, number in row["instructions"].items()}
            found[name] = {"board": known[target.name], "counts": counts, "note": WHAT}
    return found


def rounded(number: int) -> int:
    """To DIGITS significant digits."""
    return round(number, DIGITS - len(str(number))) if number > 0 else 0


def count(
    bundle: Path, board: str, variants: tuple[str, ...] = (), timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Run every variant of the bundle at `bundle`, or those of `variants`, once each on the emulated `board`.

    board: a target (`rpi5`) or a profile of tools/arm (`pi5`). timeout_s: for each variant. The golden input is used, and every variant
    has to pass the bundle's self-test there, latency aside.

    Returns JSON values: bundle, payload_digest, board, what (a label to print beside the figures), libraries,
    variants: name -> {instructions: {class: count per inference} or None, problem: ""}. A variant that does
    not run on the board has `instructions` None and the reason in `problem`.

    Raises: UsageError for an unknown board or variant, or without an emulator; EdgekitError when it fails.
    """
    folder = arm_dir()
    known = boards(folder)
    if board not in known:
        raise UsageError(f"board {printable(board)!r}: cannot be emulated. {did_you_mean(board, known)}")
    with Bundle.open(bundle) as opened:
        names = list(dict.fromkeys(variant.name for _, variant in opened.manifest.variants()))
        digest = opened.payload_digest
    for name in variants:
        if name not in names:
            raise UsageError(f"variant {name!r}: not in this bundle. {did_you_mean(name, names)}")
    found: dict[str, Any] = {}
    libraries: dict[str, str] = {}
    for name in variants or tuple(names):
        answer = _guest(folder, known[board], bundle, name, timeout_s)
        libraries.update(answer.pop("libraries", {}))
        found[name] = answer
    return {
        "bundle": str(bundle),
        "payload_digest": digest,
        "board": known[board],
        "what": WHAT,
        "libraries": libraries,
        "variants": found,
    }


def _guest(folder: Path, profile: str, bundle: Path, variant: str, timeout_s: float) -> dict[str, Any]:
    """One variant in its own emulated process: a fault there ends that one only."""
    with tempfile.TemporaryDirectory(prefix="edgekit-arm-") as work:
        stage, counts = Path(work, "stage"), Path(work, "counts.jsonl")
        stage.mkdir()
        # the package alone: its neighbours are this machine's libraries
        (stage / "edgekit").symlink_to(Path(edgekit.__file__).resolve().parent)
        command = [str(folder / "armpython"), "-c", GUEST, str(bundle.resolve()), variant, str(RUNS)]
        environment = {
            **emulated(profile, counts),
            "PYTHONPATH": str(stage),
            "EDGEKIT_CACHE": str(Path(work, "cache")),
        }
        try:
            ran = subprocess.run(
                command,
                env=environment,
                cwd=work,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except OSError as error:
            raise EdgekitError(f"ARM emulator {folder}: cannot be started: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            return _none(f"took longer than {timeout_s:.0f} s in the emulator")
        lines = ran.stdout.splitlines()
        if ran.returncode != 0 or not lines:
            said = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            return _none(f"the emulated process ended with {ran.returncode}: {said[:300]}")
        answer = json.loads(lines[-1])
        if "problem" in answer:
            return _none(answer["problem"])
        text = counts.read_text(encoding="utf-8")
        return {"instructions": last_run(text), "problem": "", "libraries": answer["libraries"]}


def emulated(profile: str, counts: Path) -> dict[str, str]:
    """Environment of `armpython` as the board `profile`, one thread, its counts written to `counts`."""
    host = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    guest = {**host, "ARM_DEVICE": profile, "ARM_COUNT": str(counts), "OMP_NUM_THREADS": "1"}
    # tools/arm/cross.sh compiles the native engine; the one beside us is this machine's
    engine = arm_dir() / "libedgekit.so"
    return guest | ({"EDGEKIT_NATIVE_LIBRARY": str(engine)} if engine.exists() else {})


def last_run(text: str) -> dict[str, int]:
    """Counts of the last marked run, from the plugin's lines."""
    marks = [json.loads(line) for line in text.splitlines() if '"mark"' in line]
    assert len(marks) == RUNS + 1, "one mark before the runs, one after each"
    return {kind: marks[-1][kind] - marks[-2][kind] for kind in CLASSES}


def _none(problem: str) -> dict[str, Any]:
    return {"instructions": None, "problem": problem}


GUEST = """
import ctypes, json, sys
import edgekit
from edgekit.runtime.selftest import set_golden

path, variant, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
mark = lambda tag: libc.lseek(-77, ctypes.c_long(tag), 0)  # count.c writes the counts so far
libc = ctypes.CDLL(None)
try:
    engine = edgekit.load(path, threads=1, variant=variant)
except edgekit.EdgekitError as error:
    print(json.dumps({"problem": str(error)}))
    sys.exit()
session = engine.session()
set_golden(engine.bundle, session)
mark(0)
for number in range(runs):
    session.run()
    mark(number + 1)
facts = engine.describe().values()
print(json.dumps({"libraries": {f["library"]: f["version"] for f in facts if "library" in f}}))
"""
"""Runs on the emulated board."""

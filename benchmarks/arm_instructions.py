"""Instructions per inference on an emulated ARM board: edgekit's INT8 files beside those of the peers.

    bash tools/arm/setup.sh; bash benchmarks/peers/setup.sh litert        once
    python benchmarks/arm_instructions.py --network mobilenetv2,yolox_nano --calibration ../shared/data/coco_mini/train

Every file is run by the same few lines on its own library (aarch64 builds under qemu with a counting plugin),
one thread, the second invocation of a warm interpreter, and its outputs are compared with those of the same
library on this machine. `all` and the classes are the invocation alone. Some files take and give codes and leave
the conversions to their caller, others hold them: `whole` is from floats to floats for every file, with
LiteRT's own QUANTIZE and DEQUANTIZE, counted alone, added to those that hold none. A proxy, not a timing: it knows
nothing of caches, memory and of how many instructions a core issues at once.

Prints one table per network and board, and appends a JSON line per row to runs/arm_instructions.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.peers import cases, runners  # noqa: E402
from benchmarks.peers import run as peers  # noqa: E402
from edgekit.backends.litert.writer import Writer  # noqa: E402
from edgekit.bundle import Bundle  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from edgekit.spec import DType, QuantParams  # noqa: E402
from edgekit.target import Target  # noqa: E402
from edgekit.toolchain.arm_count import CLASSES, arm_dir, boards, emulated, last_run  # noqa: E402

PEERS = ("ort-float", "litert-float", "ort-defaults", "ort-minmax", "litert-dynamic", "litert-int8")
"""Of benchmarks/peers/run.py: those whose library has an aarch64 build in the emulator."""
NETWORKS = ("mobilenetv2", "yolox_nano")
SQNR_PICTURES = 4


@dataclass
class File:
    """Something to count. library: onnxruntime or litert. why: the reason where there is no file."""

    name: str
    title: str
    library: str = ""
    data: bytes = b""
    why: str = ""
    sqnr_db: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    """Of the invocation alone, by class."""
    conversions: int = 0
    """Instructions from floats to its codes and back, where the file leaves them to its caller."""
    same: str = ""
    """How the board's outputs compare with this machine's."""

    @property
    def whole(self) -> int:
        return self.counts["all"] + self.conversions


RUN = '''
import sys
import numpy as np

def open_file(library, path):
    """(list of the input's (shape, dtype, quantization), run(array) -> list of outputs)."""
    if library == "onnxruntime":
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        binding = session.io_binding()
        held = []
        def set_input(x):
            held[:] = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))]
            binding.bind_ortvalue_input(entry.name, held[0])
            for out in session.get_outputs():
                binding.bind_output(out.name)
        return tuple(entry.shape), np.dtype(np.float32), None, set_input, lambda: session.run_with_iobinding(binding), \
            lambda: [o.numpy() for o in binding.get_outputs()]
    from ai_edge_litert.interpreter import Interpreter
    net = Interpreter(model_path=path, num_threads=1)
    net.allocate_tensors()
    (entry,) = net.get_input_details()
    return tuple(entry["shape"]), np.dtype(entry["dtype"]), entry["quantization"], lambda x: net.set_tensor(entry["index"], x), \
        net.invoke, lambda: [net.get_tensor(o["index"]) for o in net.get_output_details()]

def outputs(library, path, x, mark=lambda: None):
    """x: float32 [1, 3, h, w]; turned and quantized as the file wants it. Runs twice, marked."""
    shape, dtype, quantization, set_input, invoke, get = open_file(library, path)
    if tuple(x.shape) != shape:
        x = x.transpose(0, 2, 3, 1)
    if dtype.kind in "iu":
        scale, zero = quantization
        x = np.clip(np.rint(x / np.float32(scale)) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max)
    set_input(np.ascontiguousarray(x, dtype).reshape(shape))  # edgekit's may take two columns as one
    mark()
    for _ in range(2):
        invoke()
        mark()
    return get()
'''
"""Runs here and on the board, so that both are asked the same."""

GUEST = (
    RUN
    + """
import ctypes
libc = ctypes.CDLL(None)
tags = iter(range(9))
library, path, x, out = sys.argv[1:]
found = outputs(library, path, np.load(x), lambda: libc.lseek(-77, ctypes.c_long(next(tags)), 0))
np.savez(out, *found)
"""
)


def here(file: File, x: np.ndarray, work: Path) -> list[np.ndarray]:
    """The file's outputs on this machine, by the code that the board runs."""
    space: dict[str, Any] = {}
    exec(RUN, space)
    path = work / "file"
    path.write_bytes(file.data)
    found: list[np.ndarray] = space["outputs"](file.library, str(path), x)
    return found


def on_board(file: File, x: np.ndarray, profile: str, work: Path) -> tuple[dict[str, int], list[np.ndarray]]:
    """(counts of one invocation, outputs) on the emulated board. Raises: peers.Unavailable."""
    (work / "file").write_bytes(file.data)
    np.save(work / "x.npy", x)
    counts, out = work / "counts.jsonl", work / "out.npz"
    words = [str(arm_dir() / "armpython"), "-c", GUEST, file.library]
    words += [str(work / "file"), str(work / "x.npy"), str(out)]
    ran = subprocess.run(
        words,
        env=emulated(profile, counts),
        cwd=work,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise peers.Unavailable(f"ended with {ran.returncode}: {last[:200]}")
    with np.load(out, allow_pickle=False) as held:
        values = [held[f"arr_{i}"] for i in range(len(held.files))]
    return last_run(counts.read_text(encoding="utf-8")), values


def codes_outside(file: File) -> tuple[int, int]:
    """Elements of the inputs and of the outputs that the file takes and gives as codes."""
    if file.library != "litert":
        return 0, 0
    from ai_edge_litert.interpreter import Interpreter

    net = Interpreter(model_content=file.data, num_threads=1)
    sides = net.get_input_details(), net.get_output_details()
    sizes = [
        sum(int(np.prod(d["shape"])) for d in side if np.dtype(d["dtype"]).kind in "iu") for side in sides
    ]
    return sizes[0], sizes[1]


def conversion(name: str, size: int) -> File:
    """A file of one QUANTIZE or DEQUANTIZE of `size` elements."""
    writer, params = Writer(), QuantParams(DType.int8, (0.05,), (-3,))
    codes, floats = writer.tensor("q", (1, size), np.int8, params), writer.tensor("f", (1, size), np.float32)
    source, target = (floats, codes) if name == "QUANTIZE" else (codes, floats)
    writer.op(name, [source], [target])
    return File(name, name, "litert", writer.finish([source], [target]))


def conversions(file: File, profile: str, work: Path) -> int:
    """Instructions of the conversions that the file leaves to its caller, the cost of a call itself taken off."""
    total = 0
    for name, size in zip(("QUANTIZE", "DEQUANTIZE"), codes_outside(file), strict=True):
        if size:
            large, small = (
                on_board(conversion(name, n), np.zeros((1, n), np.float32), profile, work)[0]["all"]
                for n in (size, 1)
            )
            total += large - small
    return total


def compared(want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> str:
    """ "bitwise", or the largest difference in parts of the largest value of its output."""
    if all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(want, got, strict=True)):
        return "bitwise"
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        worst = max(worst, float(difference / max(float(np.abs(a.astype(np.float64)).max()), 1e-12)))
    return f"{worst:.1e}"


# --- files ------------------------------------------------------------------------------------------


def peer_files(
    case: cases.Case, data: cases.Calibration, names: Sequence[str], say: Callable[[str], None]
) -> list[File]:
    """The peers' files, made or found by benchmarks/peers, with their SQNR."""
    found, inputs = [], [case.feed(image) for image in case.pictures[:SQNR_PICTURES]]
    reference = peers.peer_entry("ort-float", case, data).answer(inputs)
    for name in names:
        say(f"{case.name}: {name}")
        peer = peers.PEERS[name]
        file = File(name, peer.title, peer.runner)
        try:
            entry = peers.peer_entry(name, case, data)
            file.data = case.graph
            if peer.maker is not None:
                folder = peers.made(peer, case, data)
                file.data = (folder / runners.facts(folder)["file"]).read_bytes()
            file.sqnr_db = round(cases.sqnr(reference, entry.answer(inputs)), 1)
        except peers.Unavailable as error:
            file.why = str(error)
        found.append(file)
    return found


def edgekit_files(
    case: cases.Case, data: cases.Calibration, path: Path | None, calibration: Path | None, target: str
) -> list[File]:
    """The payloads of an edgekit bundle for `target`, built as benchmarks/peers builds them."""
    inputs = [case.feed(image) for image in case.pictures[:SQNR_PICTURES]]
    reference = peers.peer_entry("ort-float", case, data).answer(inputs)
    try:
        path = path or peers.built_bundle(case, calibration, target)[0]
        entries = {e.row.name: e for e in peers.bundle_entries(path, case, None)}
    except (peers.Unavailable, EdgekitError) as error:
        return [File("edgekit", "edgekit", why=str(error))]
    found = []
    with Bundle.open(path) as bundle:
        for _, variant in bundle.manifest.variants():
            file = File(
                f"edgekit {variant.name}", f"edgekit, {variant.backend} {variant.precision}", variant.backend
            )
            file.data = bytes(bundle.read(variant.path))
            answer = entries[file.name].answer(inputs)
            file.sqnr_db = round(cases.sqnr(reference, answer), 1)
            found.append(file)
    return found


# --- counting ---------------------------------------------------------------------------------------


def count(files: Sequence[File], x: np.ndarray, profile: str, say: Callable[[str], None]) -> None:
    """Fill in counts and the comparison with this machine."""
    for file in files:
        if file.why:
            continue
        say(f"{profile}: {file.title}")
        with tempfile.TemporaryDirectory(prefix="edgekit-arm-") as folder:
            try:
                file.counts, got = on_board(file, x, profile, Path(folder))
                file.conversions = conversions(file, profile, Path(folder))
                file.same = compared(here(file, x, Path(folder)), got)
            except peers.Unavailable as error:
                file.why = str(error)


def table(files: Sequence[File], macs: int) -> list[str]:
    """Millions of instructions by class, the fewest first; those without figures at the end."""
    lines = [
        f"  {'':44}{'whole':>11}"
        + "".join(f"{c:>11}" for c in CLASSES if c != "sve")
        + f"{'per MAC':>9}{'SQNR dB':>9}{'vs host':>10}"
    ]
    for file in sorted((f for f in files if not f.why), key=lambda f: f.whole):
        row = "".join(f"{file.counts[c] / 1e6:11.2f}" for c in CLASSES if c != "sve")
        sqnr = "" if file.sqnr_db is None else f"{file.sqnr_db:.1f}"
        lines.append(
            f"  {file.title:44}{file.whole / 1e6:11.2f}{row}{file.counts['all'] / macs:9.3f}{sqnr:>9}{file.same:>10}"
        )
    return lines + [f"  {f.title:44} {f.why}" for f in files if f.why]


def verdict(files: Sequence[File]) -> str:
    """edgekit's fewest against the fewest of the peers, from floats to floats and of the invocation alone."""
    rows = [f for f in files if f.counts]
    ours, theirs = ([f for f in rows if f.name.startswith("edgekit") == own] for own in (True, False))
    if not ours or not theirs:
        return ""
    whole = min(f.whole for f in ours) / min(f.whole for f in theirs)
    alone = min(f.counts["all"] for f in ours) / min(f.counts["all"] for f in theirs)
    return f"  edgekit / best peer: {whole:.3f} from floats to floats, {alone:.3f} the invocation alone"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default=",".join(NETWORKS), help=f"of {', '.join(cases.NAMES)}")
    parser.add_argument("--board", default="rpi5", help="targets that can be emulated, by comma (rpi5)")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures (default: synthetic streets)"
    )
    parser.add_argument("--count", type=int, default=100, help="how many of them (100)")
    parser.add_argument("--bundle", type=Path, help="count this edgekit bundle instead of building one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "arm_instructions.jsonl")
    args = parser.parse_args()
    known, networks = boards(), args.network.split(",")
    if args.bundle and len(networks) != 1:
        parser.error("--bundle: is of one network, name it with --network")

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    for name in networks:
        case = cases.load(name)
        data = cases.calibration(case, args.calibration if case.data is not None else None, args.count)
        macs = sum(layer.macs for layer in case.layers)
        files = peer_files(case, data, args.peers.split(","), say)
        x = case.feed(case.pictures[0])
        for board in args.board.split(","):
            target = Target.load(board)
            folder = args.calibration if case.data is not None else None
            rows = files + edgekit_files(case, data, args.bundle, folder, target.name)
            count(rows, x, known[board], say)
            print(
                f"\n{name} on an emulated {known[board]}: {macs / 1e6:.0f} M MACs, millions of instructions per inference, one thread"
            )
            print("\n".join(table(rows, macs)) + f"\n{verdict(rows)}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as log:
                for row in rows:
                    line: Mapping[str, Any] = {k: v for k, v in asdict(row).items() if k != "data"}
                    log.write(
                        json.dumps(
                            {
                                "benchmark": "arm_instructions",
                                "network": name,
                                "board": known[board],
                                **line,
                                "bytes": len(row.data),
                                "commit": peers.commit(),
                            }
                        )
                        + "\n"
                    )


if __name__ == "__main__":
    try:
        main()
    except EdgekitError as error:
        sys.exit(f"arm_instructions: {error}")

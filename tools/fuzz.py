"""Damage bundles and models in many ways and see that each is refused: `make fuzz`.

Every mutant is opened in a forked child with a time and a memory limit, so that a native crash or
a hang is counted and the run goes on. It must be refused with one EdgekitError line, or be
accepted because nothing in it changed. Exit code 1 when a mutant crashed, hung or was accepted
with changed content. The same seed gives the same mutants.

What "changed content" means for a model: any file of valid ONNX is somebody's model, so an
accepted mutant counts as changed when the network that edgekit read from it computes other values
than onnxruntime computes from the file itself. Accepted mutants that onnxruntime refuses to run
are counted apart (`late`): a build stops at them later.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgekit.errors import EdgekitError

Job = tuple[str, int]
"""Kind of mutation and the seed of this one."""

Handle = Callable[[str, int], str]
"""Makes the mutant and opens it; returns `identical`, `changed`, `late`, or raises EdgekitError."""

OUTCOMES = ("refused", "identical", "late", "changed", "crash", "hang")
BAD = ("changed", "crash", "hang")


def run(jobs: Sequence[Job], handle: Handle, limit_s: float, memory: int) -> Iterator[tuple[Job, str, str]]:
    """(job, outcome, note) of every job, run one after the other in a child that may die.

    limit_s: seconds per job. memory: bytes a child may allocate beyond what it starts with.
    """
    done = 0
    while done < len(jobs):
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(jobs[done:], handle, writer, memory)
        os.close(writer)
        with os.fdopen(reader, "rb") as lines:
            while done < len(jobs):
                line = lines.readline() if _ready(lines.fileno(), limit_s) else None
                if line:
                    outcome, note = json.loads(line)
                    yield jobs[done], outcome, note
                    done += 1
                    continue
                os.kill(child, signal.SIGKILL)
                break
        status = os.waitpid(child, 0)[1]
        if done < len(jobs):
            hung = line is None
            yield jobs[done], "hang" if hung else "crash", "" if hung else f"child died, status {status}"
            done += 1


def _ready(descriptor: int, limit_s: float) -> bool:
    return bool(select.select([descriptor], [], [], limit_s)[0])


def _child(jobs: Sequence[Job], handle: Handle, writer: int, memory: int) -> None:
    """Work through `jobs`, one line of JSON each, until done or dead. Does not return."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_WRONLY)  # native libraries print what they think of a mutant
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        warnings.simplefilter("error", RuntimeWarning)  # numpy's: users would see lines that are not ours
        for job in jobs:
            outcome, note = judge(handle, job)
            # one write per line, flushed by the kernel: the parent waits for nothing else
            os.write(writer, json.dumps([outcome, note[-1500:]]).encode() + b"\n")
    finally:
        os._exit(0)


def judge(handle: Handle, job: Job) -> tuple[str, str]:
    """Outcome of one job: any exception but a one-line EdgekitError of bad input is a crash."""
    try:
        return handle(*job), ""
    except EdgekitError as error:
        text = str(error)
        if error.exit_code != 2:
            return "crash", f"{type(error).__name__} has exit code {error.exit_code}: {text}"
        if not text.isprintable() or len(text) > 1200:
            return "crash", f"message is not one short line: {text!r}"
        return "refused", text
    except BaseException:  # noqa: BLE001 - MemoryError and RecursionError count too
        return "crash", traceback.format_exc()


def table(counts: dict[str, Counter[str]]) -> str:
    """Counts per kind as text, with a total."""
    total: Counter[str] = Counter()
    lines = [f"{'':<28}{'mutants':>9}" + "".join(f"{name:>11}" for name in OUTCOMES)]
    for kind, found in counts.items():
        total += found
        cells = "".join(f"{found[name]:>11}" for name in OUTCOMES)
        lines.append(f"{kind:<28}{found.total():>9}{cells}")
    cells = "".join(f"{total[name]:>11}" for name in OUTCOMES)
    return "\n".join([*lines, f"{'total':<28}{total.total():>9}{cells}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Open thousands of damaged bundles and models.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundles", type=int, default=3000, help="mutated bundles")
    parser.add_argument("--models", type=int, default=1000, help="mutated models")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds per mutant")
    parser.add_argument("--json", action="store_true", help="counts as one JSON object on stdout")
    args = parser.parse_args(argv)

    import fuzz_bundles

    counts: dict[str, Counter[str]] = {}
    failures: list[dict[str, object]] = []
    messages: set[str] = set()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = [("bundle", args.bundles, fuzz_bundles.prepare, 1 << 30)]
        if args.models:
            import fuzz_models

            parts.append(("model", args.models, fuzz_models.prepare, 4 << 30))
        for what, count, prepare, memory in parts:
            kinds, handle = prepare(Path(folder))
            jobs = [(kinds[i % len(kinds)], args.seed * 1_000_003 + i) for i in range(count)]
            for (kind, seed), outcome, note in run(jobs, handle, args.limit, memory):
                counts.setdefault(f"{what}: {kind}", Counter())[outcome] += 1
                if outcome == "refused":
                    messages.add(note)
                if outcome in BAD:
                    failures.append(
                        {"part": what, "kind": kind, "seed": seed, "outcome": outcome, "note": note}
                    )
                    print(f"{what} {kind} {seed}: {outcome} {note[-600:]}", file=sys.stderr)
    seconds = time.monotonic() - began
    total = sum(counts.values(), Counter())
    if args.json:
        by_kind = {kind: dict(found) for kind, found in counts.items()}
        result = {"mutants": total.total(), **{name: total[name] for name in OUTCOMES}, "kinds": by_kind}
        print(json.dumps({**result, "failures": failures, "seed": args.seed, "seconds": round(seconds, 1)}))
    else:
        print(table(counts))
        print(f"{len(messages)} different messages, {seconds:.0f} s, seed {args.seed}")
        print("accepted with changed content, crashed or hung: " + str(len(failures)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

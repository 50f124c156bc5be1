"""What training any of these networks needs: a schedule, batches made ahead, checkpoints, a log, twins for shards of
a batch; and the arguments that all tools have (tools/train_*.py)."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from edgekit.host import usable_cores

T = TypeVar("T")


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the learning rate at `step` of `steps`: linear warm-up, then a cosine down to `floor`
    (Loshchilov & Hutter, "SGDR", 2017, without restarts)."""
    if step < warmup:
        return (step + 1) / warmup
    turn = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * turn))


def adamw(weights: Iterable[Any], lr: float, weight_decay: float) -> Any:
    """AdamW (Loshchilov & Hutter 2019) over `weights`; biases and factors of norms do not decay."""
    import torch

    weights = list(weights)
    decaying = [p for p in weights if p.ndim > 1]
    rest = [p for p in weights if p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def set_rate(optimizer: Any, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def ahead(make: Callable[[int], T], start: int, last: int) -> Iterator[tuple[int, T]]:
    """(step, make(step)) of each step from `start` to before `last`; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, start) if start < last else None
        for step in range(start, last):
            assert coming is not None
            made = coming.result()
            coming = pool.submit(make, step + 1) if step + 1 < last else None
            yield step, made


class Checkpoint:
    """A file that a run goes on from. options: what decides the result; parts: whatever has a state_dict, by name."""

    def __init__(self, path: Path, options: Mapping[str, Any], **parts: Any) -> None:
        self.path, self.options, self.parts = path, dict(options), parts

    def resume(self, device: Any, free: Collection[str] = ()) -> int:
        """Load the parts and return the steps done; 0 without a file. free: options that may have changed.

        Raises: SystemExit for a run with other options.
        """
        import torch

        if not self.path.is_file():
            return 0
        state = torch.load(self.path, map_location=device, weights_only=True)
        if state["options"] | {name: self.options[name] for name in free} != self.options:
            raise SystemExit(
                f"checkpoint {self.path}: made with {state['options']}. Use these or a new --out"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write it whole or not at all."""
        import torch

        part = self.path.with_name(self.path.name + ".part")
        states = {name: each.state_dict() for name, each in self.parts.items()}
        torch.save({"options": self.options, "step": step, **states}, part)
        os.replace(part, self.path)


@contextmanager
def logged(path: Path, title: str, start: int, last: int) -> Iterator[Callable[..., None]]:
    """A progress bar over steps, and a log with one JSON object a line, appended to `path`.

    Gives `say(line, note="")`, which writes the mapping `line`, a step's or an evaluation's; with a `note` it moves the bar
    to `line["step"]` and shows it there, without one the line is shown above the bar.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with bar, path.open("a", encoding="utf-8") as lines:
        task = bar.add_task("train", total=last, completed=start, note="")

        def say(line: Mapping[str, Any], note: str = "") -> None:
            print(json.dumps(line), file=lines, flush=True)
            if note:
                bar.update(task, completed=line["step"], note=note)
            else:
                bar.console.print(json.dumps(line))

        yield say


def add_run_arguments(parser: argparse.ArgumentParser, threads: str, bf16: bool = False) -> None:
    """How, not what, a tool trains. threads: what --threads counts; bf16: the default of --bf16."""
    parser.add_argument("--stop-at", type=int, help="stop after this step (the schedule still spans --steps)")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=usable_cores(), help=threads)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=bf16, help="autocast to bfloat16"
    )


def twin(model: Any) -> Any:
    """A model with the same parameters (shared) and batch norm statistics of its own (thrown away)."""
    other = copy.deepcopy(model)
    for mine, its in zip(model.modules(), other.modules(), strict=True):
        for name in mine._parameters:
            its._parameters[name] = mine._parameters[name]
    return other

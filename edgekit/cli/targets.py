"""`edgekit targets [NAME] [--json]`: the boards edgekit knows, and the facts and sources of one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from edgekit.schema import to_json
from edgekit.target import Target

_NOT_FACTS = ("name", "title", "cpus", "gpu", "dla", "power_modes", "software", "notes", "sources")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show all facts of this board, with their sources")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    if args.name is not None:
        target = Target.load(args.name)
        print(json.dumps(to_json(target), indent=2) if args.json else "\n".join(_page(target)))
        return 0
    targets = [Target.load(name) for name in Target.names()]
    if args.json:
        print(json.dumps({"targets": [to_json(t) for t in targets]}, indent=2))
        return 0
    print("\n".join(table([("NAME", "BOARD", "CPU", "GPU", "MEMORY", "BACKENDS"), *map(_row, targets)])))
    print("\nedgekit targets NAME shows every fact of a board and where it comes from.")
    return 0


def table(rows: Sequence[Sequence[str]], indent: str = "") -> Iterator[str]:
    """The rows as lines, columns aligned and two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield (indent + "  ".join(cells)).rstrip()


def quantity(field: str, value: Any) -> str:
    """The value of a field with the unit that the end of its name states: clock_hz 1.3e9 -> "1.3 GHz"."""
    if value is None:
        return "not known"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    for suffix, unit in (("_tflops", "TFLOPS"), ("_tops", "TOPS"), ("watts", "W")):
        if field.endswith(suffix):
            return f"{value:g} {unit}"
    if field.endswith("_bytes_per_s"):
        return f"{value / 1e9:g} GB/s"
    if field.endswith("_hz"):
        return f"{value / 1e9:g} GHz" if value >= 1e9 else f"{value / 1e6:g} MHz"
    if "bytes" in field:
        return _bytes(int(value))
    return f"{value:g}"


def _bytes(value: int) -> str:
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def _row(target: Target) -> tuple[str, ...]:
    cpu = " + ".join(f"{c.cores}x {c.name}" for c in target.cpus)
    gpu = f"{target.gpu.name}, {target.gpu.sms} SMs" if target.gpu else "-"
    return (target.name, target.title, cpu, gpu, _bytes(target.dram_bytes), ", ".join(target.backends))


def _page(target: Target) -> Iterator[str]:
    rows: list[tuple[str, str, str]] = []

    def add(path: str, field: str, value: Any) -> None:
        rows.append((path, quantity(field, value), target.source(path) or ""))

    def add_table(path: str, value: Any) -> None:
        for f in dataclasses.fields(value):
            if (item := getattr(value, f.name)) is not None:
                add(f"{path}.{f.name}", f.name, item)

    for f in dataclasses.fields(target):
        value = getattr(target, f.name)
        if f.name in _NOT_FACTS:
            continue
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{f.name}.{key}", f.name, item)
        elif value != ():
            add(f.name, f.name, value)
    for index, cpu in enumerate(target.cpus):
        add_table(f"cpus.{index}", cpu)
    for name in ("gpu", "dla"):
        if (value := getattr(target, name)) is not None:
            add_table(name, value)
    yield f"{target.name}: {target.title}"
    yield ""
    yield from table([("FACT", "VALUE", "SOURCE"), *rows])
    if target.power_modes:
        yield from _block(target, "power_modes", "Power modes (caps; - is no cap or not known)")
    yield from _block(target, "software", "System images, newest first")
    yield ""
    yield "Measured here: nothing. GPU figures are dense (no 2:4 sparsity) and of the GPU alone."
    yield "Sources that say 'memory, not checked' were not looked up."
    for note in target.notes:
        yield f"- {note}"


def _block(target: Target, field: str, title: str) -> Iterator[str]:
    """A list of equal tables, one row each, and where its figures come from."""
    items = getattr(target, field)
    names = [f.name for f in dataclasses.fields(items[0]) if any(getattr(i, f.name) for i in items)]
    rows = [
        [
            "-" if not (value := getattr(item, n)) else "yes" if value is True else quantity(n, value)
            for n in names
        ]
        for item in items
    ]
    heads = [n.removesuffix("_hz").replace("_", " ").upper() for n in names]
    yield ""
    yield f"{title}:"
    yield from table([heads, *rows], indent="  ")
    for path, source in target.sources.items():
        if path.split(".")[0] == field:
            yield f"  source of {path}: {source}"

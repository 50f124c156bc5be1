"""Holds the latency estimate against published latencies, and fits its coefficients on them.

    python benchmarks/estimate_accuracy.py --rows published_latency.csv           the table and its summary
    python benchmarks/estimate_accuracy.py --rows published_latency.csv --fit     and fit anew, cross-validated

The rows stay outside the repository; their columns are device, power_mode, model, input, batch, precision,
runtime, version, threads, latency_ms, includes, source. What is fitted is the few numbers of
edgekit/toolchain/coefficients.json. Held-out errors come from fits that never saw the board (or the network).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import published, shapes  # noqa: E402
from benchmarks.published import Row  # noqa: E402
from edgekit.toolchain import cost  # noqa: E402
from edgekit.toolchain.estimate import Estimator  # noqa: E402

SIGMA, PRIOR, CAP = 0.25, 0.7, 1.5
"""Of a row's log error; of a coefficient's logarithm around its prior; where a row's pull stops growing (Huber)."""
TIE = 0.05
"""Published latencies closer than this are no pair to order."""


@functools.cache
def estimator(network: str, size: tuple[int, int], unit: str) -> Estimator:
    """The layers of a network as a GPU or CPU library fuses them (on any board: only they are used)."""
    board, backend = ("jetson-orin", "tensorrt") if unit == "gpu" else ("rpi5", "onnxruntime")
    return Estimator(shapes.build(network, size), published.boards()[board], backend=backend)


def row_work(row: Row) -> cost.Work:
    where = row.machine
    return estimator(row.network, row.size, where.unit).work(row.precision, where)


class Data:
    """Rows of one unit, all their layers in one table."""

    def __init__(self, rows: Sequence[Row], unit: str) -> None:
        self.rows, self.unit = rows, unit
        parts = [row_work(row) for row in rows]
        self.sizes = [len(p.kind) for p in parts]
        self.work = cost.join(parts)
        self.python = np.array([row.python for row in rows], dtype=float)
        self.log = np.log([row.seconds for row in rows])

    def take(self, keep: np.ndarray) -> Data:
        found = object.__new__(Data)
        found.rows, found.unit = [r for r, k in zip(self.rows, keep, strict=True) if k], self.unit
        found.sizes = [s for s, k in zip(self.sizes, keep, strict=True) if k]
        mask = np.repeat(keep, self.sizes)
        found.work = cost.Work(*(getattr(self.work, f)[mask] for f in cost.Work.__dataclass_fields__))
        found.log, found.python = self.log[keep], self.python[keep]
        return found

    def seconds(self, c: Mapping[str, float]) -> np.ndarray:
        times, _, _ = cost.seconds(self.work, self.unit, c)
        return (
            np.add.reduceat(times, np.cumsum([0, *self.sizes[:-1]]))
            + c["once_us"] * 1e-6
            + self.python * c["python_us"] * 1e-6
        )

    def errors(self, c: Mapping[str, float]) -> np.ndarray:
        """log(estimated / published) of every row."""
        return np.log(self.seconds(c)) - self.log

    def weights(self) -> np.ndarray:
        """Boards and libraries with many rows count for more, but not in proportion."""
        keys = [(r.board, r.runtime, r.precision) for r in self.rows]
        counts = {k: keys.count(k) for k in set(keys)}
        return np.array([min(1.0, (6 / counts[k]) ** 0.5) for k in keys])


def fit(
    data: Data, prior: Mapping[str, float], start: Mapping[str, float], rounds: int = 25
) -> dict[str, float]:
    """Levenberg-Marquardt on the logarithms of the coefficients: Huber loss of the rows' log errors, and a
    normal prior around `prior` that keeps what the rows do not determine at a plausible value."""
    names = list(prior)
    centre = np.log([prior[n] for n in names])
    theta = np.log([start[n] for n in names])
    sigma = np.array([PRIOR for _ in names])
    weights = data.weights()

    def unpack(t: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(t).tolist(), strict=True))

    def residuals(t: np.ndarray) -> np.ndarray:
        r = data.errors(unpack(t)) / SIGMA
        huber = np.where(
            np.abs(r) <= CAP, r, np.sign(r) * np.sqrt(np.maximum(2 * CAP * np.abs(r) - CAP**2, 0))
        )
        return np.concatenate([huber * np.sqrt(weights), (t - centre) / sigma])

    damping, now = 1e-2, residuals(theta)
    for _ in range(rounds):
        step = 1e-4
        jacobian = np.stack([(residuals(theta + step * e) - now) / step for e in np.eye(len(names))], axis=1)
        gradient, hessian = jacobian.T @ now, jacobian.T @ jacobian
        before = now @ now
        for _ in range(8):
            move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = theta + np.clip(move, -0.7, 0.7)
            new = residuals(tried)
            if new @ new < before:
                theta, now, damping = tried, new, max(damping / 5, 1e-6)
                break
            damping *= 4
        if before - now @ now < 1e-4 * before:
            break
    return unpack(theta)


def held_out(
    data: Data, prior: Mapping[str, float], whole: Mapping[str, float], key: Callable[[Row], str]
) -> np.ndarray:
    """log errors of every row by a fit that saw no row of the same `key`."""
    errors = np.zeros(len(data.rows))
    keys = np.array([key(r) for r in data.rows])
    for name in sorted(set(keys)):
        inside = keys == name
        seen = data.take(~inside)
        found = fit(seen, prior, whole, rounds=6)
        errors[inside] = data.take(inside).errors(found)
    return errors


def pairs(rows: Sequence[Row], estimated: np.ndarray) -> tuple[int, int]:
    """(pairs ordered right, pairs) of two networks measured alike on one board."""
    groups: dict[Any, list[int]] = {}
    for i, r in enumerate(rows):
        groups.setdefault(
            (r.device, r.target.cpus[0].clock_hz, r.power, r.runtime, r.precision, r.threads, r.source), []
        ).append(i)
    right = total = 0
    for members in groups.values():
        for i, j in itertools.combinations(members, 2):
            if rows[i].network == rows[j].network and rows[i].size == rows[j].size:
                continue
            if abs(np.log(rows[i].seconds / rows[j].seconds)) < TIE:
                continue
            total += 1
            right += (rows[i].seconds < rows[j].seconds) == (estimated[i] < estimated[j])
    return right, total


def size_of(errors: np.ndarray) -> np.ndarray:
    """|estimated / published - 1|"""
    return np.abs(np.expm1(errors))


def summary(title: str, errors: np.ndarray) -> str:
    size = size_of(errors)
    parts = f"median {np.median(size):6.1%}   90 % of rows within {np.quantile(size, 0.9):6.1%}"
    return f"  {title:<48} {len(size):4d} rows   {parts}   mean log error {errors.mean():+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="CSV of published latencies")
    parser.add_argument(
        "--fit", action="store_true", help="fit the coefficients on these rows and write them"
    )
    parser.add_argument(
        "--left-out", action="store_true", help="also list the rows left out, with the reason"
    )
    parser.add_argument(
        "--no-held-out", action="store_true", help="skip the fits that leave boards and networks out"
    )
    args = parser.parse_args()
    rows, left = published.read(args.rows)
    if not rows:
        sys.exit(f"{args.rows}: no row that can be judged: {published.count(left)}")
    if args.left_out:
        for record, why in left:
            print(
                f"left out: {record['device']} | {record['model']} | {record['runtime']} | {record['precision']}: {why}"
            )
    shipped = cost.fitted()
    priors = json.loads((ROOT / "benchmarks" / "priors.json").read_text(encoding="utf-8"))
    written: dict[str, Any] = {}
    shown: dict[str, list[np.ndarray]] = {"estimate": [], "board": [], "network": []}
    kept: list[Row] = []
    for unit in ("gpu", "cpu"):
        mine = [r for r in rows if (r.backend == "tensorrt") == (unit == "gpu")]
        if not mine:
            continue
        data = Data(mine, unit)
        coefficients = fit(data, priors[unit], priors[unit]) if args.fit else shipped[unit]
        kept += mine
        shown["estimate"].append(data.errors(coefficients))
        if args.fit or not args.no_held_out:
            shown["board"].append(held_out(data, priors[unit], coefficients, lambda r: r.board))
            shown["network"].append(held_out(data, priors[unit], coefficients, lambda r: family(r.network)))
        written[unit] = {k: float(f"{v:.4g}") for k, v in coefficients.items()}
    errors = {k: np.concatenate(v) for k, v in shown.items() if v}
    table(kept, errors)
    report(kept, errors, left)
    if args.fit:
        spread = {}
        for group in ("gpu", "gpu-plain", "cpu-float", "cpu-int8"):
            inside = np.array([r.group == group for r in kept])
            unseen = -np.concatenate([errors["board"][inside], errors["network"][inside]])
            low, high = np.quantile(unseen, [0.1, 0.9])
            spread[group] = [round(float(np.exp(low)), 3), round(float(np.exp(high)), 3)]
        note = (
            f"Fitted by benchmarks/estimate_accuracy.py --fit on {len(kept)} published latencies of {len({r.board for r in kept})} boards "
            f"and {len({r.network for r in kept})} networks. spread: tenth and ninetieth percentile of published / estimated, "
            "rows by fits that saw no row of their board, and by fits that saw none of their family of networks."
        )
        path = ROOT / "edgekit" / "toolchain" / "coefficients.json"
        path.write_text(
            json.dumps({"note": note, **written, "spread": spread}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"\nwrote {path.relative_to(ROOT)}")


def family(network: str) -> str:
    """Scales of one architecture are held out together: yolov8s says too much about yolov8m."""
    for start in ("yolov5", "yolov8", "yolo11", "yolo26", "yolox", "efficientnet", "mobilenet_v1", "mobilenet_v3",
                  "regnetY", "vgg", "squeezenet", "resnet", "yolov3", "yolov4"):  # fmt: skip
        if network.startswith(start):
            return start
    return network


def table(rows: Sequence[Row], errors: Mapping[str, np.ndarray]) -> None:
    heads = {"estimate": "ERROR", "board": "BOARD UNSEEN", "network": "FAMILY UNSEEN"}
    lines = [
        (
            "BOARD",
            "MODE",
            "NETWORK",
            "INPUT",
            "LIBRARY",
            "PRECISION",
            "THREADS",
            "PUBLISHED",
            "ESTIMATED",
            *(heads[k] for k in errors),
        )
    ]
    for i, r in enumerate(rows):
        lines.append((
            r.board, r.power or "-", r.network, f"{r.size[1]}x{r.size[0]}", r.runtime, r.precision, str(r.threads or "-"),
            f"{r.seconds * 1e3:.2f} ms", f"{r.seconds * np.exp(errors['estimate'][i]) * 1e3:.2f} ms",
            *(f"{np.expm1(e[i]):+.0%}" for e in errors.values()),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def report(
    rows: Sequence[Row], errors: Mapping[str, np.ndarray], left: list[tuple[dict[str, str], str]]
) -> None:
    print(f"\n{len(left)} rows left out:")
    for why, count in published.count(left).items():
        print(f"  {count:4d}  {why}")
    groups = {
        "TensorRT, tensor cores": lambda r: r.group == "gpu",
        "TensorRT without them (Nano, float32 of Xavier)": lambda r: r.group == "gpu-plain",
        "CPU, float": lambda r: r.group == "cpu-float",
        "CPU, int8": lambda r: r.group == "cpu-int8",
        "libraries of edgekit's backends": lambda r: r.runtime in ("tensorrt", "onnxruntime", "xnnpack"),
        "all": lambda r: True,
    }
    titles = {
        "estimate": "with the coefficients as they are",
        "board": "held out: fits without that board",
        "network": "held out: fits without that family of networks",
    }
    for kind, found in errors.items():
        print(f"\nAbsolute error, {titles[kind]}:")
        for title, inside in groups.items():
            mask = np.array([inside(r) for r in rows])
            if mask.any():
                print(summary(title, found[mask]))
    print("\nPairs of networks on one board, measured alike, ordered right:")
    published_s = np.array([r.seconds for r in rows])
    for kind, found in errors.items():
        right, total = pairs(rows, published_s * np.exp(found))
        print(f"  {titles[kind]:<48} {right} of {total} ({right / max(total, 1):.0%})")


if __name__ == "__main__":
    main()

"""The short form of the table of compression methods, and the orders in it that hold on every seed that was tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compression


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Lines of the short form by row."""
    out: Path = tmp_path_factory.mktemp("table")
    assert compression.main(["--short", "--jobs", "1", "--out", str(out)]) == 0
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {line["row"]: line for line in lines}


@pytest.mark.slow
def test_methods_beat_their_trivial_controls(table: dict[str, dict[str, Any]]) -> None:
    for method, control, points in (
        ("unstructured-75", "unstructured-75-random", 2),
        ("block-punched-75", "block-punched-75-random", 1),
        ("1to8-one-shot", "1to8-random", 4),
        ("1to8-maxq", "1to8-random", 4),
        ("1to8-sr-ste", "1to8-random", 2),
        ("rank-tucker", "rank-random-factors", 10),
        ("rank-auto", "rank-random-factors", 10),
        ("codec-kmeans-16", "codec-kmeans-16-random", 2),
    ):
        gain = 100 * (table[method]["metric"] - table[control]["metric"])
        assert gain >= points, f"{method} is {gain:.1f} points above {control}"


@pytest.mark.slow
def test_the_freer_the_pattern_the_more_accurate(table: dict[str, dict[str, Any]]) -> None:
    freest, blocks, filters = (table[name] for name in ("unstructured-75", "block-punched-75", "filters-75"))
    assert freest["metric"] >= blocks["metric"] + 0.01
    assert freest["metric"] >= filters["metric"] + 0.03
    nonzero = [line["parameters"] * (1 - line["zeros"]) for line in (freest, blocks, filters)]
    assert max(nonzero) < 1.05 * min(nonzero)  # at equal sparsity


@pytest.mark.slow
def test_only_smaller_graphs_have_fewer_products(table: dict[str, dict[str, Any]]) -> None:
    dense = table["dense"]["macs"]
    assert table["unstructured-75"]["macs"] == table["block-punched-75"]["macs"] == dense
    assert table["filters-75"]["macs"] < 0.3 * dense
    assert table["half-macs-taylor"]["macs"] <= 0.5 * dense and table["rank-auto"]["macs"] <= 0.52 * dense

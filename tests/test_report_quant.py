"""What people are shown about INT8: the report's section, and the lines of build, inspect and verify."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.cli import build, inspect, quantization
from edgekit.toolchain import plots_quant
from edgekit.toolchain.plots_quant import Layer, Step
from edgekit.toolchain.report import render
from edgekit.toolchain.report_quant import percent
from tests import report_samples
from tests.test_report import EVIL, Reader, check_safe, json_values, places, poison


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("quant") / "q.edge"
    return report_samples.write(
        path, report_samples.quantized_evidence(), target="rpi5", precision="int8", pictures={}
    )


def section(text: str, start: str = " Quantization ", end: str = " Raw outputs of the payload") -> str:
    return text[text.index(start) : text.index(end)]


def squeezed(text: str) -> str:
    return " ".join(text.split())


# --- the page --------------------------------------------------------------------------------------


def test_section_says_it_all(bundle):
    text = render([bundle])
    shown = squeezed(section(check_safe(text).text))
    for fact in (
        "search within the accuracy budget, by the rules of LiteRT",
        "mse ranges → equalize /body/1/mul (node 5 of 150, SiLU) → adaround → 2 nodes in float",
        "64 pictures, street_64", "64 calibration pictures are few, expected 100 or more.",  # calibration
        "AP 0.2944, 95 % between 0.262 and 0.329; float 0.2951",
        "+0.0007, paired 95 % between −0.0002 and +0.0019; accepted up to 0.01",
        "2 times on the way", "0.0900 of their variance",
        # variants
        "float32 the network before, onnxruntime – 0.2951 – 11.0", "litert-int8 fastest here ai-edge-litert 2.3.0",
        "361 of 369 operators delegated in 3 partitions 1.19 MB 0.2944 +0.0007 5.18 [4.98 … 5.48] 2.12 × 93.2 %",
        "openvino left out: 1.81 times as slow as the fastest", "1 thread, median with quartiles, interleaved",
        # the search
        "1 mse ranges 0.674 100 % 13.1 – – kept", "2 percentile:99.99 ranges 0.802 – – – – no better",
        "13.2 0.2713 +0.0238 over budget", "14.1 0.2944 +0.0007 within budget", "by the cost model, not measured",
        # layers
        "48 layers with weights", "stays float (2)", "All 48 layers, in order", "the search left it in float",
        "In float on litert: 2 of 150 nodes", "In float on onnxruntime: 13 of 150 nodes", "and 3 more 11 0",
        "/body/1/mul (node 1 of 150, SiLU) 0.100",
        # scores
        "Scores are 0.032 lower than the float network's on average (confidence compression), by 0.012 at most; no limit was set.",
        "0.75 to 1 65", "Scores of 230 matched boxes",
    ):  # fmt: skip
        assert fact in shown, fact
    assert shown.count("operator NonZero: not known there") == 1, "left out, not twice"
    assert shown.count("fastest here") == 1
    assert "In float on openvino" not in shown
    assert text.count("Scores of 230 matched boxes") == 1, "plotted here, not again below"
    assert render([bundle]) == text


def test_plots_mark_what_became_of_it(bundle):
    tags = Reader(render([bundle])).tags
    kinds = [a.get("class") for t, a in tags if t == "circle"]
    assert [k for k in kinds if k and k.startswith("step")] == [
        "step kept", "step left", "step left", "step kept", "step kept", "step refused", "step kept",
    ]  # fmt: skip
    assert sum(a.get("class") == "band" for _, a in tags) == 2, "float layers"


def test_without_a_record(tmp_path):
    """Bundles of older versions, and float ones: no section, or one that says what is missing."""
    evidence = report_samples.full_evidence()
    old = report_samples.write(tmp_path / "a.edge", evidence, target="rpi5", precision="int8", pictures={})
    text = check_safe(render([old])).text
    assert "The build recorded nothing about it." in section(text)
    assert text.count("Scores of 230 matched boxes") == 1
    plain = report_samples.write(tmp_path / "b.edge", evidence, pictures={})
    text = check_safe(render([plain])).text
    assert " Quantization " not in text
    assert "Scores of 230 matched boxes" in text


def test_plain_scheme_and_nothing_float(tmp_path):
    evidence = report_samples.quantized_evidence()
    q = evidence["quantization"]
    q |= {"scheme": "minmax", "metric_looks": 1, "warnings": [], "left_out": {}, "not_lowered": {}}
    for known in q["integer"].values():
        known["float"] = []
    for row in q["trials"]:
        row.pop("seconds", None)
    q["trials"] = q["trials"][:1]
    evidence["agreement"]["score_shift_mean"] = 0.0
    evidence["accept"] |= {"max_score_shift": 0.2, "max_confidence_loss": 0.05}
    made = report_samples.write(tmp_path / "a.edge", evidence, target="rpi5", precision="int8", pictures={})
    shown = squeezed(section(Reader(render([made])).text))
    assert "plain minmax ranges, no repairs" in shown
    assert "1 time on the way" in shown
    assert "No node stays float (litert, onnxruntime, openvino)." in shown
    assert "Warnings" not in shown
    assert "The path of the search" not in shown, "one point is no path"
    assert "1 mse ranges 0.674" in shown
    assert "ms on target" not in shown
    assert "Scores are as high as the float network's on average" in shown
    assert "accepted up to a mean fall of 0.05 and a shift of 0.2." in shown


def test_markup_is_text(bundle):
    evidence = poison(report_samples.quantized_evidence())
    q = evidence["quantization"]
    q["left_out"][EVIL] = q["not_lowered"][EVIL] = EVIL
    q["integer"][EVIL] = q["integer"]["litert"]
    evidence["payloads"][EVIL] = evidence["payloads"]["litert-int8"]
    text = render([bundle], evidence)
    found = check_safe(text)
    assert "<script>alert(1)</script>" in section(found.text, end=" Provenance ")
    assert "\u202e" not in text
    assert "\x00" not in text


SMALL = report_samples.quantized_evidence()
SMALL = {k: SMALL[k] for k in ("quantization", "payloads", "agreement", "metric", "accept")}
SMALL["agreement"]["pairs"] = SMALL["agreement"]["pairs"][:3]
SMALL["metric"]["per_class"] = {}
SMALL["quantization"]["layers"] = SMALL["quantization"]["layers"][19:23]
PLACES = places(SMALL)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PLACES), json_values | st.floats(-1e18, 1e18) | st.sampled_from([0, -1, 1e-300]))
def test_any_value_anywhere(bundle, place, value):
    """Whatever stands in the place of any one entry, the page is whole and safe, and so are the lines."""
    evidence = copy.deepcopy(SMALL)
    here: Any = evidence
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    text = render([bundle], evidence)
    check_safe(text)
    assert not re.search(r'(height|width|x|y)="-', re.sub(r'x="-8"', "", text)), "no bar of negative size"
    for rows in (quantization.variants, quantization.left_out, quantization.floats, quantization.summary):
        assert all(isinstance(cell, str) for row in rows(evidence) for cell in row)
    assert all(isinstance(line, str) for line in quantization.trials(evidence))


@given(st.lists(st.floats(1e-12, 1e18), min_size=1, max_size=20))
def test_search_path_shows_every_step_inside(errors):
    text = plots_quant.search_path([Step(e, "kept", "") for e in errors])
    heights = [float(y) for y in re.findall(r'cy="([\d.e+-]+)"', text)]
    assert len(heights) == len(errors)
    assert all(8 <= y <= 8 + plots_quant.PATH_HEIGHT for y in heights)
    ranked = sorted(zip(errors, heights, strict=True))
    assert all(a[1] >= b[1] - 1e-3 for a, b in itertools.pairwise(ranked)), "less error is lower"


@given(st.floats(1e-12, 1e17), st.floats(1.01, 1e12))
def test_log_ticks(low, ratio):
    ticks = plots_quant.log_ticks(low, low * ratio)
    assert len(ticks) <= 7
    assert all(low <= t <= low * ratio for t in ticks)


@given(st.lists(st.tuples(st.none() | st.floats(-50, 200), st.none() | st.floats(-1, 1), st.booleans()), max_size=30))  # fmt: skip
def test_layers_stay_inside(rows):
    text = plots_quant.layers([Layer(*row, "") for row in rows])
    room = plots_quant.SQNR_HEIGHT + plots_quant.SHARE_HEIGHT
    assert all(0 < float(h) <= room for h in re.findall(r'<rect[^>]* height="([\d.e+-]+)"', text))
    assert text.count('class="band"') == sum(not row[2] for row in rows)


def test_all_of_it_is_said_only_of_all_of_it():
    assert [percent(v) for v in (1, 0.99999, 0.9321, 0, None)] == ["100 %", ">99.9 %", "93.2 %", "0.0 %", "–"]
    assert [quantization.percent(v) for v in (1, 0.99999, None)] == ["100 %", ">99.9 %", ""]


# --- lines -----------------------------------------------------------------------------------------


def inspected(path: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.main(parser.parse_args([str(path), *words]))


def test_inspect(bundle, capsys):
    assert inspected(bundle.path) == 0
    page = capsys.readouterr().out
    for line in (
        "litert-int8       1.14 MiB  AP 0.2944 (drop +0.0007)  5.18 ms, 2.12 x float on 1 thread  93.2 % of MACs in "
        "integers  361 of 369 operators delegated in 3 partitions",
        "openvino  1.81 times as slow as the fastest",
        "calibration                 street_64, 64 pictures",
        "looks at the metric         2",
        "warning                     64 calibration pictures are few, expected 100 or more",
        "  *  mse ranges                                   0.674    100 %     13.1",
        "     in integers, all that can be                 0.198    100 %     13.2  0.2713  +0.0238  over budget",
        "litert       Conv /body/20/conv  3.7 % of MACs  the search left it in float",
        "onnxruntime  11 x Exp                           it stands alone: no integer form of Exp",
    ):
        assert line in page, line
    assert inspected(bundle.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evidence"]["quantization"] == bundle.evidence["quantization"]


def test_inspect_without_a_record(tmp_path, capsys):
    made = report_samples.write(tmp_path / "a.edge", report_samples.full_evidence(), pictures={})
    assert inspected(made.path) == 0
    page = capsys.readouterr().out
    assert "Variants" not in page
    assert "In float" not in page


def test_inspect_escapes(tmp_path, capsys):
    evidence = json.loads(json.dumps(poison(report_samples.quantized_evidence())).replace("\\ud800", ""))
    evidence["quantization"]["warnings"] = ["\x1b[31mred\nsecond line"]
    made = report_samples.write(tmp_path / "a.edge", evidence, target="rpi5", precision="int8", pictures={})
    assert inspected(made.path) == 0
    page = capsys.readouterr().out
    assert "\\x1b[31mred\\nsecond line" in page
    assert all(c.isprintable() or c == "\n" for c in page)
    evidence = report_samples.quantized_evidence() | {"quantization": "nothing"}
    made = report_samples.write(tmp_path / "b.edge", evidence, target="rpi5", precision="int8", pictures={})
    assert inspected(made.path) == 0


def test_build_tells_the_search_once_and_each_variant(capsys):
    evidence = report_samples.quantized_evidence()
    other = copy.deepcopy(evidence)
    del other["quantization"]
    built = [SimpleNamespace(model="m", target=t, evidence=e) for t, e in (("a", evidence), ("b", evidence), ("c", other))]  # fmt: skip
    build.tell_quantization(built)
    captured = capsys.readouterr()
    assert captured.out == "", "stdout is one line per bundle"
    lines = captured.err.splitlines()
    assert lines[0] == "m for a, b: what the search saw, * kept"
    assert sum("adaround" in line for line in lines) == 1
    assert [line for line in lines if line.endswith("variants")] == ["m for a: variants", "m for b: variants"]
    assert sum(line.startswith("  litert-int8 ") for line in lines) == 2
    assert sum(line == "  openvino: left out, 1.81 times as slow as the fastest" for line in lines) == 2

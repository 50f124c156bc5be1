"""The HTML page: complete, self-contained, honest about gaps, and safe with what a stranger wrote."""

from __future__ import annotations

import argparse
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.cli import report as verb
from edgekit.errors import BundleError, OutputError, UsageError
from edgekit.toolchain import page, plots
from edgekit.toolchain.page import Facts, el, esc
from edgekit.toolchain.report import render, write_report
from tests import report_samples

SECTIONS = ["What was built", "Graph", "Outputs", "Boxes", "Accuracy", "Time", "Pictures", "Provenance"]


class Reader(html.parser.HTMLParser):
    """Checks that elements nest, and collects text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + " "


def check_safe(text: str) -> Reader:
    """The page loads nothing, runs nothing and nests."""
    found = Reader(text)
    for tag, attributes in found.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "input", "video")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert re.match(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+$", value or "")
            if name in ("href", "xlink:href"):
                assert re.fullmatch(r"#b\d+", value or "")
            if name == "style":
                assert value == "font-size:30px"
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    return found


@pytest.fixture
def full(tmp_path: Path) -> Bundle:
    return report_samples.write(tmp_path / "a.edge", report_samples.full_evidence())


def test_full_page(full, tmp_path):
    path = write_report(full, tmp_path / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = check_safe(text)
    headings = re.findall(r"<h2>([^<]+)</h2>", text)
    assert [h for h in headings if h in SECTIONS] == SECTIONS
    assert "Not measured." not in found.text
    for fact in (
        "NVIDIA Jetson AGX Orin 64 GB", "float16", "Accepted", "drop +0.0007 on 94 pictures, limit 0.01",  # head
        "0.294", "float 0.295", "7.83 ms", "230 of 232", "scores within 0.012",  # tiles
        "The payload ran on the build machine, not on NVIDIA Jetson AGX Orin 64 GB.",  # limits
        "detector.onnx", "911 k", "541 MMAC", "85.2 int8 TOPS", "64 GiB", "person, bicycle",  # what was built
        "fuse_conv_bn", "341 → 300", "3.1e-06", "Operators (356 nodes)", "yolox",  # graph
        "61.2 dB", "exact", "−4.10 … 6.80", "Over 16 pictures",  # outputs
        "Scores of 230 matched boxes", "99.1 %", "mean +0.00020",  # boxes
        "0.262 to 0.329", "−0.0019", "toothbrush", "accepted up to 0.01",  # accuracy
        "Example CPU", "7.410", "1280 × 720", "The machine was idle.",  # time
        "7 boxes, payload float16",  # pictures
        full.payload_digest, "ab" * 32, "1.23.2", "golden/input_0.bin",  # provenance
    ):  # fmt: skip
        assert fact in found.text, fact
    assert sum(tag == "img" for tag, _ in found.tags) == 4
    assert sum(a.get("class") == "point" for _, a in found.tags) == 230
    assert found.text.count("80 classes") == 1
    stages = [found.text.rindex(f" {s} ") for s in ("preprocess", "engine", "decode", "total")]
    assert stages == sorted(stages), "in the order in which they run"
    assert render([full]) == text, "equal bundles, equal pages"


def test_extra_replaces_evidence(full):
    text = Reader(render([full], {"timing": {"not_measured": "the fan was off"}})).text
    assert "The fan was off." in text
    assert "7.410" not in text


def test_nothing_measured(tmp_path):
    bundle = report_samples.write(tmp_path / "a.edge", {}, pictures={}, target="rpi5", precision="float32")
    found = check_safe(render([bundle]))
    assert found.text.count("Not measured.") == 5
    assert found.text.count("not measured") == 4, "three tiles and the heading of the list"
    assert "What was not measured" in found.text
    assert "Not proven" in found.text
    assert "The build recorded no pictures." in found.text
    assert not re.search(r"\bNone\b|\bnan\b", found.text)


def test_reasons_are_shown_once_on_top_and_in_their_section(tmp_path):
    evidence = {
        "metric": {"not_measured": "no labelled pictures were given"},
        "timing": {"not_measured": "this machine is not a Raspberry Pi 5"},
        "accept": {
            "max_drop": 0.01,
            "passed": None,
            "reason": "not measured: no labelled pictures were given",
        },
        "limits": ["Accuracy was not measured: no labelled pictures were given."],
    }
    text = Reader(render([report_samples.write(tmp_path / "a.edge", evidence, target="rpi5")])).text
    top = text[text.index("What was not measured") : text.index("What was built")]
    assert top.count("no labelled pictures were given") == 1
    assert "This machine is not a Raspberry Pi 5." in top
    assert "No labelled pictures were given." in text[text.index("Accuracy ") :]


@pytest.mark.parametrize(
    ("passed", "word", "tone"),
    [(True, "Accepted", "good"), (False, "Outside its limits", "bad"), (None, "Not proven", "warn")],
)
def test_verdict(tmp_path, passed, word, tone):
    evidence = {"accept": {"passed": passed, "reason": "because", "max_drop": 0.01}}
    text = render([report_samples.write(tmp_path / "a.edge", evidence)])
    assert f'class="verdict {tone}"' in text
    assert f"<b>{word}</b><span>because</span>" in text


def test_host_bundle_does_not_describe_this_machine(tmp_path, monkeypatch):
    """`host` is whatever machine built the bundle: facts detected here would be another machine's."""
    monkeypatch.setattr("edgekit.target.Target.load", lambda name: pytest.fail("detected this machine"))
    evidence = report_samples.full_evidence()
    text = Reader(render([report_samples.write(tmp_path / "a.edge", evidence, target="host")])).text
    assert "The machine that built the bundle." in text
    assert "Example CPU" in text


def test_unknown_board(tmp_path):
    bundle = report_samples.write(tmp_path / "a.edge", {}, target="my-board")
    assert "Facts of this board are not known here." in Reader(render([bundle])).text


def test_comparison(full, tmp_path):
    worse = report_samples.full_evidence()
    worse["accept"] = {"max_drop": 0.01, "passed": False, "reason": "AP dropped by 0.0310"}
    worse["metric"]["drop"] = 0.031
    worse["metric"]["data"] = "other.json"
    others = [
        report_samples.write(tmp_path / "b.edge", worse, target="host", precision="int8"),
        report_samples.write(tmp_path / "c.edge", {}, target="rpi5", precision="float32"),
    ]
    text = render([full, *others])
    found = check_safe(text)
    assert "3 bundles compared" in found.text
    top = found.text[: found.text.index("a.edge")]
    for fact in ("Accepted", "Outside its limits", "Not proven", "+0.0310", "AP 0.294", "int8"):
        assert fact in top, fact
    assert "do not compare" in top, "the metrics come from different pictures"
    assert [a["id"] for tag, a in found.tags if tag == "article"] == ["b1", "b2", "b3"]
    assert sum(tag == "h1" for tag, _ in found.tags) == 1


# --- a stranger's bundle ---------------------------------------------------------------------------

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00\ud800"


def poison(value: Any) -> Any:
    """Every string and every key replaced or extended by markup."""
    if isinstance(value, dict):
        keep = {"file", "name"}
        return {k: (v if k in keep else poison(v)) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return EVIL if isinstance(value, str) else value


def test_markup_in_evidence_is_text(full):
    evidence = poison(report_samples.full_evidence())
    evidence["metric"]["per_class"][EVIL] = 0.5
    evidence["metric"]["payload"][EVIL] = 0.5
    evidence["model"]["ops"][EVIL] = 3
    evidence["timing"]["stages"][EVIL] = {"median_ms": 1.0}
    evidence["payloads"][EVIL] = evidence["payloads"]["tensorrt-float16"]
    text = render([full], evidence)
    found = check_safe(text)
    assert "<script>alert(1)</script>" in found.text, "shown as text"
    assert "\u202e" not in text
    assert "\x00" not in text
    text.encode("utf-8")


def test_markup_in_manifest_is_text(tmp_path):
    nasty = "a<b>&\"'</script>"
    bundle = report_samples.write(tmp_path / "a.edge", {}, provenance={nasty: {"x": [nasty]}}, pictures={})
    found = check_safe(render([bundle]))
    assert nasty in found.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*path, k), *places(v, (*path, k))]]


SMALL = report_samples.full_evidence()
SMALL["agreement"]["pairs"] = SMALL["agreement"]["pairs"][:3]
SMALL["metric"]["per_class"] = {"car": 0.5}
PLACES = places(SMALL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Without pictures: quick to render."""
    return report_samples.write(tmp_path_factory.mktemp("report") / "a.edge", {}, pictures={})


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PLACES), json_values)
def test_any_value_anywhere(plain, place, value):
    """Whatever stands in the place of any one entry, the page is whole and safe."""
    evidence = json.loads(json.dumps(SMALL))
    here = evidence
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    check_safe(render([plain], evidence))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SMALL)), json_values, max_size=5))
def test_any_evidence(plain, evidence):
    check_safe(render([plain], evidence))


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("evidence/none.jpg", "has no file"),
        ("../../etc/passwd", "has no file"),
        ("evidence.json", "not a JPEG or PNG"),
        ("evidence/sample_0.svg", "not a JPEG or PNG"),
    ],
)
def test_sample_that_is_no_picture(tmp_path, file, part):
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    evidence = {"samples": [{"file": file, "caption": "x"}]}
    bundle = report_samples.write(tmp_path / "a.edge", evidence, pictures={"evidence/sample_0.svg": svg})
    found = check_safe(render([bundle]))
    assert part in found.text
    assert not any(tag == "img" for tag, _ in found.tags)


# --- parts -----------------------------------------------------------------------------------------


def test_el_escapes():
    assert el("p", "<b>", el("i", "x")) == "<p>&lt;b&gt;<i>x</i></p>"
    assert el("a", "t", title='"><b>') == '<a title="&quot;&gt;&lt;b&gt;">t</a>'
    assert el("p", esc("<") + "<b>") == "<p>&amp;lt;&lt;b&gt;</p>", "plain concatenation is not markup"


def test_numbers():
    assert [page.number(v) for v in (None, 0, 0.01234, 1234.5, -3.14159, 1.2e-7)] == [
        "–", "0", "0.0123", "1,234", "−3.14", "1.20e-07",
    ]  # fmt: skip
    assert [page.scaled(v, "B") for v in (None, 12, 3_660_000, 204.8e9)] == ["–", "12 B", "3.66 MB", "205 GB"]
    assert [page.signed(v, 3) for v in (0.0001, -0.0001, 0.01, -0.01)] == [
        "0.000",
        "0.000",
        "+0.010",
        "−0.010",
    ]
    assert [page.plain(v) for v in (0.01, 300, 0.65)] == ["0.01", "300", "0.65"]
    assert page.count(1234567) == "1,234,567"


def test_facts_read_wrong_types_as_absent():
    facts = Facts(
        {"n": float("nan"), "b": True, "s": ["x"], "t": 3, "i": [2, 1], "p": [[1, 2], [1], ["a", 2]]}
    )
    assert facts.number("n") is None
    assert facts.number("b") is None
    assert facts.text("s") == ""
    assert facts.text("t") == "3"
    assert facts.interval("i") is None
    assert facts.points("p") == [(1.0, 2.0)]
    assert not facts.at("t", "x")


@given(st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=50))
def test_histogram_holds_every_value(values):
    shapes = re.findall(r'height="([\d.e+-]+)"', plots.histogram(values))
    assert len(shapes) == 21
    assert max(float(h) for h in shapes) == 250


# --- edgekit report --------------------------------------------------------------------------------


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args([str(w) for w in words]))


def test_verb(full, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("a.edge") == 0
    assert "wrote report.html" in capsys.readouterr().out
    assert Path("report.html").read_text(encoding="utf-8") == render([full])
    report_samples.write(tmp_path / "b.edge", {}, target="rpi5")
    assert run("a.edge", "b.edge", "--out", "both.html") == 0
    assert "2 bundles compared" in Path("both.html").read_text(encoding="utf-8")


def test_verb_refuses(full, tmp_path):
    damaged = tmp_path / "d.edge"
    damaged.write_bytes((tmp_path / "a.edge").read_bytes()[:-7])
    with pytest.raises(BundleError):
        run(damaged, "--out", tmp_path / "r.html")
    with pytest.raises(BundleError):
        run(tmp_path / "none.edge", "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(OutputError):
        run(tmp_path / "a.edge", "--out", tmp_path)
    before = (tmp_path / "a.edge").read_bytes()
    with pytest.raises(UsageError, match="is one of the bundles"):
        run(tmp_path / "a.edge", "--out", tmp_path / "x" / ".." / "a.edge")
    assert (tmp_path / "a.edge").read_bytes() == before

"""Variants: the fastest that passes is found, recorded outside the bundle, and used by later loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.backends.base import Payload
from edgekit.bundle import make_variant
from edgekit.errors import OutputError, SelfTestError, UsageError
from edgekit.manifest import Segment
from edgekit.runtime import tuning, variants
from edgekit.runtime.engine import Engine
from tests.bundle_samples import files_of, forge
from tests.cli_runs import cli, refusal
from tests.plan_bundles import Step, altered, network, replace_file, slowed, write

GOOD = network("x", "y")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGEKIT_CACHE", str(folder))
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    return folder


def records(cache: Path) -> list[Path]:
    return sorted(cache.glob("tune/*.json"))


def mixed(path: Path) -> Path:
    return write(
        path,
        [
            Step(
                "net",
                {
                    "slow": slowed(GOOD, 40),
                    "wrong": altered(GOOD, lambda w: w[::-1]),
                    "fast": GOOD,
                    "slower": slowed(GOOD, 160),
                    "broken": network("x", "other"),
                },
            )
        ],
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return mixed(tmp_path / "m.edge")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the payloads that are loaded from now on."""
    seen: list[str] = []
    load = variants._load

    def spy(bundle: Any, segment: Any, variant: Any, options: Any) -> Any:
        seen.append(variant.name)
        return load(bundle, segment, variant, options)

    monkeypatch.setattr(variants, "_load", spy)
    return seen


def no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "race", lambda *_, **__: pytest.fail("timed something"))


# --- the race, on a clock of the test ----------------------------------------------------------


class Clock:
    """Time passes only while something runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, *seconds: float) -> Callable[[], None]:
        def durations() -> Iterator[float]:
            while True:
                yield from seconds

        left = durations()

        def run() -> None:
            self.ran.append(name)
            self.now += next(left)

        return run


def test_a_race_is_interleaved_and_leaves_out_the_first_run_of_a_turn() -> None:
    clock = Clock()
    runs = {"a": clock.job("a", 0.04, 0.002, 0.004), "b": clock.job("b", 0.003)}
    samples = tuning.race(runs, tuning.Effort(8, 2, 10.0), clock)
    np.testing.assert_allclose(samples["a"], [0.003] * 8)
    np.testing.assert_allclose(samples["b"], [0.003] * 8)
    rounds = ["".join(clock.ran[i : i + 6]) for i in range(0, len(clock.ran), 6)]
    assert len(rounds) == 10 and rounds[:2] == ["aaabbb"] * 2
    assert set(rounds[2:]) == {"aaabbb", "bbbaaa"}, "each round has an order of its own"
    again = Clock()
    tuning.race({n: again.job(n, 0.003) for n in "ab"}, tuning.Effort(8, 2, 10.0), again)
    assert again.ran == clock.ran


def test_a_race_keeps_its_budget() -> None:
    clock = Clock()
    samples = tuning.race(
        {"a": clock.job("a", 0.1), "b": clock.job("b", 0.3)}, tuning.Effort(99, 1, 1.5), clock
    )
    assert len(samples["a"]) == len(samples["b"]) == 2, "0.4 s to warm up, then twice 0.4 s; no third"
    assert clock.now <= 1.5
    slow = Clock()
    samples = tuning.race({"a": slow.job("a", 3.0), "b": slow.job("b", 4.0)}, tuning.AT_LOAD, slow)
    assert samples["a"].tolist() == [3.0] and samples["b"].tolist() == [4.0], "once at least"


@pytest.mark.parametrize(
    ("medians", "wins"),
    [((5.0, 4.0, 3.0), "c"), ((3.05, 3.0, 9.0), "a"), ((3.2, 3.05, 3.0), "b"), ((1.0,), "a")],
)
def test_the_least_median_wins_and_near_ties_go_to_the_first(medians: tuple[float, ...], wins: str) -> None:
    samples = {name: np.array([m, m, 50 * m]) for name, m in zip("abc", medians, strict=False)}
    assert tuning.winner(samples) == wins


def test_ratios_are_those_of_the_rounds() -> None:
    # load comes and goes: the medians alone would say 12
    samples = {"s/a": np.array([1.0, 1.0, 4.0]), "s/b": np.array([3.0, 12.0, 12.0])}
    one, other = tuning.timings(samples, "s/a")
    assert (one.ratio, other.ratio) == (1.0, 3.0)
    assert (one.median_ms, other.median_ms, other.min_ms, other.rounds) == (1000.0, 12000.0, 3000.0, 3)
    assert (other.p25_ms, other.p75_ms) == (7500.0, 12000.0)


# --- what load does ----------------------------------------------------------------------------


def test_the_first_load_measures_and_the_next_uses_the_record(
    bundle: Path, cache: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bundle.read_bytes()
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "fast"
        assert set(engine.refused) == {"net/slow", "net/slower", "net/wrong", "net/broken"}
        assert engine.why["net"].startswith("fastest of 3 on this machine: slow takes ")
        assert engine.tuning is not None and engine.tuning.timing("net/wrong") is None
        ratios = [engine.tuning.timing(f"net/{name}").ratio for name in ("fast", "slow", "slower")]  # type: ignore[union-attr]
        assert ratios[0] == 1.0 < ratios[1] < ratios[2]
        facts = json.loads(json.dumps(engine.describe()))["net"]
        assert facts["variant"] == "fast" and facts["why"] == engine.why["net"]
        refused, why = engine.refused, engine.why["net"]
    assert loads == ["slow", "wrong", "fast", "slower", "broken"]
    assert len(records(cache)) == 1 and bundle.read_bytes() == before
    loads.clear()
    no_race(monkeypatch)
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "fast" and loads == ["fast"]
        assert engine.why["net"] == f"{why} (recorded)" and engine.refused == refused


def test_the_record_decides(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the clock of the later load: a record that names another passing variant is followed."""
    edgekit.load(bundle, threads=1).close()
    (path,) = records(cache)
    value = json.loads(path.read_text())["value"]
    value["chosen"]["net"] = "slow"
    path.write_text(json.dumps({"sha256": tuning._digest(value), "value": value}))
    no_race(monkeypatch)
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "slow"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "binary", "list", "keys", "other", "unknown"])
def test_a_damaged_record_is_a_miss(damage: str, bundle: Path, cache: Path) -> None:
    edgekit.load(bundle, threads=1).close()
    (path,) = records(cache)
    text = path.read_text()
    value = json.loads(text)["value"]
    if damage == "other":
        value["payload_digest"] = "sha256:" + "0" * 64
    elif damage == "unknown":
        value["chosen"]["net"] = "gone"
    elif damage == "keys":
        del value["timings"]
    signed = json.dumps({"sha256": tuning._digest(value), "value": value})
    texts = {
        "flip": text.replace('"net": "fast"', '"net": "slow"'),
        "cut": text[:-9],
        "empty": "",
        "list": "[1]",
    }
    path.write_bytes(b"\xff\0\x80" if damage == "binary" else texts.get(damage, signed).encode())
    assert path.read_text(errors="replace") != text
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "fast" and "recorded" not in engine.why["net"]
    assert json.loads(path.read_text())["value"]["chosen"] == {"net": "fast"}, "written anew"


def test_a_recorded_winner_that_fails_is_replaced(bundle: Path, cache: Path) -> None:
    edgekit.load(bundle, threads=1).close()
    (path,) = records(cache)
    for bad in ("wrong", "broken"):
        value = json.loads(path.read_text())["value"]
        value["chosen"]["net"] = bad
        path.write_text(json.dumps({"sha256": tuning._digest(value), "value": value}))
        with edgekit.load(bundle, threads=1) as engine:
            assert engine.variants["net"].name == "fast"
            assert "differ from the golden ones" in engine.refused["net/wrong"]
        assert json.loads(path.read_text())["value"]["chosen"] == {"net": "fast"}


@pytest.mark.parametrize("change", ["threads", "library", "cpu", "isa", "spin", "payload"])
def test_what_a_timing_depends_on_makes_another_key(
    change: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = edgekit.Bundle.open(bundle).manifest
    before, threads = tuning.record_path(manifest, 1), 1
    assert tuning.record_path(manifest, 1) == before
    if change == "threads":
        threads = 2
    elif change == "library":
        monkeypatch.setattr(tuning, "library", lambda backend: f"{backend} 99.0")
    elif change == "cpu":
        monkeypatch.setattr("edgekit.runtime.selftest.cpu_name", lambda: "Another CPU")
    elif change == "isa":
        monkeypatch.setitem(edgekit.host.ISA, "sse4_1", ("never",))  # type: ignore[attr-defined]
        monkeypatch.setitem(edgekit.host.ISA, "neon", ("never",))  # type: ignore[attr-defined]
    elif change == "spin":
        monkeypatch.setenv("EDGEKIT_ORT_SPIN", "0")
    else:
        other = write(tmp_path / "o.edge", [Step("net", {"a": GOOD, "b": slowed(GOOD, 2)})])
        manifest = edgekit.Bundle.open(other).manifest
    assert tuning.record_path(manifest, threads) != before


def test_another_device_measures_again(
    bundle: Path, cache: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edgekit.load(bundle, threads=1).close()
    loads.clear()
    monkeypatch.setattr("edgekit.runtime.selftest.cpu_name", lambda: "Another CPU")
    edgekit.load(bundle, threads=1).close()
    assert len(loads) == 5 and len(records(cache)) == 2


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_without_tuning_the_first_that_passes_runs(
    how: str, tmp_path: Path, cache: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_race(monkeypatch)
    if how == "environment":
        monkeypatch.setenv(tuning.SWITCH, "off")
    bundle = mixed(tmp_path / "m.edge")
    with edgekit.load(bundle, tune=how != "argument") as engine:
        assert engine.variants["net"].name == "slow" and engine.why["net"] == variants.NOT_TUNED
        assert engine.refused["net/fast"] == variants.NOT_TRIED
    assert loads == ["slow"], "nothing else is touched"

    def wrong_first(tree: Any) -> None:
        tree["plan"][0]["variants"] = [tree["plan"][0]["variants"][i] for i in (4, 1, 2, 0, 3)]

    (tmp_path / "w.edge").write_bytes(forge(files_of(bundle), wrong_first))
    with edgekit.load(tmp_path / "w.edge", tune=how != "argument") as engine:
        assert engine.variants["net"].name == "fast"
        assert "golden" in engine.refused["net/wrong"] and "output y" in engine.refused["net/broken"]
        assert engine.refused["net/slow"] == variants.NOT_TRIED
    assert records(cache) == []


def test_a_wrong_switch_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.SWITCH, "0")
    with pytest.raises(UsageError, match=r"variable EDGEKIT_TUNE: expected on or off, got '0'"):
        edgekit.load(bundle)


def test_nothing_is_timed_where_nothing_can_be_chosen(
    tmp_path: Path, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_race(monkeypatch)
    with edgekit.load(write(tmp_path / "one.edge", [Step("net", {"a": GOOD})])) as engine:
        assert engine.why == {"net": "the only variant"} and engine.tuning is None
    with edgekit.load(bundle, variant="slow") as engine:
        assert engine.why == {"net": "asked for by name"}
    assert records(cache) == []


def test_a_variant_whose_library_is_missing_is_a_note(tmp_path: Path, cache: Path) -> None:
    bundle = write(tmp_path / "b.edge", [Step("net", {"a": GOOD, "b": slowed(GOOD, 30)})])
    extra = make_variant("net", "odd-int8", Payload("nosuchlib", "int8", "bin", b"payload", (), ()))

    def add(tree: Any) -> None:
        entry = {k: v for k, v in vars(extra).items() if k != "options"} | {"options": {}}
        tree["plan"][0]["variants"].insert(0, entry)
        tree["files"][extra.path] = {"bytes": extra.bytes, "sha256": extra.digest.removeprefix("sha256:")}

    (tmp_path / "odd.edge").write_bytes(forge({**files_of(bundle), extra.path: b"payload"}, add))
    with edgekit.load(tmp_path / "odd.edge", threads=1) as engine:
        assert engine.variants["net"].name == "a" and "nosuchlib" in engine.refused["net/odd-int8"]
        assert engine.tuning is not None
        assert engine.tuning.device["libraries"]["nosuchlib"] is None, "once it is there, it is another key"
    with pytest.raises(edgekit.EdgekitError, match="nosuchlib"):
        edgekit.load(tmp_path / "odd.edge", variant="odd-int8")


def test_an_untested_choice_is_not_recorded(bundle: Path, cache: Path) -> None:
    with edgekit.load(bundle, threads=1, self_test=False) as engine:
        assert engine.variants["net"].name in ("fast", "wrong")
    assert records(cache) == []


def test_a_cache_that_cannot_be_written_costs_only_time(bundle: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "fast"
    with pytest.raises(OutputError, match="tuning record"):
        variants.tune(bundle, threads=1, rounds=2)


def test_only_wrong_variants_are_refused_with_or_without_a_record(tmp_path: Path, cache: Path) -> None:
    bundle = mixed(tmp_path / "m.edge")
    name = edgekit.Bundle.open(bundle).manifest.golden.outputs[0].path
    bad = replace_file(bundle, tmp_path / "bad.edge", name, bytes(len(files_of(bundle)[name])))
    for _ in range(2):
        with pytest.raises(SelfTestError, match="golden"):
            edgekit.load(bad)
    assert records(cache) == []


def test_each_segment_gets_its_own_winner(tmp_path: Path, cache: Path, loads: list[str]) -> None:
    one, two = network("x", "mid", 1), network("mid", "y", 2, extra="x")
    steps = [
        Step("first", {"slow": slowed(one, 60), "fast": one}),
        Step("second", {"fast": two, "slow": slowed(two, 60)}),
    ]
    bundle = write(tmp_path / "two.edge", steps)
    with edgekit.load(bundle, threads=1) as engine:
        assert {s: v.name for s, v in engine.variants.items()} == {"first": "fast", "second": "fast"}
    loads.clear()
    with edgekit.load(bundle, threads=1) as engine:
        assert loads == ["fast", "fast"] and set(engine.refused) == {"first/slow", "second/slow"}


def test_winners_that_fail_together_are_not_used_together(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each error alone lies within the tolerance, both together do not."""
    one, two = network("x", "mid", 1), network("mid", "y", 2)
    off_one, off_two = altered(one, lambda w: w * 1.01), altered(two, lambda w: w * 1.01)
    steps = [Step("first", {"exact": one, "off": off_one}), Step("second", {"exact": two, "off": off_two})]
    from edgekit.manifest import GoldenTensor

    def worst(**choice: str) -> float:
        path = write(tmp_path / "probe.edge", steps, golden=GoldenTensor("", "", atol=100.0))
        with edgekit.Bundle.open(path) as opened:
            segments = {s.name: s for s in opened.manifest.plan if isinstance(s, Segment)}
            options = variants.LoadOptions(1)
            plan = {
                n: variants.load_variants(opened, s, options, choice[n], {})[0] for n, s in segments.items()
            }
            (rule,) = opened.manifest.golden.outputs
            got = variants._flow(opened, plan, {})["y"] - variants.golden_values(opened, rule)
            variants.close(list(plan.values()))
            return float(np.abs(got).max())

    alone = max(worst(first="off", second="exact"), worst(first="exact", second="off"))
    together = worst(first="off", second="off")
    assert together > alone
    tolerance = GoldenTensor("", "", atol=(alone + together) / 2)
    bundle = write(tmp_path / "b.edge", steps, golden=tolerance)
    monkeypatch.setattr(tuning, "winner", lambda samples: next(n for n in samples if n.endswith("off")))
    with edgekit.load(bundle, threads=1) as engine:
        assert {v.name for v in engine.variants.values()} == {"exact"}
        assert engine.refused["first/off"] == variants.TOGETHER
    with edgekit.load(bundle, threads=1) as engine:
        assert {v.name for v in engine.variants.values()} == {"exact"}


def test_old_records_go(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_RECORDS", 2)
    for threads in (1, 2, 3):
        edgekit.load(bundle, threads=threads).close()
    assert len(records(cache)) == 2


def test_the_race_runs_on_the_golden_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        Step("first", {"a": network("x", "mid", 1), "b": network("x", "mid", 1)}),
        Step("second", {"a": network("mid", "y", 2), "b": network("mid", "y", 2)}),
    ]
    bundle = write(tmp_path / "b.edge", steps, outputs=["y", "mid"])
    with edgekit.Bundle.open(bundle) as opened:
        golden = {g.tensor: variants.golden_values(opened, g).copy() for g in opened.manifest.golden.outputs}
        golden["x"] = variants.golden_values(opened, opened.manifest.golden.inputs[0]).copy()
    seen: dict[str, np.ndarray] = {}
    flow = variants._flow
    monkeypatch.setattr(variants, "_flow", lambda *given: seen.update(flow(*given)) or seen)
    edgekit.load(bundle, threads=1).close()
    for name, value in golden.items():
        np.testing.assert_allclose(seen[name], value, atol=1e-5)


# --- the verb ----------------------------------------------------------------------------------


def test_tune_prints_the_table_and_records(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = cli("tune", bundle, "--threads", 1, "--rounds", 9, "--json")
    assert ran.code == 0, ran
    found = json.loads(ran.out)
    assert found["payload_digest"] == edgekit.Bundle.open(bundle).payload_digest
    assert [found["record"]] == [str(p) for p in records(cache)]
    (segment,) = found["segments"]
    rows = {row["variant"]: row for row in segment["variants"]}
    assert list(rows) == ["slow", "wrong", "fast", "slower", "broken"], "the bundle's order"
    assert {n: r["status"] for n, r in rows.items()} == {
        "slow": "slower", "wrong": "refused", "fast": "chosen", "slower": "slower", "broken": "refused",
    }  # fmt: skip
    assert segment["chosen"] == "fast" and rows["fast"]["ratio"] == 1.0 and rows["fast"]["rounds"] == 9
    assert rows["fast"]["p25_ms"] <= rows["fast"]["median_ms"] <= rows["fast"]["p75_ms"]
    assert rows["wrong"]["median_ms"] is None and "golden" in rows["wrong"]["why"]
    assert found["device"]["threads"] == 1 and "onnxruntime" in found["device"]["libraries"]
    no_race(monkeypatch)
    with edgekit.load(bundle, threads=1) as engine:
        assert engine.variants["net"].name == "fast" and "(recorded)" in engine.why["net"]


def test_tune_measures_again_although_there_is_a_record(bundle: Path, cache: Path) -> None:
    edgekit.load(bundle, threads=1).close()
    (path,) = records(cache)
    value = json.loads(path.read_text())["value"]
    value["chosen"]["net"] = "slow"
    path.write_text(json.dumps({"sha256": tuning._digest(value), "value": value}))
    ran = cli("tune", bundle, "--threads", 1, "--rounds", 5)
    assert ran.code == 0 and "fast " in ran.out and "<- runs here" in ran.out and str(path) in ran.out
    assert json.loads(path.read_text())["value"]["chosen"] == {"net": "fast"}


def test_tune_of_a_single_variant_says_so(tmp_path: Path, cache: Path) -> None:
    one = write(tmp_path / "one.edge", [Step("net", {"a": GOOD})])
    found = json.loads(cli("tune", one, "--json").out)
    assert found["record"] is None and found["segments"][0]["variants"][0]["status"] == "only"
    assert "nothing to choose" in cli("tune", one).out and records(cache) == []


def test_tune_refuses_what_load_refuses(tmp_path: Path) -> None:
    wrong = mixed(tmp_path / "m.edge")
    name = edgekit.Bundle.open(wrong).manifest.golden.outputs[0].path
    bad = replace_file(wrong, tmp_path / "bad.edge", name, bytes(len(files_of(wrong)[name])))
    refusal(cli("tune", bad), 1, "golden")
    refusal(cli("tune", tmp_path / "absent.edge"), 2, "no such file")
    refusal(cli("tune", wrong, "--rounds", "0"), 2, "--rounds")


def test_inspect_says_which_variant_runs_here_and_why(bundle: Path) -> None:
    assert json.loads(cli("inspect", bundle, "--json").out)["tuned"] == []
    assert "not timed here yet" in cli("inspect", bundle).out
    edgekit.load(bundle).close()
    edgekit.load(bundle, threads=1).close()
    tuned = json.loads(cli("inspect", bundle, "--json").out)["tuned"]
    assert [record["threads"] for record in tuned] == [0, 1]
    assert tuned[0]["segments"]["net"]["variant"] == "fast"
    assert "x its time" in tuned[0]["segments"]["net"]["why"]
    assert "fastest of 3 on this machine" in cli("inspect", bundle).out


def test_an_engine_made_directly_takes_the_record_too(bundle: Path) -> None:
    edgekit.load(bundle).close()
    with Engine(edgekit.Bundle.open(bundle), owner=True) as engine:
        assert "(recorded)" in engine.why["net"]

"""`edgekit app`: apps are found by path, get their own words, and end as they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_runs import cli, refusal

APP = '''"""Counts words.

More of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass
class Words:
    count: int


def main(words=None):
    if words == ["say"]:
        sys.exit("app count: nothing to count. Give words")
    if words == ["code"]:
        sys.exit(3)
    print(Words(len(words)), words)
    return 0
'''


@pytest.fixture(autouse=True)
def _apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "apps" / "count"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(APP)
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path))


def test_apps_are_listed_with_their_purpose() -> None:
    lines = cli("app").out.splitlines()
    assert [line.split(None, 1) for line in lines] == [
        [
            "bevfusion",
            "Six cameras and a LiDAR in one view from above, live: boxes in metres out, and a page to watch it on.",
        ],
        ["count", "Counts words."],
        ["detect", "The shipped detector, live: a camera in, boxes out, and a page to watch it on."],
        [
            "gesture",
            "The shipped gesture recogniser, live: frames in, what moves and since when out, and a page to watch it on.",
        ],
    ]


def test_what_follows_the_name_is_the_app_s_own() -> None:
    ran = cli("app", "count", "--view", ":8080", "x")
    assert ran.code == 0, ran.err  # a dataclass finds its module, too
    assert ran.out == "Words(count=3) ['--view', ':8080', 'x']\n"


def test_how_an_app_ends() -> None:
    ran = cli("app", "count", "say")
    assert (ran.code, ran.out, ran.err) == (1, "", "app count: nothing to count. Give words\n")
    assert cli("app", "count", "code").code == 3
    assert cli("app", "detect", "--help").code == 0
    assert cli("app", "detect", "--nothing").code == 2


@pytest.mark.parametrize("app", ["bevfusion", "detect", "gesture"])
def test_a_wrong_option_is_refused_before_anything_is_built(
    app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.app_bundle", lambda *_, **__: pytest.fail("builds"))
    ran = cli("app", app, "--limit", "0")
    assert ran.code == 2 and ran.err.endswith("--limit 0: expected at least 1\n")


def test_an_unknown_app() -> None:
    refusal(cli("app", "detct"), 2, "Did you mean 'detect'?")

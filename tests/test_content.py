"""Where the content folders are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekit import content
from tests.helpers import ROOT


def test_the_checkout_is_found() -> None:
    assert content.find("targets", "rpi5") == ROOT / "targets" / "rpi5"
    assert content.find("targets", "no-such") is None


def test_the_users_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in ("a", "b"):
        (tmp_path / root / "targets" / "rpi5").mkdir(parents=True)
    paths = [str(tmp_path / "a"), "", str(tmp_path / "none"), str(tmp_path / "b")]
    monkeypatch.setenv("EDGEKIT_PATH", os.pathsep.join(paths))
    found = content.folders("targets")
    assert found[:2] == (tmp_path / "a" / "targets", tmp_path / "b" / "targets")
    assert content.find("targets", "rpi5") == tmp_path / "a" / "targets" / "rpi5"
    assert content.find("targets", "rpi4") == ROOT / "targets" / "rpi4"


def test_an_installed_copy_is_found_and_strangers_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    (site / "edgekit" / "_content" / "targets" / "rpi5").mkdir(parents=True)
    (site / "targets" / "rpi5").mkdir(parents=True)  # somebody else's package of that name
    monkeypatch.setattr(content, "__file__", str(site / "edgekit" / "content.py"))
    monkeypatch.delenv("EDGEKIT_PATH", raising=False)
    assert content.folders("targets") == (site / "edgekit" / "_content" / "targets",)

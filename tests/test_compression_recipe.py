"""Recipes: what a file may say, and what is said about a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgekit.compression.recipe import Recipe, method, methods, named_recipes, read_recipe
from edgekit.errors import UsageError
from edgekit.schema import to_json
from edgekit.target import Target
from tests.compression_nets import NEEDED

TWO = """
name = "two"
seed = 5

[[step]]
method = "finetune"
steps = 40

[[step]]
method = "prune"
ratio = 0.5
steps = 10
rounds = 3
finish_steps = 1
"""


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", named_recipes())
def test_shipped_recipes_read(name: str) -> None:
    found = read_recipe(name)
    assert found.name == name
    assert found.title
    assert read_recipe(found.table()) == found, "every option written out reads back"


@pytest.mark.parametrize("name", methods())
def test_methods_are_what_their_folder_says(name: str) -> None:
    found = method(name)
    assert found.__doc__
    assert callable(found.run)
    options = found.Options(**NEEDED.get(name, {}))
    assert dataclasses.is_dataclass(options)
    assert (
        read_recipe({"name": "r", "step": [{"method": name, **to_json(options)}]}).steps[0].options == options
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.anything = 1


def test_a_file_a_table_and_a_recipe_are_the_same(tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path, TWO))
    assert (found.name, found.seed) == ("two", 5)
    assert [s.method for s in found.steps] == ["finetune", "prune"]
    assert found.steps[1].options.ratio == 0.5
    assert found.stages() == ("1-finetune", "2-prune")
    assert read_recipe(found.table()) == found
    assert read_recipe(found) is found
    assert found.batches == 40 + 3 * 10 + 1


def test_scaled_and_seeded(tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path, TWO))
    small = found.scaled(0.1)
    assert small.steps[0].options == dataclasses.replace(found.steps[0].options, steps=4)
    assert small.steps[1].options == dataclasses.replace(found.steps[1].options, steps=1, finish_steps=1)
    assert found.seeded(9) == Recipe("two", found.steps, 9)
    for scale in (0, -1, float("nan"), 1e9):
        with pytest.raises(UsageError, match="expected a number above 0"):
            found.scaled(scale)
    with pytest.raises(UsageError, match="steps must be between"):
        read_recipe({"name": "r", "step": [{"method": "finetune", "steps": 10**7}]}).scaled(10)
    with pytest.raises(UsageError, match="seed -1"):
        found.seeded(-1)


def test_a_new_file_on_the_content_path_is_a_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "calibration" / "recipes"
    folder.mkdir(parents=True)
    (folder / "ours.toml").write_text(TWO)
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path))
    assert read_recipe("ours").name == "two"
    assert "finetune" in named_recipes(), "those that ship stay"


STEP = '[[step]]\nmethod = "finetune"\n'


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ('name = "r"\n[[step]]\nmethod = "finetun"', "step[0].method 'finetun': unknown. Did you mean 'finetune'?"),
        (f'name = "r"\n{STEP}step = 5', "step[0]: unknown key 'step'. Did you mean 'steps'?"),
        (f'name = "r"\n{STEP}[[step]]\nmethod = "finetune"\nsteps = "5"', "step[1].steps: expected an integer, got '5'"),
        (f'name = "r"\n{STEP}ema = 1.0', "step[0]: ema must be at least 0 and below 1, got 1"),
        (f'name = "r"\n{STEP}lr = nan', "step[0].lr: expected a finite number"),
        ('name = "r"\n[[step]]\nsteps = 5', "step[0]: method is missing. Known: "),
        ('name = "r"\n[[step]]\nmethod = 5', "step[0]: method is not a string"),
        (f'{STEP}', "key 'name' is missing"),
        ('name = "r"', "key 'step' is missing"),
        ('name = "r"\nstep = []', "no step"),
        (f'name = "a/b"\n{STEP}', "name 'a/b' must be letters"),
        (f'name = "r"\nseed = -1\n{STEP}', "seed must be between 0"),
        (f'name = "r"\nsteps = 1\n{STEP}', "unknown key 'steps'. Did you mean 'step'?"),
        ("name = ", "not valid TOML"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, text: str, needle: str) -> None:
    with pytest.raises(UsageError) as failed:
        read_recipe(recipe(tmp_path, text))
    message = str(failed.value)
    assert needle in message
    assert message.startswith(f"recipe {tmp_path / 'r.toml'}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "needle"),
    [
        ("finetunes", "neither a .toml file nor a recipe that ships. Did you mean 'finetune'?"),
        ("gone.toml", "no such file"),
        ("", "empty"),
        (
            {"name": "r", "step": [{"method": "finetune", "lr": "x"}]},
            "recipe r: step[0].lr: expected a number",
        ),
        ({"step": []}, "recipe: key 'name' is missing"),
    ],
)
def test_wrong_arguments(given: Any, needle: str) -> None:
    with pytest.raises(UsageError) as failed:
        read_recipe(given)
    assert needle in str(failed.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        read_recipe(tmp_path)


def test_a_step_that_goes_by_time_needs_a_board() -> None:
    step = {"method": "prune", "ratio": 0.5, "steps": 1}
    found = read_recipe({"name": "r", "step": [{"method": "finetune"}, {**step, "by": "latency"}]})
    found.check(Target.load("rpi5"))
    with pytest.raises(UsageError, match=r"recipe r: step\[1\]: prune goes by the time on a board.*--target"):
        found.check(None)
    read_recipe({"name": "r", "step": [{**step, "by": "macs"}]}).check(None)

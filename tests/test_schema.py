"""Strict JSON and dataclasses: whatever comes in, the answer is a value or one SchemaError line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.manifest import KernelStep, Manifest, Segment
from edgekit.schema import SchemaError, canonical_json, from_json, parse_json, printable, to_json
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from edgekit.tasks.detect.spec import DetectSpec
from tests.bundle_samples import sample

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@dataclass(frozen=True)
class Leaf:
    kind: Literal["leaf"]
    number: float


@dataclass(frozen=True)
class Fork:
    kind: Literal["fork"]
    pair: tuple[int, str]
    options: dict[str, int | None]
    type: DType = DType.int8


@dataclass(frozen=True)
class Tree:
    nodes: tuple[Leaf | Fork, ...]
    level: Literal[1, 2] = 1
    flag: bool = False
    name: str | None = None


def one_line(error: BaseException) -> str:
    text = str(error)
    assert len(text) <= 400
    assert text.isprintable()
    text.encode("utf-8")
    return text


def refused(value: Any, cls: type = Tree) -> str:
    with pytest.raises(SchemaError) as caught:
        from_json(cls, value, "here")
    return one_line(caught.value)


LEAF = {"kind": "leaf", "number": 1.5}
FORK = {"kind": "fork", "pair": [3, "x"], "options": {"a": None, "b": 7}}


def test_round_trip() -> None:
    tree = from_json(Tree, {"nodes": [LEAF, FORK], "level": 2, "name": "n"}, "here")
    assert tree == Tree((Leaf("leaf", 1.5), Fork("fork", (3, "x"), {"a": None, "b": 7})), 2, False, "n")
    assert from_json(Tree, to_json(tree), "here") == tree


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "here: expected a table, got []"),
        ({}, "here: key 'nodes' is missing"),
        ({"nodes": {}}, "here.nodes: expected a list, got {}"),
        ({"node": [], "nodes": []}, "here: unknown key 'node'. Did you mean 'nodes'?"),
        ({"nodes": [], "flag": 1}, "here.flag: expected true or false, got 1"),
        ({"nodes": [], "level": True}, "here.level: expected one of 1, 2, got True"),
        ({"nodes": [], "level": 1.0}, "here.level: expected one of 1, 2, got 1.0"),
        ({"nodes": [], "name": 5}, "here.name: expected a string, got 5"),
        ({"nodes": [{**LEAF, "number": True}]}, "here.nodes[0].number: expected a number, got True"),
        ({"nodes": [{**LEAF, "number": math.nan}]}, "here.nodes[0].number: expected a finite number, got nan"),
        ({"nodes": [{**LEAF, "number": 10**400}]}, "here.nodes[0].number: expected a number, got an integer of 1329 bits"),
        ({"nodes": [{**LEAF, "number": 10**9999}]}, "here.nodes[0].number: expected a number, got an integer of 33216 bits"),
        ({"nodes": [{**FORK, "pair": [3]}]}, "here.nodes[0].pair: expected 2 values, got a list of 1"),
        ({"nodes": [{**FORK, "pair": ["3", "x"]}]}, "here.nodes[0].pair[0]: expected an integer, got '3'"),
        ({"nodes": [{**FORK, "type": "int9"}]}, "here.nodes[0].type: expected one of 'float32', "),
        ({"nodes": [{**FORK, "type": ["int8"]}]}, "got a list of 1"),
        ({"nodes": [{**FORK, "options": {"a\nb": ""}}]}, "here.nodes[0].options.'a\\nb': expected an integer, got ''"),
        ({"nodes": [{**FORK, "kind": "leaf"}]}, "here.nodes[0]: unknown key 'pair'. Known: kind, number."),
    ],
)  # fmt: skip
def test_each_misfit_has_its_message(value: Any, message: str) -> None:
    assert message in refused(value)


@pytest.mark.parametrize(
    "value",
    [
        {"x" * 10_000_000: 1},
        {"nodes": "y" * 10_000_000},
        {"nodes": [[["z" * 1_000_000] * 10] * 10] * 10},
        {"\ud800\n": 1},
        {"nodes": "\ud800\x00\u2028"},
    ],
)
def test_messages_stay_one_short_line(value: Any) -> None:
    refused(value)


def test_dataclass_invariants_become_schema_errors() -> None:
    text = refused({"dtype": "int8", "scale": [0.0], "zero_point": [0]}, QuantParams)
    assert text == "here: every scale must be positive and finite"


@given(json_values)
def test_any_json_gives_schema_error_or_a_value(value: Any) -> None:
    for cls in (Tree, Manifest, Target, DetectSpec, Segment, KernelStep):
        try:
            assert isinstance(from_json(cls, value, "here"), cls)
        except SchemaError as error:
            one_line(error)


manifest_json = to_json(sample()[0])


@given(st.data())
def test_any_damage_to_a_manifest_gives_schema_error_or_a_manifest(data: st.DataObject) -> None:
    """Replace one value somewhere in a good manifest: deeper places than arbitrary JSON reaches."""
    tree = json.loads(json.dumps(manifest_json))
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or data.draw(st.booleans()):
            node[key] = data.draw(json_values)
            break
        node = child
    try:
        from_json(Manifest, tree, "here")
    except SchemaError as error:
        one_line(error)


# --- JSON text ---------------------------------------------------------------------------------


@given(json_values)
def test_canonical_json_round_trips_to_the_same_bytes(value: Any) -> None:
    try:
        text = canonical_json(value, "here")
    except SchemaError as error:  # a lone surrogate: no UTF-8
        if "cannot be written as JSON" in one_line(error):
            return
        raise
    try:
        again = parse_json(text, "here")
    except SchemaError as error:  # integers past 64 bits are written but not read
        if "digits, expected at most 19" in one_line(error):
            return
        raise
    assert canonical_json(again, "here") == text


@given(st.binary() | st.text(alphabet='[]{}",:\\0123456789.eE-+truefalsnN \u00e9').map(str.encode))
def test_any_bytes_give_schema_error_or_a_value(data: bytes) -> None:
    try:
        parse_json(data, "here")
    except SchemaError as error:
        one_line(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b"\xff", "not UTF-8 text at byte 0"),
        (b'{"a":1,"a":2}', "key 'a' is there twice"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "number '1e999' is out of range"),
        (b"1" * 20, "an integer of 20 digits, expected at most 19"),
        (b"9" * 1_000_000, "an integer of 1000000 digits, expected at most 19"),
        (b"[" * 65 + b"]" * 65, "nested too deep, expected at most 64 levels"),
        (b"[" * 900_000, "nested too deep, expected at most 64 levels"),
        (b'{"a":' * 100_000, "nested too deep, expected at most 64 levels"),
        (b"[" + b"0," * 1_000_000 + b"0]", "too many values, expected at most 1000000"),
        (b" " * ((16 << 20) + 1), "too large, expected at most 16777216 bytes, got 16777217"),
        (b"{} {}", "not valid JSON: Extra data"),
    ],
)
def test_each_bad_text_has_its_message(text: bytes, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse_json(text, "here")
    assert one_line(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_deepest_allowed_nesting_is_read() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, "here")


def test_canonical_form() -> None:
    value = {"b": [1, 0.5, 1e-7, 1e16, True, None], "a": "é\n", "B": {}}
    assert canonical_json(value, "here") == '{"B":{},"a":"é\\n","b":[1,0.5,1e-07,1e+16,true,null]}'.encode()


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": object()}, {"a": {1}}, "\udcff"])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(SchemaError, match="here: cannot be written as JSON"):
        canonical_json(value, "here")


def test_printable() -> None:
    assert printable("a\nb\ud800") == "a\\nb\\ud800"
    assert printable("x" * 100) == "x" * 77 + "..."

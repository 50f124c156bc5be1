"""Frozen dataclasses to and from plain JSON/TOML values, strictly.

One reader for the bundle manifest, `edgekit.toml` and `target.toml`: unknown keys, missing
keys and wrong types are errors that name the place. No coercion except int -> float.
Supported annotations: str, int, float, bool, None, Any, Enum, Literal, dataclass,
`tuple[T, ...]`, `tuple[A, B]`, `dict[str, T]` (or Mapping) and unions of these.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgekit.errors import EdgekitError, did_you_mean

T = TypeVar("T")


class SchemaError(EdgekitError):
    """A value that does not fit its schema; callers re-raise it as their own error."""

    exit_code = 2


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def to_json(value: Any) -> Any:
    """Dataclasses, enums and tuples as dicts, values and lists; fields equal to None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_json(item) for name, item in items if item is not None}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    return value


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from `data`; `where` names the source in errors.

    Raises: SchemaError, one line, naming the key path, what was expected and what was found.
    """
    result = _convert(cls, data, where)
    assert isinstance(result, cls)
    return result


def _fail(where: str, expected: str, value: Any) -> typing.NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise SchemaError(f"{where}: expected {expected}, got {shown}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, value, where)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            _fail(where, "one of " + ", ".join(map(repr, choices)), value)
        return value
    if origin is tuple:
        return _convert_tuple(kind, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            _fail(where, "a table", value)
        item = typing.get_args(kind)[1]
        return {k: _convert(item, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, where)
    if kind is None or kind is type(None):
        if value is not None:
            _fail(where, "nothing", value)
        return None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            _fail(where, "one of " + ", ".join(repr(m.value) for m in kind), value)
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            _fail(where, "a number", value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        _fail(where, "a finite number", value)
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        _fail(where, names.get(kind, str(kind)), value)
    return value


def _convert_union(kind: Any, value: Any, where: str) -> Any:
    first: SchemaError | None = None
    for option in typing.get_args(kind):
        try:
            return _convert(option, value, where)
        except SchemaError as error:
            # the message of the option that got furthest (longest path) helps most
            if option is not type(None) and (first is None or len(str(error)) > len(str(first))):
                first = error
    assert first is not None
    raise first


def _convert_tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    args = typing.get_args(kind)
    if not isinstance(value, (list, tuple)):
        _fail(where, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        _fail(where, f"{len(args)} values", value)
    return tuple(
        _convert(arg, v, f"{where}[{i}]") for i, (arg, v) in enumerate(zip(args, value, strict=True))
    )


def _convert_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _fail(where, "a table", value)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = _hints(cls)
    unknown = [str(k) for k in value if k not in fields]
    if unknown:
        raise SchemaError(f"{where}: unknown key {unknown[0]!r}. {did_you_mean(unknown[0], fields)}")
    kwargs = {}
    for name, field in fields.items():
        if name in value:
            kwargs[name] = _convert(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{where}: key {name!r} is missing")
    try:
        return cls(**kwargs)
    except ValueError as error:  # a dataclass checks its own invariants in __post_init__
        raise SchemaError(f"{where}: {error}") from None

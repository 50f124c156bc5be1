"""Frozen dataclasses to and from plain JSON/TOML values, strictly.

One reader for the bundle manifest, `edgekit.toml` and `target.toml`: unknown keys, missing
keys and wrong types are errors that name the place. No coercion except int -> float.
Supported annotations: str, int, float, bool, None, Any, Enum, Literal, dataclass,
`tuple[T, ...]`, `tuple[A, B]`, `dict[str, T]` (or Mapping) and unions of these.

The values may come from a stranger: whatever they are, the only exception is SchemaError, its
message is one printable line of bounded length, and reading takes bounded time and memory.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgekit import errors
from edgekit.errors import EdgekitError, did_you_mean

T = TypeVar("T")

LATER = {"later": True}
"""Metadata of a field that came after files had been written: its default says what those mean, and writing
it would change their digests."""

MAX_JSON_BYTES = 16 << 20
MAX_JSON_VALUES = 1_000_000
MAX_JSON_DEPTH = 64
MAX_INTEGER_DIGITS = 19
"""Integers fit 64 bits, so that readers in other languages agree."""


class SchemaError(EdgekitError):
    """A value that does not fit its schema; callers re-raise it as their own error."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 400))


def printable(text: str, limit: int = 80) -> str:
    """`text` on one line of at most `limit` characters, control characters and lone surrogates escaped."""
    return errors.printable(text if len(text) <= limit else text[: limit - 3] + "...")


# --- JSON text ---------------------------------------------------------------------------------


def canonical_json(value: Any, where: str) -> bytes:
    """The one byte form of a JSON value: keys sorted by code point, no spaces, UTF-8, no NaN.

    Numbers print as Python prints them: integers in full, floats as the shortest decimal that
    reads back equal, with exponent when it is below -4 or above 15.
    Raises: SchemaError for NaN, infinity, lone surrogates and values that JSON does not have.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"{where}: cannot be written as JSON: {error}") from None


def parse_json(data: bytes | memoryview, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """JSON from an untrusted source. Bounded in bytes, values, depth and digits; no duplicate keys, no NaN.

    Raises: SchemaError, one line, that begins with `where`.
    """
    if len(data) > max_bytes:
        raise SchemaError(f"{where}: too large, expected at most {max_bytes} bytes, got {len(data)}")
    raw = bytes(data)
    # every value but the first is preceded by one of these; strings only make the bound safer
    if sum(map(raw.count, (b",", b"[", b"{"))) >= MAX_JSON_VALUES:
        raise SchemaError(f"{where}: too many values, expected at most {MAX_JSON_VALUES}")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise SchemaError(f"{where}: nested too deep, expected at most {MAX_JSON_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise SchemaError(f"{where}: not UTF-8 text at byte {error.start}") from None
    except ValueError as error:
        raise SchemaError(f"{where}: not valid JSON: {error}") from None
    level, depth = [value], 0
    while level:
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise SchemaError(f"{where}: nested too deep, expected at most {MAX_JSON_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {_show(twice)} is there twice")
    return table


def _no_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {MAX_INTEGER_DIGITS}")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {_show(digits)} is out of range")
    return value


# --- dataclasses -------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def to_json(value: Any) -> Any:
    """Dataclasses, enums and tuples as dicts, values and lists.

    Left out are fields equal to None, and fields of metadata `LATER` equal to their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {
            f.name: to_json(item)
            for f, item in items
            if item is not None and not ("later" in f.metadata and item == _default(f))
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from `data`; `where` names the source in errors.

    Raises: SchemaError, one line, naming the key path, what was expected and what was found.
    """
    result = _convert(cls, data, where)
    assert isinstance(result, cls)
    return result


_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = _short.maxlong = 60


def _show(value: Any) -> str:
    """repr of bounded length and depth; an integer too long to print is described."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >> 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list, tuple)) and not value:
        return repr(value)
    if isinstance(value, (dict, list, tuple)):
        # items may hold integers that repr refuses: say what it is, not what is in it
        noun = "table" if isinstance(value, dict) else "list"
        return f"a {noun} of {len(value)}"
    return printable(_short.repr(value))


def _key(where: str, key: Any) -> str:
    """The path of `key` below `where`, plain for bare keys, quoted and cut for others."""
    return f"{where}.{key}" if re.fullmatch(r"[\w-]{1,64}", str(key)) else f"{where}.{_show(key)}"


def _fail(where: str, expected: str, value: Any) -> typing.NoReturn:
    raise SchemaError(f"{where}: expected {expected}, got {_show(value)}")


def _same(value: Any, choice: Any) -> bool:
    return type(value) is type(choice) and value == choice  # 1, 1.0 and True are three values


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, value, where)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if not any(_same(value, choice) for choice in choices):
            _fail(where, "one of " + ", ".join(map(repr, choices)), value)
        return value
    if origin is tuple:
        return _convert_tuple(kind, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            _fail(where, "a table", value)
        item = typing.get_args(kind)[1]
        return {k: _convert(item, v, _key(where, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, where)
    if kind is None or kind is type(None):
        if value is not None:
            _fail(where, "nothing", value)
        return None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if not any(_same(value, member.value) for member in kind):
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
    options = typing.get_args(kind)
    if value is None and type(None) in options:
        return None
    # a table that says its kind (a Literal field) is judged as that kind alone: one clear error
    options = tuple(o for o in options if o is not type(None))
    options = tuple(o for o in options if _tag_fits(o, value)) or options
    first: SchemaError | None = None
    for option in options:
        try:
            return _convert(option, value, where)
        except SchemaError as error:
            # the message of the option that got furthest (longest path) helps most
            if first is None or len(str(error)) > len(str(first)):
                first = error
    assert first is not None
    raise first


def _tag_fits(option: Any, value: Any) -> bool:
    if not dataclasses.is_dataclass(option) or not isinstance(value, dict):
        return False
    tags = {
        n: h for n, h in _hints(typing.cast(type, option)).items() if typing.get_origin(h) is typing.Literal
    }
    said = [(value[name], typing.get_args(hint)) for name, hint in tags.items() if name in value]
    return bool(said) and all(any(_same(word, choice) for choice in choices) for word, choices in said)


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
    unknown = next((str(k) for k in value if k not in fields), None)
    if unknown is not None:
        # difflib takes quadratic time: a long key is not a typing mistake
        hint = did_you_mean(unknown, fields) if len(unknown) <= 64 else did_you_mean("", fields)
        raise SchemaError(f"{where}: unknown key {_show(unknown)}. {hint}")
    kwargs = {}
    for name, field in fields.items():
        if name in value:
            kwargs[name] = _convert(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{where}: key {name!r} is missing")
    try:
        return cls(**kwargs)
    except (ValueError, ArithmeticError) as error:  # a dataclass checks its own invariants in __post_init__
        raise SchemaError(f"{where}: {error}") from None

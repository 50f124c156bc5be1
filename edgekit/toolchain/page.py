"""Parts of an HTML page: markup that cannot be injected into, numbers for people, untrusted JSON.

What a bundle says is text from a stranger. `el` escapes every child and attribute that is not
`Markup`, and `Facts` reads a value of the wrong type as absent, so no section needs to check.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator
from typing import Any

VOID = frozenset({"meta", "img", "line", "rect", "circle", "path", "col"})


class Markup(str):
    """HTML that is safe as it is; only `el`, `esc` and `join` make it."""

    __slots__ = ()


def esc(text: str) -> Markup:
    """`text` as HTML text; what does not print (control and direction marks too) becomes U+FFFD."""
    if isinstance(text, Markup):
        return text
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return Markup(html.escape(shown, quote=True))


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Parts in a row, each escaped unless it is Markup."""
    return Markup(esc(between).join(esc(part) for part in parts))


def el(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element. `class_` and `for_` lose the underscore, others turn it into '-'; None leaves one out."""
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{esc(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        assert not children
        return Markup(f"<{tag}{text}>" if tag in ("meta", "img", "col") else f"<{tag}{text}/>")
    return Markup(f"<{tag}{text}>{join(children)}</{tag}>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], class_: str = "", numeric: str = "") -> Markup:
    """A table that scrolls sideways when it must. `numeric`: one character a column, 'n' = align right."""
    marks = [*numeric, *" " * 40]

    def cells(tag: str, row: Iterable[str]) -> Markup:
        return join(
            el(tag, cell, class_="n" if mark == "n" else ("bar" if mark == "b" else None))
            for cell, mark in zip(row, marks, strict=False)
        )

    body = join(el("tr", cells("td", row)) for row in rows)
    top = el("thead", el("tr", cells("th", head)))
    return el("div", el("table", top, el("tbody", body), class_=class_ or None), class_="scroll")


def pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    """A list of names and values; empty values are left out."""
    return el("dl", join(join([el("dt", name), el("dd", value)]) for name, value in _safe(rows) if value))


def _safe(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[Markup, Markup]]:
    for name, value in rows:
        yield esc(name), esc(value)


# --- numbers -----------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands apart, e.g. 1,234 or 0.0123; tiny ones as 1.2e-07."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e12:
        return _minus(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return _minus(f"{value:,.{decimals}f}")


def count(value: float | None) -> str:
    """A whole number, thousands apart."""
    return "–" if value is None else _minus(f"{value:,.0f}")


def plain(value: float | None) -> str:
    """As somebody would write it: 0.01, 0.25, 300."""
    return "–" if value is None else _minus(f"{value:.4g}")


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, for columns that are compared."""
    return "–" if value is None else _minus(f"{value:,.{decimals}f}")


def signed(value: float | None, decimals: int) -> str:
    """With its sign; zero has none."""
    if value is None:
        return "–"
    shown = f"{value:+,.{decimals}f}"
    return _minus(shown if float(shown.replace(",", "")) != 0 else shown[1:])


def scaled(value: float | None, unit: str) -> str:
    """With a prefix: 3.66 MB, 541 MMAC, 204.8 GB/s."""
    if value is None:
        return "–"
    size = abs(value)
    for prefix in ("", "k", "M", "G", "T", "P"):
        if size < 1000 or prefix == "P":
            decimals = 0 if not prefix or size >= 100 else (1 if size >= 10 else 2)
            return f"{_minus(f'{math.copysign(size, value):.{decimals}f}')} {prefix}{unit}".rstrip()
        size /= 1000
    raise AssertionError


def _minus(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else text


# --- untrusted JSON ----------------------------------------------------------------------------


class Facts:
    """A JSON table whose entries may be anything: what has the wrong type reads as absent."""

    def __init__(self, value: Any = None) -> None:
        self.value: dict[str, Any] = value if isinstance(value, dict) else {}

    def __bool__(self) -> bool:
        return bool(self.value)

    def at(self, *path: str) -> Facts:
        """The table at `path`, empty when there is none."""
        here: Any = self.value
        for key in path:
            here = here.get(key) if isinstance(here, dict) else None
        return Facts(here)

    def number(self, key: str) -> float | None:
        """A finite number."""
        return as_number(self.value.get(key))

    def text(self, key: str, limit: int = 400) -> str:
        """A string, or a number as one; "" when absent."""
        return as_text(self.value.get(key), limit)

    def flag(self, key: str) -> bool | None:
        value = self.value.get(key)
        return value if isinstance(value, bool) else None

    def tables(self, key: str, limit: int = 200) -> list[Facts]:
        """The tables of a list."""
        found = self.value.get(key)
        return [Facts(v) for v in found[:limit] if isinstance(v, dict)] if isinstance(found, list) else []

    def texts(self, key: str, limit: int = 200) -> list[str]:
        """The strings of a list."""
        found = self.value.get(key)
        return [t for t in map(as_text, found[:limit]) if t] if isinstance(found, list) else []

    def numbers(self, key: str, limit: int = 1000) -> dict[str, float]:
        """The numbers of a table."""
        found = ((k, as_number(v)) for k, v in list(self.at(key).value.items())[:limit])
        return {k: v for k, v in found if v is not None}

    def interval(self, key: str) -> tuple[float, float] | None:
        """Two numbers, low and high."""
        found = self.value.get(key)
        if not isinstance(found, list) or len(found) != 2:
            return None
        low, high = as_number(found[0]), as_number(found[1])
        return None if low is None or high is None or low > high else (low, high)

    def points(self, key: str, limit: int = 400) -> list[tuple[float, float]]:
        """Pairs of numbers."""
        found = self.value.get(key)
        rows = found[:limit] if isinstance(found, list) else []
        good = [(as_number(r[0]), as_number(r[1])) for r in rows if isinstance(r, list) and len(r) == 2]
        return [(a, b) for a, b in good if a is not None and b is not None]


def as_number(value: Any) -> float | None:
    """A finite float of sane size, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e18 < value < 1e18 else None


def as_text(value: Any, limit: int = 400) -> str:
    """A string or number as text of at most `limit` characters; anything else is ""."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    if not isinstance(value, str):
        found = as_number(value)
        value = "" if found is None else f"{found:.10g}"
    text: str = value
    return text if len(text) <= limit else text[: limit - 1] + "…"

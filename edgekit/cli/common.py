"""Small things that several verbs say and ask."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError, did_you_mean, printable

if TYPE_CHECKING:
    from edgekit.bundle import Bundle

MAX_COUNT = 10**9
MAX_THREADS = 1024


def warn(bundle: Bundle) -> None:
    """One line on stderr when the bundle is for another board than this machine."""
    from edgekit.runtime.engine import foreign_target

    text = foreign_target(bundle)
    if text:
        say(f"edgekit: warning: bundle {bundle.path}: {text}")


def say(text: str) -> None:
    """One line for people, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout (ASCII, so that no terminal or pipe can garble it)."""
    print(json.dumps(value))


def integer(option: str, low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`. Raises: UsageError."""

    def parse(text: str) -> int:
        plain = text.strip()
        value = int(plain) if plain.lstrip("-").isdecimal() and len(plain) <= 18 else None
        if value is None or not low <= value <= high:
            raise UsageError(
                f"option {option} {printable(text)[:40]}: expected a whole number from {low} to {high}"
            )
        return value

    return parse


def fraction(option: str) -> Callable[[str], float]:
    """An argparse type: a number from 0 to 1. Raises: UsageError."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise UsageError(f"option {option} {printable(text)[:40]}: expected a number from 0 to 1")
        return value

    return parse


def one_of(option: str, known: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of some words. Raises: UsageError with a suggestion."""

    def parse(text: str) -> str:
        if text not in known:
            raise UsageError(
                f"option {option} {printable(text)[:40]!r}: unknown, expected one of {', '.join(known)}. "
                + (did_you_mean(text, known) if "Did" in did_you_mean(text, known) else "")
            )
        return text

    return parse


def filled(option: str) -> Callable[[str], str]:
    """An argparse type: any text but an empty one. Raises: UsageError."""

    def parse(text: str) -> str:
        if not text.strip():
            raise UsageError(
                f"option {option}: empty, expected a value. Leave the option out for its default"
            )
        return text

    return parse


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--threads and --variant, of every verb that loads a bundle."""
    parser.add_argument(
        "--threads",
        type=integer("--threads", 0, MAX_THREADS),
        default=0,
        metavar="N",
        help="CPU threads of the engine (default: 0, its own choice)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="payload to use when the bundle has several (default: the fastest)",
    )


def ran(runs: dict[str, Any]) -> str:
    """What `Engine.describe` says of a step, for people: the payload and why it, or the kernel."""
    if "variant" in runs:
        return f"{printable(runs['variant'])}, {printable(runs['why'])}"
    return f"kernel {printable(str(runs.get('kernel', '')))}, {printable(str(runs.get('library', '')))}"

"""Every exception edgekit raises on purpose.

    EdgekitError (exit 1)              the work failed
    ├── UsageError (2)                 a wrong argument, name or project file
    │   └── MissingExtraError          an optional package is not installed
    ├── ModelError (2)                 a model file that cannot be read or used
    ├── CalibrationError (2)           calibration data missing or unfit
    ├── LoweringError (2)              the target cannot run this graph
    ├── BundleError (2)                a bundle that is damaged, unsafe or of a newer schema
    ├── SelfTestError (1)              a loaded engine does not reproduce its golden output
    ├── EvidenceError (1)              a build that misses its accuracy budget
    ├── OutputError (1)                a result that could not be written
    └── StreamError (1)                a sensor, session or sink failed while streaming

Messages are one line: ``<what> <which>: <problem>, expected X, got Y. <next step>``.
The command line prints them as they are and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(EdgekitError):
    """A wrong argument, an unknown name or a faulty project file."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional dependency is missing; the message holds the pip line that installs it, or `hint`
    for a package that pip does not have."""

    def __init__(self, package: str, extra: str, purpose: str, hint: str = "") -> None:
        hint = hint or f"Run: pip install 'edgekit[{extra}]'"
        super().__init__(f"package {package}: not installed, needed to {purpose}. {hint}")
        self.package = package
        self.extra = extra


class ModelError(EdgekitError):
    """A model file that is missing, damaged or outside what edgekit takes."""

    exit_code = 2


class CalibrationError(EdgekitError):
    """Calibration data that is missing or unfit; random numbers are never used instead."""

    exit_code = 2


class LoweringError(EdgekitError):
    """The target's backend cannot run this graph; the message lists every unsupported operator."""

    exit_code = 2


class BundleError(EdgekitError):
    """A bundle that is damaged, unsafe, of a newer schema or for another machine."""

    exit_code = 2


class SelfTestError(EdgekitError):
    """A loaded engine does not reproduce the golden output of its bundle."""


class EvidenceError(EdgekitError):
    """A build whose evidence misses the accept limits."""


class OutputError(EdgekitError):
    """A file that could not be written (disk full, read-only, no permission)."""


class StreamError(EdgekitError):
    """A sensor, a session or a sink failed while streaming."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"Did you mean 'a' or 'b'?"` for close matches, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "Known: " + ", ".join(names) + "."


def printable(name: object) -> str:
    """A path or URI for a one-line message: control characters and stray bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))

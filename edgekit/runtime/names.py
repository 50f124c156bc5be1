"""What a stream is given, and what it calls it: cameras, engines and sinks by short names of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgekit.bundle import Bundle
from edgekit.errors import UsageError, printable
from edgekit.runtime.engine import Engine
from edgekit.runtime.sinks import Sink
from edgekit.runtime.sources import Source

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "source": (
        (str, Path, Source),
        "a path, a URI or a Source. A camera is v4l2:/dev/video0, IteratorSource takes a program's own pictures",
    ),
    "bundle": ((str, Path, Bundle, Engine), "a path, a Bundle or an Engine. edgekit.load gives one"),
    "sink": ((str, Path, Sink), "a name or a Sink. A file's name is one"),
}


def check_kind(what: str, thing: Any) -> None:
    """Raises: UsageError unless `thing` may be given as that."""
    kinds, expected = _KINDS[what]
    if not isinstance(thing, kinds):
        text = printable(repr(thing)[:60])
        raise UsageError(f"stream: {what} {text} ({type(thing).__name__}): expected {expected}")


def named(what: str, given: Any, name: Callable[[Any], str]) -> dict[str, Any]:
    """One thing, several, or a mapping of them, by unique name. Raises: UsageError."""
    if isinstance(given, Mapping):
        names, things = [str(key) for key in given], list(given.values())
    else:
        things = list(given) if isinstance(given, (list, tuple)) else [given]
        names = []
    for i, thing in enumerate(things):
        check_kind(what, thing)
        if isinstance(thing, Source) and any(thing is other for other in things[:i]):
            raise UsageError(f"stream: source {thing.uri}: given twice. Every engine gets its frames already")
    if not things:
        raise UsageError("stream: expected at least one bundle and one source, got none")
    return dict(zip(names or unique(map(name, things)), things, strict=True))


def unique(names: Iterable[str]) -> list[str]:
    """The same names; one that is taken becomes `name-2` and so on."""
    found: list[str] = []
    for base in names:
        text, number = base, 1
        while text in found:
            number += 1
            text = f"{base}-{number}"
        found.append(text)
    return found


def camera_name(source: str | Path | Source) -> str:
    """A short name: `video0`, `csi0`, `street`, the file's name without its suffix."""
    uri = source.uri if isinstance(source, Source) else re.sub(r"//[^/@]*@", "//", str(source))  # no password
    plain = uri.partition("?")[0]
    scheme, _, rest = plain.partition(":")
    if scheme in ("rtsp", "rtsps"):  # the last part of the path, else the whole host
        host, _, path = rest.strip("/").partition("/")
        return (path.rstrip("/").rpartition("/")[2] or host.replace(":", "-"))[:40] or scheme
    scheme, _, rest = plain.rpartition(":")
    name = "" if scheme == "gst" else Path(rest).stem
    return (scheme + name if not name or name.isdecimal() else name)[:40] or "camera"


def engine_name(bundle: str | Path | Bundle | Engine) -> str:
    """The bundle's file name up to the first dot."""
    if isinstance(bundle, Engine):
        bundle = bundle.bundle
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    return Path(path).name.partition(".")[0] or "engine"

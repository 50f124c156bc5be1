"""Results of long steps, kept by the content of what went in (never by file name).

A cache that cannot be read or written is a cache that misses, never an error; an entry that was
damaged or altered counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edgekit


def cache_dir() -> Path:
    """`$EDGEKIT_CACHE`, else `$XDG_CACHE_HOME/edgekit`, else `~/.cache/edgekit`."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit"


def digest(*parts: Any) -> str:
    """sha256 over bytes and JSON values, in order; every part is length-prefixed."""
    h = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def sources(*packages: str) -> str:
    """Digest of the code of some packages and modules of edgekit ("kernels", "tasks/detect", "timebase.py"): a
    result that they computed is not that of their next version."""
    root = Path(edgekit.__file__).parent
    files = sorted(
        path
        for package in packages
        for path in ([root / package] if package.endswith(".py") else (root / package).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h")
    )
    return digest(*(part for path in files for part in (str(path.relative_to(root)), path.read_bytes())))


def tools() -> dict[str, str]:
    """Versions of the tools that may change a result."""
    from importlib.metadata import version

    names = ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "opencv-python-headless")
    known = {name: version(name) for name in (*names, "pycocotools")}
    return {"edgekit": edgekit.__version__, "python": platform.python_version(), **known}


def load(kind: str, key: str) -> dict[str, Any] | None:
    """The stored JSON object, or None."""
    path = cache_dir() / kind / f"{key}.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        value = entry["value"]
        intact = entry["sha256"] == digest(kind, key, value)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if intact and isinstance(value, dict) else None


def store(kind: str, key: str, value: Mapping[str, Any]) -> None:
    """Keep a JSON object, with a digest of it: a flipped bit in a number would else pass for evidence."""
    path = cache_dir() / kind / f"{key}.json"
    temporary = path.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}.tmp")
    text = json.dumps({"sha256": digest(kind, key, json.loads(json.dumps(value))), "value": value})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

"""Writing a model entry as an `edgekit.toml` that reads back as the same entry."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.archive import write_atomic
from edgekit.dataset import DataSet
from edgekit.project import FILE_NAME, ModelEntry
from edgekit.project.training import TrainHint
from edgekit.schema import to_json


def write_entry(entry: ModelEntry, folder: Path, note: str) -> Path:
    """Write `folder`/edgekit.toml with this one model; its paths are written relative to the folder.

    entry: with a file as its source. note: a comment on the first line. Raises: OutputError.
    """
    assert entry.module is None, "a torch module is written as ONNX first"

    def relative(path: Path) -> str:
        try:
            return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
        except ValueError:  # another drive
            return path.resolve().as_posix()

    def pictures(data: DataSet) -> dict[str, Any]:
        if data.name:
            return {"set": data.name, "count": data.count}
        paths = {k: relative(v) for k in ("images", "data") if (v := getattr(data, k)) is not None}
        source = {"source": data.source, "seed": data.seed} if data.source else {}
        return {**paths, **source, "count": data.count}

    def training(train: TrainHint) -> dict[str, Any]:
        """Without `steps`: the network has been trained."""
        rest = {f.name: getattr(train, f.name) for f in dataclasses.fields(train)}
        return {**pictures(train.data), **{k: v for k, v in rest.items() if k not in ("data", "steps")}}

    default = ModelEntry(entry.name, entry.source)
    model: dict[str, Any] = {"name": entry.name, "source": relative(entry.source), "task": entry.task}
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if field.name in ("name", "source", "task") or value == getattr(default, field.name):
            continue
        if isinstance(value, DataSet):
            model[field.name] = pictures(value)
        else:
            model[field.name] = training(value) if isinstance(value, TrainHint) else to_json(value)
    lines = [f"# {note}", "[project]", f"name = {_value(entry.name)}", "", "[[model]]"]
    lines += _table(model, "model")
    path = folder / FILE_NAME
    write_atomic(path, ["\n".join([*lines, ""]).encode("utf-8")], "project")
    return path


def _table(table: Mapping[str, Any], place: str) -> list[str]:
    """Plain values first, then a table each. None is left out, and so are tables without any value."""
    plain = [
        f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None and not isinstance(v, Mapping)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping) and (inside := _table(value, f"{place}.{_key(key)}")):
            head = [f"[{place}.{_key(key)}]"] if not inside[0].startswith("[") and inside[0] else []
            plain += ["", *head, *inside]
    return plain


def _key(text: str) -> str:
    return text if text.replace("-", "").replace("_", "").isalnum() and text.isascii() else _value(text)


def _value(value: Any) -> str:
    """A TOML value. JSON's strings are TOML's, save that TOML wants DEL escaped too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    assert isinstance(value, str), value
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")

"""Torch modules as sources: `module = "package.module:function"` of a project, and what a build makes of it.

module = load_module(entry.module, "model net")       # what the function returned, with its weights
entry = exported(entry)                               # the same entry, whose source is an ONNX file in the cache
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgekit.archive import write_atomic
from edgekit.errors import EdgekitError, MissingExtraError, ModelError, OutputError, UsageError, printable
from edgekit.project import ModelEntry, safe_name
from edgekit.project.training import ModuleSource

if TYPE_CHECKING:
    from torch import nn

WRAPPED = ("state_dict", "model", "ema")
"""Keys under which checkpoints keep the weights among other things."""


def exported(entry: ModelEntry) -> ModelEntry:
    """`entry` with an ONNX file as its source; one that has a file is returned as it is.

    The network is exported each time, and the file kept in the cache under its content.
    Raises: UsageError, ModelError, MissingExtraError without torch, OutputError.
    """
    if entry.module is None:
        return entry
    what = f"model {entry.name}"
    if entry.train is not None and entry.train.steps:
        raise UsageError(
            f"{what}: its network is trained by 'edgekit compress' first (train.steps). Build the folder that it writes"
        )
    module = load_module(entry.module, what)
    return dataclasses.replace(entry, source=export(module, entry.module, what), module=None)


def export(module: Any, source: ModuleSource, what: str) -> Path:
    """The ONNX file of `module`, in the cache. Raises: UsageError, ModelError, OutputError."""
    import torch

    from edgekit.models.exporting import write_onnx
    from edgekit.toolchain import cache

    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"{what}: {printable(source.factory)} gives a {type(module).__name__}, expected a torch.nn.Module"
        )
    if not source.input:
        raise UsageError(
            f"{what}: the sizes of its input are not known. Give --input 1x3x224x224, or input = [1, 3, 224, 224]"
        )
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        path = Path(folder) / "network.onnx"
        try:
            write_onnx(module, path, (torch.zeros(source.input),), ["input"], ["output"])
        except Exception as error:
            raise ModelError(f"{what}: cannot be exported to ONNX: {_line(error)}") from error
        data = path.read_bytes()
    name = f"{safe_name(source.factory.rpartition(':')[2])}.onnx"
    try:
        found = cache.cache_dir() / "modules" / hashlib.sha256(data).hexdigest()[:32] / name
        if not found.is_file():
            write_atomic(found, [data], "cache")
    except OutputError:  # a cache that cannot be written: for this process only
        found = Path(tempfile.mkdtemp(prefix="edgekit-modules-")) / name
        write_atomic(found, [data], "cache")
    return found


def load_module(source: ModuleSource, what: str) -> Any:
    """What the function returns: a torch module with its weights, in evaluation mode, or whatever else it makes.

    Torch's generator is seeded with 0 for it, so that weights drawn at random are the same each time.
    Raises: UsageError in one line where it cannot be found, fails, or its weights do not fit; MissingExtraError.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "torch", "make networks from torch modules") from None
    where = f"{what}: module {printable(source.factory)}"
    name, _, function = source.factory.partition(":")
    with _importable(source.root, name):
        try:
            found: ModuleType = importlib.import_module(name)
        except Exception as error:
            raise UsageError(f"{where}: cannot be imported: {_line(error)}") from error
        make = getattr(found, function, None)
        if not callable(make):
            raise UsageError(f"{where}: {name} has no function {function}. Check the name after the colon")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                made = make()
        except EdgekitError:
            raise
        except Exception as error:
            raise UsageError(f"{where}: {function}() failed: {_line(error)}") from error
    if source.weights is not None:
        if not isinstance(made, torch.nn.Module):
            raise UsageError(
                f"{where}: gives a {type(made).__name__}, expected a torch.nn.Module for its weights"
            )
        _load_weights(made, source.weights, what)
    if isinstance(made, torch.nn.Module):
        made.eval()
    return made


def _load_weights(module: nn.Module, path: Path, what: str) -> None:
    """Raises: UsageError, in one line."""
    import torch

    where = f"{what}: weights {printable(path)}"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise UsageError(
            f"{where}: hold more than tensors, which is not loaded from a file. Save them with torch.save(net.state_dict(), ...)"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{where}: not a file of torch.save: {_line(error)}") from None
    for key in WRAPPED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError(f"{where}: expected a state_dict, names and tensors. Save net.state_dict()")
    mine = module.state_dict()
    wrong = [
        n for n in {**mine, **state} if n not in mine or n not in state or mine[n].shape != state[n].shape
    ]
    if wrong:
        name = wrong[0]
        sizes = [list(s[name].shape) if name in s else "not there" for s in (mine, state)]
        raise UsageError(
            f"{where}: do not fit the module: {printable(name)} is {sizes[0]} in it, {sizes[1]} in the file "
            f"({len(wrong)} of {len(mine)} differ)"
        )
    module.load_state_dict(dict(state))


@contextlib.contextmanager
def _importable(root: Path | None, name: str) -> Iterator[None]:
    """`root` comes first where Python looks for modules, and a module of the same name of elsewhere gives way."""
    top = name.partition(".")[0]
    local = root is not None and ((root / f"{top}.py").is_file() or (root / top).is_dir())
    if not local:
        yield
        return
    folder = str(Path(str(root)).resolve())
    held = {n: m for n, m in sys.modules.items() if n == top or n.startswith(f"{top}.")}
    foreign = top in held and not str(getattr(held[top], "__file__", "")).startswith(folder)
    for n in held if foreign else ():
        del sys.modules[n]
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if foreign:
            for n in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
                del sys.modules[n]
            sys.modules.update(held)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return printable(f"{type(error).__name__}{': ' if text else ''}{text}")

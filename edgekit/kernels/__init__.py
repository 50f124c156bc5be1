"""Kernels: `<kernel>/reference.py` (numpy) defines what `<kernel>/kernel.cpp` computes.

The compiled ones live in one module, `edgekit._native`. Without it (no compiler at install time) the
references run and give the same results; `EDGEKIT_KERNELS=numpy` forces them, `native` forbids them.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from edgekit.errors import UsageError, did_you_mean

_CHOICES = ("auto", "native", "numpy")


@functools.cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("edgekit._native")
    except ModuleNotFoundError:  # not built; a module that is there but broken still raises
        return None


def native() -> ModuleType | None:
    """`edgekit._native`, or None where it is not built or `EDGEKIT_KERNELS=numpy`.

    Raises: UsageError for another value of `EDGEKIT_KERNELS`, or `native` without the module.
    """
    choice = os.environ.get("EDGEKIT_KERNELS") or "auto"
    if choice == "numpy":
        return None
    module = _load()
    if choice == "native" and module is None:
        raise UsageError(
            "EDGEKIT_KERNELS native: edgekit._native is not built. Install a C++17 compiler and reinstall edgekit."
        )
    if choice not in _CHOICES:
        raise UsageError(f"EDGEKIT_KERNELS {choice!r}: unknown. {did_you_mean(choice, _CHOICES)}")
    return module

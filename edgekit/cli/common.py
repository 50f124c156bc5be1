"""Small things that several verbs say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.bundle import Bundle


def warn(bundle: Bundle) -> None:
    """One line on stderr when the bundle is for another board than this machine."""
    from edgekit.runtime.engine import foreign_target

    text = foreign_target(bundle)
    if text:
        print(f"edgekit: warning: bundle {bundle.path}: {text}", file=sys.stderr)

"""`edgekit report`: one HTML page about a bundle, or about several side by side."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from edgekit.bundle import Bundle
from edgekit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write one self-contained HTML page: what was built, the evidence, the limits."
    parser.add_argument(
        "bundle", nargs="+", type=Path, metavar="BUNDLE", help="several are compared on one page"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: BundleError, UsageError, OutputError."""
    from edgekit.toolchain.report import write_comparison, write_report

    if any(os.path.realpath(path) == os.path.realpath(args.out) for path in args.bundle):
        raise UsageError(f"option --out {args.out}: is one of the bundles. Name another file")
    with contextlib.ExitStack() as opened:
        bundles = [opened.enter_context(Bundle.open(path)) for path in args.bundle]
        if len(bundles) == 1:
            write_report(bundles[0], args.out)
        else:
            write_comparison(bundles, args.out)
    print(f"wrote {args.out}")
    return 0

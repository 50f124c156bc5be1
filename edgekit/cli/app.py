"""Run one of the apps that ship with edgekit, or list them; what follows the name goes to the app."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

from edgekit import content
from edgekit.errors import UsageError, did_you_mean, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit app\n"
        "  edgekit app detect --source v4l2:/dev/video0 --view :8080\n"
        "  edgekit app detect --help"
    )
    parser.add_argument("name", nargs="?", metavar="APP", help="which app (default: list them)")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="the app's own options")


def main(args: argparse.Namespace) -> int:
    apps = find_apps()
    if args.name is None:
        width = max(map(len, apps), default=0)
        for name, script in apps.items():
            print(f"{name:<{width}}  {_purpose(script)}")
        return 0
    if args.name not in apps:
        raise UsageError(f"app {printable(args.name)!r}: unknown. {did_you_mean(args.name, apps)}")
    spec = importlib.util.spec_from_file_location(f"edgekit_app_{args.name}", apps[args.name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    sys.path.insert(0, str(apps[args.name].parent))  # as `python main.py` has it
    try:
        spec.loader.exec_module(module)
        return int(module.main([word for word in args.words if word not in ("-v", "--verbose")]) or 0)
    except SystemExit as end:  # its argparse: --help, or a wrong option; or what it has to say at its end
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)


def find_apps() -> dict[str, Path]:
    """Name -> main.py of every app on the content path, the first of a name."""
    found: dict[str, Path] = {}
    for folder in content.folders("apps"):
        for script in sorted(folder.glob("*/main.py")):
            found.setdefault(script.parent.name, script)
    return dict(sorted(found.items()))


def _purpose(script: Path) -> str:
    """The first line of the script's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]

"""`edgekit <verb> ...`: one file per verb in this folder, each with add_arguments() and main()."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from edgekit import __version__
from edgekit.errors import EdgekitError, UsageError, did_you_mean

VERBS = {
    "build": "turn a model into proven bundles",
    "run": "run a bundle on pictures, videos or a synthetic street",
    "bench": "time a bundle on this machine, stage by stage",
    "inspect": "show what is in a bundle, or extract it",
    "verify": "check digests, signature, self-test and accuracy",
    "targets": "list the known boards and their facts",
    "doctor": "say what this machine can build and run",
    "init": "write a commented edgekit.toml",
    "report": "write an HTML page about a bundle",
}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{self.prog}: {message}. See {self.prog} --help")


def _parser(verb: str) -> Parser:
    module = importlib.import_module(f"edgekit.cli.{verb}")
    parser = Parser(prog=f"edgekit {verb}", description=(module.__doc__ or VERBS[verb]).strip())
    parser.add_argument("-v", "--verbose", action="store_true", help="show the trace of an error")
    module.add_arguments(parser)
    return parser


def _help() -> str:
    lines = [
        f"edgekit {__version__}: puts trained vision models on edge devices",
        "",
        "usage: edgekit VERB ...",
    ]
    lines += ["", *(f"  {verb:<9}{text}" for verb, text in VERBS.items())]
    lines += [
        "",
        "edgekit VERB --help shows the options of a verb; start with: edgekit build --target jetson-orin",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 ok, 1 the work failed, 2 usage or bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_help())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"edgekit {__version__}")
            return 0
        verb = words[0]
        if verb not in VERBS:
            raise UsageError(f"edgekit {verb!r}: no such verb. {did_you_mean(verb, VERBS)}")
        parser = _parser(verb)
        arguments = parser.parse_args(words[1:])
        module = importlib.import_module(f"edgekit.cli.{verb}")
        return int(module.main(arguments))
    except EdgekitError as error:
        if verbose:
            traceback.print_exc()
        print("edgekit: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgekit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader went away (| head); point stdout elsewhere so that the exit flush stays silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last net: a defect of ours, said in one line
        if verbose:
            traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        print(
            f"edgekit: internal error: {type(error).__name__}: {text}. Run again with -v and report the trace",
            file=sys.stderr,
        )
        return 1


def run() -> None:
    """Console entry point."""
    sys.exit(main())

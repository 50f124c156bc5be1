"""`edgekit <verb> ...`: one file per verb in this folder, each with add_arguments() and main()."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from edgekit import __version__
from edgekit.errors import EdgekitError, UsageError, did_you_mean, printable

VERBS = {
    "build": "turn a model into proven bundles",
    "compress": "make a network smaller or faster by training it",
    "run": "run bundles on cameras, videos, pictures or a synthetic street",
    "app": "run an app that ships with edgekit",
    "bench": "time a bundle on this machine, stage by stage",
    "tune": "time a bundle's variants here and keep the fastest",
    "compare": "compare two bundles, or one with its float model",
    "inspect": "show what is in a bundle, or extract it",
    "estimate": "estimate the latency of a model on a board",
    "verify": "check digests, signature, self-test and accuracy",
    "targets": "list the known boards and their facts",
    "doctor": "say what this machine can build and run",
    "rig": "look at a rig's calibration, with pictures and points",
    "init": "write a commented edgekit.toml",
    "report": "write an HTML page about a bundle",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, suggestions and no abbreviated options (they would break when an
    option is added)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UsageError(f"{self.prog.removeprefix('edgekit ')}: {message}. See {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse would hide that it cannot be written

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        values, unknown = self.parse_known_args(words)
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]
                options = [o for o in self._option_string_actions if o.startswith("--")]
                raise UsageError(
                    f"option {printable(name)}: unknown to {self.prog}. {did_you_mean(name, options)}"
                )
        if unknown:
            raise UsageError(f"argument {printable(unknown[0])}: one too many. See {self.prog} --help")
        return values


def _parser(verb: str) -> Parser:
    module = importlib.import_module(f"edgekit.cli.{verb}")
    parser = Parser(prog=f"edgekit {verb}", description=(module.__doc__ or VERBS[verb]).strip())
    module.add_arguments(parser)
    parser.description = textwrap.fill(parser.description or "", 79)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the trace of an error")
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
        "edgekit VERB --help shows the options of a verb.",
        "Start with: edgekit build --target jetson-orin",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 ok, 1 the work failed, 2 usage or bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # a full disk or a closed pipe behind it is known here at the latest
        return code
    except EdgekitError as error:
        return _fail(str(error), error.exit_code, verbose)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, verbose)
    except BrokenPipeError:  # the reader went away (| head): it has what it wanted
        _drop_stdout()
        return FAILED
    except MemoryError:
        return _fail("out of memory. Close other programs or use a machine with more", FAILED, verbose)
    except OSError as error:
        # what is written elsewhere has been turned into an OutputError there
        if error.filename is not None or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            return _internal(error, verbose)
        _drop_stdout()
        return _fail(f"standard output: cannot be written: {error.strerror or error}", FAILED, verbose)
    except Exception as error:  # noqa: BLE001 - the last net: a defect of ours, said in one line
        return _internal(error, verbose)


def _dispatch(words: list[str]) -> int:
    while words and words[0] in ("-v", "--verbose"):  # common to all verbs, so taken before one too
        words = words[1:]
    if not words:
        print(_help(), file=sys.stderr)
        return USAGE
    verb = words[0]
    if verb in ("-h", "--help", "help"):
        print(_help())
        return OK
    if verb == "--version":
        print(f"edgekit {__version__}")
        return OK
    if verb not in VERBS:
        raise UsageError(f"verb {printable(verb)!r}: unknown. {did_you_mean(verb, VERBS)} See edgekit --help")
    try:
        arguments = _parser(verb).parse_args(words[1:])
    except SystemExit as end:  # --help
        return int(end.code or OK)
    module = importlib.import_module(f"edgekit.cli.{verb}")
    return int(module.main(arguments))


def _fail(text: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):  # stderr is gone: the code has to say it
        print(f"edgekit: {printable(text)}", file=sys.stderr, flush=True)
    return code


def _internal(error: Exception, verbose: bool) -> int:
    text = " ".join(str(error).split())[:300]
    return _fail(
        f"internal error: {type(error).__name__}: {text}. Run again with -v and report the trace",
        FAILED,
        verbose,
    )


def _drop_stdout() -> None:
    """Point stdout elsewhere, so that the flush at exit stays silent."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: KeyboardInterrupt, but not amid an import, where a C++ extension may answer with abort()."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _later(number)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _not_lost(lost: Any) -> None:
    """`sys.unraisablehook`: an interrupt that met a destructor or a callback, where python drops it, comes again."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        _later(signal.SIGINT)
    else:
        sys.__unraisablehook__(lost)


def _later(number: int) -> None:
    timer = threading.Timer(0.02, _thread.interrupt_main, (number,))
    timer.daemon = True
    timer.start()


def run() -> NoReturn:
    """Console entry point."""
    for fd in (0, 1, 2):  # `edgekit ... >&-`: the next file opened would become stdout
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot show are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):  # a service manager's SIGTERM cleans up as Ctrl-C does
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background jobs of a shell ask for that
            signal.signal(number, _interrupt)
    sys.unraisablehook = _not_lost
    try:
        code = main()
    except KeyboardInterrupt:  # an impatient second Ctrl-C
        code = INTERRUPTED
    for number in (signal.SIGINT, signal.SIGTERM):  # the work is done: nothing to stop any more
        signal.signal(number, signal.SIG_IGN)
    if code == INTERRUPTED:
        # python ends by the signal, not with our code, when the interrupt passed through its exec() on the way
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)

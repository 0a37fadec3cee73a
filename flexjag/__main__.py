"""The command line: ``python -m flexjag`` or ``flexjag``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from flexjag import __version__, bench
from flexjag.cli import cache, demo
from flexjag.cli import compile as cli_compile
from flexjag.cli import explain as cli_explain
from flexjag.errors import FlexjagError, LanguageError

WRONG_USE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: {' '.join(message.splitlines())}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexjag", description="Attention over jagged batches, compiled.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flexjag {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    demo.add_command(commands)
    cli_explain.add_command(commands)
    cli_compile.add_command(commands)
    cache.add_command(commands)
    commands.add_parser("bench", help="measure, beside what one would use instead; has its own --help")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments, without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 if a check failed, 2 for wrong use (told in one line on stderr), 130 after Ctrl-C.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    flexjag ...
    0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names and dashes, on whatever the terminal can do
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None and arguments[:1] == ["demo"] and "OMP_WAIT_POLICY" not in os.environ:
            # Waiting threads spin by default, and where another program wants the core each of flexjag's many short
            # parallel loops then costs a time slice: 7 s instead of 0.3 s. The policy is read when torch loads.
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
            os.execv(sys.executable, [sys.executable, "-m", "flexjag", *arguments])
        if arguments[:1] == ["bench"]:
            return bench.main(arguments[1:])
        args = _parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse: --help, --version and errors
        return stop.code if isinstance(stop.code, int) else WRONG_USE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `flexjag explain ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (FlexjagError, OSError, MemoryError) as error:
        message = error.line if isinstance(error, LanguageError) else str(error) or "out of memory"
        print(f"flexjag: {' '.join(message.split())}", file=sys.stderr)
        return WRONG_USE
    return code


if __name__ == "__main__":
    sys.exit(main())

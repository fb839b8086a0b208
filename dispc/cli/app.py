"""The command line: parse, call, print. Exit codes: 0 done, 1 a check failed, 2 could not run, 128 + N by signal N."""

import os
import re
import signal
import sys
from typing import Annotated

import typer
from rich.markup import escape

from dispc.cli import compiling, evaluating, judging, learning, recovering, using
from dispc.cli.arguments import expand
from dispc.cli.process import NOTES, own_the_process
from dispc.cli.tables import err, out, print_error
from dispc.support.errors import DispcError, Interrupted, first_line
from dispc.support.printable import is_text
from dispc.support.version import __version__

EMPTY = re.compile("--[a-z0-9-]+=")
"""An option that is given nothing."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compile DISP-LLM pruned decoder models to ONNX artifacts: right, small and fast.",
    epilog="Put --debug anywhere on the line to see the traceback of an error, and why passes left nodes as they were.",
)


for name, command in (
    ("compile", compiling.compile),
    ("generate", using.generate),
    ("inspect", using.inspect),
    ("demo", using.demo),
    ("validate", judging.validate),
    ("doctor", using.doctor),
    ("learn", learning.learn),
    ("recover", recovering.recover),
    ("eval", evaluating.evaluate),
    ("import-masks", learning.import_masks),
):
    app.command(name)(expand(command))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `dispc` command."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    own_the_process(debug=debug)
    try:
        _check_words(arguments)
        app(arguments)
    except SystemExit as stop:
        _flush(gone=isinstance(stop.__context__, BrokenPipeError))
        for note in NOTES.taken() if stop.code in (0, 1, None) else ():
            err.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False)
        if stop.code == 130:
            print_error("interrupted")
        raise
    except Interrupted as stop:
        if str(stop):
            print_error(str(stop))
        sys.exit(128 + stop.signum)
    except Exception as error:
        if debug:
            raise
        print_error(_in_one_line(error))
        sys.exit(2)


def _flush(*, gone: bool) -> None:
    """Write what is left of the output; exit where that cannot be, as by SIGPIPE where its reader has `gone`."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            print_error(_in_one_line(error))
            sys.exit(2)
    if gone:
        sys.exit(128 + signal.SIGPIPE)


def _check_words(arguments: list[str]) -> None:
    """Refuse what no argument can be.

    Raises:
        DispcError: for one that is not UTF-8, which JSON, ONNX and most libraries cannot hold, and for an empty one,
            which is most often a variable of a script that nobody set, and would count as an option not given.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not is_text(argument):
            raise DispcError(f"{argument}: is not UTF-8; rename the file or folder, or write the text in UTF-8")
        if not argument or EMPTY.fullmatch(argument):
            what = argument or (f"what follows {before}" if before else "the first argument")
            raise DispcError(f"{what} is empty; give a value, or leave it out")


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    if isinstance(error, DispcError):
        return str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # torch raises RuntimeErrors
        return f"there is not enough memory ({first_line(error)})"
    return f"unexpected {type(error).__name__}: {first_line(error)}; --debug shows where, please report it"

"""The `dispc` command run inside the test's process, and what a directory tree holds before and after it."""

import gc
import hashlib
import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from dispc.cli import app as cli
from dispc.support.signals import ENDING


@dataclass(frozen=True)
class Outcome:
    """Exit code and both streams of one command."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Outcome:
    """`dispc ARGUMENTS`. An exception that reaches the caller is what a user would see as a traceback."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        with (
            patch.object(sys, "argv", ["dispc", *map(str, arguments)]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.enable()  # the command turns it off, as its process does not live long
    return Outcome(code, out.getvalue(), err.getvalue())


def fingerprint(directory: Path) -> dict[str, str]:
    """Every path below `directory` with its content's digest: nothing can appear, vanish or change unseen."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


def assert_refused(place: Path, *arguments: object, says: tuple[str, ...] = (), code: int = 2) -> None:
    """The command fails with one `error:` line that holds `says`, and leaves all of `place` as it was."""
    before = fingerprint(place)
    outcome = run(*arguments)
    lines = outcome.err.splitlines()
    assert outcome.code == code, outcome
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    for phrase in says:
        assert phrase in lines[0], lines[0]
    assert outcome.out == ""
    assert fingerprint(place) == before

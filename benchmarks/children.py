"""Child processes that print their results as lines of JSON. Each has a time limit, and may die."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One line of results."""
LAST_LINES = 6
"""How much of a failed process's stderr is kept."""


def read_records(command: Sequence[str], seconds: float, work: Path, record: Callable[[Record], None]) -> str:
    """Run a command for at most `seconds` and pass on each record that it prints.

    It gets a process group of its own, which is killed as a whole when the time is up. Returns what went wrong, with
    the end of its stderr, which goes to a file in `work`; an empty string when it ended with 0.
    """
    if seconds <= 0:
        return "no time was left for it"
    log = work / f"stderr-{threading.get_ident()}.txt"
    with log.open("w") as errors, start(command, errors) as process:
        timer = threading.Timer(seconds, kill_group, [process])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if (found := parse(line)) is not None:
                record(found)
        code = process.wait()
        timed_out = timer.finished.is_set()
        timer.cancel()
    if code == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:] or ["nothing on stderr"]
    ended = f"stopped after {seconds:.0f} s" if timed_out else f"ended with {code}"
    return f"the process {ended}: {' | '.join(line.strip()[:200] for line in lines)}"


def start(command: Sequence[str], errors: Any) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own; its stderr goes to the open file `errors`."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def parse(line: str) -> Record | None:
    """The record of a line; None for what libraries print."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its children, if it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return

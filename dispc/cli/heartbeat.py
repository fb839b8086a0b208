"""Lines of progress where no progress bar can be shown: in CI, in a log, in a pipe."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

INTERVAL = 20.0
"""Seconds between two lines."""


@contextmanager
def heartbeat(console: Console, doing: str) -> Iterator[Callable[[str], None]]:
    """Print a line every `INTERVAL` seconds, unless `console` is a terminal; the callback sets the next lines' text."""
    if console.is_terminal:
        yield lambda doing: None
        return
    started, ended, latest = time.monotonic(), threading.Event(), doing

    def update(doing: str) -> None:
        nonlocal latest
        latest = doing

    def print_lines() -> None:
        while not ended.wait(INTERVAL):
            console.print(f"{escape(latest)} ({time.monotonic() - started:.0f} s)", highlight=False, soft_wrap=True)

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()

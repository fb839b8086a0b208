"""Work that an interrupt must not stop halfway."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What was ignored when the process started (SIGHUP under nohup, SIGINT in a script's background job) stays ignored,
# here and in `main`: whoever did that wants the work to continue.
ENDING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""Ctrl-C, `kill`, and a terminal that was closed."""


def _handlers() -> dict[int, Callable[..., Any]]:
    """What these do now, where Python handles them; nothing in other threads, which get no signals."""
    numbers = ENDING if threading.current_thread() is threading.main_thread() else ()
    return {number: handler for number in numbers if callable(handler := signal.getsignal(number))}


@contextmanager
def note_signals() -> Iterator[Callable[[], int | None]]:
    """Note the signals that end a process, for a body that asks where it can stop: the value is the first, or None.

    A second signal, of somebody who does not want to wait, is handled as it is outside of the body.
    """
    noted: list[int] = []
    handlers = _handlers()

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, note)
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def hold_signals() -> Iterator[Callable[[], bool]]:
    """Keep the signals that end a process waiting until the end of the body; the value says whether one waits.

    Python raises an interrupt between any two instructions: in a thread pool's own code that leaves a lock taken for
    ever, in a cleanup it leaves files behind.
    """
    waiting: list[int] = []
    handlers = _handlers()
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: waiting.append(number))
        yield lambda: bool(waiting)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])

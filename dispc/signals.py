"""Work in whose middle an interrupt must not be raised."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hold_signals() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C and SIGTERM waiting until the end of the body; the value says whether one waits.

    Python raises an interrupt between any two instructions: in a thread pool's own code that leaves a lock behind for
    which everybody waits, in a cleanup it leaves files behind.
    """
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: waiting.append(number))
        yield lambda: bool(waiting)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])

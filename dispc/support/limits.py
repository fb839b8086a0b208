"""Work that others wrote, in a process of its own: it may fail, and take no more time and memory than it is given."""

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dispc.support.errors import DispcError, first_line


def limited(work: Callable[[], str], seconds: float, memory: int) -> str:
    """The text that `work` makes in a forked process, within `seconds` and `memory` bytes more than this one has.

    Raises:
        DispcError: with the reason why there is none.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work_and_exit(work, writing, seconds, memory)
    os.close(writing)
    try:
        said = _read(reading, seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if said is None:
        raise DispcError(f"it takes longer than {seconds:g} s")
    if not said:
        raise DispcError("it takes too much memory or time")
    answer: dict[str, str] = json.loads(said)
    if "error" in answer:
        raise DispcError(answer["error"])
    return answer["text"]


def _read(reading: int, seconds: float) -> bytes | None:
    """Everything until the other end is closed; None when that takes longer."""
    said, end = b"", time.monotonic() + seconds
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(reading, 2**16)
        if not piece:
            return said
        said += piece
    return None


def _work_and_exit(work: Callable[[], str], writing: int, seconds: float, memory: int) -> None:
    """In the child: nothing of the parent's cleaning up may run here."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        try:
            answer = {"text": work()}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except Exception as error:  # whatever the foreign work runs into
            answer = {"error": f"{type(error).__name__} {first_line(error)}"}
        with open(writing, "wb") as out:
            out.write(json.dumps(answer).encode())
    finally:
        os._exit(0)

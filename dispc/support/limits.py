"""Work that others wrote, in a process of its own: it may fail, and take no more time and memory than it is given."""

import json
import os
import resource
import select
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dispc.support.errors import DispcError, first_line

SIZE = 8
"""Bytes before a message that say how long it is."""
Answer = Callable[[Any], Any]
"""From a question to its answer, both of what JSON can say."""


class Helper:
    """A forked process that answers questions, one at a time; what goes wrong in it is an error here.

    `start` is called there, and makes what answers. The process ends when this object does.

    Raises:
        DispcError: when `start` fails, or takes longer or more memory (in bytes, beside what is there) than it may.
    """

    def __init__(self, start: Callable[[], Answer], seconds: float, memory: int) -> None:
        (reading, there), (here, writing) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.close(writing)
            _serve(start, here, there, seconds, memory)
        os.close(here)
        os.close(there)
        self.reading, self.writing = reading, writing
        self.end = weakref.finalize(self, _end, os.getpid(), child, reading, writing)
        self._answer(seconds)

    def ask(self, question: Any, seconds: float, memory: int) -> Any:
        """The answer to a question.

        Raises:
            DispcError: with the reason why there is none.
        """
        if not self.end.alive:
            raise DispcError("it has ended")
        try:
            _send(self.writing, {"question": question, "seconds": seconds, "memory": memory})
        except BrokenPipeError as error:
            raise DispcError("it has ended") from error
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        try:
            message = _receive(self.reading, time.monotonic() + seconds)
        except TimeoutError as error:
            self.end()
            raise DispcError(f"it takes longer than {seconds:g} s") from error
        if message is None:
            self.end()
            raise DispcError("it takes too much memory or time")
        if "error" in message:
            raise DispcError(message["error"])
        return message["answer"]


def _end(parent: int, child: int, reading: int, writing: int) -> None:
    os.close(writing)
    os.close(reading)
    if os.getpid() == parent:  # another fork of it has a copy of the object
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _send(writing: int, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    content = len(content).to_bytes(SIZE, "little") + content
    while content:
        content = content[os.write(writing, content) :]


def _receive(reading: int, end: float | None = None) -> dict[str, Any] | None:
    """The next message; None when the other side is gone. TimeoutError when it is not there at the time `end`."""
    received = bytearray()
    while len(received) < SIZE or len(received) < SIZE + int.from_bytes(received[:SIZE], "little"):
        if end is not None and not select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(reading, 2**20)
        if not piece:
            return None
        received += piece
    message: dict[str, Any] = json.loads(received[SIZE:])
    return message


def _serve(start: Callable[[], Answer], reading: int, writing: int, seconds: float, memory: int) -> None:
    """In the child: nothing of the parent's cleaning up may run here, and nothing that foreign code says is shown."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        answer, message = _tried(start, seconds, memory)
        _send(writing, message)
        while "error" not in message and (request := _receive(reading)) is not None:
            _, reply = _tried(lambda: answer(request["question"]), request["seconds"], request["memory"])
            _send(writing, reply)
    finally:
        os._exit(0)


def _tried(work: Callable[[], Any], seconds: float, memory: int) -> tuple[Any, dict[str, Any]]:
    """What `work` gives within its limits, and the message about it."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    processors = os.cpu_count() or 1
    for limit, value in (
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CPU, int(spent + seconds * processors) + 1),
    ):
        most = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if most == resource.RLIM_INFINITY else min(value, most), most))
    try:
        result = work()
        message = {"answer": None if callable(result) else result}
        json.dumps(message)
        return result, message
    except MemoryError:
        return None, {"error": "it takes too much memory"}
    except BaseException as error:  # whatever the foreign work runs into; a panic of Rust is no Exception
        return None, {"error": f"{type(error).__name__} {first_line(error)}"}

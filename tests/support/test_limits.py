"""Work in a process of its own: whatever it does, the answer comes, or one error that says why not."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from dispc.support.errors import DispcError
from dispc.support.limits import Helper

MIB = 2**20


class Panic(BaseException):
    """As the libraries written in Rust raise it."""


def fail(error: BaseException) -> Any:
    raise error


def grow() -> str:
    return "a" * (2**33)


def end(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: time.sleep(60), "longer than 0.5 s"),
        (grow, "too much memory"),
        (lambda: end(signal.SIGKILL), "too much memory or time"),
        (lambda: os._exit(0), "too much memory or time"),
        (lambda: fail(Panic("over\nand out")), "Panic over$"),
        (lambda: fail(SystemExit(3)), "SystemExit 3"),
        (lambda: fail(ValueError("bad")), "ValueError bad"),
        (lambda: object(), "not JSON serializable"),
    ],
)
def test_what_goes_wrong_is_one_error(work: Callable[[], Any], says: str) -> None:
    helper = Helper(lambda: lambda question: work(), 0.5, 256 * MIB)
    with pytest.raises(DispcError, match=says):
        helper.ask(None, 0.5, 256 * MIB)
    helper.end()


def test_answers_of_any_size_come_in_turn_and_the_process_ends_with_its_object() -> None:
    helper = Helper(lambda: lambda question: [question, os.getpid()], 5, 512 * MIB)
    for question in ("a", {"b": [1, None]}, "x" * 5_000_000):
        answer, process = helper.ask(question, 5, 512 * MIB)
        assert answer == question and process != os.getpid()
    del helper
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_error_leaves_the_process_ready_and_a_dead_one_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def answer(question: str) -> str:
        os.write(1, b"noise")
        return {"fine": "yes", "exit": os._exit}[question] if question != "exit" else str(os._exit(1))

    helper = Helper(lambda: answer, 5, 256 * MIB)
    with pytest.raises(DispcError, match="KeyError"):
        helper.ask("unknown", 5, 256 * MIB)
    assert helper.ask("fine", 5, 256 * MIB) == "yes"
    for _ in range(2):
        with pytest.raises(DispcError):
            helper.ask("exit", 5, 256 * MIB)
    assert capfd.readouterr().out == ""

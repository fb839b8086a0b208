"""Interrupts wait until it is safe to raise them, and are never lost."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import fingerprint
from writing import fill, lazy, model_of, older_artifact

from dispc.export.write import save_model
from dispc.support import directories
from dispc.support.directories import staged_directory
from dispc.support.signals import hold_signals, note_signals


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_body_which_can_see_it() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), hold_signals() as interrupted:
        seen.append(interrupted())
        interrupt()
        seen.append(interrupted())
    assert seen == [False, True]


def test_a_noted_interrupt_is_an_answer_and_the_second_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with note_signals() as noted:
        assert noted() is None
        interrupt()
        assert noted() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_those_of_before_afterwards() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with hold_signals():
        pass
    with pytest.raises(KeyboardInterrupt), hold_signals():
        interrupt()
    with pytest.raises(ValueError, match="mine"), hold_signals():
        raise ValueError("mine")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_tests_of_signals_pass_where_the_shell_ignores_them() -> None:
    if "DISPC_NESTED" in os.environ:
        pytest.skip("this is that run")
    ignored = f"trap '' INT HUP TERM; exec {sys.executable} -m pytest -q -n 0 -p no:cacheprovider {__file__}"
    done = subprocess.run(
        ["bash", "-c", ignored], capture_output=True, text=True, check=False, env=os.environ | {"DISPC_NESTED": "1"}
    )
    assert done.returncode == 0, done.stdout


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with hold_signals() as interrupted:
            interrupt()
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing() -> None:
    results: list[Any] = []

    def work() -> None:
        with hold_signals() as interrupted:
            results.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]


def test_an_interrupt_while_weights_are_written_ends_the_threads_and_is_raised(tmp_path: Path) -> None:
    values = {f"w{i}": lazy(np.ones((1, 500), np.float32), f"w{i}") for i in range(200)}
    seen: list[int] = []

    def progress(name: str, done: int, total: int) -> None:
        if not seen:
            interrupt()
        seen.append(done)

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        save_model(model_of(values), tmp_path / "model.onnx", progress)
    assert threading.active_count() == threads
    assert len(seen) < len(values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["exchange", "rename", "rmdir"])
def test_an_interrupt_while_directories_are_exchanged_leaves_one_whole_artifact(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older_artifact(tmp_path / "out")
    owner: Any = {"exchange": directories, "rename": Path, "rmdir": os}[where]
    if where == "rename":  # what is done where the system cannot exchange
        monkeypatch.setattr(directories, "exchange", lambda first, second: False)
    original = getattr(owner, where)

    def interrupted(*args: Any, **options: Any) -> Any:
        interrupt()
        return original(*args, **options)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out", force=True) as stage:
        fill(stage)
    monkeypatch.undo()
    assert sorted(fingerprint(tmp_path)) == ["out", "out/dispc.json", "out/sub", "out/sub/file"]


@pytest.mark.parametrize(
    ("end", "code"),
    [("| true", 141), ("> /dev/null", 0), (">&-", 0), ("> /dev/full", 2)],
)
def test_a_reader_that_goes_is_no_failed_check(end: str, code: int) -> None:
    """Exit code 1 means one: a script with pipefail would take a right artifact for a wrong one."""
    long = f"{sys.executable} -m dispc compile --help {end}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", long], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == ("error: input or output: No space left on device\n" if code == 2 else "")

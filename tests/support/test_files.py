"""Files appear whole or not at all, wherever they are."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

from dispc.support.files import whole, write_json, write_text


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "file"
    write_text(file, "older")
    with pytest.raises(RuntimeError), whole(file) as partial:
        partial.write_text("half of")
        raise RuntimeError
    assert file.read_text() == "older" and list(file.parent.iterdir()) == [file]
    with whole(file) as partial:
        partial.write_text("newer")
        assert file.read_text() == "older"
    assert file.read_text() == "newer" and list(file.parent.iterdir()) == [file]


def test_what_a_killed_process_left_is_cleared_up_by_the_next_one(tmp_path: Path) -> None:
    file, child = tmp_path / "file", os.fork()
    if child == 0:
        with whole(file) as partial:
            partial.write_text("half of")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    mine = tmp_path / f"file.{os.getppid()}.partial"  # of a process that runs
    for foreign in (mine, tmp_path / "file.old.partial"):
        foreign.touch()
    assert len(list(tmp_path.iterdir())) == 3
    write_text(file, "newer")
    assert {path.name for path in tmp_path.iterdir()} == {"file", mine.name, "file.old.partial"}


def test_links_are_written_through_and_devices_stay_devices(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "text"
    terminal, device = os.openpty()
    (tmp_path / "terminal").symlink_to(os.ttyname(device))
    for path in (tmp_path / "terminal", Path(os.ttyname(device))):
        write_text(path, "text\n")
        assert os.read(terminal, 100) == b"text\r\n" and path.is_char_device()


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    """The system names no file where it is a write that fails."""
    for path in (tmp_path / "file", Path("/dev/full")):
        with pytest.raises(OSError, match="No space left") as raised, whole(path) as partial:
            partial.touch()
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        assert raised.value.filename == str(path)
    with pytest.raises(OSError, match="No such file") as raised, whole(tmp_path / "file") as partial:
        partial.rename(tmp_path / "other")  # there is none
    assert raised.value.filename == str(tmp_path / "file")


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": float("nan"), "b": [math.inf, {"c": -math.inf}], "d": (1.5, None)})
    text = (tmp_path / "file").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [None, {"c": None}],
        "d": [1.5, None],
    }


def test_an_error_of_a_library_without_a_number_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot seek") as raised, whole(tmp_path / "file"):
        raise OSError("cannot seek")
    assert raised.value.filename == str(tmp_path / "file") and raised.value.errno is not None

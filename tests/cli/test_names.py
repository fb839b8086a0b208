"""Names and texts that are not UTF-8: one line from every command, and nothing in what is written."""

import json
import os
import shutil

import command
import pytest
from command import assert_refused
from desk import Desk

LATIN1 = os.fsdecode(b"ne\xff")
"""A name as Python has it whose bytes on the disk are no UTF-8."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "compile": ("compile", LATIN1, "-t", "onnx-cpu"),
    "compile -o": ("compile", "model", "-t", "onnx-cpu", "-o", LATIN1),
    "validate": ("validate", "older", "-r", LATIN1),
    "validate --html": ("validate", "older", "-r", "model", "--html", LATIN1),
    "generate": ("generate", "older", LATIN1),
    "inspect": ("inspect", LATIN1),
    "learn": ("learn", "model", "--method", "random", "-o", LATIN1),
    "eval": ("eval", "model", "--data", LATIN1),
    "recover": ("recover", "model", "--data", "text.txt", "-o", LATIN1),
    "import-masks": ("import-masks", LATIN1, "--model", "model"),
    "demo": ("demo", "--directory", LATIN1),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_that_is_not_utf8_is_named(name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.place)
    assert_refused(desk.place, *COMMANDS[name], says=("ne\\udcff: is not UTF-8",))


@pytest.mark.parametrize(
    "words",
    [
        ("compile", "model", "-t", "onnx-cpu", "-o", "new"),
        ("learn", "model", "--method", "random", "-o", "new.safetensors"),
        ("recover", "model", "--data", "text.txt", "-o", "new", "--sequence-length", "16"),
        ("validate", "older", "-r", "model"),
    ],
    ids=lambda words: words[0],
)
def test_a_folder_around_it_that_is_not_utf8_is_named(
    words: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = desk.place / LATIN1
    place.mkdir()
    for name in ("model", "older"):
        shutil.copytree(desk.place / name, place / name)
    (place / "text.txt").write_text("the sea")
    monkeypatch.chdir(place)
    assert_refused(place, *words, says=("ne\\udcff", "its name is not UTF-8"))


def test_a_name_in_a_model_that_is_not_utf8_is_spelled_out_in_what_is_written(desk: Desk) -> None:
    (desk.model / LATIN1).mkdir()
    (desk.model / LATIN1 / "adapter_config.json").write_text("{}")
    manifest = json.loads((desk.compiles() / "dispc.json").read_text())
    assert any("ne\\udcff" in note for note in manifest["notes"])
    assert command.run("inspect", desk.new).code == 0

"""What files say is shown, and commands nothing."""

import json
from pathlib import Path

import command
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dispc.support.files import write_text
from dispc.support.printable import HIDDEN, printable


@given(st.text())
def test_no_control_character_is_left_and_nothing_else_is_changed(text: str) -> None:
    shown = printable(text)
    assert not HIDDEN.search(shown)
    assert all(character in shown for character in text if not HIDDEN.match(character))
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"), [("\x1b[31m", "\\x1b[31m"), ("a\u202eb", "a\\u202eb"), ("a\tb\nc", "a\tb\nc")]
)
def test_a_control_character_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_written_text_has_none(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "<p>\x1b]0;title\x07</p>\n")
    assert (tmp_path / "page.html").read_text() == "<p>\\x1b]0;title\\x07</p>\n"


@pytest.mark.parametrize("place", ["key", "tensor", "metadata"])
def test_names_in_files_do_not_reach_the_terminal_as_they_are(place: str, tmp_path: Path) -> None:
    import torch

    model = tiny.make_model("llama", tmp_path / "model")
    evil = "\x1b[31mred\x07"
    if place == "key":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {evil: 1}))
        outcome = command.run("inspect", model)
    elif place == "tensor":
        from safetensors.torch import load_file

        save_file(load_file(model / "model.safetensors") | {evil: torch.ones(1)}, model / "model.safetensors")
        outcome = command.run("learn", model, "--method", "magnitude", "-r", "0.3", "-o", tmp_path / "m.safetensors")
    else:
        masks = tmp_path / "m.safetensors"
        assert command.run("learn", model, "--method", "random", "-r", "0.3", "-o", masks).code == 0
        from dataclasses import replace

        from dispc.masks import Masks
        from dispc.model.checkpoint import Checkpoint

        found = Masks.load(masks)
        replace(found, metadata={**found.metadata, "data": evil}).save(masks, Checkpoint(model).config)
        outcome = command.run("inspect", masks)
        assert outcome.code == 0
    assert "red" in outcome.out + outcome.err
    assert "\x1b" not in outcome.out + outcome.err and "\x07" not in outcome.out + outcome.err

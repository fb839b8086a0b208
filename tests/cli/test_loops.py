"""A link that leads to itself, wherever a command takes a path: one line, and nothing is written."""

import command
import pytest
from desk import Desk

LOOP = "loop"
READ: tuple[tuple[str, ...], ...] = (
    ("compile", LOOP, "-t", "onnx-cpu"),
    ("compile", "model", "-t", "onnx-cpu", "--masks", LOOP),
    ("validate", LOOP, "-r", "model"),
    ("validate", "older", "-r", LOOP),
    ("validate", "older", "-r", "model", "--masks", LOOP),
    ("validate", "older", "-r", "model", "--baseline", LOOP),
    ("generate", LOOP, "the sea"),
    ("inspect", LOOP),
    ("learn", LOOP, "--method", "random"),
    ("learn", "model", "--data", LOOP),
    ("eval", LOOP, "--data", "text.txt"),
    ("eval", "model", "--data", LOOP),
    ("eval", "model", "--data", "text.txt", "--masks", LOOP),
    ("recover", LOOP, "--data", "text.txt", "-o", "new"),
    ("recover", "model", "--data", "text.txt", "-o", "new", "--teacher", LOOP),
    ("import-masks", LOOP, "--model", "model"),
    ("import-masks", "model", "--model", LOOP),
)


@pytest.mark.parametrize("words", READ, ids=" ".join)
def test_it_is_refused_where_something_is_read(
    words: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.place / LOOP).symlink_to(LOOP)
    (desk.place / "text.txt").write_text("the sea")
    monkeypatch.chdir(desk.place)
    command.assert_refused(desk.place, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("compile", "model", "-t", "onnx-cpu", "--no-validate", "-o", LOOP),
        ("compile", "model", "-t", "onnx-cpu", "--no-validate", "-o", "new", "--dump-ir", LOOP),
        ("validate", "older", "-r", "model", "--html", LOOP),
        ("learn", "model", "--method", "random", "-o", LOOP),
        ("inspect", "model/masks.safetensors", "--plot", f"{LOOP}.png"),
    ],
    ids=" ".join,
)
def test_where_something_is_written_it_is_refused_or_replaced(
    words: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (LOOP, f"{LOOP}.png"):
        (desk.place / name).symlink_to(name)
    monkeypatch.chdir(desk.place)
    outcome = command.run(*words)
    assert outcome.code in (0, 2)
    assert outcome.code == 0 or outcome.err.count("\n") == 1
    assert "unexpected" not in outcome.err

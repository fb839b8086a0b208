"""Where a compilation writes: what it replaces, what it leaves behind when it fails, and what its output is called."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import command
import pytest
import torch
from command import assert_refused, fingerprint
from desk import Desk
from safetensors.torch import load_file

from dispc import compiler
from dispc.validate.checks.parity import Thresholds

# Output


def test_an_output_that_exists_is_replaced_by_force_only(desk: Desk) -> None:
    compile_older = ("compile", desk.model, "-t", "onnx", "-o", desk.older, "--no-validate")
    assert_refused(desk.place, *compile_older, says=(str(desk.older), "exists already", "--force"))
    assert command.run(*compile_older, "--force").code == 0
    assert json.loads((desk.older / "dispc.json").read_text())["target"] == "onnx"
    assert sorted(path.name for path in desk.place.iterdir()) == ["model", "older"]


def test_force_does_not_replace_what_is_no_artifact(desk: Desk) -> None:
    for output in (desk.model, desk.model / "config.json"):
        arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", output, "--force")
        assert_refused(desk.place, *arguments, says=(str(output), "holds no dispc.json"))


def test_an_output_that_cannot_be_written_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    inside_a_file = desk.model / "config.json" / "out"
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "--no-validate", "-o")
    assert_refused(desk.place, *arguments, inside_a_file, says=(str(inside_a_file), "config.json is not a directory"))

    def denied(*args: Any, **options: Any) -> str:  # as root no directory is read-only
        raise PermissionError(errno.EACCES, "Permission denied", str(desk.place))

    monkeypatch.setattr("dispc.support.directories.mkdtemp", denied)
    desk.refuses("--no-validate", says=("cannot be written", "Permission denied"))


def test_a_disk_that_is_too_full_is_noticed_before_writing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(desk.place)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    desk.refuses("--no-validate", says=("the disk is too full", "MiB needed, 0.0 MiB free"))


@pytest.mark.parametrize("where", ["onnx_ir.save", "pathlib.Path.write_bytes", "dispc.compiler.write_json"])
def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    where: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    desk.refuses("--no-validate", says=("cannot be written", "No space left on device"))


def test_an_artifact_that_fails_validation_is_shown_and_not_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispc.validate.checks.parity.DEFAULTS", Thresholds(error=1e-9))
    before = fingerprint(desk.place)
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", desk.older, "--force")
    table = command.run(*arguments)
    assert (table.code, len(table.err.splitlines())) == (1, 1)
    assert "FAIL" in table.out and "--no-validate" in table.err
    report = command.run(*arguments, "--json")
    assert report.code == 1
    assert json.loads(report.out)["validation"]["passed"] is False
    assert fingerprint(desk.place) == before


# Formats and paths


@pytest.mark.parametrize("shards", [False, True])
def test_torch_files_compile_to_the_same_bytes_as_safetensors(shards: bool, desk: Desk) -> None:
    state = load_file(desk.model / "model.safetensors")
    (desk.model / "model.safetensors").unlink()
    if shards:
        names = sorted(state)
        held = {"a.bin": names[::2], "b.bin": names[1::2]}
        for shard, part in held.items():
            torch.save({name: state[name] for name in part}, desk.model / shard)
        weight_map = {name: shard for shard, part in held.items() for name in part}
        (desk.model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, desk.model / "pytorch_model.bin")
    new, older = fingerprint(desk.compiles()), fingerprint(desk.older)
    new.pop("dispc.json"), older.pop("dispc.json")  # it holds the times
    assert new == older


def test_the_output_is_named_after_model_and_target_wherever_the_command_runs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.model)
    for spelled in (".", "../model", str(desk.model)):
        outcome = command.run("compile", spelled, "-t", "onnx-cpu", "--no-validate", "--json")
        assert outcome.code == 0, outcome
        assert (desk.place / "model-onnx-cpu" / "dispc.json").is_file()
        shutil.rmtree(desk.place / "model-onnx-cpu")


def test_what_is_compiled_from_is_not_replaced(desk: Desk) -> None:
    inside = shutil.copytree(desk.model, desk.older / "model")
    masks = shutil.copy(desk.model / "masks.safetensors", desk.older / "mine.safetensors")
    line = ("compile", "-t", "onnx-cpu", "-o", desk.older, "--force", "--no-validate")
    for arguments in ((*line, inside), (*line, desk.model, "--masks", masks)):
        assert_refused(desk.place, *arguments, says=("which is not of the artifact",))
    shutil.rmtree(inside)
    Path(masks).unlink()
    dump = (*line, desk.model, "--dump-ir", desk.older / "ir")
    assert_refused(desk.place, *dump, says=("lies in", "which would be replaced"))


def test_a_directory_that_came_meanwhile_is_not_replaced(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    write = compiler.save_model

    def write_slowly(*given: Any) -> None:
        desk.new.mkdir()
        (desk.new / "thesis.txt").write_text("mine")
        write(*given)

    monkeypatch.setattr(compiler, "save_model", write_slowly)
    for force in ([], ["--force"]):
        outcome = command.run("compile", desk.model, "-t", "onnx-cpu", "-o", desk.new, "--no-validate", *force)
        assert outcome.code == 2 and str(desk.new) in outcome.err
        assert [path.name for path in desk.new.iterdir()] == ["thesis.txt"]
        shutil.rmtree(desk.new)
    assert not list(desk.place.glob(".*"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("inspect", "model", "--plot", "model/widths.png"), "model/widths.png"),
        (("inspect", "model/masks.safetensors", "--plot", "model/masks.safetensors"), "model/masks.safetensors"),
        (("compile", "model", "-t", "onnx", "-o", "new", "--dump-ir", "model/ir"), "model/ir"),
        (("eval", "model", "--data", "text.txt", "--json-file", "text.txt"), "text.txt"),
        (("eval", "model", "--data", "text.txt", "--masks", "m.st", "--record", "--json-file", "./m.st"), "m.st"),
        (("validate", "older", "-r", "model", "--json-file", "same", "--html", "model/../same"), "two reports"),
        (("validate", "older", "-r", "model", "--junit", "same", "--markdown", "link"), "two reports"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nothing_is_written_over_what_is_read_or_written_elsewhere(
    words: tuple[str, ...], named: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.place)
    (desk.place / "text.txt").write_text("the sea")
    shutil.copy(desk.model / "masks.safetensors", "m.st")
    (desk.place / "link").symlink_to("same")
    assert_refused(desk.place, *words, says=(named,))


@pytest.mark.parametrize(
    "words",
    [
        ("compile", "model", "-t", "onnx", "-o"),
        ("compile", "model", "-t", "onnx", "-o", "new", "--dump-ir"),
        ("learn", "model", "--data", "text.txt", "--sequence-length", "8", "-o"),
        ("learn", "model", "--method", "random", "-o"),
        ("recover", "model", "--data", "text.txt", "--sequence-length", "8", "-o"),
        ("eval", "model", "--data", "text.txt", "--json-file"),
        ("inspect", "model/masks.safetensors", "--plot"),
        *(("validate", "older", "-r", "model", f"--{report}") for report in ("json-file", "junit", "markdown", "html")),
    ],
    ids=lambda words: " ".join((words[0], words[-1])),
)
@pytest.mark.parametrize("full", [False, True], ids=["in a file", "nothing can be made there"])
def test_a_place_where_nothing_can_be_written_is_found_before_the_work(
    full: bool, words: tuple[str, ...], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.place)
    (desk.place / "text.txt").write_text("the sea " * 1000)
    for work in ("model.checkpoint.Checkpoint.load_model", "model.text.tokenise", "runtime.session.Artifact.__init__"):
        monkeypatch.setattr(f"dispc.{work}", Mock(side_effect=AssertionError("the work begins")))
    if full:  # as root no directory is read-only
        monkeypatch.setattr("dispc.support.files.TemporaryFile", Mock(side_effect=OSError(errno.EROFS, "Read-only")))
    (desk.place / "file").touch()
    place, why = ("far/new", "Read-only") if full else ("file/new", "file is not a directory")
    assert_refused(desk.place, *words, place, says=("cannot be written", why))

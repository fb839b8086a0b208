"""The command line: what bad input does (one line, exit code 2, nothing changed), and what good input prints.

Every test runs `dispc.cli.app.main` with a command line; those of signals run the command as a process of its own.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import command
import pytest
import typer
from command import assert_refused, fingerprint
from desk import Desk

from dispc.cli import app as cli
from dispc.support.errors import CheckpointError

COMMANDS = ("compile", "validate", "doctor", "generate", "inspect", "demo", "learn", "recover", "eval", "import-masks")


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--target", "tpu"), ("unknown target 'tpu'", "onnx-cuda, onnx-cpu, onnx")),
        (("--target", "onnx-cuda", "--dtype", "int4"), ("no dtype 'int4'", "float16, bfloat16, float32")),
        (("--target", "onnx-cpu", "--dtype", "float16"), ("no dtype 'float16'", "float32")),
        (("--padding", "middle"), ("unknown padding 'middle'", "left or right")),
        (("--lowering", "magic"), ("unknown lowering 'magic'", "inverse-gather, canonical")),
        (("--target", "onnx", "--padding", "right"), ("--padding left",)),
        (("--target", "onnx-cuda", "--dtype", "float32", "--padding", "right"), ("--padding left",)),
        (
            ("--target", "onnx-cuda", "--dtype", "bfloat16", "--lowering", "canonical"),
            ("bfloat16", "--lowering inverse-gather"),
        ),
        (("--dense", "--masks", "masks.safetensors"), ("--dense and --masks",)),
        (("--quantize", "int3"), ("unknown quantisation 'int3'", "int4, int8")),
        (("--quantize", "int4", "--block-size", "48"), ("block size 48", "16, 32, 64, 128, 256")),
        (("--quantize", "int8", "--block-size", "8"), ("block size 8", "16, 32, 64, 128, 256")),
        (("--block-size", "64"), ("without --quantize",)),
        (("--quantize-head",), ("without --quantize",)),
        (("--no-int8-activations",), ("without --quantize",)),
        (("--target", "onnx-cuda", "--quantize", "int4", "--int8-activations"), ("--target onnx-cpu",)),
        (("--target", "onnx", "--quantize", "int4"), ("standard operators", "--target onnx-cpu or onnx-cuda")),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_way_out(
    options: tuple[str, ...], says: tuple[str, ...], desk: Desk
) -> None:
    desk.refuses(*options, says=says)


# Errors as a user sees them


def test_debug_lets_the_traceback_through_wherever_it_stands(desk: Desk) -> None:
    (desk.model / "config.json").unlink()
    for arguments in (("--debug", "compile", desk.model), ("compile", desk.model, "--debug")):
        with pytest.raises(CheckpointError):
            command.run(*arguments, "-t", "onnx-cpu")


def test_an_error_of_several_lines_is_printed_as_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise CheckpointError("first\n  second")

    monkeypatch.setattr("dispc.compiler.load_masks", fail)
    desk.refuses(says=("error: first second",))


def test_an_error_is_printed_as_it_is_whatever_the_path_holds(desk: Desk) -> None:
    for name in ("[bold]x[/bold]", ":smile:", "[/]", "a" * 300):
        assert_refused(desk.place, "inspect", desk.place / name, says=(str(desk.place / name),))


def test_ctrl_c_is_one_line_and_code_130_and_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for where in ("load_masks", "trace", "check_file", "write_companions"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dispc.compiler.{where}", interrupted)
            desk.refuses("--no-validate", says=("interrupted",), code=130)


SLOW = """
import sys, time
from pathlib import Path
import dispc.model.weights
from dispc.cli.app import main
evaluate = dispc.model.weights.LazyWeight.evaluate
def slowly(self, *out):
    Path({marker!r}).touch()
    time.sleep(0.5)
    return evaluate(self, *out)
dispc.model.weights.LazyWeight.evaluate = slowly
main()
"""


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "lines"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0), (signal.SIGHUP, 129, 0)]
)
def test_a_signal_in_the_middle_of_writing_leaves_the_older_artifact_and_nothing_else(
    number: signal.Signals, code: int, lines: int, desk: Desk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = fingerprint(desk.place)
    marker = tmp_path_factory.mktemp("marker") / "writing"
    arguments = ["compile", desk.model, "-t", "onnx-cpu", "-o", desk.older, "--force", "--no-validate"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(marker=str(marker)), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(marker, process)
        assert any(path.name.endswith(".partial") for path in desk.place.iterdir())
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "")
    assert len(err.splitlines()) == lines, err
    assert all(line.startswith("error: interrupted") for line in err.splitlines())
    assert fingerprint(desk.place) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_command_that_was_started_with_a_signal_ignored_keeps_to_that(
    number: signal.Signals, desk: Desk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As `nohup dispc ...` and `dispc ... &` in a script: the terminal's signals are not meant for it."""
    marker = tmp_path_factory.mktemp("marker") / "writing"
    arguments = ["compile", desk.model, "-t", "onnx-cpu", "-o", desk.new, "--no-validate"]
    before = signal.signal(number, signal.SIG_IGN)  # which the command inherits
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW.format(marker=str(marker)), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, before)
    try:
        wait_for(marker, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert (desk.new / "dispc.json").is_file()


def test_the_installed_command_prints_one_line_and_with_debug_a_traceback(desk: Desk) -> None:
    (desk.model / "config.json").unlink()
    arguments = [Path(sys.executable).with_name("dispc"), "inspect", desk.model / "lost"]
    plain, debug = (
        subprocess.run([*arguments, *more], capture_output=True, text=True, check=False) for more in ([], ["--debug"])
    )
    assert (plain.returncode, plain.stdout) == (2, "")
    assert re.fullmatch(r"error: .*lost: is no mask file, artifact or model directory\n", plain.stderr)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_an_unexpected_error_is_one_line_and_exit_code_2(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispc.inspect.inspect_path", Mock(side_effect=KeyError("name")))
    assert_refused(desk.place, "inspect", desk.older, says=("unexpected KeyError: 'name'; --debug shows where",))
    with pytest.raises(KeyError):
        command.run("inspect", desk.older, "--debug")


# validate


def test_validate_of_a_good_artifact_passes_in_every_form(desk: Desk) -> None:
    arguments = ("validate", desk.older, "--reference", desk.model, "--json-file", desk.place / "report.json")
    table, report = command.run(*arguments), command.run(*arguments, "--json")
    assert (table.code, report.code) == (0, 0)
    parsed = json.loads(report.out)
    assert parsed["passed"] is True
    assert json.loads((desk.place / "report.json").read_text()) == parsed
    shown = " ".join(table.out.replace("│", " ").split())
    for check in parsed["checks"]:
        assert check["name"].split()[0] in shown
    assert "passed" in table.out and "FAIL" not in table.out
    assert table.err == report.err == ""


# Help and output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_holds_an_example_of_it(name: str) -> None:
    outcome = command.run(name, "--help")
    assert outcome.code == 0
    assert f"dispc {name}" in outcome.out.split("Example:")[1]
    assert name != "demo" or "'dispc[demo]'" in outcome.out  # rich takes brackets for markup


def test_no_help_text_loses_brackets_to_markup() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for parameter in (one for each in commands.values() for one in each.params):
        assert "[" not in (getattr(parameter, "help", None) or ""), parameter.name


def test_every_command_has_been_listed_here_and_in_the_help() -> None:
    outcome = command.run("--help")
    registered = {info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback}
    assert registered == set(COMMANDS)
    assert all(name in outcome.out for name in registered)


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("compile",), ("compile", "model", "--frobnicate")])
def test_a_line_that_cannot_be_parsed_has_code_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    outcome = command.run(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_version_is_that_of_the_package() -> None:
    from dispc import __version__

    assert command.run("--version").out.strip() == __version__


def test_compile_prints_tables_or_json_of_the_same_facts(desk: Desk) -> None:
    arguments = ("compile", desk.model, "-t", "onnx-cpu", "-o", desk.new, "--force")
    table, report = command.run(*arguments), command.run(*arguments, "--json")
    assert (table.code, report.code) == (0, 0), table
    assert table.err == report.err == ""
    manifest = json.loads(report.out)
    assert manifest.pop("output") == str(desk.new)
    assert manifest == json.loads((desk.new / "dispc.json").read_text())
    blocks = manifest["block_parameters"]
    assert f"{blocks['kept']:,} of {blocks['dense']:,}" in table.out
    assert all(record["name"] in table.out for record in manifest["passes"])
    assert "Validation passed" in table.out


def test_the_demo_names_the_ratios_for_which_masks_ship(tmp_path: Path) -> None:
    assert_refused(tmp_path, "demo", "--pruning-ratio", 0.35, says=("0.35", "there are some for", "0.3"))
